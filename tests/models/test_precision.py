"""What computes in float32 whatever the config's dtype, and that float32 products are exact on every device."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from configs import imagenet
from gigagan_jax.config import AttentionConfig, DiscriminatorConfig, VisionAidedConfig, from_dict
from gigagan_jax.models.build import make_discriminator, make_generator, make_vision_aided
from gigagan_jax.models.discriminator import DiscriminatorLevel, ModulatedHead, ProjectionHead
from gigagan_jax.models.layers.adaptive_conv import AdaptiveConv
from gigagan_jax.models.layers.attention import FeedForward, SelfAttention
from gigagan_jax.models.layers.equalized import Conv, Linear
from gigagan_jax.models.network import Network
from gigagan_jax.models.vision_aided import Head, RandomProjection

N = 4
EXACT = (jax.lax.Precision.HIGHEST,) * 2
HALF = jnp.bfloat16


class Product(NamedTuple):
    """One matrix product or convolution: the narrower type of its operands, its precision, the channels that it joins."""

    dtype: Any
    precision: Any
    inputs: int
    outputs: int


def read_products(function, *args):
    """All products of a function of abstract arguments, those of inner functions included."""
    # Precision is read as the layers ask for it: the tests' own default would hide what they leave open.
    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return list(_walk(jaxpr))


def _walk(jaxpr):
    for e in jaxpr.eqns:
        if e.primitive.name in ("dot_general", "conv_general_dilated"):
            left, right = (v.aval for v in e.invars[:2])
            # The gradient of bfloat16 logits in float32 has one operand of each type.
            narrower = min(left.dtype, right.dtype, key=lambda t: t.itemsize)
            yield Product(narrower, e.params["precision"], *_channels(e, right.shape))
        for inner in core.jaxprs_in_params(e.params):
            yield from _walk(inner)


def _channels(e, kernel):
    numbers = e.params["dimension_numbers"]
    if e.primitive.name == "conv_general_dilated":
        return kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]]
    (_, contracted), (_, batch) = numbers
    free = set(range(len(kernel))) - {*contracted, *batch}
    return math.prod(kernel[i] for i in contracted), math.prod(kernel[i] for i in free)


def forward_and_gradient(make, *shapes):
    """(function, abstract arguments): outputs of a module, and gradients by its parameters and inputs."""
    module = Network("m", make)
    loss = lambda p, *xs: jax.tree.reduce(
        jnp.add, [y.astype(jnp.float32).sum() for y in jax.tree.leaves(module.bind(p)(*xs))]
    )
    args = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes]
    return jax.value_and_grad(loss, tuple(range(1 + len(args)))), (module.abstract(), *args)


# ---------------------------------------------------------------- layers

LAYERS = {
    "linear": (lambda **kw: Linear(6, 5, axes=(None, None), **kw), (N, 6)),
    "conv 1x1": (lambda **kw: Conv(6, 5, kernel=1, **kw), (N, 4, 4, 6)),
    "conv 3x3": (lambda **kw: Conv(6, 5, kernel=3, **kw), (N, 4, 4, 6)),
    "conv 3x3 down": (lambda **kw: Conv(6, 5, kernel=3, down=True, **kw), (N, 4, 4, 6)),
    "attention": (lambda **kw: SelfAttention(6, AttentionConfig(heads=2, head_dim=4), **kw), (N, 7, 6)),
    "feed-forward": (lambda **kw: FeedForward(6, 2.0, "rms", **kw), (N, 7, 6)),
} | {
    f"adaptive, {form}": (
        lambda form=form, **kw: AdaptiveConv(6, 5, w_dim=8, bank=4, form=form, **kw),
        (N, 4, 4, 6),
        (N, 8),
    )
    for form in ("bank", "shift", "im2col", "vmap")
}


@pytest.mark.parametrize("name", LAYERS)
def test_products_in_float32_are_exact_and_those_in_bfloat16_are_not_slowed(name):
    make, *shapes = LAYERS[name]
    for dtype in (jnp.float32, HALF):
        products = read_products(*_flat(forward_and_gradient(lambda rngs, t=dtype: make(dtype=t, rngs=rngs), *shapes)))
        # The forward product and both of its gradients.
        assert len(products) >= 3
        own = [p for p in products if p.dtype == dtype]
        assert own
        for p in products:
            assert (p.precision == EXACT) == (p.dtype == jnp.float32), p


def _flat(made):
    function, args = made
    return function, *args


def test_fixed_projections_are_exact_in_float32():
    make = lambda rngs: RandomProjection(6, 5, 1, rngs=rngs)
    module = Network("m", make)
    for dtype in (jnp.float32, HALF):
        features = jax.ShapeDtypeStruct((N, 4, 4, 6), dtype)
        (product,) = read_products(lambda p, x: module.bind(p)([x]), module.abstract(), features)
        assert (product.dtype, product.precision == EXACT) == (dtype, dtype == jnp.float32)


# ---------------------------------------------------------------- networks


def case(name, config):
    """(function, abstract arguments, products that join RGB or give a logit) of a network's forward pass."""
    text = config.condition == "text"
    tokens = jax.ShapeDtypeStruct((N, config.text.length), jnp.int32) if text else None
    labels = None if text else jax.ShapeDtypeStruct((N,), jnp.int32)
    if name == "generator":
        g = Network("g", lambda rngs: make_generator(config, rngs))
        z = jax.ShapeDtypeStruct((N, config.generator.z_dim), jnp.float32)
        return lambda p, *a: g.bind(p)(*a)[0], (g.abstract(), z, tokens, labels), len(config.generator.blocks)
    if name == "vision":
        v = Network("v", lambda rngs: make_vision_aided(config, rngs))
        c = config.vision_aided
        features = [jax.ShapeDtypeStruct((N, 4, 4, c.projection), config.dtype) for _ in c.layers]

        def judge(p, x, *caption):
            heads = v.bind(p)
            return heads(x, heads.condition(*caption))

        return judge, (v.abstract(), features, tokens, labels), 2 * len(c.layers)
    d = Network("d", lambda rngs: make_discriminator(config, rngs))
    c = config.discriminator
    levels = len(c.blocks)
    entries, exits = (levels if on else 1 for on in (c.multi_scale_input, c.multi_scale_output))
    images = [jax.ShapeDtypeStruct((N, 4 << i, 4 << i, 3), jnp.float32) for i in reversed(range(levels))][:entries]

    def judge_images(p, x, *caption):
        disc = d.bind(p)
        return [logits.own for logits in disc({"real": x}, disc.condition(*caption)).values()]

    # A projection head has one layer that gives a logit; its other product is by the caption.
    by_head = 2 if c.head == "modulated" else 1
    return judge_images, (d.abstract(), images, tokens, labels), entries + by_head * exits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["generator", "discriminator", "vision", "classes"])
def test_images_and_logits_never_pass_a_product_in_bfloat16(tiny, name, dtype):
    config = from_dict(imagenet.get_config("tiny")) if name == "classes" else tiny
    function, args, expected = case(name, dataclasses.replace(config, dtype=dtype))
    products = read_products(function, *args)
    # Mapping network, affines, conditions: what is float32 is so on every device.
    assert all(p.precision == EXACT for p in products if p.dtype == jnp.float32)
    edges = [p for p in products if p.inputs == 3 or p.outputs in (1, 3)]
    assert len(edges) >= expected
    assert {p.dtype for p in edges} == {np.dtype("float32")}
    # The trunk is in the config's type all the same.
    assert any(p.dtype == dtype and p.inputs > 3 and p.outputs > 3 for p in products)
    for out in jax.tree.leaves(jax.eval_shape(function, *args)):
        assert out.dtype == jnp.float32


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def share_of_bfloat16(x):
    """Share of the values that bfloat16 holds without rounding."""
    x = np.asarray(x, np.float32)
    assert x.std() > 0
    return np.mean(x == x.astype(HALF).astype(np.float32))


@pytest.mark.parametrize("head", [ModulatedHead, ProjectionHead, Head])
def test_logits_are_not_rounded_to_bfloat16(build, head):
    settings = {"head_width": 8, "head_depth": 2}
    x, t = jnp.asarray(normal(0, N, 2, 5, 5, 6), HALF), normal(1, N, 1, 7)
    if head is Head:
        x, t = x[:, 0], t[:, 0]
        make = lambda rngs: Head(VisionAidedConfig(projection=6, **settings), 7, dtype=HALF, rngs=rngs)
    else:
        make = lambda rngs: head(DiscriminatorConfig(**settings), 6, 7, dtype=HALF, rngs=rngs)
    module, params = build(make)
    f = jax.jit(lambda p, x, t: module.bind(p)(x, t))
    # Each of the two predictions alone: a sum of two rounded ones is not round.
    for silent in ("unconditional", "embed" if head is ProjectionHead else "layers"):
        assert share_of_bfloat16(f(params | {silent: jax.tree.map(jnp.zeros_like, params[silent])}, x, t)) < 0.05


@pytest.fixture(scope="module")
def trunk(tiny):
    """D of two levels without a condition, in bfloat16."""
    d = dataclasses.replace(tiny.discriminator, blocks=(1, 1), attention_depth=(1, 0))
    return dataclasses.replace(tiny, resolution=8, condition="none", remat=False, dtype="bfloat16", discriminator=d)


@pytest.fixture(scope="module")
def judge(build):
    """judge(config, images [(N, r, r, 3)]) -> logits"""

    def run(config, images):
        module, params = build(lambda rngs: make_discriminator(config, rngs))
        return [
            np.asarray(x) for x in jax.jit(lambda p, x: module.bind(p)({"real": x}, None)["real"].own)(params, images)
        ]

    return run


def test_a_step_that_bfloat16_does_not_hold_changes_the_logits(trunk, judge):
    # Multiples of 1/64 in [1/2, 1): 1/1024 more is rounded away, as bfloat16 has steps of 1/256 there.
    images = [np.floor(32 * np.random.default_rng(r).random((N, r, r, 3))) / 64 + 0.5 for r in (8, 4)]
    images = [x.astype(np.float32) for x in images]
    moved = [x + np.float32(1 / 1024) for x in images]
    for x, y in zip(images, moved, strict=True):
        np.testing.assert_array_equal(x.astype(HALF), y.astype(HALF))
    for before, after in zip(judge(trunk, images), judge(trunk, moved), strict=True):
        assert (before != after).any(axis=-1).all()


# ---------------------------------------------------------------- D's lowest stages


@pytest.mark.parametrize("limit", [0, 4, 8])
def test_levels_up_to_the_chosen_resolution_are_float32(tiny, limit):
    d = dataclasses.replace(tiny.discriminator, blocks=(2, 2, 2), attention_depth=(1, 1, 1), float32_resolution=limit)
    x = None
    for i, resolution in enumerate((16, 8, 4)):
        level = Network("l", lambda rngs, i=i: DiscriminatorLevel(d, i, 7, remat=True, dtype=HALF, rngs=rngs))
        image, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, 2, resolution, resolution, 3), (N, 1, 7)))
        function = lambda p, *a, level=level: level.bind(p)(*a)
        products = read_products(function, level.abstract(), x, image, t)
        inner = {p.dtype for p in products if p.inputs > 3 and p.outputs > 3}
        x, logits = jax.eval_shape(function, level.abstract(), x, image, t)
        assert logits.dtype == jnp.float32
        if resolution <= limit:
            assert (x.dtype, inner) == (jnp.float32, {np.dtype("float32")})
        else:
            assert x.dtype == HALF
            assert np.dtype(HALF) in inner


def test_with_all_levels_in_float32_d_is_that_of_a_float32_config(trunk, judge):
    images = [normal(r, N, r, r, 3) for r in (8, 4)]
    limited = lambda limit: dataclasses.replace(
        trunk, discriminator=dataclasses.replace(trunk.discriminator, float32_resolution=limit)
    )
    want = judge(dataclasses.replace(trunk, dtype="float32"), images)
    for a, b in zip(judge(limited(8), images), want, strict=True):
        np.testing.assert_array_equal(a, b)
    # The logits of exit 1 of the 4 px image never saw a level in bfloat16; those of the 8 px image did.
    got = judge(limited(4), images)
    np.testing.assert_array_equal(got[-1], want[-1])
    assert all((a != b).any() for a, b in zip(got[:-1], want[:-1], strict=True))
