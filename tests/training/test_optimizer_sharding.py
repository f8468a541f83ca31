"""Moments and averages cut over data: the update is the same, and costs what it should."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import digits
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal, with_shardings
from gigagan_jax.config import DEFAULT_RULES, MeshConfig, from_dict
from gigagan_jax.inference.sampler import Sampler
from gigagan_jax.parallel import sharding
from gigagan_jax.training.health import step_statistics
from gigagan_jax.training.state import Net, Networks
from gigagan_jax.training.step import TrainStep, apply_update


@pytest.fixture(scope="module")
def step():
    """Of configs/digits.py:tiny, with a first moment too."""
    values = digits.get_config("tiny")
    values.g_optimizer.beta1 = 0.5
    return TrainStep(Networks(from_dict(values)))


def updated(step, shape):
    """G after two updates by gradients drawn by their place in the tree, on a mesh: (Net, norm), where it lies."""
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    where = step.networks.shardings(mesh)
    start = step.networks.init(mesh)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.standard_normal(x.shape).astype(np.float32)
    grads = [jax.tree.map(draw, step.networks.g.abstract()) for _ in range(2)]
    rate = np.float32(0.01)

    def run(net, grads):
        with sharding.use_mesh(mesh, step.config.rules):
            grads = step.reduce_scatter("g", grads)
            net, _ = apply_update(step.networks.g_tx, net, grads, rate, jnp.asarray(True))
            return step.all_gather("g", net), jnp.sqrt(sum(step_statistics.squared_norms(grads)))

    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(run, in_shardings=(where.g, where.g.params), out_shardings=(where.g, everywhere))
    net, norm = start.g, None
    for one in grads:
        net, norm = compiled(net, one)
    return net, norm, where


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 1, 2)], ids=str)
def test_an_update_does_not_depend_on_the_mesh(step, shape, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_ELEMENTS_TO_SHARD", 64)
    expected, norm, _ = updated(step, (1, 1, 1))
    net, found, where = updated(step, shape)
    assert isinstance(net, Net)
    np.testing.assert_allclose(found, norm, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, jax.device_get(net), jax.device_get(expected))
    assert len(cut_over_data(net.opt)) > 40  # both moments of most matrices
    for x, s in zip(jax.tree.leaves(net), jax.tree.leaves(where.g), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


def cut_over_data(tree):
    return [x for x in jax.tree.leaves(tree) if "data" in jax.tree.leaves(tuple(x.sharding.spec))]


def test_a_cut_average_is_stored_and_sampled_from_on_any_mesh(step, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_ELEMENTS_TO_SHARD", 64)
    networks, config = step.networks, step.config
    meshes = [sharding.make_mesh(MeshConfig(*shape)) for shape in ((8, 1, 1), (2, 2, 2))]
    state = networks.init(meshes[0])
    assert len(cut_over_data(state.g_ema)) > 20
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(1, state, {}, config)
    checkpoints.wait_until_finished()
    restored, _ = checkpoints.restore(1, with_shardings(networks.abstract(), networks.shardings(meshes[1])))
    checkpoints.close()
    assert states_equal(restored, state)
    assert len(cut_over_data(restored.g.opt)) > 20
    sampler = Sampler(config, meshes[0], device_batch=1)
    images = [sampler(params, state.w_avg, ["a seven", "a three"], [0, 1]) for params in (state.g_ema, state.g.params)]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_parameters_are_gathered(dtype):
    """Not the batch's activations, to where a part of a gradient is wanted; and a new parameter once, not at each use."""
    mesh = sharding.make_mesh(MeshConfig())
    names, rows = ("embed", "mlp"), NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    part = NamedSharding(mesh, sharding.optimizer_spec(names, (128, 256), mesh, DEFAULT_RULES, "w"))
    assert part.spec == PartitionSpec(None, "data")

    def run(w, moment, x):
        def forward(w):
            w = w.astype(dtype)
            y = jnp.tanh(x.astype(dtype) @ w)
            return jnp.mean(jnp.square(y @ w.T).astype(jnp.float32))

        with sharding.use_mesh(mesh, DEFAULT_RULES):
            grad = sharding.scatter_gradient(jax.grad(forward)(w), names)
            moment = 0.9 * moment + jnp.square(grad)
            w = sharding.gather_update(w - grad * jax.lax.rsqrt(moment), names)
            return w, moment, forward(w)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((128, 256), (128, 256), (64, 128))]
    compiled = jax.jit(run, in_shardings=(everywhere, part, rows), out_shardings=(everywhere, part, everywhere))
    text = compiled.lower(*shapes).compile().as_text()
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).* all-gather(?:-start)?\(", text)
    assert gathered == ["f32[128,256]"], gathered
