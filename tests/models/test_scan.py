"""Loops over equal layers: unrolled on CPUs, one loop a stack on TPUs, and the same numbers either way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.models.layers.equalized import Conv, ScannedLayers, leaky_relu
from gigagan_jax.models.layers.scan import scan
from gigagan_jax.models.pretrained.transformer import Block, Encoder
from gigagan_jax.parallel import sharding
from gigagan_jax.planning import topology
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

LOOP = "stablehlo.while"


class ConvLayer(nnx.Module):
    def __init__(self, rngs):
        self.conv = Conv(8, 8, kernel=3, rngs=rngs)

    def __call__(self, x):
        return x + leaky_relu(self.conv(x))


def make_stack(count, remat=False):
    rngs = nnx.Rngs(0)
    return ScannedLayers(lambda: ConvLayer(rngs), count, remat=remat, rngs=rngs)


def gradients(module, x):
    """Jitted gradient of a sum over the module's output, by its parameters and x; as a function and its arguments."""
    graph, params = nnx.split(module)

    def loss(params, x):
        out = nnx.merge(graph, params)(x)
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out))

    return jax.jit(jax.grad(loss, (0, 1))), (nnx.to_pure_dict(params), x)


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


def in_both_forms(monkeypatch, make):
    """[(lowered text, value)] of `make() -> (jitted, arguments)`, unrolled and looped."""
    results = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(sharding, "mesh_platform", lambda platform=platform: platform)
        jitted, arguments = make()
        results.append((jitted.lower(*arguments).as_text(), jitted(*arguments)))
    return results


@pytest.mark.parametrize("remat", [False, True])
def test_a_stack_has_the_same_gradients_in_both_forms_parity(monkeypatch, remat):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
    (straight, a), (looped, b) = in_both_forms(monkeypatch, lambda: gradients(make_stack(3, remat), x))
    assert LOOP not in straight
    assert LOOP in looped
    close(a, b)


def test_an_encoder_has_the_same_gradients_in_both_forms_parity(monkeypatch):
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))

    def make():
        rngs = nnx.Rngs(0)
        block = lambda: Block(16, 32, 2, "gelu", 1e-5, dtype=jnp.float32, rngs=rngs)
        encoder = Encoder(block, 3, remat=False, rngs=rngs)
        fill = lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * 0.3
        graph, params = nnx.split(encoder)
        return gradients(Taps(nnx.merge(graph, jax.tree.map(fill, nnx.to_pure_dict(params)))), x)

    (straight, a), (looped, b) = in_both_forms(monkeypatch, make)
    assert LOOP not in straight
    assert LOOP in looped
    close(a, b)


class Taps(nnx.Module):
    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, x):
        return self.encoder(x, taps=(0, 1, 3))


@pytest.mark.slow
def test_the_whole_step_has_the_same_gradients_in_both_forms_parity(monkeypatch, tiny):
    """Stacks of G, D and T, and two micro-batches, with recomputation; at 8 px."""
    config = dataclasses.replace(
        tiny,
        resolution=8,
        batch_size=4,
        micro_batches=2,
        generator=dataclasses.replace(tiny.generator, blocks=(1, 3), bank=(1, 2), attention_depth=(0, 2)),
        discriminator=dataclasses.replace(tiny.discriminator, blocks=(3, 1), attention_depth=(2, 0)),
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8),
        "tokens": rng.integers(3, 200, (4, config.text.length)).astype(np.int32),
        "label": np.full(4, -1, np.int32),
    }
    assert batch.keys() == abstract_batch(config).keys()

    def make():
        networks = Networks(config)
        step = TrainStep(networks)
        state = networks.init(sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
        critics = lambda s, b, k: step.add_r1(s, step.critic_gradients(s, b, k), b, k).grads
        both = lambda s, b, k: (critics(s, b, k), step.g_gradients(s, b, k)[0])
        return jax.jit(both, compiler_options={"xla_backend_optimization_level": 0}), (state, batch, jax.random.key(0))

    (straight, a), (looped, b) = in_both_forms(monkeypatch, make)
    assert looped.count(LOOP) > straight.count(LOOP)  # those that are left are in the random numbers
    size = lambda tree: float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))
    for one, other in zip(a, b, strict=True):
        assert size(jax.tree.map(lambda x, y: x - y, one, other)) <= 1e-5 * size(one)


def test_a_count_of_one_is_never_a_loop(monkeypatch):
    monkeypatch.setattr(sharding, "mesh_platform", lambda: "tpu")
    jitted, arguments = gradients(make_stack(1), jnp.ones((1, 8, 8, 8)))
    assert LOOP not in jitted.lower(*arguments).as_text()


def test_outputs_are_stacked_as_those_of_a_loop():
    carry, (doubled, nothing) = scan(lambda c, x: (c + x, (2 * x, None)), jnp.float32(0), jnp.arange(4.0), 4)
    assert carry == 6
    np.testing.assert_array_equal(doubled, [0, 2, 4, 6])
    assert nothing is None


def test_a_lowering_for_a_tpu_has_one_loop_a_stack_sharding():
    """On a host that has CPUs only: the mesh decides."""
    mesh = sharding.make_mesh(MeshConfig(data=4), topology.topology_devices(topology.parse_topology("v5p:2x2x1")))
    stack = make_stack(3)
    graph, params = nnx.split(stack)
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(params))

    def apply(params, x):
        with sharding.use_mesh(mesh, DEFAULT_RULES):
            return nnx.merge(graph, params)(x)

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(apply, in_shardings=everywhere, out_shardings=everywhere)
    assert jitted.lower(shapes, jax.ShapeDtypeStruct((4, 8, 8, 8), jnp.float32)).as_text().count(LOOP) == 1


@pytest.mark.slow
def test_the_step_of_laion_lowered_for_a_tpu_keeps_its_loops_sharding():
    """Stacks of two layers or more in G, D and the frozen towers are loops, forward and backward."""
    from configs.laion import get_config
    from gigagan_jax.config import from_dict

    config = get_config("bytes")
    config.batch_size = 16
    mesh = sharding.make_mesh(MeshConfig(data=4), topology.topology_devices(topology.parse_topology("v5p:2x2x1")))
    networks = Networks(from_dict(config))
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        text = CompiledStep(TrainStep(networks), mesh).lower(with_r1=False).as_text()
    stacks = [m for net in (networks.g, networks.d) for m in stacks_of(net)]
    assert len(stacks) > 8
    assert text.count(LOOP) >= 2 * len(stacks)


def stacks_of(module):
    """Paths of the parameters' groups with a leading axis "layers" of two or more, each once."""
    found = set()
    for path, spec in jax.tree_util.tree_leaves_with_path(module.specs, is_leaf=lambda s: hasattr(s, "axes")):
        if "layers" in spec.axes and spec.shape[0] > 1:
            names = [str(getattr(k, "key", k)) for k in path]
            found.add(tuple(names[: names.index("layer")]))
    return found
