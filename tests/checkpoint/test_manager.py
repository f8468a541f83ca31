"""Checkpoints without training: which are kept, what counts as damage, and what a run does about it."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from gigagan_jax.checkpoint import checksums
from gigagan_jax.checkpoint.checksums import CHECKSUMS_FILE, verify_checksums, write_checksums
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.retention import CheckpointInfo, checkpoints_to_keep
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import CheckpointConfig
from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.parallel.signals import Interrupted, StopSignals
from tests.runs import small


def made(*steps, metric=None):
    return [CheckpointInfo(s, 1000 * s, (metric or {}).get(s)) for s in steps]


def test_kept_newest():
    assert checkpoints_to_keep(made(1, 2, 3, 4), CheckpointConfig(keep=2)) == {3, 4}
    assert checkpoints_to_keep(made(1), CheckpointConfig(keep=3)) == {1}


def test_kept_one_of_every_so_many_images_for_ever():
    """Saved every 3 kimg, one kept every 10: pruned after each save, the same stay as at the end."""
    settings = CheckpointConfig(keep=1, keep_every_kimg=10.0)
    here = []
    for step in range(3, 60, 3):
        here = [m for m in [*here, *made(step)] if m.step in checkpoints_to_keep([*here, *made(step)], settings)]
    assert [m.step for m in here] == [12, 21, 30, 42, 51, 57]


def test_kept_best():
    metric = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.0}
    best = CheckpointConfig(keep=1, keep_best=2, best_metric="fid")
    assert checkpoints_to_keep(made(1, 2, 3, 4, 5, 6, metric=metric), best) == {2, 5, 6}  # of equals the newer one
    most = dataclasses.replace(best, best_mode="max")
    assert checkpoints_to_keep(made(1, 2, 3, 4, 5, 6, metric=metric), most) == {1, 5, 6}


def test_what_cannot_be_read_is_kept():
    assert checkpoints_to_keep([CheckpointInfo(1, None), *made(2, 3)], CheckpointConfig(keep=1)) == {1, 3}


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"keep": 0}, "checkpoint.keep"),
        ({"keep_best": 1}, "needs config.checkpoint.best_metric"),
        ({"best_mode": "least"}, "must be one of 'min', 'max'"),
        ({"keep_every_kimg": -1.0}, "must not be negative"),
        ({"timeout_seconds": 0}, "greater than 0"),
    ],
)
def test_bad_settings(fields, word, refused):
    refused(lambda: small(**{f"checkpoint__{k}": v for k, v in fields.items()}), word)


def state(step):
    return {"a": jax.numpy.arange(2000.0) + step, "b": {"c": jax.numpy.full((3, 4), step, "int32")}}


def abstract():
    where = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state(0))


def save(checkpoints, config, *steps, fid=None):
    for step in steps:
        data = {"examples_seen": 16 * step}
        metrics = {"fid": (fid or {}).get(step, float("nan"))}
        checkpoints.save(step, state(step), data, config, images=16 * step, metrics=metrics)
    checkpoints.wait_until_finished()


@pytest.fixture
def three(tmp_path):
    """A workdir with checkpoints 2, 4 and 6."""
    config = small()
    open_workdir(tmp_path, config)
    checkpoints = Checkpoints(tmp_path, config)
    save(checkpoints, config, 2, 4, 6)
    checkpoints.close()
    return tmp_path


def test_a_run_prunes_by_all_rules_and_over_restarts(tmp_path):
    config = small(
        checkpoint__keep=1, checkpoint__keep_every_kimg=0.08, checkpoint__keep_best=1, checkpoint__best_metric="fid"
    )
    fid = {2: 9.0, 4: 3.0, 6: 8.0, 8: 7.0, 10: 6.0, 12: 5.0}
    for steps in ((2, 4, 6), (8, 10, 12)):  # a second process knows of the first one's only what is on the disk
        checkpoints = Checkpoints(tmp_path, config)
        checkpoints.check_metrics({"fid": 1.0})
        save(checkpoints, config, *steps, fid=fid)
        checkpoints.close()
    assert checkpoints.all_steps() == [4, 6, 10, 12]  # best; first from 80 images; first from 160; newest


def test_a_metric_that_is_not_there(tmp_path, refused):
    config = small(checkpoint__keep_best=1, checkpoint__best_metric="digits/frechett")
    checkpoints = Checkpoints(tmp_path, config)
    refused(lambda: checkpoints.check_metrics({"digits/frechet": 1, "loss/d": 2}), "did you mean digits/frechet?")
    checkpoints.close()


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file):
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 0x10]))


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def all_files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_each_file_of_a_checkpoint_is_watched(three):
    """Any file, cut, removed or with one bit changed, is found and named; what Orbax reads none of is let be."""
    good = three / "checkpoints" / "6"
    assert verify_checksums(good) is None
    bad = three / "bad"
    for file in all_files(good):
        if file.endswith("commit_success.txt"):
            continue
        for harm in (cut, flip, os.remove):
            shutil.copytree(good, bad)
            harm(bad / file)
            what = verify_checksums(bad)
            # A changed time in Orbax's own note of when it was written is as good as another.
            assert what is not None or (file == "_CHECKPOINT_METADATA" and harm is flip), (file, harm)
            assert what is None or file in what
            shutil.rmtree(bad)


def test_checkpoints_of_before_have_no_checksums(three):
    here = three / "checkpoints" / "6"
    text = (here / "_CHECKPOINT_METADATA").read_text()
    os.remove(here / CHECKSUMS_FILE)
    assert verify_checksums(here) == f"{CHECKSUMS_FILE} is missing"
    old = json.loads(text) | {"custom_metadata": {}}
    (here / "_CHECKPOINT_METADATA").write_text(json.dumps(old))
    assert verify_checksums(here) is None
    os.remove(here / "data" / "metadata")
    assert verify_checksums(here) == "data/metadata is missing"


def write_parts(folder):
    """The files that every checkpoint has, with nothing in them."""
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "data/metadata", "config/metadata"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


def test_checksums_are_of_whole_files(tmp_path, monkeypatch):
    """Files are read in chunks: one bit is found in each of them."""
    monkeypatch.setattr(checksums, "_CHUNK", 16)
    write_parts(tmp_path)
    file = tmp_path / "state" / "array"
    whole = bytes(range(40))
    file.write_bytes(whole)
    write_checksums(tmp_path)
    for place in (0, 20, 39):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert verify_checksums(tmp_path) == "state/array does not have the checksum that it was written with"
    file.write_bytes(whole)
    assert verify_checksums(tmp_path) is None


def test_checksums_say_what_differs(tmp_path):
    write_parts(tmp_path)
    write_checksums(tmp_path)
    assert verify_checksums(tmp_path) is None
    (tmp_path / "state/_METADATA").write_text("[]")
    assert verify_checksums(tmp_path) == "state/_METADATA does not have the checksum that it was written with"
    (tmp_path / "state/_METADATA").write_text("{} ")
    assert verify_checksums(tmp_path) == "state/_METADATA has 3 bytes and not 2"


def test_a_damaged_newest_one_is_put_aside_and_the_one_before_is_used(three, caplog):
    config = small()
    victim = largest(three / "checkpoints" / "6")
    flip(victim)
    cut(largest(three / "checkpoints" / "4" / "state"))
    checkpoints = Checkpoints(three, config)
    with caplog.at_level(logging.ERROR):
        step, restored, data = checkpoints.restore_latest_valid(abstract())
    assert step == 2
    assert np.array_equal(restored["a"], state(2)["a"])
    assert data["examples_seen"] == 32
    assert any("6 is DAMAGED" in r.message and victim.name in r.message for r in caplog.records)
    assert any("4 is DAMAGED" in r.message and "bytes and not" in r.message for r in caplog.records)
    assert sorted(p.name for p in (three / "checkpoints").iterdir() if "damaged" in p.name) == [
        "4.damaged",
        "6.damaged",
    ]
    # The run goes on and writes the same steps again; should they be damaged again, both copies stay.
    save(checkpoints, config, 4, 6)
    checkpoints.close()
    flip(largest(three / "checkpoints" / "6"))
    assert Checkpoints(three, config).latest_valid_step() == 4
    assert (three / "checkpoints" / "6.damaged").is_dir()
    assert (three / "checkpoints" / "6.damaged.2").is_dir()


def test_within_a_run_it_goes_back_to_the_newest_whole_one(tmp_path):
    """For a rollback: what is being saved is waited for, and checked."""
    config = small()
    checkpoints = Checkpoints(tmp_path, config)
    assert checkpoints.restore_latest_valid(abstract()) is None
    checkpoints.save(2, state(2), {}, config)
    checkpoints.save(4, state(4), {}, config)
    assert checkpoints.restore_latest_valid(abstract())[0] == 4
    save(checkpoints, config, 6)
    flip(largest(tmp_path / "checkpoints" / "6" / "state"))
    assert checkpoints.restore_latest_valid(abstract())[0] == 4
    save(checkpoints, config, 6)
    assert checkpoints.restore_latest_valid(abstract())[0] == 6
    checkpoints.close()


def test_where_all_are_damaged_nothing_is_touched(three, refused):
    folder = three / "checkpoints"
    for step in (2, 4, 6):
        cut(largest(folder / str(step)))
    before = all_files(folder)
    for _ in range(2):  # a launcher may try again
        said = refused(
            lambda: Checkpoints(three, small()).latest_valid_step(), "every checkpoint in", "nothing was changed"
        )
        assert all(f"{step}: " in said for step in (2, 4, 6))
    assert all_files(folder) == before
    for step in (2, 4, 6):
        (folder / str(step)).rename(folder / f"{step}.damaged")
    refused(lambda: Checkpoints(three, small()).latest_valid_step(), "put aside as damaged")


def test_reading_falls_back_and_moves_nothing(three, caplog):
    """As `sample` does."""
    flip(largest(three / "checkpoints" / "6" / "state"))
    before = all_files(three)
    checkpoints = Checkpoints(three)
    assert checkpoints.latest_valid_step() == 4
    part = {"b": abstract()["b"]}
    assert np.array_equal(checkpoints.restore_partial(4, part)["b"]["c"], state(4)["b"]["c"])
    checkpoints.close()
    assert any("6 is damaged" in r.message and "using 4" in r.message for r in caplog.records)
    assert all_files(three) == before


def test_the_config_is_read_from_the_newest_that_has_one(three):
    (three / "config.json").unlink()
    cut(three / "checkpoints" / "6" / "config" / "metadata")
    with pytest.raises(UserError, match=r"generator\.z_dim: 8 -> 16"):
        open_workdir(three, small(generator__z_dim=16))


def test_a_save_that_breaks_with_another_process_is_not_called_a_full_disk(tmp_path):
    """What is lost then is the other process: the watch over processes names it."""
    checkpoints = Checkpoints(tmp_path, small())

    def lost():
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:22412")

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        checkpoints._run_write(full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Connection closed by peer"):
        checkpoints._run_write(lost)


def test_what_passes_is_not_called_the_disk_s_or_the_checkpoint_s_fault(three, monkeypatch):
    """Launchers try again after 1, not after 2."""
    checkpoints = Checkpoints(three, small())

    def late():
        raise TimeoutError("timed out") from jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: async_commit_complete")

    def away(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    def lost(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed")

    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints._run_write(late)
    with pytest.raises(Unreachable, match="Stale file handle") as stale:
        checkpoints._run_write(away)
    assert stale.value.code == 1
    monkeypatch.setattr(checkpoints._manager, "restore", away)
    with pytest.raises(Unreachable, match="cannot be read now"):
        checkpoints.restore(6, abstract())
    monkeypatch.setattr(checkpoints._manager, "restore", lost)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(6, abstract())
    checkpoints._failed = True  # nothing of it is to be waited for


def test_a_signal_while_a_checkpoint_is_read_says_nothing_of_the_checkpoint(three, monkeypatch):
    checkpoints = Checkpoints(three, small())
    monkeypatch.setattr(checkpoints._manager, "restore", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), StopSignals():
        checkpoints.restore(6, abstract())
    checkpoints.close()


def test_a_given_step_is_verified(three, refused):
    checkpoints = Checkpoints(three)
    assert checkpoints.require_step(4) == 4
    refused(lambda: checkpoints.require_step(5), f"{three} has no checkpoint of step 5; there are: 2, 4, 6")
    flip(largest(three / "checkpoints" / "6"))
    refused(lambda: checkpoints.require_step(6), "checkpoints/6 cannot be read (damaged: ", "go on from step 4")
    checkpoints.close()
