"""Weights of the loss that change over a run, and what a run of another length says of them."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.training import losses
from gigagan_jax.training.input_pipeline import make_pipeline
from gigagan_jax.training.loop import Run
from gigagan_jax.training.resume import warn_of_moved_ramps
from tests.runs import small

ENDS = (0.2, 2.0)


@pytest.mark.parametrize(
    "fields, images, share",
    [
        ({"total_kimg": 0.32}, 80, 0.25),
        ({"total_kimg": 0.32}, 320, 1.0),
        # Past the end of the ramp the last value stays.
        ({"total_kimg": 0.64, "loss__ramp_kimg": 0.16}, 80, 0.5),
        ({"total_kimg": 0.64, "loss__ramp_kimg": 0.16}, 320, 1.0),
        ({"total_kimg": 0.16, "loss__ramp_kimg": 0.64}, 160, 0.25),
    ],
)
def test_weights_are_linear_in_images_up_to_the_end_of_the_ramp(fields, images, share):
    config = small(**fields, loss__r1_gamma=ENDS)
    assert float(losses.ramp_progress(config, jnp.uint32(images))) == pytest.approx(share, rel=1e-6)
    weights = losses.ramped_weights(config, images)
    assert weights["r1_gamma"] == pytest.approx(0.2 + 1.8 * share, rel=1e-6)
    assert weights["clip"] == 0


def resume(workdir, caplog, config):
    """(the warnings of jumps, the images of the state) of a run that goes on in the workdir and has nothing to do there."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        state = Run(config, workdir).train()
    assert "resume: restoring checkpoint 10" in caplog.text
    assert "nothing to do" in caplog.text
    return [r.message for r in caplog.records if "weights jump" in r.message], int(state.images)


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """(workdir, fields of its config): at 160 of 320 images, as a run leaves it; not trained."""
    workdir = tmp_path_factory.mktemp("ramps") / "run"
    fields = {"total_kimg": 0.32, "loss__r1_gamma": ENDS, "evaluators": ()}
    config = small(**fields)
    open_workdir(workdir, config)
    run = Run(config, workdir)
    state = run.networks.init(run.mesh)
    place = lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding)
    state = state.replace(step=place(10, state.step), images=place(160, state.images))
    checkpoints = Checkpoints(workdir, config)
    with make_pipeline(config, workdir, run.rows) as data:
        checkpoints.save(10, state, data.state(), config, images=160)
        checkpoints.close()
    return workdir, fields


def test_a_resume_at_another_length_says_which_weights_jump(half_way, caplog):
    """The checkpoint's own config decides: config.json already has the new one at the next start."""
    workdir, fields = half_way
    for _ in range(2):
        warnings, images = resume(workdir, caplog, small(**fields | {"total_kimg": 0.16}))
        assert images == 160
        (line,) = warnings
        assert "loss.r1_gamma from 1.1 to 2" in line
        assert "0.16 kimg into the run" in line
        assert "ended at 0.32 kimg and now end at 0.16" in line
        assert "--config.loss.ramp_kimg=0.32 keeps" in line
        # The digits have no contrastive loss: its weight does not change.
        assert "loss.clip" not in line


def test_a_resume_that_keeps_its_ramps_says_nothing(half_way, caplog):
    workdir, fields = half_way
    for changed in (
        {"loss__ramp_kimg": 0.32, "total_kimg": 0.16},
        {"total_kimg": 0.16, "loss__ramp_kimg": 0.32, "batch_size": 8},
    ):
        warnings, _ = resume(workdir, caplog, small(**fields | changed))
        assert warnings == []


@pytest.mark.parametrize(
    "before, now, images, jumps",
    [
        # A finished run that is extended: its weights fall back.
        ({"total_kimg": 0.32}, {"total_kimg": 0.64}, 320, "loss.r1_gamma from 2 to 1.1, loss.clip from 1 to 0.6"),
        ({"total_kimg": 0.32}, {"total_kimg": 0.64, "loss__ramp_kimg": 0.32}, 320, None),
        ({"total_kimg": 0.64}, {"total_kimg": 0.64, "loss__ramp_kimg": 0.32}, 160, "from 0.65 to 1.1"),
        (
            {"total_kimg": 0.64, "loss__ramp_kimg": 0.16},
            {"total_kimg": 1.28, "loss__ramp_kimg": 0.0},
            640,
            "loss.clip from 1 to 0.6",
        ),
        # The weights themselves were changed: no length keeps them.
        ({"total_kimg": 0.32}, {"loss__r1_gamma": (0.4, 0.4)}, 160, "loss.r1_gamma from 1.1 to 0.4"),
        # Both ramps are over: nothing jumps.
        ({"total_kimg": 0.64, "loss__ramp_kimg": 0.16}, {"total_kimg": 1.28, "loss__ramp_kimg": 0.32}, 640, None),
        ({"total_kimg": 0.32, "loss__r1_gamma": (2.0, 2.0), "loss__clip": (0.0, 0.0)}, {"total_kimg": 0.64}, 320, None),
    ],
)
def test_which_weights_jump(caplog, clip_folder, before, now, images, jumps):
    both = {"loss__r1_gamma": ENDS, "loss__clip": (0.2, 1.0), "clip__path": str(clip_folder)} | before
    warn_of_moved_ramps(small(**both), small(**both | now), images)
    assert len(caplog.records) == bool(jumps)
    assert (jumps or "") in caplog.text
    if jumps and "loss__r1_gamma" not in now:
        assert f"ramp_kimg={before.get('loss__ramp_kimg') or before['total_kimg']:g} keeps" in caplog.text


def test_the_suggested_length_is_exact(caplog):
    """%g alone would round it, and the ramp would move after all."""
    before, now = (small(total_kimg=kimg, loss__r1_gamma=ENDS) for kimg in (1_234_567.5, 2_000_000.0))
    warn_of_moved_ramps(before, now, 1_000_000)
    assert "--config.loss.ramp_kimg=1234567.5 keeps" in caplog.text
