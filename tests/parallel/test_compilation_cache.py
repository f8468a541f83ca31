"""Where compiled programs are kept; that a second start compiles none is in tests/training/test_run.py."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from gigagan_jax.parallel import compilation_cache

# Compiles one program, so that the chosen folder gets a file.
PROGRAM = """
import sys
import jax
from pathlib import Path
from gigagan_jax.parallel import compilation_cache
print(compilation_cache.enable_compilation_cache(sys.argv[1], Path(sys.argv[2])))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((32, 32)))
"""


def run_program(where, workdir, **environment):
    """What a process of its own says: the setting is the process's."""
    # pytest's own cache must not reach the child.
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {k: v for k, v in os.environ.items() if k not in names} | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", PROGRAM, where, workdir]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_flag_goes_before_the_environment_and_that_before_the_workdir(tmp_path):
    # Without a floor in seconds, the small program is kept too.
    at_once = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flag, environment, workdir = tmp_path / "flag", tmp_path / "environment", tmp_path / "w"
    assert run_program("", workdir, **at_once) == str(workdir / "compilation_cache")
    assert list_programs(workdir / "compilation_cache")
    variables = {"JAX_COMPILATION_CACHE_DIR": str(environment)} | at_once
    assert run_program(str(flag), tmp_path / "v", **variables) == str(flag)
    assert list_programs(flag)
    assert not environment.exists()
    assert run_program("", tmp_path / "v", **variables) == str(environment)
    assert list_programs(environment)
    assert run_program("off", tmp_path / "v", **at_once) == "None"
    assert not (tmp_path / "v").exists()


def test_a_folder_that_cannot_be_used(tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused(
        lambda: compilation_cache.enable_compilation_cache(str(tmp_path / "file" / "x"), tmp_path),
        "--compilation_cache=",
        "or off",
    )


def list_programs(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith("-cache"))


# Files younger than _WRITING_SECONDS are never checked.
def make_older(folder, seconds):
    for file in folder.iterdir():
        then = file.stat().st_mtime - seconds
        os.utime(file, (then, then))


def test_a_program_that_was_half_written_is_compiled_and_kept_again(tmp_path):
    """As a process leaves it that is killed while it writes."""
    at_once = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run_program(str(tmp_path), tmp_path, **at_once)
    names = list_programs(tmp_path)
    assert names
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        # The end is missing, as after a kill within a write.
        (tmp_path / name).write_bytes(whole[name][:-10])
    make_older(tmp_path, 60)
    run_program(str(tmp_path), tmp_path, PYTHONWARNINGS="error", **at_once)
    assert list_programs(tmp_path) == names
    assert all(len((tmp_path / name).read_bytes()) > len(whole[name]) - 10 for name in names)
    make_older(tmp_path, 60)
    before = {p: p.stat().st_mtime for p in tmp_path.glob("*-cache")}
    run_program(str(tmp_path), tmp_path, PYTHONWARNINGS="error", **at_once)
    assert {p: p.stat().st_mtime for p in tmp_path.glob("*-cache")} == before


ZSTANDARD = bytes.fromhex("28b52ffd200b590000") + b"hello hello"  # one frame, of one raw block


@pytest.mark.parametrize("content", [zlib.compress(bytes(range(256)) * 99), ZSTANDARD], ids=["zlib", "zstandard"])
def test_only_what_is_broken_and_old_enough_is_removed(tmp_path, content):
    # Without a module for Zstandard its files cannot be checked.
    if content is ZSTANDARD and compilation_cache._zstandard_decompressor() is None:
        content = zlib.compress(content)
    (tmp_path / "whole-cache").write_bytes(content)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / f"{length}-cache").write_bytes(content[:length])
    (tmp_path / "other").write_bytes(b"")
    young = list_programs(tmp_path)
    compilation_cache.remove_incomplete_programs(tmp_path)  # they may be in the middle of being written
    assert list_programs(tmp_path) == young
    make_older(tmp_path, 60)
    compilation_cache.remove_incomplete_programs(tmp_path)
    assert list_programs(tmp_path) == ["whole-cache"]
    assert (tmp_path / "other").exists()


def test_a_program_is_checked_once(tmp_path):
    (tmp_path / "a-cache").write_bytes(zlib.compress(b"program"))
    make_older(tmp_path, 60)
    compilation_cache.remove_incomplete_programs(tmp_path)
    then = (tmp_path / "a-cache").stat().st_mtime
    (tmp_path / "a-cache").write_bytes(b"")  # known to be whole: not read again
    os.utime(tmp_path / "a-cache", (then, then))
    compilation_cache.remove_incomplete_programs(tmp_path)
    assert list_programs(tmp_path) == ["a-cache"]


def test_a_folder_that_cannot_be_written_to_is_no_reason_not_to_train(tmp_path):
    compilation_cache.remove_incomplete_programs(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


# Two processes are pretended: only then the private function is replaced.
OTHER_JAX = """
import sys
import jax
from pathlib import Path
from jax._src import compiler
from gigagan_jax.parallel import compilation_cache
jax.process_count = lambda: 2
if sys.argv[2] == "other":
    compiler._cache_write = lambda key, executable, more: None
before = compiler._cache_write
compilation_cache.enable_compilation_cache(sys.argv[1], Path("x"))
print(compiler._cache_write is before)
"""


@pytest.mark.parametrize("which", ["other", "this"])
def test_a_private_function_of_jax_is_replaced_only_where_it_is_the_tested_one(tmp_path, which):
    """Else the run goes on without, with one warning."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", OTHER_JAX, str(tmp_path), which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(which == "other")]
    assert len(done.stderr.splitlines()) == (which == "other"), done.stderr
    assert ("keeps the compiled programs of process 0 only" in done.stderr) == (which == "other")
