"""DINO's vision transformer against transformers' torch class, from files that transformers wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained import dino, hub
from gigagan_jax.models.pretrained.weights import Weights

TINY = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
}
TOLERANCE = 1e-5


def torch_forward(model, pixels):
    """(what comes into the first block and out of every block, after the final norm), [N, T, D] each"""
    seen = []
    keep = lambda _module, _args, out: seen.append(out)
    hooks = [m.register_forward_hook(keep) for m in (model.embeddings, *model.layers)]
    last = model(pixel_values=pixels.permute(0, 3, 1, 2)).last_hidden_state
    for hook in hooks:
        hook.remove()
    return seen, last


def load(read, folder):
    """(Module, parameters) of a folder, through the production table."""
    config = dino.read_config(folder)
    table = dino.dino_rows(Weights(folder).keys(), config)
    return read(lambda rngs: dino.Dino(config, rngs=rngs), table, folder, ignore=dino.is_ignored)


def images(size):
    return np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, save):
    """(folder, torch model)"""
    folder = tmp_path_factory.mktemp("dino")
    return folder, save(transformers.ViTModel(transformers.ViTConfig(**TINY), add_pooling_layer=False), folder)


@pytest.fixture(scope="module")
def loaded(tiny, read):
    """(Module, parameters)"""
    return load(read, tiny[0])


def worst_of_all_blocks(module, params, model, error):
    depth, x = model.config.num_hidden_layers, images(model.config.image_size)
    out = jax.jit(lambda p, x: module.bind(p)(x, taps=range(depth + 1)))(params, x)
    with torch.no_grad():
        hidden, last = torch_forward(model, torch.from_numpy(x))
    assert len(hidden) == depth + 1
    return max(error(a, b) for a, b in zip([*out.hidden, out.last], [*hidden, last], strict=True))


def test_all_blocks_parity(tiny, loaded, error):
    e = worst_of_all_blocks(*loaded, tiny[1], error)
    assert e <= TOLERANCE, e


def test_full_width_two_blocks_parity(tmp_path, save, read, error):
    sizes = vars(dino.KNOWN["facebook/dino-vits16"]) | {"num_hidden_layers": 2}
    model = save(transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False), tmp_path)
    e = worst_of_all_blocks(*load(read, tmp_path), model, error)
    assert e <= TOLERANCE, e


def test_gradient_by_the_images_parity(tiny, loaded, error):
    """What G learns from: through two taps, with blocks recomputed; in bfloat16 it is near."""
    config = dino.read_config(tiny[0])
    x = images(config.image_size)
    weights = np.random.default_rng(1).standard_normal((2, 26, config.hidden_size), np.float32)

    def gradient(dtype):
        module = Network("dino", lambda rngs: dino.Dino(config, dtype=dtype, remat=True, rngs=rngs))

        def loss(x, p):
            out = module.bind(p)(x, taps=(1, 2), pool=False)
            assert out.last is None
            return sum(jnp.sum(h.astype(jnp.float32) * weights) for h in out.hidden)

        return jax.jit(jax.grad(loss))(x, loaded[1])

    pixels = torch.from_numpy(x).requires_grad_()
    hidden, _ = torch_forward(tiny[1], pixels)
    ((hidden[1] + hidden[2]) * torch.from_numpy(weights)).sum().backward()
    e = error(gradient(jnp.float32), pixels.grad)
    assert e <= TOLERANCE, e
    assert error(gradient(jnp.bfloat16), pixels.grad) < 5e-2


def test_preprocess_at_the_same_size():
    x = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    expected = ((x + 1) / 2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(dino.preprocess(jnp.asarray(x), 8), expected, atol=TOLERANCE)


@pytest.mark.parametrize("size, to", [(12, 20), (40, 24)])
def test_preprocess_resizes_as_torch(size, to, error):
    x = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    options = {"size": (to, to), "mode": "bicubic", "antialias": True}
    resized = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2) / 2 + 0.5, **options)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    e = error(dino.preprocess(jnp.asarray(x), to), (resized.permute(0, 2, 3, 1) - mean) / std)
    assert e <= TOLERANCE, e


def test_other_image_size_is_an_error(loaded):
    module, params = loaded
    with pytest.raises(ValueError, match="this tower sees 20 px"):
        jax.eval_shape(lambda p, x: module.bind(p)(x), params, jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32))


# ---------------------------------------------------------------- files


def same(read, folder, loaded):
    jax.tree.map(np.testing.assert_array_equal, load(read, folder)[1], loaded[1])


def rewritten(folder, out, change):
    """The folder with another dict of tensors."""
    out.mkdir()
    save_file(change(dict(load_file(folder / hub.SINGLE))), out / hub.SINGLE)
    (out / hub.CONFIG).write_text((folder / hub.CONFIG).read_text())
    return out


def test_names_inside_transformers(tiny, loaded, tmp_path, read, save):
    save(tiny[1], tmp_path, save_original_format=False)  # the same weights again
    inside, stored = Weights(tmp_path).keys(), Weights(tiny[0]).keys()
    assert "layers.0.attention.q_proj.weight" in inside
    assert "encoder.layer.0.attention.attention.query.weight" in stored
    same(read, tmp_path, loaded)


def test_prefix(tiny, loaded, tmp_path, read):
    same(read, rewritten(tiny[0], tmp_path / "x", lambda t: {f"vit.{k}": v for k, v in t.items()}), loaded)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_pooler_is_ignored(tiny, loaded, tmp_path, read, prefix):
    pooler = {"pooler.dense.weight": np.zeros((24, 24), np.float32), "pooler.dense.bias": np.zeros(24, np.float32)}
    folder = rewritten(tiny[0], tmp_path / "x", lambda t: {f"{prefix}{k}": v for k, v in (t | pooler).items()})
    same(read, folder, loaded)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {k: v for k, v in t.items() if k != "layernorm.bias"}, "\\(layernorm.bias\\) missing"),
        # A supervised classifier is a "vit" too, and expects other images.
        (lambda t: t | {"classifier.weight": np.zeros((3, 24), np.float32)}, "\\(classifier.weight\\) left over"),
        (
            lambda t: t | {"embeddings.position_embeddings": np.zeros((1, 50, 24), np.float32)},
            "position_embeddings has shape \\(1, 50, 24\\)",
        ),
    ],
)
def test_other_tensors_are_an_error(tiny, tmp_path, read, change, said):
    folder = rewritten(tiny[0], tmp_path / "x", change)
    with pytest.raises(UserError, match=said) as e:
        load(read, folder)
    assert "\n" not in str(e.value)


def test_config_is_read(tiny):
    config = dino.read_config(tiny[0])
    assert vars(config) == TINY | {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


@pytest.mark.parametrize(
    "values, said",
    [
        ({"model_type": "dinov2"}, "model_type='dinov2' is no DINO"),
        ({"hidden_size": 384.0}, "hidden_size=384.0 is not int"),
        ({"image_size": [224, 224]}, "image_size=\\[224, 224\\] is not int"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh'; known: quick_gelu"),
        ({"qkv_bias": False}, "qkv_bias=False: a DINO has qkv_bias=True"),
        ({"num_channels": 1}, "num_channels=1: a DINO has num_channels=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": 7}, "sizes that make no network: .*num_attention_heads=7"),
        ({"patch_size": 15}, "image_size=224 is no multiple of patch_size=15"),
    ],
)
def test_config_errors(tmp_path, values, said):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"} | values))
    with pytest.raises(UserError, match=said) as e:
        dino.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, count",
    [
        ("facebook/dino-vits16", 21_665_664),
        ("facebook/dino-vits8", 21_670_272),
        ("facebook/dino-vitb16", 85_798_656),
        ("facebook/dino-vitb8", 85_807_872),
    ],
)
def test_known_sizes(name, count):
    """Parameters of the published towers."""
    assert Network(name, lambda rngs: dino.Dino(dino.KNOWN[name], rngs=rngs)).count() == count
