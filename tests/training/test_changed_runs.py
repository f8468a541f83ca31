"""Runs whose data or settings change on the way, and those that start from weights: whole runs, killed and resumed."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from gigagan_jax import train
from gigagan_jax.checkpoint.manager import states_equal
from gigagan_jax.checkpoint.workdir import open_workdir, with_original_settings
from gigagan_jax.core.errors import UserError
from gigagan_jax.telemetry.history import read_history, record_event
from gigagan_jax.training.fine_tuning import InitFrom
from gigagan_jax.training.loop import Run
from tests.runs import read, small


def write_photos(folder, numbers):
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"photograph {i}")


def on_photos(folder, steps, **fields):
    fields = {"data__source": "folder", "data__path": str(folder), "total_kimg": 0.016 * steps} | fields
    return small(**fields)


@pytest.mark.slow
def test_data_that_grows_and_settings_that_change_within_a_run(tmp_path, caplog):
    """24 photographs, then 28: killed before and after the first checkpoint with them, the run is the undisturbed one."""
    photos = tmp_path / "photos"
    write_photos(photos, range(24))
    Run(on_photos(photos, 4), tmp_path / "start").train()
    write_photos(photos, range(20, 28))
    with pytest.raises(UserError, match=r"24 -> 28 examples.*--accept=data"):
        Run(on_photos(photos, 10), tmp_path / "start").train()
    lower = {"g_optimizer__learning_rate": 0.001}
    with pytest.raises(UserError, match=r"learning_rate: 0.0035 -> 0.001\): --accept=settings goes on"):
        Run(on_photos(photos, 10, **lower), tmp_path / "start").train()
    for name in ("whole", "killed"):
        shutil.copytree(tmp_path / "start", tmp_path / name)
    both = {"accept": ("data", "settings")}
    with caplog.at_level(logging.INFO):
        Run(on_photos(photos, 10, **lower), tmp_path / "whole", **both).train()
    assert "24 -> 28 examples in a new order; the first epoch over them begins at image 64" in caplog.text
    # The first one is as if it was killed before its checkpoint; then one with the flags, and one without.
    killed = tmp_path / "killed"
    Run(on_photos(photos, 6, **lower), killed, **both).train()
    shutil.rmtree(killed / "checkpoints" / "6")
    Run(on_photos(photos, 7, **lower), killed, **both).train()
    Run(on_photos(photos, 10, **lower), killed, init_from=InitFrom("nowhere")).train()
    (a, data_a), (b, data_b) = (read(tmp_path / name, on_photos(photos, 10, **lower)) for name in ("whole", "killed"))
    assert states_equal(a, b)
    assert data_a == data_b
    assert data_a["earlier"][0][1:] == [24, 64]
    # Each once, though the flags were there at three starts.
    events = read_history(killed)
    (data,) = [event for event in events if event["event"] == "data"]
    assert (data["step"], data["images"], data["old"]["examples"], data["new"]["examples"]) == (4, 64, 24, 28)
    assert [0.0035, 0.001] in [e["fields"].get("g_optimizer.learning_rate") for e in events if e["event"] == "settings"]


@pytest.mark.slow
def test_a_run_from_weights_is_bit_for_bit_that_run_after_a_kill(tmp_path):
    photos = tmp_path / "photos"
    write_photos(photos, range(24))
    source = tmp_path / "source"
    Run(on_photos(photos, 2), source).train()
    init = InitFrom(str(source), ("g", "d", "averages", "optimizer"))
    state = Run(on_photos(photos, 4), tmp_path / "whole", init_from=init).train()
    assert (int(state.step), int(state.images)) == (4, 64)
    Run(on_photos(photos, 4), tmp_path / "fresh").train()
    Run(on_photos(photos, 2), tmp_path / "killed", init_from=init).train()
    Run(on_photos(photos, 4), tmp_path / "killed", init_from=init).train()
    whole, killed, fresh = (read(tmp_path / name, on_photos(photos, 4)) for name in ("whole", "killed", "fresh"))
    assert states_equal(whole[0], killed[0])
    # The order of the data is that of any new run.
    assert whole[1]["examples_seen"] == fresh[1]["examples_seen"] == 64
    assert not states_equal(jax.device_get(whole[0].g.params), jax.device_get(fresh[0].g.params))


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
