"""CLIP towers equal transformers' torch classes: every output, padding and end-of-text handling, both file layouts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained import clip
from gigagan_jax.models.pretrained.hub import INDEX, SINGLE

TOLERANCE = 1e-5
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION = TEXT | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
VOCABULARY = {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}

text_only = {"ours": lambda k: not k.startswith(("vision_model.", "visual_projection.", "logit_scale"))}
vision_only = {"ours": lambda k: not k.startswith(("text_model.", "text_projection."))}


def rows_of_tokens(length, eos, vocab, seed=0):
    """Rows that end early, late, at once, and whose pads are the end token or zeros."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab - 3, (5, length))
    tokens[:, 0] = vocab - 2
    for row, (end, pad) in enumerate([(1, eos), (length - 1, eos), (length // 2, eos), (length // 3, 0), (4, 7)]):
        tokens[row, end] = eos
        tokens[row, end + 1 :] = pad
    return tokens.astype(np.int64)


def read_text(read, folder, prefix="text_model.", projection=True, predicates=None):
    config = clip.read_config(folder)
    width = config.projection_dim
    make = lambda rngs: clip.ClipText(config.text, width if projection else 0, rngs=rngs)
    module, params = read(make, clip.text_rows(prefix, projection=projection), folder, **(predicates or text_only))
    depth = config.text.num_hidden_layers
    return jax.jit(lambda t: module.bind(params)(t, taps=tuple(range(depth + 1)))), config


def read_vision(read, folder):
    config = clip.read_config(folder)
    make = lambda rngs: clip.ClipVision(config.vision, config.projection_dim, rngs=rngs)
    module, params = read(make, clip.vision_rows(), folder, **vision_only)
    depth = config.vision.num_hidden_layers
    return jax.jit(lambda x: module.bind(params)(x, taps=tuple(range(depth + 1)))), config, params


def compare_text(ours, model, tokens, error):
    with torch.no_grad():
        theirs = model.text_model(torch.tensor(tokens), output_hidden_states=True)
        projected = model.text_projection(theirs.pooler_output)
    said = ours(jnp.asarray(tokens, jnp.int32))
    worst = max(error(a, b) for a, b in zip(said.hidden, theirs.hidden_states, strict=True))
    return max(
        worst,
        error(said.last, theirs.last_hidden_state),
        error(said.pooled, theirs.pooler_output),
        error(said.projected, projected),
    )


def compare_vision(ours, model, size, error, n=2):
    images = np.random.default_rng(3).standard_normal((n, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model.vision_model(torch.tensor(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
        projected = model.visual_projection(theirs.pooler_output)
    said = ours(jnp.asarray(images))
    hidden = theirs.hidden_states
    assert len(said.hidden) == len(hidden)
    worst = max(error(a, b) for a, b in zip(said.hidden, hidden, strict=True))
    return max(worst, error(said.pooled, theirs.pooler_output), error(said.projected, projected))


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def tiny_clip(request, tmp_path_factory, save):
    act = {"hidden_act": request.param}
    config = transformers.CLIPConfig(text_config=TEXT | VOCABULARY | act, vision_config=VISION | act, projection_dim=24)
    folder = tmp_path_factory.mktemp("clip")
    return save(transformers.CLIPModel(config), folder), folder


def test_torch_parity_text(tiny_clip, read, error):
    model, folder = tiny_clip
    ours, _ = read_text(read, folder)
    assert compare_text(ours, model, rows_of_tokens(77, 98, 99), error) < TOLERANCE
    # The first of two end tokens counts.
    twice = rows_of_tokens(20, 98, 99)
    twice[1, 5] = 98
    assert compare_text(ours, model, twice, error) < TOLERANCE


def test_torch_parity_vision(tiny_clip, read, error):
    model, folder = tiny_clip
    ours, _, params = read_vision(read, folder)
    assert compare_vision(ours, model, 32, error) < TOLERANCE
    assert float(params["logit_scale"]) == pytest.approx(model.logit_scale.item())


def test_torch_parity_with_the_end_of_text_of_old_configs(tmp_path, save, read, error):
    config = transformers.CLIPConfig(text_config=TEXT | VOCABULARY | {"eos_token_id": 2}, vision_config=VISION)
    model = save(transformers.CLIPModel(config), tmp_path)
    ours, _ = read_text(read, tmp_path)
    tokens = rows_of_tokens(16, 98, 99)  # the highest id ends the text, whatever the config calls it
    assert compare_text(ours, model, tokens, error) < TOLERANCE


def test_torch_parity_of_penultimate_features_without_the_last_block(tiny_clip, read, error):
    model, folder = tiny_clip
    config = clip.read_config(folder)
    make = lambda rngs: clip.ClipText(config.text, config.projection_dim, rngs=rngs)
    module, params = read(make, clip.text_rows(), folder, **text_only)
    tokens = rows_of_tokens(20, 98, 99)
    said = module.bind(params)(jnp.asarray(tokens, jnp.int32), taps=(3,), pool=False)
    with torch.no_grad():
        theirs = model.text_model(torch.tensor(tokens), output_hidden_states=True).hidden_states[-2]
    assert error(said.hidden[0], theirs) < TOLERANCE
    assert said.projected is None


@pytest.mark.parametrize(
    "name", [pytest.param("openai/clip-vit-large-patch14", marks=pytest.mark.slow), "openai/clip-vit-base-patch32"]
)
def test_torch_parity_at_full_width(name, tmp_path, save, read, error):
    """Widths, heads, vocabulary and patches of the published networks, two blocks deep."""
    known = clip.KNOWN[name]
    shallow = {"num_hidden_layers": 2}
    sizes = lambda c: {k: getattr(c, k) for k in c.__dataclass_fields__} | shallow
    config = transformers.CLIPConfig(
        text_config=sizes(known.text), vision_config=sizes(known.vision), projection_dim=known.projection_dim
    )
    model = save(transformers.CLIPModel(config), tmp_path)
    ours, _ = read_text(read, tmp_path)
    assert compare_text(ours, model, rows_of_tokens(77, 49407, 49408), error) < TOLERANCE
    ours, _, _ = read_vision(read, tmp_path)
    assert compare_vision(ours, model, 224, error, n=1) < TOLERANCE


def test_torch_parity_from_shards_and_from_a_text_tower_alone(tmp_path, save, read, error):
    config = transformers.CLIPConfig(text_config=TEXT | VOCABULARY, vision_config=VISION, projection_dim=24)
    folder = tmp_path / "shards"
    model = save(transformers.CLIPModel(config), folder, max_shard_size="60KB")
    assert (folder / INDEX).exists()
    assert not (folder / SINGLE).exists()
    ours, _ = read_text(read, folder)
    tokens = rows_of_tokens(20, 98, 99)
    assert compare_text(ours, model, tokens, error) < TOLERANCE

    for kind, prefix in ((transformers.CLIPTextModel, ""), (transformers.CLIPTextModelWithProjection, "text_model.")):
        folder = tmp_path / kind.__name__
        alone = save(kind(transformers.CLIPTextConfig(**TEXT, **VOCABULARY, projection_dim=24)), folder)
        projection = prefix != ""
        ours, read_back = read_text(read, folder, prefix, projection, {})
        assert read_back.projection_dim == (24 if projection else 0)
        with torch.no_grad():
            theirs = alone(torch.tensor(tokens))
        said = ours(jnp.asarray(tokens, jnp.int32))
        assert error(said.last, theirs.last_hidden_state) < TOLERANCE
        if projection:
            assert error(said.projected, theirs.text_embeds) < TOLERANCE


def test_known_sizes_are_those_of_the_published_models():
    """Parameter counts of the networks, as their authors state them (millions)."""
    stated = {
        "base-patch32": 151,
        "base-patch16": 150,
        "large-patch14": 428,
        "H-14": 986,
        "g-14": 1367,
        "bigG-14": 2540,
    }
    for name, config in clip.KNOWN.items():
        width = config.projection_dim
        text = Network("t", lambda rngs, c=config, w=width: clip.ClipText(c.text, w, rngs=rngs))
        vision = Network("v", lambda rngs, c=config, w=width: clip.ClipVision(c.vision, w, rngs=rngs))
        million = next(v for k, v in stated.items() if k in name)
        assert (text.count() + vision.count()) / 1e6 == pytest.approx(million, rel=0.005), name


def test_preprocess_is_pillows_bicubic_and_clips_normalisation():
    rng = np.random.default_rng(0)
    for side in (16, 64, 300):
        image = rng.random((side, side, 3)).astype(np.float32)
        channels = [
            Image.fromarray(image[..., c], mode=None).resize((224, 224), Image.Resampling.BICUBIC) for c in range(3)
        ]
        expected = (np.stack([np.asarray(c) for c in channels], -1) - np.array(clip.PIXEL_MEAN_STD[0])) / np.array(
            clip.PIXEL_MEAN_STD[1]
        )
        ours = np.asarray(clip.preprocess(jnp.asarray(image)[None] * 2 - 1, 224))[0]
        assert np.abs(ours - expected).max() < 1e-3, side


def test_a_config_of_another_network_is_refused(tmp_path):
    for values, word in (
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "clip", "text_config": {"hidden_size": "wide"}}, "hidden_size"),
        ({"model_type": "clip", "vision_config": {"hidden_size": 10, "num_attention_heads": 3}}, "make no network"),
        ({"model_type": "clip", "text_config": {"hidden_act": "tanh"}}, "hidden_act"),
        ({"model_type": "clip", "text_config": [1]}, "text_config"),
        ({"model_type": "clip", "projection_dim": "24"}, "projection_dim"),
        ({"model_type": "clip", "projection_dim": 0}, "projection_dim=0"),
        ([1], "no JSON object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=word):
            clip.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        clip.read_config(tmp_path)
