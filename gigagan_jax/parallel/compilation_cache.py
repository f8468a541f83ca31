"""The persistent compilation cache: a run that restarts loads its compiled programs from disk."""

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
from gigagan_jax.core.workdir_files import COMPILATION_CACHE_FOLDER

_log = logging.getLogger(__name__)
# Its time stamp: cache files that are older were found complete.
CHECKED_FILE = ".checked"
# Programs that compile faster are not worth a file.
_MIN_SECONDS = 0.1
# Another run may still be writing a file that is younger.
_WRITING_SECONDS = 10
# Parameters of the private functions below, in the order of jax 0.10.2 to 0.11.2; 0.10 has one more.
_WRITE_PARAMETERS = ("cache_key", "compile_time_secs", "module_name", "backend", "executable")
_PUT_PARAMETERS = ("cache_key", "module_name", "executable", "backend", "compile_time")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--compilation_cache"""
    parser.add_argument(
        "--compilation_cache",
        default="",
        help="folder of compiled programs, or off (<workdir>/compilation_cache, or $JAX_COMPILATION_CACHE_DIR where it is set)",
    )


def enable_compilation_cache(where: str, workdir: Path) -> Path | None:
    """Enables the persistent cache. Call it before the first compilation, with the same folder on all processes.

    Args:
      where: the flag: a folder, "off", or "" for the environment's or the workdir's.
      workdir: of the run.

    Returns:
      The folder; None without a cache, or with one in a bucket.

    Raises:
      UserError: the folder cannot be made or written to.
    """
    if where == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    chosen = where or os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    # JAX writes to buckets itself.
    if "://" in chosen:
        jax.config.update("jax_compilation_cache_dir", chosen)
        return None
    folder = Path(chosen or workdir / COMPILATION_CACHE_FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        # Opening the workdir reports the same error, with a message about the workdir.
        if not chosen:
            return None
        raise UserError(
            f"--compilation_cache={folder} cannot be used: {e.strerror or e}; name another, or off"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    # A program that was compiled before this call has fixed the cache's folder for the process (jax-ml/jax#25768).
    compilation_cache.reset_cache()
    if jax.process_index() == 0:
        # Process 0 only: the folder is shared.
        remove_incomplete_programs(folder)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        _write_on_all_processes()
    return folder


def remove_incomplete_programs(folder: Path) -> None:
    """Removes files that a killed process left incomplete. JAX warns of them at every start, and never replaces one.

    Each file is read once, at the first start after it was written.
    """
    stamp = folder / CHECKED_FILE
    try:
        since = stamp.stat().st_mtime if stamp.exists() else 0.0
        stamp.touch()
        # The time of a file just touched is by the clock of the disk, as the times of the cache files are.
        until = stamp.stat().st_mtime - _WRITING_SECONDS
        for file in folder.glob("*-cache"):
            if since <= file.stat().st_mtime < until and not _is_complete(file):
                file.unlink()
        os.utime(stamp, (until, until))
    # Training works with a disk that is full, and another run may have removed the same file first.
    except OSError as e:
        _log.debug("the compiled programs in %s could not be checked: %s", folder, e)


def _is_complete(file: Path) -> bool:
    """Whether a compressed program is complete; True if no module here can read it."""
    with open(file, "rb") as f:
        start = f.read(4)
        f.seek(0)
        reader: Any = zlib.decompressobj()
        # The magic number of Zstandard, which JAX prefers over zlib if a module for it is installed.
        if start == b"\x28\xb5\x2f\xfd":
            reader = _zstandard_decompressor()
        if reader is None:
            return True
        try:
            # In pieces of 1 MB, so that a large program is never in memory at once.
            while not reader.eof and (part := f.read(1 << 20)):
                reader.decompress(part)
        # Each of the three modules has its own class of errors.
        except Exception:
            return False
    return reader.eof


def _zstandard_decompressor() -> Any:
    """A decompressor of the standard library (from Python 3.14 on) or of `zstandard`; None without both."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").ZstdDecompressor()
    with contextlib.suppress(ImportError):
        return importlib.import_module("zstandard").ZstdDecompressor().decompressobj()
    return None


def _write_on_all_processes() -> None:
    """Lets every process write its programs. JAX writes those of process 0 only; on CPUs the others' programs differ."""
    # JAX has no setting for this (requested in jax-ml/jax#18819), so a private function is replaced. That happens only
    # if its parameters are those of the tested versions; another JAX keeps its own behaviour.
    try:
        from jax._src import compilation_cache as files
        from jax._src import compiler

        write, put = compiler._cache_write, files.put_executable_and_time
        known_writes = (_WRITE_PARAMETERS, (*_WRITE_PARAMETERS, "host_callbacks"))
        known = _parameter_names(write) in known_writes and _parameter_names(put) == _PUT_PARAMETERS
    except (ImportError, AttributeError):
        known = False
    if not known:
        _log.warning(
            "jax %s keeps the compiled programs of process 0 only: the others compile at each start", jax.__version__
        )
        return

    takes_callbacks = len(_parameter_names(write)) > len(_WRITE_PARAMETERS)

    def write_on_each_process(
        key: str, seconds: float, name: str, backend: Any, executable: Any, callbacks: Any = ()
    ) -> None:
        if jax.process_index() == 0:
            write(key, seconds, name, backend, executable, *([callbacks] if takes_callbacks else []))
        # Programs with host callbacks hold addresses of this process: JAX does not write them either.
        elif not callbacks and seconds >= jax.config.values["jax_persistent_cache_min_compile_time_secs"]:
            try:
                put(key, name, executable, backend, int(seconds))
            # As JAX does: a full disk must not end training.
            except Exception as e:
                _log.warning("cannot keep the compiled program %s: %s", name, e)

    compiler._cache_write = write_on_each_process  # type: ignore[assignment]


def _parameter_names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
