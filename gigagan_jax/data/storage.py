"""Files by path or address: local, `gs://`, `s3://`, `file://` and whatever else fsspec knows; patient with servers.

A server that does not answer is asked again, with growing pauses, for `retry_seconds`; a file that is not there is not.
"""

import collections
import glob
import hashlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from gigagan_jax.core.errors import Unreachable, UserError, passing

_log = logging.getLogger(__name__)

T = TypeVar("T")
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "updated")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_OPEN_FILES = 128  # of one process
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
# What client libraries call credentials that are missing, which no waiting brings.
_REFUSALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
# A request that hangs must not wait as long as the whole patience.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30}}}


def is_local(path: str) -> bool:
    """Whether a path lies in this machine's file system (network file systems included)."""
    return not _SCHEME.match(path) or path.startswith("file://")


def local(path: str) -> str:
    """A local path without its `file://`, `~` expanded."""
    return os.path.expanduser(path.removeprefix("file://"))


def join(folder: str, name: str) -> str:
    """folder/name, for addresses too."""
    return name if not folder else f"{folder.rstrip('/')}/{name}"


class _File:
    """An open local file; closed when nobody uses it any more."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class Storage:
    """Reads files and parts of files. Safe to use from several threads; may be pickled.

    Args:
      retry_seconds: how long a server that does not answer is asked again before that is an error.
    """

    def __init__(self, retry_seconds: float = 300.0):
        self.retry_seconds = retry_seconds
        self._fresh()

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, _File] = collections.OrderedDict()
        self._systems: dict[str, Any] = {}
        self._process = os.getpid()

    def __getstate__(self):
        return {"retry_seconds": self.retry_seconds}

    def __setstate__(self, state):
        self.retry_seconds = state["retry_seconds"]
        self._fresh()

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes offset ... offset + size of a file (to its end where size is None); fewer where the file ends before.

        Raises:
          OSError: a local file, or any that is not there.
          UserError: its server did not answer for `retry_seconds` or does not let us; the package for such addresses is
            missing.
        """
        if size == 0:
            return b""
        if is_local(path):
            return self._patiently(path, lambda: self._read_local(local(path), offset, size))
        end = None if size is None else offset + size
        data = self._patiently(path, lambda: self._system(path).cat_file(path, start=offset, end=end))
        if size is not None and len(data) > size:
            raise UserError(
                f"{path}: its server sends whole files where parts were asked for (no range requests): use another server, or "
                "copy the data to a disk"
            )
        return data

    def size(self, path: str) -> int:
        """Length of a file in bytes; raises as `read` does."""
        if is_local(path):
            return self._patiently(path, lambda: os.stat(local(path)).st_size)
        return self._patiently(path, lambda: int(self._system(path).info(path)["size"]))

    def stamp(self, path: str) -> tuple[int, int]:
        """(length in bytes, when it was changed) of a file: in ns, or for addresses a number made of what the server says of its
        version. Raises as `read` does."""
        if not is_local(path):
            about = self._patiently(path, lambda: self._system(path).info(path))
            version = [str(about[k]) for k in _VERSIONS if about.get(k)][:1]
            return int(about["size"]), int.from_bytes(hashlib.sha256("".join(version).encode()).digest()[:7], "big")
        status = self._patiently(path, lambda: os.stat(local(path)))
        return status.st_size, status.st_mtime_ns

    def open(self, path: str) -> io.BufferedReader:
        """A file to be read and sought in, every read as patient as `read`; raises as `read` does."""
        return io.BufferedReader(_Ranges(self, path), 1 << 20)

    def exists(self, path: str) -> bool:
        """Whether there is such a file; raises UserError as `read` does."""
        try:
            self.size(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def expand(self, pattern: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        """Files that a pattern names, sorted within each of its alternatives.

        Args:
          pattern: a file, a folder (its files that end in one of `suffixes`), or either with ranges `{000..123}`,
            alternatives `{a,b}` and wildcards `*`, `?`, `[...]`. Files named by ranges need not be listed: nothing is asked
            of the server for them.
          suffixes: see above; in lower case.

        Raises:
          UserError: nothing there.
        """
        if not pattern:
            raise UserError("config.data.path is empty: set it to the data's files")
        found: list[str] = []
        # What is there by this very name is no pattern, whatever characters are in it.
        literal = is_local(pattern) and os.path.exists(local(pattern))
        for one in [pattern] if literal else braces(pattern):
            if any(c in one for c in "*?[") and not literal:
                matches = [m for m in self._glob(one) if not suffixes or m.lower().endswith(suffixes)]
                if not matches:
                    raise UserError(f"{one} matches no file; check config.data.path")
                found += matches
            elif suffixes and not one.lower().endswith(suffixes):
                found += self._listed(one, suffixes)
            else:
                found.append(one)
        return found

    def _listed(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        if is_local(folder) and not os.path.isdir(local(folder)):
            what = "is a file of another kind" if os.path.exists(local(folder)) else "is not there"
            raise UserError(f"{folder} {what}: expected {' or '.join(suffixes)} files, or a folder of them")
        inside = join(glob.escape(local(folder)) if is_local(folder) else folder, "*")
        matches = [m for m in self._glob(inside) if m.lower().endswith(suffixes)]
        if not matches:
            raise UserError(f"{folder} holds no {' or '.join(suffixes)} file; check config.data.path")
        return matches

    def _glob(self, pattern: str) -> list[str]:
        if is_local(pattern):
            return sorted(glob.glob(local(pattern)))
        system = self._system(pattern)

        def ask() -> list[str]:
            system.invalidate_cache()
            return sorted(system.glob(pattern))

        scheme = pattern[: pattern.index("://") + 3]
        return [m if _SCHEME.match(m) else scheme + m.lstrip("/") for m in self._patiently(pattern, ask)]

    def _system(self, path: str) -> Any:
        """The fsspec file system of an address. A process that was forked makes its own."""
        scheme = path[: path.index("://")].lower()
        if self._process != os.getpid():
            self._fresh()
        with self._lock:
            if scheme not in self._systems:
                import fsspec

                try:
                    self._systems[scheme] = fsspec.filesystem(scheme, **_OPTIONS.get(scheme, {}))
                except ImportError as e:
                    package = _PACKAGES.get(scheme)
                    extra = {"gcsfs": "gcs", "s3fs": "s3"}.get(package or "")
                    how = f"pip install -e '.[{extra}]'" if extra else str(e)
                    raise UserError(
                        f"{path}: {scheme}:// needs the package {package or '(see below)'}: {how}"
                    ) from None
                except ValueError:
                    raise UserError(f"{path}: no file system is known for {scheme}://") from None
            return self._systems[scheme]

    def _read_local(self, path: str, offset: int, size: int | None) -> bytes:
        with self._lock:
            file = self._files.pop(path, None) or _File(path)
            self._files[path] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        if size is None:
            size = max(0, os.fstat(file.number).st_size - offset)
        data = os.pread(file.number, size, offset)
        while len(data) < size:  # one pread gives 2 GiB at most
            more = os.pread(file.number, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _patiently(self, path: str, action: Callable[[], T]) -> T:
        began = pause = None
        while True:
            try:
                result = action()
            except (UserError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise
            except Exception as e:  # each client library has its own errors for a server that is away
                if is_local(path) and not passing(e):
                    raise
                why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}".rstrip(": ")
                if isinstance(e, PermissionError) or type(e).__name__ in _REFUSALS:
                    raise UserError(f"{path}: not allowed ({why}); check the credentials of this machine") from None
                now = time.monotonic()
                began = now if began is None else began
                if now - began >= self.retry_seconds:
                    raise Unreachable(
                        f"{path}: its storage has not answered for {now - began:.0f} s ({why}); check the network and the "
                        "credentials, and start again: the run goes on where it was (config.data.retry_seconds sets the time)"
                    ) from None
                pause = _FIRST_PAUSE if pause is None else min(_LONGEST_PAUSE, 2 * pause)
                pause = min(pause, max(0.05, self.retry_seconds - (now - began)))
                _log.warning("%s: %s; asking again in %.1f s", path, why, pause)
                with self._lock:
                    self._files.pop(local(path), None)
                time.sleep(pause)
                continue
            if began is not None:
                _log.warning("%s: its storage answers again after %.0f s", path, time.monotonic() - began)
            return result


class _Ranges(io.RawIOBase):
    """A file as ranges read one by one."""

    def __init__(self, storage: Storage, path: str):
        self._storage, self._path, self._at = storage, path, 0
        self._size = storage.size(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        data = self._storage.read(self._path, self._at, size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def braces(pattern: str) -> list[str]:
    """`a{00..02}b` to a00b, a01b, a02b, and `a{x,y}` to ax, ay; several multiply.

    Raises:
      UserError: a brace that is not closed, or a range that is none.
    """
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise UserError(f"{pattern}: a }} without its {{")
        return [pattern]
    end = pattern.find("}", start)
    if end < 0 or "{" in pattern[start + 1 : end]:
        raise UserError(
            f"{pattern}: a {{ that is not closed; ranges are written {{00000..01234}}, alternatives {{a,b}}"
        )
    inside, tails = pattern[start + 1 : end], braces(pattern[end + 1 :])
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = span.groups()
        if int(first) > int(last):
            raise UserError(f"{pattern}: the range {{{inside}}} runs backwards")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        middles = [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
    elif "," in inside:
        middles = inside.split(",")
    else:
        raise UserError(f"{pattern}: {{{inside}}} is neither a range like 00000..01234 nor alternatives like a,b")
    return [pattern[:start] + middle + tail for middle in middles for tail in tails]
