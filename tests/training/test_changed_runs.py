"""Runs whose data or settings change on the way, and those that start from weights: whole runs, killed and resumed."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from gigagan_jax import train
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal
from gigagan_jax.checkpoint.workdir import open_workdir, with_original_settings
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import sharding
from gigagan_jax.telemetry.history import read_history, record_event
from gigagan_jax.training.fine_tuning import InitFrom
from gigagan_jax.training.loop import Run
from gigagan_jax.training.state import Networks
from tests.runs import read, small


def write_photos(folder, numbers):
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"photograph {i}")


def save_untrained(workdir, config):
    """A workdir with a checkpoint of step 7, of initial values."""
    open_workdir(workdir, config)
    checkpoints = Checkpoints(workdir, config)
    checkpoints.save(7, Networks(config).init(sharding.make_mesh(config.mesh)), {}, config, {})
    checkpoints.close()


def on_photos(folder, steps, **fields):
    fields = {"data__source": "folder", "data__path": str(folder), "total_kimg": 0.016 * steps} | fields
    return small(**fields)


@pytest.mark.slow
def test_from_weights_over_data_that_grows_with_settings_that_change(tmp_path, caplog):
    """24 photographs, then 28: stopped and gone on without the flags, the run is the undisturbed one bit for bit."""
    photos, begun = tmp_path / "photos", tmp_path / "begun"
    write_photos(photos, range(24))
    save_untrained(tmp_path / "weights", on_photos(photos, 4))
    init = InitFrom(str(tmp_path / "weights"), ("g", "d", "averages", "optimizer"))
    state = Run(on_photos(photos, 4), begun, init_from=init).train()
    # The counters and the order of the data are those of any new run.
    assert (int(state.step), int(state.images)) == (4, 64)
    assert read(begun, on_photos(photos, 4))[1]["examples_seen"] == 64

    write_photos(photos, range(24, 28))
    with pytest.raises(UserError, match=r"24 -> 28 examples.*--accept=data"):
        Run(on_photos(photos, 10), shutil.copytree(begun, tmp_path / "refused")).train()
    lower = {"g_optimizer__learning_rate": 0.001}
    whole, stopped = (shutil.copytree(begun, tmp_path / name) for name in ("whole", "stopped"))
    # A launcher runs the same command again; the weights need not be there any more.
    both = {"accept": ("data", "settings"), "init_from": InitFrom("nowhere")}
    with caplog.at_level(logging.INFO):
        Run(on_photos(photos, 10, **lower), whole, **both).train()
    assert "--init_from=nowhere was for the start" in caplog.text
    assert "24 -> 28 examples in a new order; the first epoch over them begins at image 64" in caplog.text
    Run(on_photos(photos, 7, **lower), stopped, **both).train()
    Run(on_photos(photos, 10, **lower), stopped).train()
    (a, data_a), (b, data_b) = (read(folder, on_photos(photos, 10, **lower)) for folder in (whole, stopped))
    assert states_equal(a, b)
    assert data_a == data_b
    assert data_a["earlier"][0][1:] == [24, 64]
    events = read_history(stopped)
    assert events[0]["event"] == "init"
    (data,) = [event for event in events if event["event"] == "data"]
    assert (data["step"], data["images"], data["old"]["examples"], data["new"]["examples"]) == (4, 64, 24, 28)
    assert [0.0035, 0.001] in [e["fields"].get("g_optimizer.learning_rate") for e in events if e["event"] == "settings"]


def stored(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_accepted_settings_are_those_of_the_run_from_then_on(tmp_path, refused):
    begun, other = small(), small(loss__match_d=2.0)
    open_workdir(tmp_path, begun)
    # As a first checkpoint leaves it.
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    refused(lambda: open_workdir(tmp_path, other), "loss.match_d: 0.5 -> 2.0", "--accept=settings")
    refused(lambda: open_workdir(tmp_path, other, ["data"]), "--accept=settings")
    assert stored(tmp_path)["loss"]["match_d"] == 0.5
    open_workdir(tmp_path, other, ["settings"])
    open_workdir(tmp_path, other)
    assert stored(tmp_path)["loss"]["match_d"] == 2.0
    refused(lambda: open_workdir(tmp_path, begun), "loss.match_d: 2.0 -> 0.5")
    refused(lambda: open_workdir(tmp_path, small(seed=3), ["settings", "data"]), "seed: 0 -> 3", "another --workdir")


def test_a_field_that_is_younger_than_the_run_changes_when_it_is_named(tmp_path):
    config = small()
    open_workdir(tmp_path, config)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    # Written before there was such a field.
    values = stored(tmp_path) | {"format": 2}
    del values["loss"]["r2"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    asked = small(loss__r2=True)
    assert not with_original_settings(tmp_path, asked).loss.r2
    chosen = with_original_settings(tmp_path, asked, ["loss.r2"])
    assert chosen.loss.r2
    open_workdir(tmp_path, chosen, ["settings"])
    # The next start needs neither the flag nor the field.
    assert with_original_settings(tmp_path, small()).loss.r2


def test_the_history_has_each_change_once(tmp_path):
    for _ in range(2):
        record_event(tmp_path, "data", step=4, old=("a", 24), new=["b", 28])
        record_event(tmp_path, "settings", step=4, fields={"loss.match_d": [1.0, 2.0]})
    record_event(tmp_path, "data", step=8, old=["b", 28], new=["a", 24])
    assert [(e["event"], e["step"]) for e in read_history(tmp_path)] == [("data", 4), ("settings", 4), ("data", 8)]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--accept=everything"], "write data, settings, or data,settings"),
        (["--init_from=x", "--init_parts=g,text"], "unknown part 'text'"),
    ],
)
def test_flags(tmp_path, refused, flags, words):
    command = ["--config=configs/digits.py:tiny", f"--workdir={tmp_path / 'run'}", *flags]
    refused(lambda: train.verb(command), words)
