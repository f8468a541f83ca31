"""Where compiled programs are kept; that a second start compiles none is in tests/training/test_run.py."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gigagan_jax import compilation

PROGRAM = """
import sys
import jax
from pathlib import Path
from gigagan_jax import compilation
print(compilation.keep_programs(sys.argv[1], Path(sys.argv[2])))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((32, 32)))
"""


def run(where, workdir, **environment):
    """What a process of its own says: the setting is the process's."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {k: v for k, v in os.environ.items() if k not in names} | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", PROGRAM, where, workdir]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_flag_goes_before_the_environment_and_that_before_the_workdir(tmp_path):
    at_once = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flag, environment, workdir = tmp_path / "flag", tmp_path / "environment", tmp_path / "w"
    assert run("", workdir, **at_once) == str(workdir / "compilation_cache")
    assert any(p.name.endswith("-cache") for p in (workdir / "compilation_cache").iterdir())
    there = {"JAX_COMPILATION_CACHE_DIR": str(environment)} | at_once
    assert run(str(flag), tmp_path / "v", **there) == str(flag)
    assert list(flag.iterdir())
    assert not environment.exists()
    assert run("", tmp_path / "v", **there) == str(environment)
    assert list(environment.iterdir())
    assert run("off", tmp_path / "v", **at_once) == "None"
    assert not (tmp_path / "v").exists()


def test_a_folder_that_cannot_be_used(tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused(lambda: compilation.keep_programs(str(tmp_path / "file" / "x"), tmp_path), "--compilation_cache=", "or off")


def test_files_appear_whole_or_not_at_all(tmp_path):
    """Here the disk takes no more than a part."""
    cache = compilation._AtomicCache(str(tmp_path), max_size=-1)
    cache.put("a", b"program")
    assert cache.get("a") == b"program"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            cache.put("b", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.get("b") is None
    assert len(list(tmp_path.iterdir())) == 1
