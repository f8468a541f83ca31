"""Room for checkpoints: what is said at the start, and that training waits for space and loses nothing."""

import collections
import errno
import logging
import threading
import types

import jax
import pytest

from gigagan_jax.checkpoint import disk_space
from gigagan_jax.checkpoint.disk_space import DiskSpace
from gigagan_jax.checkpoint.manager import Checkpoints, states_equal
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.checkpoint.write_errors import DiskFull, write_error
from gigagan_jax.core.errors import UserError
from gigagan_jax.training import loop, saving
from gigagan_jax.training.saving import CheckpointSaver
from tests.checkpoint.test_disk_faults import may_mount, mounted
from tests.checkpoint.test_manager import abstract, state
from tests.runs import small

Usage = collections.namedtuple("Usage", "total used free")
NEVER = lambda: False
# A state of 100 MB: with the small files 101.
LARGE = {"x": jax.ShapeDtypeStruct((25_000_000,), "float32")}


@pytest.fixture
def free(monkeypatch):
    """free(*sizes): what the disk has at each look; the last one stays."""

    def set_free(*sizes):
        left = list(sizes)
        take = lambda folder: Usage(10**12, 0, left.pop(0) if len(left) > 1 else left[0])
        monkeypatch.setattr(disk_space.shutil, "disk_usage", take)

    return set_free


@pytest.mark.parametrize(
    "megabytes, existing, kimg, words",
    [
        (50, 0, 10, "refused"),
        (50, 3, 10, "refused"),
        # Three and one more.
        (410, 0, 10, None),
        (390, 0, 10, "3 checkpoints of 101 MB are kept, and one more while it is written, which takes 404 MB more"),
        # Those that are there need no room.
        (390, 1, 10, None),
        (110, 3, 10, None),
        # A run of two checkpoints keeps two.
        (210, 0, 2, None),
        (110, 0, 2, "keep=1"),
        # Nothing is written any more.
        (50, 3, 0, None),
    ],
)
def test_the_start_looks_for_room(tmp_path, free, caplog, megabytes, existing, kimg, words):
    config = small(checkpoint__keep=3, checkpoint_kimg=1.0, total_kimg=20.0)
    space = DiskSpace(RunFolder.open(tmp_path / "new" / "run"), config, LARGE)
    free(megabytes * 10**6)
    if words == "refused":
        with pytest.raises(UserError, match="has 50 MB free and a checkpoint takes 101 MB: free some space, or choose"):
            space.check_start(existing, kimg)
        return
    space.check_start(existing, kimg)
    assert len(caplog.records) == bool(words)
    assert (words or "") in caplog.text


def test_training_waits_for_room(tmp_path, free, caplog, monkeypatch):
    waits = []
    monkeypatch.setattr(disk_space.time, "sleep", waits.append)
    space = DiskSpace(RunFolder.open(tmp_path), small(), LARGE)
    free(60 * 10**6, 70 * 10**6, 200 * 10**6)
    space.wait_for_room(NEVER)
    assert waits == [5.0, 5.0]
    assert "lacks 41 MB for the checkpoint of 101 MB: training waits for free space, 10 min 00 s at most" in caplog.text
    # It is told to stop, or time is over: the save is tried, and fails as before.
    free(0)
    space.wait_for_room(lambda: True)
    DiskSpace(RunFolder.open(tmp_path), small(checkpoint__full_disk_seconds=0.0), LARGE).wait_for_room(NEVER)
    assert len(waits) == 2


def test_what_a_full_disk_is(tmp_path):
    place = RunFolder.open(tmp_path)
    full = [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left on device]"),
        ValueError("INTERNAL: [OS error 122: EDQUOT Disk quota exceeded]"),
    ]
    assert all(isinstance(write_error(place, "x", e, None), DiskFull) for e in full)
    assert not isinstance(write_error(place, "x", OSError(errno.EFBIG, "File too large"), None), DiskFull)


def test_a_save_without_room_is_made_again(tmp_path, monkeypatch, caplog):
    """A small file system without free inodes: its bytes seem to suffice. They are freed while the run waits."""
    if not may_mount(tmp_path):
        pytest.skip("no file system can be mounted here")
    monkeypatch.setattr(saving, "_RETRY_SECONDS", 0.3)
    config = small()
    with mounted(tmp_path / "run", "size=20m,nr_inodes=60"):
        fillers = [tmp_path / "run" / f"filler{i}" for i in range(45)]
        for filler in fillers:
            filler.touch()
        checkpoints = Checkpoints(tmp_path / "run", config)
        space = DiskSpace(RunFolder.open(tmp_path / "run"), config, abstract())
        saver = CheckpointSaver(checkpoints, space, 30.0, NEVER)
        threading.Timer(1.5, lambda: [filler.unlink() for filler in fillers]).start()
        start = lambda: checkpoints.save(4, state(4), {"examples_seen": 64}, config, images=64)
        with caplog.at_level(logging.WARNING):
            saver.save(start)
            if saver.has_failed():
                saver.save(start)
            saver.finish(start)
        assert "No space left on device" in caplog.text
        assert "training waits for free space" in caplog.text
        checkpoints.close()
        reader = Checkpoints(tmp_path / "run")
        assert reader.all_steps() == [4]
        assert states_equal(reader.restore_partial(reader.latest_valid_step(), abstract()), state(4))
        reader.close()


def test_it_is_given_up_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_RETRY_SECONDS", 0.01)
    config, tries = small(), []

    def start():
        tries.append(1)
        raise DiskFull("no room")

    checkpoints = Checkpoints(tmp_path, config)
    space = DiskSpace(RunFolder.open(tmp_path), config, abstract())
    with pytest.raises(DiskFull, match="no room"):
        CheckpointSaver(checkpoints, space, 0.2, NEVER).save(start)
    assert len(tries) > 1
    # A run that is told to stop waits for nothing.
    tries.clear()
    with pytest.raises(DiskFull):
        CheckpointSaver(checkpoints, space, 600.0, lambda: True).save(start)
    assert len(tries) == 1
    checkpoints.close()


@pytest.mark.parametrize("saving, judged", [(False, [1]), (True, [1, 2, 3])])
def test_a_save_that_is_made_again_holds_the_judgement_of_its_own_step(saving, judged):
    """None is due at step 3, two steps behind the first that is not judged yet."""
    seen = []
    observe = lambda step, images, metrics: seen.append(step)
    run = loop._Loop.__new__(loop._Loop)
    run.config = small(checkpoint_kimg=10.0, log_kimg=10.0)
    run.run = types.SimpleNamespace(signals=types.SimpleNamespace(number=0))
    run.guard = types.SimpleNamespace(monitor=types.SimpleNamespace(skipped=0), observe=observe)
    run.agreement, run.images, run.total_images = None, 48, 320
    run.pending = [loop._Pending(step, 16 * step, {}, None) for step in (1, 2, 3)]
    assert run._observe_pending_steps(saving=saving) == 0
    assert seen == judged
