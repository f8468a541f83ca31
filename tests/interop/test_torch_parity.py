"""The networks here against `torch_gigagan.py`, written from the paper: outputs, predictions, gradients, the way back."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import imagenet, laion
from gigagan_jax.config import TextConfig, from_dict, to_dict
from gigagan_jax.config.parameter_renames import nest
from gigagan_jax.data.tokenizers import make_tokenizer
from gigagan_jax.interop import torch_gigagan
from gigagan_jax.interop.torch_table import from_torch, to_torch
from gigagan_jax.models.build import build_discriminator, build_generator, build_vision_aided
from gigagan_jax.models.discriminator import prediction_pairs
from gigagan_jax.models.network import path_name
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options
from tests.runs import ROOT

sys.path.append(str(ROOT / "tools"))  # as for a script there

from measure_parity import draw_params

N = 4
FAST = {"xla_backend_optimization_level": 0}


def changed(config, **values):
    """The config with fields replaced, by names such as generator__w_token."""
    for name, value in values.items():
        *groups, last = name.split("__")
        path = [config]
        for group in groups:
            path.append(getattr(path[-1], group))
        new = dataclasses.replace(path[-1], **{last: value})
        for parent, group in zip(path[-2::-1], groups[::-1], strict=True):
            new = dataclasses.replace(parent, **{group: new})
        config = new
    return config


def small(base, **values):
    config = from_dict(base.get_config("tiny"))
    defaults = {"resolution": 16, "dtype": "float32", "remat": False}
    for net in ("generator", "discriminator"):
        blocks = (1, 2, 3) if net == "generator" else (2, 1, 1)
        depth = (0, 2, 2) if net == "generator" else (0, 1, 0)
        defaults |= {f"{net}__blocks": blocks, f"{net}__attention_depth": depth, f"{net}__text__depth": 1}
    return changed(config, **(defaults | {"generator__bank": (1, 2, 4)} | values))


CONFIGS = {
    "text": lambda: small(laion),
    "words": lambda: small(laion, text__encoder="words", text__buckets=16, generator__attention_placement="last"),
    "class": lambda: small(imagenet, discriminator__head="projection", discriminator__class_mapping_depth=2),
    "none": lambda: small(laion, condition="none", generator__attention_placement="every"),
    "plain": lambda: small(
        laion,
        **{f"generator__{name}": False for name in ("w_token", "cross_attention", "mlp_after_self")},
        generator__attention__norm="none",
        generator__attention__kind="dot",
        generator__layer_scale=0.1,
        generator__text__width=24,
        discriminator__multi_scale_input=False,
        discriminator__multi_scale_output=False,
        discriminator__minibatch_std=2,
        discriminator__minibatch_std_equalized=False,
    ),
    "other": lambda: small(
        laion,
        generator__attention__mask_self=True,
        generator__mlp_after_cross=False,
        generator__rgb_gain=0.3,
        generator__attention__dim_multiplier=0.5,
        discriminator__mlp=True,
        discriminator__residual_gain=0.5,
        discriminator__minibatch_std=4,
        discriminator__head="projection",
        discriminator__attention__kind="dot",
    ),
}


def torch_config(config):
    return json.loads(json.dumps(to_dict(config)))


def load(module, network, config, params):
    state = {key: torch.from_numpy(x.copy()) for key, x in to_torch(network, config, params)}
    missing, unknown = module.load_state_dict(state, strict=False)
    assert (set(missing) - {"w_avg"}, unknown) == (set(), [])
    return module


def draw_conditions(config, seed=0):
    """(tokens, labels) of N examples of several lengths, for JAX and for torch."""
    rng = np.random.default_rng(seed)
    if config.condition == "none":
        return None, None
    if config.condition == "class":
        return None, rng.integers(0, config.class_count, N).astype(np.int32)
    top = 259 if config.text.encoder == "bytes" else config.text.buckets**2
    tokens = np.zeros((N, config.text.length), np.int32)
    for row, length in zip(tokens, (0, 3, 7, config.text.length - 2), strict=True):
        row[: length + 2] = (1, *rng.integers(3, top, length), 2)
    return tokens, None


def as_torch(x):
    return None if x is None else torch.from_numpy(np.array(x)).long()


def close(ours, theirs, rtol):
    """By the size of the whole array: single small values are differences of large ones."""
    theirs = np.asarray(theirs.detach())
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=rtol * np.abs(theirs).max())


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


CAPTIONS = (
    "",
    "a cat",
    "Red  APPLE, it's",
    "é" * 60,
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "\ud800 猫",
)


@pytest.mark.parametrize("encoder", ["bytes", "words"])
@pytest.mark.parametrize("length", [3, 8, 21])
def test_tokenize(encoder, length):
    text = TextConfig(encoder=encoder, length=length, buckets=16)
    tokenizer = make_tokenizer(encoder, length, **tokenizer_options(text))
    theirs = torch_gigagan.tokenize(list(CAPTIONS), dataclasses.asdict(text))
    np.testing.assert_array_equal(tokenizer(CAPTIONS), theirs.numpy())


def test_generator(config):
    network = build_generator(config)
    params = draw_params(network, 1)
    theirs = load(torch_gigagan.Generator(torch_config(config)), network, config, params)
    tokens, labels = draw_conditions(config)
    z = np.random.default_rng(2).standard_normal((N, config.generator.z_dim)).astype(np.float32)
    images, _ = jax.jit(lambda p: network.bind(p)(z, tokens, labels), compiler_options=FAST)(params)
    expected = theirs(torch.from_numpy(z), as_torch(tokens), as_torch(labels))
    assert len(images) == len(expected) == 3
    for ours, image in zip(images, expected, strict=True):
        close(np.moveaxis(np.asarray(ours), -1, 1), image, 1e-4)


def test_discriminator_and_its_gradient_by_images(config):
    network = build_discriminator(config)
    params = draw_params(network, 3)
    theirs = load(torch_gigagan.Discriminator(torch_config(config)), network, config, params)
    tokens, labels = draw_conditions(config)
    rng = np.random.default_rng(4)
    levels = 3 if config.discriminator.multi_scale_input else 1
    images = [rng.standard_normal((N, 16 >> i, 16 >> i, 3)).astype(np.float32) for i in range(levels)]
    signs = rng.choice((-1.0, 1.0), len(prediction_pairs(config.discriminator))).astype(np.float32)

    def total(images):
        disc = network.bind(params)
        t = disc.condition(tokens, labels)
        own = disc({"real": images}, t)["real"].own
        return sum(s * x.sum() for s, x in zip(signs, own, strict=True)), own

    (_, own), grads = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=FAST)(
        list(map(jnp.asarray, images))
    )
    inputs = [nchw(x).requires_grad_() for x in images]
    logits = theirs(inputs, theirs.condition(as_torch(tokens), as_torch(labels)))
    assert list(logits) == [tuple(pair) for pair in prediction_pairs(config.discriminator)]
    for ours, expected in zip(own, logits.values(), strict=True):
        close(ours, expected, 1e-4)
    sum(s * x.sum() for s, x in zip(signs.tolist(), logits.values(), strict=True)).backward()
    for ours, x in zip(grads, inputs, strict=True):
        close(np.moveaxis(np.asarray(ours), -1, 1), x.grad, 1e-3)


def test_vision_aided_heads(config):
    network = build_vision_aided(config)
    params = draw_params(network, 5)
    theirs = load(torch_gigagan.VisionAided(torch_config(config)), network, config, params)
    tokens, labels = draw_conditions(config)
    v = config.vision_aided
    rng = np.random.default_rng(6)
    features = [rng.standard_normal((N, 3, 3, v.projection)).astype(np.float32) for _ in v.layers]

    def run(params):
        module = network.bind(params)
        return module(features, module.condition(tokens, labels))

    logits = jax.jit(run, compiler_options=FAST)(params)
    expected = theirs(list(map(nchw, features)), theirs.condition(as_torch(tokens), as_torch(labels)))
    for ours, x in zip(logits, expected, strict=True):
        close(ours, x, 1e-4)


@pytest.mark.parametrize("build", [build_generator, build_discriminator, build_vision_aided])
def test_there_and_back_changes_no_bit(config, build):
    network = build(config)
    params = draw_params(network, 7)
    state = dict(to_torch(network, config, params))
    back = nest(dict(from_torch(network, config, {k: x.shape for k, x in state.items()}, state.__getitem__, "here")))
    ours, again = (jax.tree_util.tree_leaves_with_path(tree) for tree in (params, back))
    assert [path_name(p) for p, _ in ours] == [path_name(p) for p, _ in again]
    for (_, a), (_, b) in zip(ours, again, strict=True):
        np.testing.assert_array_equal(a, b)
