"""What can go wrong with the disk under a run: each fault ends as docs/runs.md says, and loses nothing that was good."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gigagan_jax.checkpoint.manager import states_equal
from tests.runs import child, finished, log, read, small

TWELVE = ("--config.total_kimg=0.192", "--config.checkpoint_kimg=0.064")


def errors(workdir):
    return [line for line in log(workdir).splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir of a run of 12 steps, checkpoints at 4, 8 and 12; not to be written to."""
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    assert child(workdir, *TWELVE).wait(300) == 0, log(workdir)
    return workdir


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [pytest.param(truncate, marks=pytest.mark.slow), flip])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(whole, tmp_path, harm):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    files = [p for p in (workdir / "checkpoints" / "12" / "state").rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    harm(victim)
    assert child(workdir, *TWELVE).wait(300) == 0, log(workdir)
    (line,) = [line for line in log(workdir).splitlines() if "DAMAGED" in line]
    assert re.search(
        rf"checkpoints/12 is DAMAGED \(.*{victim.name}.*moved to .*12\.damaged; going on from step 8", line
    )
    assert "Traceback" not in log(workdir)
    (a, data_a), (b, data_b) = read(whole, small()), read(workdir, small())
    assert states_equal(a, b)
    assert data_a == data_b
    # Nobody's to remove but the user's.
    assert (workdir / "checkpoints" / "12.damaged" / victim.relative_to(workdir / "checkpoints" / "12")).exists()


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system at a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def may_mount(tmp_path):
    probe = tmp_path / "probe"
    probe.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True).returncode:
        return False
    return subprocess.run(["umount", probe]).returncode == 0


def test_a_full_disk_during_a_save(whole, tmp_path):
    """The run ends, saying so; with space again it goes on, and becomes what it would have been.

    Where no file system can be mounted no file may be larger than 100 kB: writing fails with another word of the system's.
    """
    workdir = tmp_path / "run"
    fields = (*TWELVE, "--config.checkpoint.keep=9", "--config.checkpoint.full_disk_seconds=0")
    with contextlib.ExitStack() as stack:
        if may_mount(tmp_path):
            size = sum(p.stat().st_size for p in (whole / "checkpoints" / "12").rglob("*") if p.is_file())
            stack.enter_context(mounted(workdir, f"size={8 * size}"))
            filler = workdir / "filler"
            filler.write_bytes(bytes(int(6.2 * size)))  # space for one, not for two
            process = child(workdir, *fields)
            free = filler.unlink
        else:
            process = child(workdir, *fields)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
            free = lambda: None
        assert process.wait(300) == 2, log(workdir)
        (line,) = errors(workdir)
        assert re.search(r"cannot write .*(No space left|File too large|Disk quota)", line)
        assert "Traceback" not in log(workdir)
        before = finished(workdir / "checkpoints")
        assert before < 12
        free()
        assert child(workdir, *fields).wait(300) == 0, log(workdir)
        assert (f"resume: restoring checkpoint {before}" if before else "start: initialising") in log(workdir)
        assert states_equal(read(whole, small())[0], read(workdir, small())[0])


def test_an_unwritable_workdir(tmp_path):
    """A read-only file system, and where none can be mounted, or besides, a file in the way: one line, nothing changed."""
    roots = [tmp_path / "file"]
    roots[0].write_text("")
    with contextlib.ExitStack() as stack:
        if may_mount(tmp_path):
            roots.append(tmp_path / "fixed")
            stack.enter_context(mounted(roots[1], "ro"))
        for root in roots:
            command = [sys.executable, "-m", "gigagan_jax.train", "--config=configs/digits.py:tiny"]
            done = subprocess.run(
                [*command, f"--workdir={root / 'run'}"], cwd=Path(__file__).parents[2], capture_output=True, text=True
            )
            assert done.returncode == 2
            (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert re.search(rf"--workdir={root / 'run'} cannot be used: (Not a directory|Read-only file system)", line)
            assert "Traceback" not in done.stderr
    assert roots[0].read_text() == ""
