"""The T5 encoder against transformers' torch classes, from files that transformers wrote."""

import copy
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained import hub, t5, weights
from gigagan_jax.parallel import sharding

# Heads times their width is not the channels; most of LENGTH is farther than the last bucket begins.
TINY = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
LENGTH = 45
TOLERANCE = 1e-5


def load(read, folder, **options):
    """(Module, parameters) of a folder, through the production table."""
    config, keys = t5.read_config(folder), weights.Weights(folder).keys()
    make = lambda rngs: t5.T5Encoder(config, rngs=rngs, **options)
    return read(make, t5.t5_rows(keys, config), folder, ours=t5.is_encoder, ignore=t5.duplicate_embedding_filter(keys))


def forward(module, params, tokens, mask):
    return jax.jit(lambda p, t, m: module.bind(p)(t, m))(params, tokens, mask)


def captions(vocab=TINY["vocab_size"], length=LENGTH):
    """Tokens and mask of a full row, a short one and one token."""
    tokens = np.random.default_rng(0).integers(2, vocab, (3, length), np.int32)
    mask = np.arange(length) < np.array([[length], [length // 3], [1]])
    return np.where(mask, tokens, 0).astype(np.int32), mask


def torch_forward(model, tokens, mask):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids, seen = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
        return model.get_encoder()(input_ids=ids, attention_mask=seen).last_hidden_state


def far(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def gated(tmp_path_factory, save):
    """(folder, torch model) of a gated T5EncoderModel"""
    folder = tmp_path_factory.mktemp("gated")
    config = transformers.T5Config(**TINY, feed_forward_proj="gated-gelu")
    return folder, save(transformers.T5EncoderModel(config), folder)


@pytest.fixture(scope="module")
def ours(gated, read):
    """(Module, parameters, output) of it"""
    module, params = load(read, gated[0])
    return module, params, forward(module, params, *captions())


def test_gated_gelu_parity(gated, ours, error):
    e = error(ours[2], torch_forward(gated[1], *captions()))
    assert e <= TOLERANCE, e


def test_relu_of_the_whole_model_parity(tmp_path, save, read, error):
    config = transformers.T5Config(**TINY, feed_forward_proj="relu")
    model = save(transformers.T5ForConditionalGeneration(config), tmp_path)
    keys = weights.Weights(tmp_path).keys()
    assert not all(t5.is_encoder(k) for k in keys)
    e = error(forward(*load(read, tmp_path), *captions()), torch_forward(model, *captions()))
    assert e <= TOLERANCE, e


def test_mt5_parity(tmp_path, save, read, error):
    config = transformers.MT5Config(**TINY, feed_forward_proj="gated-gelu")
    model = save(transformers.MT5EncoderModel(config), tmp_path)
    assert json.loads((tmp_path / hub.CONFIG).read_text())["model_type"] == "mt5"
    text = captions(length=9)
    e = error(forward(*load(read, tmp_path), *text), torch_forward(model, *text))
    assert e <= TOLERANCE, e


def test_full_width_block_parity(tmp_path, save, read, error):
    base = t5.KNOWN["google/t5-v1_1-base"]
    sizes = {n: getattr(base, n) for n in ("d_model", "d_kv", "d_ff", "num_heads", "feed_forward_proj")}
    model = save(transformers.T5EncoderModel(transformers.T5Config(**sizes, vocab_size=128, num_layers=1)), tmp_path)
    text = captions(128, 77)
    e = error(forward(*load(read, tmp_path), *text), torch_forward(model, *text))
    assert e <= TOLERANCE, e


@pytest.mark.parametrize("count, max_distance", [(32, 128), (32, 256), (8, 12), (6, 20), (4, 3)])
def test_buckets_torch(count, max_distance):
    places = np.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(places), True, count, max_distance)
    mine = t5.relative_position_buckets(places, count, max_distance)
    np.testing.assert_array_equal(mine, theirs.numpy())
    assert (mine.min(), mine.max()) == (0, count - 1)


def test_padding_is_not_looked_at(ours):
    module, params, out = ours
    tokens, mask = captions()
    changed = np.where(mask, tokens, 7).astype(np.int32)
    seen = lambda x: np.asarray(x)[mask]
    np.testing.assert_array_equal(seen(forward(module, params, changed, mask)), seen(out))
    everywhere = forward(module, params, changed, np.ones_like(mask))
    assert far(seen(everywhere), seen(out)) > 1e-2


def test_bfloat16_torch(gated, ours):
    """No farther from float32 than transformers' own bfloat16, with recomputed blocks."""
    tokens, mask = captions()
    config = t5.read_config(gated[0])
    module = Network("t5", lambda rngs: t5.T5Encoder(config, dtype=jnp.bfloat16, remat=True, rngs=rngs))
    out = forward(module, jax.tree.map(lambda p: p.astype(jnp.bfloat16), ours[1]), tokens, mask)
    assert out.dtype == jnp.bfloat16
    theirs = torch_forward(copy.deepcopy(gated[1]).bfloat16(), tokens, mask).float().numpy()
    rms = lambda x: np.sqrt(np.square(np.asarray(x, np.float32) - np.asarray(ours[2])).mean())
    assert rms(out) <= rms(theirs)


def test_sharding_gives_the_same(ours):
    module, params, out = ours
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = jax.device_put(params, module.shardings(mesh, DEFAULT_RULES))
    kernel = params["encoder"]["blocks"]["layer"]["up"]["weight"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32 // 4, 40 // 2)
    assert far(forward(module, params, *captions()), out) <= TOLERANCE


# ---------------------------------------------------------------- files


def rewritten(folder, out, change):
    """The folder's weights with `change` applied to the dict of tensors."""
    out.mkdir()
    tensors = dict(load_file(folder / hub.SINGLE))
    change(tensors)
    save_file(tensors, out / hub.SINGLE)
    (out / hub.CONFIG).write_text((folder / hub.CONFIG).read_text())
    return out


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",), None])
def test_embedding_by_either_name_or_both(gated, ours, tmp_path, read, names):
    names = names or ("shared.weight", "encoder.embed_tokens.weight")

    def change(tensors):
        held = [tensors.pop(n) for n in ("shared.weight", "encoder.embed_tokens.weight") if n in tensors]
        tensors.update({n: held[0].copy() for n in names})

    _, params = load(read, rewritten(gated[0], tmp_path / "x", change))
    jax.tree.map(np.testing.assert_array_equal, params, ours[1])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("encoder.block.2.layer.1.DenseReluDense.wo.weight"), "wo.weight\\) missing"),
        (lambda t: t.pop("shared.weight"), "embed_tokens.weight\\) missing"),
        # UMT5: a bias for every block
        (
            lambda t: t.update(
                {
                    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": t[
                        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
                    ]
                }
            ),
            "relative_attention_bias.weight\\) left over",
        ),
    ],
)
def test_other_tensors_are_an_error(gated, tmp_path, read, change, said):
    folder = rewritten(gated[0], tmp_path / "x", change)
    with pytest.raises(UserError, match=said) as e:
        load(read, folder)
    assert "\n" not in str(e.value)


def test_config_is_read(gated):
    config = t5.read_config(gated[0])
    assert {n: getattr(config, n) for n in TINY} == TINY
    assert (config.feed_forward_proj, config.pad_token_id, config.eos_token_id) == ("gated-gelu", 0, 1)
    assert config.layer_norm_epsilon == 1e-6


def test_config_of_v1_0_leaves_things_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 512, "n_positions": 512}))
    assert t5.read_config(tmp_path) == t5.KNOWN["google-t5/t5-small"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mt5"}))
    theirs = transformers.MT5Config()
    config = t5.read_config(tmp_path)
    names = [n for n in vars(config) if n != "layer_norm_epsilon"]
    assert {n: getattr(config, n) for n in names} == {n: getattr(theirs, n) for n in names}


@pytest.mark.parametrize(
    "proj, dense, is_gated", [("relu", "relu", False), ("gated-gelu", "gelu_new", True), ("gated-silu", "silu", True)]
)
def test_feed_forward_is_what_transformers_makes_of_it(proj, dense, is_gated):
    theirs = transformers.T5Config(feed_forward_proj=proj)
    assert (theirs.dense_act_fn, theirs.is_gated_act) == (dense, is_gated)
    mine = t5.T5Config(feed_forward_proj=proj)
    assert (mine.activation, mine.gated) == (dense, is_gated)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"model_type": "umt5"}, "model_type='umt5' is no T5"),
        ({"model_type": None}, "is no T5"),
        ({"d_model": "512"}, "d_model='512' is not int"),
        ({"eos_token_id": None}, "eos_token_id=None is not int"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon=True is not float"),
        ({"feed_forward_proj": "gated-swiglu"}, "feed_forward_proj='gated-swiglu'; known: quick_gelu"),
        ({"feed_forward_proj": "gelu", "is_gated_act": True}, "contradicts is_gated_act=True"),
        ({"num_heads": 0}, "sizes that make no network: .*num_heads=0"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets=2"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance=8"),
    ],
)
def test_config_errors(tmp_path, values, said):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"} | values))
    with pytest.raises(UserError, match=said) as e:
        t5.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, count",
    [
        ("google-t5/t5-small", 35_330_816),
        ("google-t5/t5-base", 109_628_544),
        ("google-t5/t5-large", 334_939_648),
        ("google/t5-v1_1-small", 35_332_800),
        ("google/t5-v1_1-base", 109_628_544),
        ("google/flan-t5-large", 341_231_104),
        ("google/flan-t5-xl", 1_223_527_424),
        ("google/t5-v1_1-xxl", 4_762_310_656),
    ],
)
def test_known_sizes(name, count):
    """Parameters of the published encoders; they divide over a large mesh."""
    module = Network(name, lambda rngs: t5.T5Encoder(t5.KNOWN[name], rngs=rngs))
    assert module.count() == count
    mesh = sharding.abstract_mesh(MeshConfig(data=1, fsdp=64, tensor=8), 512)
    token = module.shardings(mesh, DEFAULT_RULES)["token"]
    assert math.prod(token.shard_shape((32128, t5.KNOWN[name].d_model))) * 64 == 32128 * t5.KNOWN[name].d_model
