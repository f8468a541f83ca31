"""A checkpoint is finished when it has its name, whatever Orbax takes the file system for.

Orbax marks finished checkpoints with a file commit_success.txt. On buckets, and in versions to come on buckets that are mounted,
it takes a checkpoint without that file as half written; versions before it wrote none on a mounted disk.
"""

import jax
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity, atomicity_defaults
from orbax.checkpoint._src.path import step as step_lib

from gigagan_jax.checkpoint.checksums import CHECKSUMS_FILE, write_checksums
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.workdir import open_workdir
from tests.checkpoint.test_manager import abstract, save, state
from tests.runs import small

MARKER = "commit_success.txt"


@pytest.fixture
def unmarked(tmp_path, monkeypatch):
    """A workdir with checkpoints 2 and 4 that have no marker, on what Orbax now takes for a bucket."""
    config = small()
    open_workdir(tmp_path, config)
    checkpoints = Checkpoints(tmp_path, config)
    save(checkpoints, config, 2, 4)
    checkpoints.close()
    markers = list(tmp_path.rglob(MARKER))
    for marker in markers:
        marker.unlink()
    for step in (2, 4):
        (tmp_path / "checkpoints" / str(step) / CHECKSUMS_FILE).unlink()
        write_checksums(tmp_path / "checkpoints" / str(step))
    default = atomicity_defaults._resolve_temporary_path_class_from_options
    bucket = lambda path, *, atomicity_options=None: default(atomicity_options) or atomicity.CommitFileTemporaryPath
    for name in ("get_default_temporary_path_class", "get_item_default_temporary_path_class"):
        assert hasattr(atomicity_defaults, name)
        monkeypatch.setattr(atomicity_defaults, name, bucket)
    return tmp_path


def test_orbax_alone_takes_them_as_half_written(unmarked):
    """What the other tests are about is there."""
    folder = unmarked / "checkpoints" / "4"
    assert not step_lib.is_path_finalized(folder)
    assert step_lib.is_path_temporary(folder)


def test_they_are_sampled_from(unmarked):
    checkpoints = Checkpoints(unmarked)
    assert checkpoints.all_steps() == [2, 4]
    assert checkpoints.latest_valid_step() == 4
    restored, position = checkpoints.restore(4, abstract())
    checkpoints.close()
    checkpoints = Checkpoints(unmarked)
    part = checkpoints.restore_partial(4, {"b": abstract()["b"]})
    checkpoints.close()
    assert np.array_equal(restored["a"], state(4)["a"])
    assert np.array_equal(part["b"]["c"], state(4)["b"]["c"])
    assert position == {"examples_seen": 64}


def test_a_run_goes_on_from_them_and_keeps_them(unmarked):
    config = small()
    checkpoints = Checkpoints(unmarked, config)
    step, restored, _ = checkpoints.restore_latest_valid(abstract())
    assert step == 4
    assert np.array_equal(jax.device_get(restored["a"]), state(4)["a"])
    save(checkpoints, config, 6)
    checkpoints.close()
    assert sorted(p.name for p in (unmarked / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert Checkpoints(unmarked).latest_valid_step() == 6


def test_half_written_folders_go_and_no_others(unmarked):
    folder = unmarked / "checkpoints"
    (folder / "6.orbax-checkpoint-tmp-1").mkdir()
    Checkpoints(unmarked, small()).close()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
