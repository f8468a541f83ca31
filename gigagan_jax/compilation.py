"""Compiled programs kept on disk, so that a run that starts again does not compile again."""

import argparse
import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache, compiler, lru_cache

from gigagan_jax.errors import UserError

FOLDER = "compilation_cache"
_MIN_SECONDS = 0.1  # programs that compile faster are not worth a file


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--compilation_cache"""
    parser.add_argument(
        "--compilation_cache",
        default="",
        help="folder of compiled programs, or off (<workdir>/compilation_cache, or $JAX_COMPILATION_CACHE_DIR where it is set)",
    )


class _AtomicCache(lru_cache.LRUCache):
    """JAX's cache, whose files appear whole: it would never replace one that a killed process had half written."""

    def put(self, key: str, value: bytes) -> None:
        name = f"{key}{lru_cache._CACHE_SUFFIX}"
        if self.eviction_enabled or (self.path / name).exists():
            super().put(key, value)
            return
        temporary = self.path / f".{secrets.token_hex(6)}.tmp"
        try:
            temporary.write_bytes(value)
            temporary.rename(self.path / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


_write_by_process_0 = compiler._cache_write


def _write(
    cache_key: str,
    compile_time_secs: float,
    module_name: str,
    backend: Any,
    executable: Any,
    host_callbacks: Sequence[Any],
) -> None:
    """JAX lets process 0 write for all. Processes on CPUs have programs of their own, which it would never write."""
    if backend.platform != "cpu" or jax.process_index() == 0:
        _write_by_process_0(cache_key, compile_time_secs, module_name, backend, executable, host_callbacks)
    elif not host_callbacks and compile_time_secs >= jax.config.values["jax_persistent_cache_min_compile_time_secs"]:
        seconds = int(compile_time_secs)
        try:
            compilation_cache.put_executable_and_time(cache_key, module_name, executable, backend, seconds)
        except Exception as e:  # as JAX does: a full disk is no reason not to train
            warnings.warn(f"cannot keep the compiled program {module_name}: {e}")


def _open(path: str) -> tuple[lru_cache.LRUCache, str]:
    return _AtomicCache(path, max_size=jax.config.values["jax_compilation_cache_max_size"]), path


def keep_programs(where: str, workdir: Path) -> Path | None:
    """Keeps compiled programs; comes before the first is compiled. Returns the folder; None for none on this machine.

    Give all processes the same folder.

    Args:
      where: the flag: a folder, "off", or "" for the environment's or the workdir's.
      workdir: of the run.

    Raises:
      UserError: the folder cannot be made or written to.
    """
    if where == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    named = where or os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in named:  # a bucket: JAX knows how
        jax.config.update("jax_compilation_cache_dir", named)
        return None
    folder = Path(named or workdir / FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        if not named:
            return None  # what is wrong with the workdir is said where it is opened
        raise UserError(
            f"--compilation_cache={folder} cannot be used: {e.strerror or e}; name another, or off"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    compilation_cache.get_file_cache, compiler._cache_write = _open, _write
    compilation_cache.reset_cache()
    return folder
