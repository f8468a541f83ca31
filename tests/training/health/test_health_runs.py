"""Runs with faults: what is not finite is named, changes nothing, and the run skips, goes back or stops as its policy says."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import get_config
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.core.workdir_files import HEALTH_REPORT_FILE
from gigagan_jax.data import embeddings
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.models.network import path_name
from gigagan_jax.parallel import sharding
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.loop import Hooks, Run
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

BATCH = 16
VICTIM = "generator/levels/1/to_rgb"  # the module of G whose gradient is made NaN
MARKER = {"g": -7, "d": -8}  # labels, which this model does not learn from, that stand for a fault in a gradient


def tiny(steps=8, **fields):
    """configs/digits.py:tiny for so many steps: a checkpoint every two, a snapshot and a line of metrics every one."""
    c = get_config("tiny")
    c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg, c.log_kimg = steps * 0.016, 0.032, 0.016, 0.016
    c.loss.r1_interval, c.checkpoint.keep = 4, 10
    for name, value in fields.items():
        setattr(c.health, name, value)
    return from_dict(c)


class FaultyStep(TrainStep):
    """Makes one module's gradient NaN where the batch says so."""

    def poisoned(self, grads, batch, net, victim):
        here = batch["label"][0] == MARKER[net]

        def one(path, x):
            return jnp.where(here, jnp.nan, x) if path_name(path).startswith(victim) else x

        return jax.tree_util.tree_map_with_path(one, grads)

    def d_gradients(self, state, batch, *args):
        grads, metrics = super().d_gradients(state, batch, *args)
        return self.poisoned(grads, batch, "d", "d/levels/0/down/"), metrics

    def g_gradients(self, state, batch, *args):
        grads, metrics = super().g_gradients(state, batch, *args)
        return self.poisoned(grads, batch, "g", "levels/1/to_rgb/"), metrics


class FaultyRun(Run):
    """A run whose step number k meets the fault `faults[k]`: "g", "d" or "image"; once, or each time it comes to that step.

    Images are floats here, so that they can be NaN.
    """

    def __init__(self, config, workdir, compiled, faults, again=False):
        super().__init__(config, workdir, mesh=compiled.mesh, hooks=lambda run: Hooks(snapshot=self.keep))
        self.step, self.faults, self.again = compiled, dict(faults), again
        self.states = {}

    def keep(self, state, kimg, logger):
        self.states[int(state.step)] = jax.device_get(jax.tree.map(jnp.copy, state))

    def next_batch(self, data):
        step = data.state()["examples_seen"] // BATCH + 1
        batch = super().next_batch(data)
        fault = self.faults.get(step) if self.again else self.faults.pop(step, None)
        batch["image"] = batch["image"].astype(jnp.float32)
        if fault == "image":
            batch["image"] = batch["image"].at[3, 0, 0, 0].set(jnp.nan)
        elif fault:
            batch["label"] = batch["label"].at[0].set(MARKER[fault])
        return batch


@pytest.fixture(scope="module")
def compiled():
    """One step for all runs: what fails when is in the data."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return CompiledStep(FaultyStep(Networks(tiny())), mesh)


def report(workdir):
    return json.loads((workdir / HEALTH_REPORT_FILE).read_text())


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(workdir, read=None):
    """Steps of the checkpoints; with `read`, what that one holds as its position."""
    c = Checkpoints(workdir)
    try:
        return c.all_steps() if read is None else c.data_position(read)
    finally:
        c.close()


@pytest.fixture(scope="module")
def skipped(compiled, tmp_path_factory):
    """Faults in the third, fifth and seventh of eight steps, all skipped."""
    workdir = tmp_path_factory.mktemp("skipped") / "run"
    run = FaultyRun(tiny(nonfinite="skip", max_skips=1), workdir, compiled, {3: "g", 5: "d", 7: "image"})
    run.train()
    return run, workdir


def test_a_fault_changes_nothing(skipped):
    run, _ = skipped
    states = run.states
    assert sorted(states) == list(range(1, 9))
    assert [(int(s.step), int(s.images)) for _, s in sorted(states.items())] == [(k, k * BATCH) for k in range(1, 9)]
    parts = lambda s: {"g": s.g, "d": s.d, "ema": s.g_ema, "w": s.w_avg}
    for step in range(2, 9):
        changed = {
            k for k in ("g", "d", "ema", "w") if not states_equal(parts(states[step - 1])[k], parts(states[step])[k])
        }
        # A fault in G comes after D's half of the step.
        assert changed == {3: {"d"}, 5: set(), 7: set()}.get(step, {"g", "d", "ema", "w"}), step
    assert all(np.isfinite(x).all() for s in states.values() for x in jax.tree.leaves(s))


def test_a_fault_is_named_and_counted(skipped):
    _, workdir = skipped
    found = report(workdir)["findings"]
    assert [(f["step"], f["module"], f["action"]) for f in found] == [
        (3, VICTIM, "skip"),
        (5, "discriminator/levels/0/down", "skip"),
        (7, "image", "skip"),
    ]
    source, order = DigitsSource(), DigitsSource().shuffled_order(0)
    assert f"the image of {source.name(order[6 * BATCH + 3])}, number 3 of the batch" in found[2]["text"]
    assert [m["health/skipped"] for m in lines(workdir)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert lines(workdir)[6]["loss/d"] is None
    assert report(workdir)["stopped"] is None
    assert checkpoints(workdir, 4)["health"]["skipped"] == 1


def test_too_many_in_a_row_stop_the_run_and_lose_nothing(skipped, compiled, tmp_path, refused, caplog):
    """Its first three steps are those of the run above."""
    run = FaultyRun(tiny(nonfinite="skip", max_skips=1), tmp_path, compiled, {3: "g", 4: "g"}, again=True)
    with caplog.at_level(logging.WARNING):
        refused(run.train, "stopped at step 4", f"nonfinite in {VICTIM}", "number 2 of at most 1", HEALTH_REPORT_FILE)
    assert [r.message.partition(":")[0] for r in caplog.records] == ["health"] * 2
    assert checkpoints(tmp_path) == [2]
    assert report(tmp_path)["stopped"]["step"] == 4
    assert report(tmp_path)["skipped"] == 2
    assert states_equal(run.states[2], skipped[0].states[2])
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3]


@pytest.fixture(scope="module")
def back(compiled, tmp_path_factory):
    """Faults in steps 5 and 6 at their first coming; a checkpoint of step 4."""
    workdir = tmp_path_factory.mktemp("back") / "run"
    config = tiny(10, nonfinite="rollback", max_skips=1, rollback_lr=0.5)
    run = FaultyRun(config, workdir, compiled, {5: "g", 6: "image"})
    return run, run.train(), workdir


def test_back_to_the_last_checkpoint(skipped, back):
    _, state, workdir = back
    assert int(state.step) == 10
    assert checkpoints(workdir) == [2, 4, 6, 8, 10]
    assert [f["action"] for f in report(workdir)["findings"]] == ["skip", "rollback"]
    assert [m["step"] for m in lines(workdir)] == list(range(1, 11))  # each once
    assert [m["health/rollbacks"] for m in lines(workdir)] == [0] * 4 + [1] * 6
    assert [m["health/lr_scale"] for m in lines(workdir)] == [1] * 4 + [0.5] * 6
    # Half the learning rate: what a step changes, by the size of the update.
    rate = [m["health/update/d"] / m["health/direction/d"] for m in lines(workdir)]
    assert rate[4] / rate[3] == pytest.approx(0.5, rel=0.02)
    # Another order of the data from there on, and only from there on.
    assert "reorders" not in checkpoints(workdir, 4)
    assert checkpoints(workdir, 6)["reorders"] == [[4 * BATCH, 1]]
    real = lambda where: [m["health/spread_real"] for m in lines(where)]
    assert real(workdir)[:4] == real(skipped[1])[:4]
    assert real(workdir)[5] != real(skipped[1])[5]


def test_a_run_that_went_back_resumes_bit_for_bit(back, compiled, tmp_path):
    """Stopped after the rollback, and resumed by a new process's objects."""
    config = tiny(8, nonfinite="rollback", max_skips=1, rollback_lr=0.5)
    FaultyRun(config, tmp_path, compiled, {5: "g", 6: "image"}).train()
    state = FaultyRun(tiny(10, **{"nonfinite": "rollback", "max_skips": 1}), tmp_path, compiled, {}).train()
    assert states_equal(state, back[1])
    assert checkpoints(tmp_path, 10) == checkpoints(back[2], 10)


@pytest.mark.slow
def test_rollbacks_that_do_not_help_end(compiled, tmp_path, refused):
    config = tiny(nonfinite="rollback", max_skips=0, max_rollbacks=2)
    run = FaultyRun(config, tmp_path, compiled, {5: "d"}, again=True)
    refused(run.train, "stopped at step 5", "discriminator/levels/0/down", "3 skipped, 2 rollbacks")
    assert [f["action"] for f in report(tmp_path)["findings"]] == ["rollback", "rollback", "stop"]
    assert report(tmp_path)["lr_scale"] == 0.25
    assert checkpoints(tmp_path) == [2, 4]
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4]


def test_back_to_the_start_where_nothing_was_saved(compiled, tmp_path):
    config = tiny(2, nonfinite="rollback", max_skips=0)
    state = FaultyRun(config, tmp_path, compiled, {1: "g"}).train()
    assert int(state.step) == 2
    assert checkpoints(tmp_path, 2)["reorders"] == [[0, 1]]
    assert [m["health/rollbacks"] for m in lines(tmp_path)] == [1, 1]


@pytest.mark.slow
def test_back_to_before_a_run_went_wrong(compiled, tmp_path, refused):
    """Saturation, by a limit that all steps are beyond, from step 4 on: the checkpoint of step 4 is not gone back to."""
    settings = {"grace": 3, "window": 1, "patience": 3, "max_gap": -1.0}
    config = tiny(saturation="rollback", max_rollbacks=1, **settings)
    run = FaultyRun(config, tmp_path, compiled, {})
    refused(run.train, "stopped at step 6", "saturation in d_gap", "0 skipped, 1 rollbacks")
    # Of the output image and of the level below it.
    assert [(f["step"], f["module"], f["action"]) for f in report(tmp_path)["findings"]] == [
        (6, module, action) for action in ("rollback", "stop") for module in ("d_gap", "d_gap/4")
    ]
    assert checkpoints(tmp_path) == [2, 4]  # that of step 4 anew
    assert checkpoints(tmp_path, 4)["reorders"] == [[2 * BATCH, 1]]


@pytest.mark.slow
def test_a_stored_embedding_that_is_not_finite(clip_folder, tmp_path):
    """Text features made ahead of time, those of one example NaN: it is named, and nothing is learned."""
    c = get_config("tiny")
    c.total_kimg = c.checkpoint_kimg = c.log_kimg = 0.016
    c.text.encoder, c.text.path, c.text.length = "clip", str(clip_folder), 16
    c.data.embeddings = str(tmp_path / "embeddings")
    config, source = from_dict(c), DigitsSource()
    (tmp_path / "embeddings").mkdir()
    rng = np.random.default_rng(0)
    said = lambda: embeddings.CaptionEmbedding(rng.normal(size=(4, 32)).astype(np.float32), None)
    broken = embeddings.CaptionEmbedding(np.full((4, 32), np.nan, np.float32), None)
    order = source.shuffled_order(config.seed)
    for number in range(-(-len(source) // embeddings.PART_SIZE)):
        part = range(number * embeddings.PART_SIZE, min(len(source), (number + 1) * embeddings.PART_SIZE))
        rows = [[broken if i == order[9] else said() for _ in source.read(i).captions] for i in part]
        embeddings.write_part(tmp_path / "embeddings" / embeddings.part_name(number), rows, 32, np.float32)
    embeddings.write_null(tmp_path / "embeddings", said())
    embeddings.write_index(tmp_path / "embeddings", embeddings.expected_metadata(config, source), {})
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    run = Run(config, tmp_path / "run", mesh=mesh)
    state = run.train()
    (found,) = report(tmp_path / "run")["findings"]
    assert found["module"] == "features"
    assert f"caption embedding (features) of {source.name(order[9])}, number 9 of the batch" in found["text"]
    start = run.networks.init(mesh)
    assert states_equal((start.g, start.d, start.g_ema), (state.g, state.d, state.g_ema))
