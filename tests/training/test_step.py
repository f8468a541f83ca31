"""The compiled train step: what it changes, that it can be repeated from its state alone, and gradient accumulation."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config import MeshConfig
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.models.network import path_name
from gigagan_jax.parallel import sharding
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.objectives import LossReport
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep, ema_decay
from tests.quick import OPTIONS

STEPS = 5
R1_METRICS = {"loss/r1", "r1/last_exit", "r1/cosine/8", "r1/cosine/16"}
WITH_R1 = tuple(step % 4 == 0 for step in range(STEPS))


@pytest.fixture(scope="module")
def config(tiny):
    return dataclasses.replace(tiny, remat=False, batch_size=8)


def batch_of(config, step):
    """Random images with captions of which some are equal."""
    rng = np.random.default_rng(step)
    n = config.batch_size
    shapes = abstract_batch(config)
    return {
        "image": rng.integers(0, 256, shapes["image"].shape).astype(np.uint8),
        "tokens": ByteTokenizer(config.text.length)([f"caption number {k}" for k in rng.integers(0, n, n)]),
        "label": np.full(n, -1, np.int32),
    }


def compiled_step(config):
    """A CompiledStep on two devices, its programs compiled with OPTIONS."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=OPTIONS))
        return CompiledStep(TrainStep(Networks(config)), mesh)


@dataclasses.dataclass
class Run:
    """Five steps on two devices: the state before each and after the last, and the metrics of each.

    given, last: the states that were given away at each step, and the one that was left, on their devices
    """

    compiled: CompiledStep
    states: list
    metrics: list
    given: list
    last: object = None


@pytest.fixture(scope="module")
def run(config):
    compiled = compiled_step(config)
    state = compiled.step.networks.init(compiled.mesh)
    key = compiled.key()
    # On a CPU what is fetched shares the memory of the array, which then could not be given away.
    copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))
    fetch = lambda state: jax.device_get(copy(state))
    run = Run(compiled, [fetch(state)], [], [])
    for step in range(STEPS):
        batch = jax.device_put(batch_of(config, step), compiled.batch_shardings)
        run.given.append(state)
        state, metrics = compiled(state, batch, key, with_r1=WITH_R1[step])
        run.states.append(fetch(state))
        run.metrics.append(metrics)
    run.last = state
    return run


def leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_program_is_traced_once(run):
    assert run.compiled.traces == list(run.compiled.programs(with_r1=True))


def test_metrics(run, config):
    common = {"loss/d", "loss/d_gan", "loss/d_match", "logits/real", "logits/fake", "logits/wrong", "grad_norm/d"}
    common |= {"loss/g", "loss/g_gan", "loss/g_match", "image/spread", "grad_norm/g"}
    for with_r1, metrics in zip(WITH_R1, run.metrics, strict=True):
        assert metrics.keys() == common | {"health"} | (R1_METRICS if with_r1 else set())
        reading = run.compiled.step.health_vector.read(metrics["health"])
        assert reading.applied
        assert reading.bad_inputs() == reading.bad_modules() == {}
        assert all(map(math.isfinite, reading.measures().values()))
        assert math.isfinite(reading.values["loss/r1"]) == with_r1
        for net, modules in run.compiled.step.health_vector.modules.items():
            norm = math.sqrt(sum(reading.values[name] for name in modules))
            assert norm == pytest.approx(float(metrics[f"grad_norm/{net}"]), rel=1e-5)
        for name, value in metrics.items():
            if name == "health":
                continue
            assert value.shape == (), name
            assert value.dtype == jnp.float32, name
            assert np.isfinite(value), name
        for name in ("loss/d_gan", "loss/d_match", "loss/g_gan", "grad_norm/d", "grad_norm/g"):
            assert metrics[name] > 0
        # The min-max form is D's term with the opposite sign.
        assert metrics["loss/g_match"] < 0
        assert metrics["image/spread"] > 0


def test_each_half_of_a_step_draws_its_own_z(run):
    """The measure of what z does compares an image of D's half with one of G's: of one z they would be the same image."""
    for metrics in run.metrics:
        assert run.compiled.step.health_vector.read(metrics["health"]).values["health/diversity_z"] > 1e-3


def test_losses_add_up_with_r1_weighted_by_its_interval_and_the_images_seen(run, config):
    first, last = config.loss.r1_gamma
    for step, metrics in enumerate(run.metrics):
        progress = step * config.batch_size / (config.total_kimg * 1000)
        gamma = first + (last - first) * progress
        expected = metrics["loss/d_gan"] + config.loss.match_d * metrics["loss/d_match"]
        if WITH_R1[step]:
            assert metrics["loss/r1"] > 0
            expected += 0.5 * gamma * 16 * metrics["loss/r1"]
        np.testing.assert_allclose(metrics["loss/d"], expected, rtol=1e-5)
        np.testing.assert_allclose(
            metrics["loss/g"], metrics["loss/g_gan"] + config.loss.match_g * metrics["loss/g_match"], rtol=1e-6
        )


def test_counters(run, config):
    assert [int(s.step) for s in run.states] == list(range(STEPS + 1))
    assert [int(s.images) for s in run.states] == [config.batch_size * k for k in range(STEPS + 1)]
    last = run.states[-1]
    assert last.step.dtype == np.int32
    assert last.images.dtype == np.uint32


def test_the_state_that_went_in_is_given_away(run):
    for step, state in enumerate(run.given):
        kept = [name for name, x in leaves(state).items() if not x.is_deleted()]
        assert kept == [], step


def test_the_state_stays_where_it_belongs(run):
    where = run.compiled.state_shardings
    for x, s in zip(jax.tree.leaves(run.last), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    cut = [x for x in jax.tree.leaves(run.last) if x.addressable_shards[0].data.shape != x.shape]
    assert sum(x.size for x in cut) > 0.9 * sum(x.size for x in jax.tree.leaves(run.last))
    assert all(x.sharding.is_fully_replicated for metrics in run.metrics for x in metrics.values())


@pytest.mark.parametrize("net", ["g", "d"])
def test_no_parameter_is_dead(run, net):
    """Every parameter gets a gradient (the second moment is an average of its squares) and changes in the first step."""
    first, second, last = (getattr(run.states[k], net) for k in (0, 1, -1))
    moments = leaves(last.opt[0].nu)
    assert moments.keys() == leaves(last.params).keys()
    assert [name for name, x in moments.items() if not x.max() > 0] == []
    start, now = leaves(first.params), leaves(second.params)
    assert [name for name in start if (start[name] == now[name]).all()] == []
    assert all(np.isfinite(x).all() for x in leaves(last).values())


def test_no_unit_is_dead(run):
    """Nor a single element of one, but for bytes that no caption has and places that no caption reaches."""
    for net in ("g", "d"):
        for name, x in leaves(getattr(run.states[-1], net).opt[0].nu).items():
            if not name.endswith(("encoder/embedding", "encoder/position")):
                assert (x > 0).mean() > 0.99, name


def test_average_of_g(run, config):
    for before, after in itertools.pairwise(run.states):
        keep = float(ema_decay(config, jnp.asarray(before.images)))
        for name, average in leaves(after.g_ema).items():
            new, old = leaves(after.g.params)[name], leaves(before.g_ema)[name]
            np.testing.assert_allclose(average, new + (old - new) * keep, rtol=1e-5, atol=1e-6)
    assert_same_bits(run.states[1].g_ema, run.states[1].g.params)  # nothing of the random start is kept


def test_average_of_w(run, config):
    averages = [s.w_avg for s in run.states]
    assert averages[0].shape == (config.generator.w_dim,)
    assert not averages[0].any()
    assert np.abs(averages[1]).max() > 0.01  # the first step takes w as it is
    for before, after in itertools.pairwise(averages[1:]):
        assert np.abs(after - before).max() > 0


@pytest.mark.parametrize("decay", [0.0, 0.998])
def test_w_is_averaged_as_long_as_g_or_by_a_decay_of_its_own(run, config, decay):
    state, w = run.states[2], np.ones(config.generator.w_dim, np.float32)
    changed = dataclasses.replace(config, generator=dataclasses.replace(config.generator, w_avg_decay=decay))
    step = TrainStep(Networks(changed))
    g_ema, w_avg = step.averages(state, state.g.params, jnp.asarray(w))
    keep = decay or float(ema_decay(config, state.images))
    np.testing.assert_allclose(w_avg, w + (state.w_avg - w) * keep, rtol=1e-6)
    # G's own average keeps the same share of what it was.
    if not decay:
        name = next(iter(leaves(state.g.params)))
        old, new = leaves(state.g_ema)[name], leaves(state.g.params)[name]
        np.testing.assert_allclose(leaves(g_ema)[name], new + (old - new) * keep, rtol=1e-5, atol=1e-7)


def test_another_step_draws_other_noise(run, config):
    """Same parameters, same batch, another number of the step."""
    compiled = run.compiled
    state = jax.device_put(run.states[1].replace(step=np.int32(7)), compiled.state_shardings)
    batch = jax.device_put(batch_of(config, 1), compiled.batch_shardings)
    _, metrics = compiled(state, batch, compiled.key(), with_r1=WITH_R1[1])
    assert metrics["logits/fake"] != run.metrics[1]["logits/fake"]
    assert metrics["logits/real"] == run.metrics[1]["logits/real"]
    assert len(compiled.traces) == len(set(compiled.traces))


def test_restarted_from_its_state_alone_it_goes_on_bit_for_bit(run, config):
    """After two steps: a new process's objects, and nothing but the stored state and the config's seed."""
    compiled = compiled_step(config)
    state = jax.device_put(run.states[2], compiled.state_shardings)
    for step in (2, 3):
        batch = jax.device_put(batch_of(config, step), compiled.batch_shardings)
        state, metrics = compiled(state, batch, compiled.key(), with_r1=WITH_R1[step])
        assert_same_bits(metrics, run.metrics[step])
    assert_same_bits(jax.device_get(state), run.states[4])


# ---------------------------------------------------------------- gradient accumulation


def accumulate(config, micro_batches, shape, loss, params, batch):
    """TrainStep.gradients of `loss` on a mesh."""
    step = TrainStep(Networks(config))
    step.config = dataclasses.replace(config, micro_batches=micro_batches)
    mesh = sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    everywhere = NamedSharding(mesh, PartitionSpec())

    def run(params, batch, key):
        with sharding.use_mesh(mesh, config.rules):
            return step.gradients(loss, params, batch, key)

    where = (everywhere, batch_shardings(config, mesh), everywhere)
    grads, report = jax.device_get(jax.jit(run, in_shardings=where)(params, batch, jax.random.key(0)))
    return grads, report.metrics


@pytest.mark.parametrize("micro_batches, shape", [(2, (1, 1, 1)), (8, (1, 1, 1)), (2, (2, 2, 1))])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(config, micro_batches, shape):
    def loss(params, batch, key):
        x = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 127.5 - 1
        y = jnp.tanh(x @ params["a"]) @ params["b"]
        value = jnp.square(y - batch["tokens"][:, 3].astype(jnp.float32)).mean()
        return value, LossReport({"loss": value}, {})

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(0, 0.1, (16 * 16 * 3, 8)), "b": rng.normal(0, 1, 8)}
    params = {k: x.astype(np.float32) for k, x in params.items()}
    batch = batch_of(config, 0)
    whole, metrics = accumulate(config, 1, (1, 1, 1), loss, params, batch)
    parts, part_metrics = accumulate(config, micro_batches, shape, loss, params, batch)
    for name in params:
        scale = np.abs(whole[name]).max()
        assert scale > 0.01
        np.testing.assert_allclose(parts[name], whole[name], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("micro_batches, shape", [(1, (1, 1, 1)), (2, (1, 1, 1)), (4, (1, 1, 1)), (2, (2, 2, 1))])
def test_every_example_is_used_once_with_all_that_is_its_own(config, micro_batches, shape):
    """Counts examples by an id that is written into each entry of the batch; every part draws from its own key."""
    n = config.batch_size
    ids = np.arange(n)
    batch = {
        "image": np.broadcast_to(ids[:, None, None, None], (n, 16, 16, 3)).astype(np.uint8),
        "tokens": np.broadcast_to(ids[:, None], (n, config.text.length)).astype(np.int32),
        "label": ids.astype(np.int32),
    }

    def loss(params, batch, key):
        label = batch["label"]
        here = jnp.zeros(n).at[label].add(1.0)
        agree = (batch["image"] == label[:, None, None, None]).all() & (batch["tokens"] == label[:, None]).all()
        draw = jnp.zeros(n).at[label].add(jax.random.uniform(key))
        notes = {"here": here, "agree": agree.astype(jnp.float32), "draw": draw}
        return 0.0 * params.sum(), LossReport(notes, {})

    _, notes = accumulate(config, micro_batches, shape, loss, np.ones(3, np.float32), batch)
    np.testing.assert_allclose(notes["here"] * micro_batches, 1.0)
    np.testing.assert_allclose(notes["agree"], 1.0)
    _, sizes = np.unique(notes["draw"], return_counts=True)
    assert sizes.tolist() == [n // micro_batches] * micro_batches
