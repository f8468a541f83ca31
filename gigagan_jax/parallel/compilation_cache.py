"""Compiled programs kept on disk, so that a run that starts again does not compile again."""

import argparse
import contextlib
import importlib
import inspect
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from gigagan_jax.core.errors import UserError

_log = logging.getLogger(__name__)
FOLDER = "compilation_cache"
CHECKED = ".checked"  # as old as the newest file that is known to be whole
_MIN_SECONDS = 0.1  # programs that compile faster are not worth a file
_WRITTEN_SECONDS = 10  # a younger file may be in the middle of being written by another run
# Parameters of the private functions below, in the order of jax 0.10.2 to 0.11.2; 0.10 has one more.
_WRITE = ("cache_key", "compile_time_secs", "module_name", "backend", "executable")
_PUT = ("cache_key", "module_name", "executable", "backend", "compile_time")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--compilation_cache"""
    parser.add_argument(
        "--compilation_cache",
        default="",
        help="folder of compiled programs, or off (<workdir>/compilation_cache, or $JAX_COMPILATION_CACHE_DIR where it is set)",
    )


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
    compilation_cache.reset_cache()
    if jax.process_index() == 0:
        remove_broken(folder)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        _let_all_write()
    return folder


def remove_broken(folder: Path) -> None:
    """Removes the programs that a killed process had half written: JAX warns of each at every start, and never replaces one.

    Each file is read once, at the first start after it was written.
    """
    stamp = folder / CHECKED
    try:
        since = stamp.stat().st_mtime if stamp.exists() else 0.0
        stamp.touch()
        until = stamp.stat().st_mtime - _WRITTEN_SECONDS  # by the clock of the disk, as the files' times are
        for file in folder.glob("*-cache"):
            if since <= file.stat().st_mtime < until and not _whole(file):
                file.unlink()
        os.utime(stamp, (until, until))
    except OSError as e:  # a disk that cannot be written to is no reason not to train; or another run was faster
        _log.debug("the compiled programs in %s could not be checked: %s", folder, e)


def _whole(file: Path) -> bool:
    """Whether a program is there to its end; True where this cannot be told."""
    with open(file, "rb") as f:
        start = f.read(4)
        f.seek(0)
        reader: Any = zlib.decompressobj()
        if start == b"\x28\xb5\x2f\xfd":  # Zstandard, which JAX takes where it finds a module for it
            reader = _zstandard()
        if reader is None:
            return True
        try:
            while not reader.eof and (part := f.read(1 << 20)):
                reader.decompress(part)
        except Exception:  # each of the three modules has an error of its own
            return False
    return reader.eof


def _zstandard() -> Any:
    """What reads Zstandard here, or None: Python has a module of its own from 3.14 on."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").ZstdDecompressor()
    with contextlib.suppress(ImportError):
        return importlib.import_module("zstandard").ZstdDecompressor().decompressobj()
    return None


def _let_all_write() -> None:
    """JAX lets process 0 write for all. Processes on CPUs have programs of their own, which it would never write.

    JAX has no setting for this, so a private function is replaced, where it is the one that was tested.
    """
    try:
        from jax._src import compilation_cache as files
        from jax._src import compiler

        write, put = compiler._cache_write, files.put_executable_and_time
        known = _names(write) in (_WRITE, (*_WRITE, "host_callbacks")) and _names(put) == _PUT
    except (ImportError, AttributeError):
        known = False
    if not known:
        _log.warning(
            "jax %s keeps the compiled programs of process 0 only: the others compile at each start", jax.__version__
        )
        return

    def write_mine(key: str, seconds: float, name: str, backend: Any, executable: Any, callbacks: Any = ()) -> None:
        if jax.process_index() == 0:
            write(key, seconds, name, backend, executable, *([callbacks] if len(_names(write)) > len(_WRITE) else []))
        elif not callbacks and seconds >= jax.config.values["jax_persistent_cache_min_compile_time_secs"]:
            try:
                put(key, name, executable, backend, int(seconds))
            except Exception as e:  # as JAX does: a full disk is no reason not to train
                _log.warning("cannot keep the compiled program %s: %s", name, e)

    compiler._cache_write = write_mine  # type: ignore[assignment]


def _names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
