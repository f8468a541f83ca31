"""Where the attention layers of a resolution are: the order of application, and that it is all that a placement changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import scale
from gigagan_jax.config import DEFAULT_RULES, MeshConfig, from_dict
from gigagan_jax.models import generator
from gigagan_jax.models.build import build_discriminator, build_generator
from gigagan_jax.models.conditioning import Condition
from gigagan_jax.models.generator import AttentionLayer, SynthesisBlock, SynthesisLevel
from gigagan_jax.models.network import Network
from gigagan_jax.parallel import sharding

# (blocks B, attention layers d) of a resolution -> blocks behind which they are: ceil(k B / d).
PLACES = {
    (3, 2): (2, 3),
    (2, 1): (2,),
    (2, 2): (1, 2),
    (1, 4): (1, 1, 1, 1),
    (7, 5): (2, 3, 5, 6, 7),
    (5, 2): (3, 5),
    (2, 4): (1, 1, 2, 2),
    (3, 0): (),
}
WIDTH, CONTEXT = 4, 8
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time


def settings(config, blocks, depth, placement):
    """G's settings, with so many blocks and attention layers at 8 px."""
    attention = dataclasses.replace(config.generator.attention, heads=1, head_dim=4)
    return dataclasses.replace(
        config.generator,
        blocks=(1, blocks),
        bank=(1, 1),
        attention_depth=(0, depth),
        attention_placement=placement,
        channel_base=8 * WIDTH,
        channel_max=WIDTH,
        w_dim=WIDTH,
        attention=attention,
    )


def make_level(build, g, remat=False):
    """(Network, parameters) of the level of 8 px."""
    return build(lambda rngs: SynthesisLevel(g, 1, 4, WIDTH, CONTEXT, remat=remat, dtype=jnp.float32, rngs=rngs))


@pytest.mark.parametrize("size", PLACES, ids=str)
def test_the_kth_layer_is_behind_its_share_of_the_blocks(size):
    assert generator.spread_attention(*size) == PLACES[size]


@pytest.mark.parametrize("size", [s for s in PLACES if s[1]], ids=str)
def test_segments_take_every_layer_once(size):
    segments = generator.group_segments(PLACES[size])
    blocks, depth = (sum(s.repeats * s.counts[i] for s in segments) for i in (0, 1))
    assert (blocks, depth) == (size[0] - 1, size[1])


def test_segments_are_few():
    segments = lambda size: [tuple(s) for s in generator.group_segments(PLACES[size])]
    assert segments((3, 2)) == [(2, (1, 1))]
    assert segments((5, 2)) == [(2, (2, 1))]
    assert segments((2, 2)) == [(1, (0, 1)), (1, (1, 1))]
    assert segments((2, 4)) == [(1, (0, 2)), (1, (1, 2))]
    assert segments((7, 5)) == [(2, (1, 1)), (1, (2, 1)), (2, (1, 1))]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("placement", ["spread", "last"])
@pytest.mark.parametrize("size", PLACES, ids=str)
def test_order_of_application(monkeypatch, build, tiny, size, placement, platform):
    """Every layer writes its number on a tape: unrolled, and as loops."""
    blocks, depth = size
    module, params = make_level(build, settings(tiny, blocks, depth, placement))
    number = lambda start, count: jnp.broadcast_to(
        start + jnp.arange(count, dtype=jnp.float32)[:, None], (count, WIDTH)
    )
    params["entry"]["conv1"]["bias"] = number(1, 1)[0]
    if blocks > 1:
        params["blocks"]["layer"]["conv1"]["bias"] = number(2, blocks - 1)
    if depth:
        params["attention"]["layer"]["attention"]["out"]["bias"] = number(101, depth)
    write = lambda tape, bias: jnp.concatenate([tape[1:], bias[...][:1]])
    monkeypatch.setattr(SynthesisBlock, "__call__", lambda self, x, *_: write(x, self.conv1.bias))
    monkeypatch.setattr(AttentionLayer, "__call__", lambda self, x, *_: write(x, self.attention.out.bias))
    monkeypatch.setattr(generator.AdaptiveConv, "__call__", lambda self, x, w: jnp.zeros((1, 8, 8, 3)))
    monkeypatch.setattr(sharding, "mesh_platform", lambda: platform)
    tape, _ = module.bind(params)(jnp.zeros(blocks + depth), None, None, Condition(None))

    want = []
    places = PLACES[size] if placement == "spread" else (blocks,) * depth
    for block in range(1, blocks + 1):
        want += [block, *(101 + k for k, place in enumerate(places) if place == block)]
    np.testing.assert_array_equal(tape, want)


@pytest.mark.parametrize("platform, remat", [("cpu", False), ("tpu", True)])
def test_level_is_the_loop_over_its_layers_with_the_same_gradients(monkeypatch, build, tiny, platform, remat):
    """Five blocks and two attention layers: a loop in a loop on a TPU."""
    blocks, depth = 5, 2
    # Without feed-forwards: half the time of compiling.
    g = dataclasses.replace(settings(tiny, blocks, depth, "spread"), mlp_after_self=False, mlp_after_cross=False)
    module, params = make_level(build, g, remat)
    block, _ = build(lambda rngs: SynthesisBlock(g, WIDTH, WIDTH, bank=1, up=False, dtype=jnp.float32, rngs=rngs))
    layer, _ = build(lambda rngs: AttentionLayer(g, WIDTH, CONTEXT, dtype=jnp.float32, rngs=rngs))
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    x, w, local, mask = normal(2, 4, 4, WIDTH), normal(2, WIDTH), normal(2, 3, CONTEXT), np.ones((2, 3), bool)

    def looped(p, x, w, local):
        at = lambda stack, k: jax.tree.map(lambda v: v[k], p[stack]["layer"])
        x = module.bind(p).entry(x, w, local, mask)
        for i in range(2, blocks + 1):
            x = block.bind(at("blocks", i - 2))(x, w, local, mask)
            for k, place in enumerate(PLACES[blocks, depth]):
                if place == i:
                    x = layer.bind(at("attention", k))(x, w, local, mask)
        return x

    def scanned(p, x, w, local):
        return module.bind(p)(x, None, w, Condition(None, local, mask))[0]

    def measure(f):
        loss = lambda *a: jnp.sin(f(*a)).sum()
        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
        return jax.jit(gradient, compiler_options=QUICK)(params, x, w, local)

    monkeypatch.setattr(sharding, "mesh_platform", lambda: "cpu")
    want = measure(looped)
    monkeypatch.setattr(sharding, "mesh_platform", lambda: platform)
    got = measure(scanned)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    if platform == "tpu":
        text = str(jax.make_jaxpr(scanned)(params, x, w, local))
        # One over the two segments, and one in it over the two blocks of each.
        assert text.count(" scan[") == 2


def test_gradients_of_spread_layers_do_not_depend_on_the_mesh_sharding(tiny):
    """Two blocks and two attention layers in turn, cut over data, fsdp and tensor."""
    g = dataclasses.replace(settings(tiny, 2, 2, "spread"), mlp_after_self=False, mlp_after_cross=False)
    make = lambda rngs: SynthesisLevel(g, 1, 4, WIDTH, CONTEXT, remat=True, dtype=jnp.float32, rngs=rngs)
    module = Network("level", make)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    inputs = normal(8, 4, 4, WIDTH), normal(8, WIDTH), normal(8, 3, CONTEXT)

    def measure(config, devices):
        mesh = sharding.make_mesh(config, jax.devices()[:devices])
        params = module.init(0, module.shardings(mesh, DEFAULT_RULES))

        def loss(p, x, w, local):
            with sharding.use_mesh(mesh, DEFAULT_RULES):
                out, _ = module.bind(p)(x, None, w, Condition(None, local, jnp.ones((8, 3), bool)))
            return jnp.sin(out).sum()

        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("fsdp", "data")))
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params, *jax.device_put(inputs, rows))

    one, many = measure(MeshConfig(), 1), measure(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), one, many)
    cut = many["blocks"]["layer"]["conv1"]["filters"], many["attention"]["layer"]["cross"]["out"]["weight"]
    assert not any(x.sharding.is_fully_replicated for x in cut)


def trace(build, g):
    """The program of a level, as text."""
    module, params = make_level(build, g)
    x = jnp.zeros((1, 4, 4, WIDTH))
    context = Condition(None, jnp.zeros((1, 3, CONTEXT)), jnp.ones((1, 3), bool))
    return str(jax.make_jaxpr(lambda p: module.bind(p)(x, None, jnp.zeros((1, WIDTH)), context))(params))


@pytest.mark.parametrize("size, same", [((1, 2), True), ((3, 1), True), ((3, 2), False)], ids=str)
def test_placements_are_one_program_where_all_attention_is_last(build, tiny, size, same):
    spread, last = (trace(build, settings(tiny, *size, placement)) for placement in ("spread", "last"))
    assert (spread == last) == same


def test_a_checkpoint_fits_both_placements():
    config = scale.get_config("10b")
    assert config.generator.attention_placement == "spread"
    spread = build_generator(from_dict(config))
    config.generator.attention_placement = "last"
    assert build_generator(from_dict(config)).specs == spread.specs


def test_the_discriminator_has_attention_between_blocks_and_the_way_down(monkeypatch, tiny):
    """At a resolution with two blocks: one of equal size, attention, the block that halves."""
    from gigagan_jax.models import discriminator

    order = []

    def record(cls, name):
        call = cls.__call__
        monkeypatch.setattr(cls, "__call__", lambda self, x: (order.append(name(self, x)), call(self, x))[1])

    record(discriminator.TrunkBlock, lambda self, x: (x.shape[2], "block" if self.skip is None else "down"))
    record(discriminator.AttentionLayer, lambda self, x: (x.shape[2], "attention"))
    d = dataclasses.replace(tiny.discriminator, blocks=(1, 2, 1), attention_depth=(0, 2, 0))
    network = build_discriminator(dataclasses.replace(tiny, discriminator=d, remat=False))
    images = [jax.ShapeDtypeStruct((2, r, r, 3), jnp.float32) for r in (16, 8, 4)]
    t = jax.ShapeDtypeStruct((2, d.text.width), jnp.float32)
    jax.eval_shape(lambda p, x, t: network.bind(p)({"real": x}, t), network.abstract(), images, t)
    assert order == [(16, "down"), (8, "block"), (8, "attention"), (8, "attention"), (8, "down")]
