"""Files by path or address: local, `gs://`, `s3://`, `file://` and every other scheme of fsspec, with retries.

A request that fails is repeated for `retry_seconds`, with growing pauses. A missing file is reported at once.
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

from gigagan_jax.core.errors import Unreachable, UserError, is_transient

_log = logging.getLogger(__name__)

T = TypeVar("T")
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Keys under which client libraries report a file's version. The first that has a value is used.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "updated")
# Seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Open files of one process. The usual limit of a process is 1,024, and sockets count too.
_OPEN_FILES = 128
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
# Exceptions of client libraries for missing credentials. Retrying does not help.
_REFUSALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
# How gcsfs begins the message of an OSError for a request that the server refuses (403).
_FORBIDDEN = "Forbidden: "
# Seconds. A request that hangs must not use up all of retry_seconds.
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 30


def is_local(path: str) -> bool:
    """Whether a path lies in this machine's file system (network file systems included)."""
    return not _SCHEME.match(path) or path.startswith("file://")


def local_path(path: str) -> str:
    """A local path without its `file://`, `~` expanded."""
    return os.path.expanduser(path.removeprefix("file://"))


def _client_options(scheme: str) -> dict[str, Any]:
    """Time limits of the fsspec file system of a scheme."""
    if scheme in ("s3", "s3a"):
        config = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _ANSWER_SECONDS}
        return {"config_kwargs": config}
    if scheme in ("gs", "gcs"):
        # gcsfs asks for the kind of a bucket first, by a service that an emulator or a proxy lacks, and waits a minute for it.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            import aiohttp
        except ImportError:
            # gcsfs needs it, and is missing too: opening the file system says so.
            return {}
        timeouts = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS)
        return {"requests_timeout": timeouts}
    return {}


def configure_clients(scheme: str) -> None:
    """Gives the fsspec file systems that libraries open for a scheme the time limits of this module, and no cached listings."""
    from fsspec.config import conf

    for key, value in (_client_options(scheme) | {"use_listings_cache": False}).items():
        conf.setdefault(scheme, {}).setdefault(key, value)


def join_path(folder: str, name: str) -> str:
    """folder/name, for addresses too."""
    return name if not folder else f"{folder.rstrip('/')}/{name}"


# Closed by the garbage collector: a thread may still read a file that another thread removed from the cache.
class _OpenFile:
    """An open local file, closed with its last reference."""

    def __init__(self, path: str):
        # O_CLOEXEC: child processes must not keep the file open. Windows has no such flag.
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        # os.open may have raised before the attribute was set.
        if hasattr(self, "number"):
            os.close(self.number)


class Storage:
    """Reads files and parts of files. Safe to use from several threads; picklable.

    Args:
      retry_seconds: time for which failed requests are repeated before they become an error.
    """

    # Named in messages: the setting that sets the time; empty where none does.
    retry_setting = "config.data.retry_seconds"
    # A listing of thousands of tars answers for each of them.
    caches_listings = True

    def __init__(self, retry_seconds: float = 300.0):
        self.retry_seconds = retry_seconds
        self._reset_handles()

    def _reset_handles(self) -> None:
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, _OpenFile] = collections.OrderedDict()
        self._file_systems: dict[str, Any] = {}
        self._process = os.getpid()

    # Descriptors, locks and connections belong to one process.
    def __getstate__(self):
        return {"retry_seconds": self.retry_seconds}

    def __setstate__(self, state):
        self.retry_seconds = state["retry_seconds"]
        self._reset_handles()

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes offset ... offset + size of a file (to its end where size is None); fewer where the file ends before.

        Raises:
          OSError: a local file cannot be read, or any file is missing.
          UserError: the server did not answer for `retry_seconds` or denies access, or the package for its scheme is
            missing.
        """
        # HTTP has no empty range.
        if size == 0:
            return b""
        if is_local(path):
            return self._call_with_retries(path, lambda: self._read_local(local_path(path), offset, size))
        end = None if size is None else offset + size
        data = self._call_with_retries(path, lambda: self._file_system(path).cat_file(path, start=offset, end=end))
        # A server may ignore the Range header. Each read of a record would then download a whole shard.
        if size is not None and len(data) > size:
            raise UserError(
                f"{path}: its server sends whole files and does not support range requests: use another "
                "server, or copy the data to a disk"
            )
        return data

    def file_size(self, path: str) -> int:
        """Length of a file in bytes. Raises as `read` does."""
        if is_local(path):
            return self._call_with_retries(path, lambda: os.stat(local_path(path)).st_size)
        return self._call_with_retries(path, lambda: int(self._file_system(path).info(path)["size"]))

    def version_stamp(self, path: str) -> tuple[int, int]:
        """(length in bytes, version) of a file. It changes when the file changes.

        The version is the modification time in ns, or for addresses a hash of the version that the server reports.
        Raises as `read` does.
        """
        if not is_local(path):
            info = self._call_with_retries(path, lambda: self._file_system(path).info(path))
            version = [str(info[k]) for k in _VERSIONS if info.get(k)][:1]
            # Seven bytes: the number fits the index's int64.
            return int(info["size"]), int.from_bytes(hashlib.sha256("".join(version).encode()).digest()[:7], "big")
        status = self._call_with_retries(path, lambda: os.stat(local_path(path)))
        return status.st_size, status.st_mtime_ns

    def open(self, path: str) -> io.BufferedReader:
        """A seekable file. Each of its reads retries and raises as `read` does."""
        # Parquet and TFDS readers read in small steps. The buffer (1 MiB) joins them into one request.
        return io.BufferedReader(_RangeReader(self, path), 1 << 20)

    def exists(self, path: str) -> bool:
        """Whether the file exists. Raises UserError as `read` does."""
        try:
            self.file_size(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def expand_pattern(self, pattern: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        """Expands a pattern to files, sorted within each of its alternatives.

        Args:
          pattern: a file, a folder (its files that end in one of `suffixes`), or either with ranges `{000..123}`,
            alternatives `{a,b}` and wildcards `*`, `?`, `[...]`. Ranges send no request to the server.
          suffixes: see above; in lower case.

        Raises:
          UserError: the pattern matches no file.
        """
        if not pattern:
            raise UserError("config.data.path is empty: set it to the data's files")
        found: list[str] = []
        # A path that exists is no pattern, even with braces or wildcards in its name.
        literal = is_local(pattern) and os.path.exists(local_path(pattern))
        for one in [pattern] if literal else expand_braces(pattern):
            if any(c in one for c in "*?[") and not literal:
                matches = [m for m in self._glob(one) if not suffixes or m.lower().endswith(suffixes)]
                if not matches:
                    raise UserError(f"{one} matches no file; check config.data.path")
                found += matches
            elif suffixes and not one.lower().endswith(suffixes):
                found += self._list_folder(one, suffixes)
            else:
                found.append(one)
        return found

    def _list_folder(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        if is_local(folder) and not os.path.isdir(local_path(folder)):
            what = "is a file of another kind" if os.path.exists(local_path(folder)) else "is not there"
            raise UserError(f"{folder} {what}: expected {' or '.join(suffixes)} files, or a folder of them")
        # Escaped: the folder's own name may contain wildcards.
        inside = join_path(glob.escape(local_path(folder)) if is_local(folder) else folder, "*")
        matches = [m for m in self._glob(inside) if m.lower().endswith(suffixes)]
        if not matches:
            raise UserError(f"{folder} holds no {' or '.join(suffixes)} file; check config.data.path")
        return matches

    def _glob(self, pattern: str) -> list[str]:
        if is_local(pattern):
            return sorted(glob.glob(local_path(pattern)))
        system = self._file_system(pattern)

        def list_matches() -> list[str]:
            # fsspec caches listings. A retry must see files that have appeared since.
            system.invalidate_cache()
            return sorted(system.glob(pattern))

        # Most file systems of fsspec return matches without their scheme.
        scheme = pattern[: pattern.index("://") + 3]
        matches = self._call_with_retries(pattern, list_matches)
        return [m if _SCHEME.match(m) else scheme + m.lstrip("/") for m in matches]

    def _file_system(self, path: str) -> Any:
        """The fsspec file system of an address."""
        scheme = path[: path.index("://")].lower()
        # fsspec's event loop is a thread, which a fork does not copy.
        if self._process != os.getpid():
            self._reset_handles()
        with self._lock:
            if scheme not in self._file_systems:
                import fsspec

                try:
                    options = _client_options(scheme)
                    if options:
                        # Stated: `configure_clients` may have set another default.
                        options["use_listings_cache"] = self.caches_listings
                    self._file_systems[scheme] = fsspec.filesystem(scheme, **options)
                except ImportError as e:
                    package = _PACKAGES.get(scheme)
                    extra = {"gcsfs": "gcs", "s3fs": "s3"}.get(package or "")
                    how = f"pip install -e '.[{extra}]'" if extra else str(e)
                    raise UserError(
                        f"{path}: {scheme}:// needs the package {package or '(see below)'}: {how}"
                    ) from None
                except ValueError:
                    raise UserError(f"{path}: no file system is known for {scheme}://") from None
            return self._file_systems[scheme]

    def _read_local(self, path: str, offset: int, size: int | None) -> bytes:
        with self._lock:
            # Taken out and put back at the end: the first entry is the least recently used.
            file = self._files.pop(path, None) or _OpenFile(path)
            self._files[path] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        if size is None:
            size = max(0, os.fstat(file.number).st_size - offset)
        # pread takes an offset, so threads share the descriptor without a lock.
        data = os.pread(file.number, size, offset)
        # One pread returns 2 GiB at most. An empty result is the end of the file.
        while len(data) < size:
            more = os.pread(file.number, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _call_with_retries(self, path: str, action: Callable[[], T]) -> T:
        first_failure = pause = None
        while True:
            try:
                result = action()
            # These errors are answers of the storage.
            except (UserError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
                raise
            # Each client library has its own exceptions for a server that cannot be reached.
            except Exception as e:
                if is_local(path) and not is_transient(e):
                    raise
                # This process ends: no further request can succeed.
                if isinstance(e, RuntimeError) and "shutdown" in str(e):
                    raise
                why = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}".rstrip(": ")
                refused = isinstance(e, PermissionError) or str(e).startswith(_FORBIDDEN)
                if refused or type(e).__name__ in _REFUSALS:
                    raise UserError(f"{path}: not allowed ({why}); check the credentials of this machine") from None
                now = time.monotonic()
                first_failure = now if first_failure is None else first_failure
                if now - first_failure >= self.retry_seconds:
                    raise Unreachable(
                        f"{path}: its storage has not answered for {now - first_failure:.0f} s ({why}); check the "
                        "network and the credentials, and run the same command again: it resumes the run"
                        + (f" ({self.retry_setting} sets the time)" if self.retry_setting else "")
                    ) from None
                pause = _FIRST_PAUSE if pause is None else min(_LONGEST_PAUSE, 2 * pause)
                # The last attempt comes when the time is up, not a long pause later.
                pause = min(pause, max(0.05, self.retry_seconds - (now - first_failure)))
                _log.warning("%s: %s; asking again in %.1f s", path, why, pause)
                # Network file systems give stale handles (ESTALE): the next attempt opens the file anew.
                with self._lock:
                    self._files.pop(local_path(path), None)
                time.sleep(pause)
                continue
            if first_failure is not None:
                elapsed = time.monotonic() - first_failure
                _log.warning("%s: its storage answers again after %.0f s", path, elapsed)
            return result


class _RangeReader(io.RawIOBase):
    """A raw file object whose reads are range requests of a Storage."""

    def __init__(self, storage: Storage, path: str):
        self._storage, self._path, self._position = storage, path, 0
        self._size = storage.file_size(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        # A request beyond the end of the file is an error for some servers (416).
        size = max(0, min(len(buffer), self._size - self._position))
        data = self._storage.read(self._path, self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def expand_braces(pattern: str) -> list[str]:
    """Expands `a{00..02}b` to a00b, a01b, a02b, and `a{x,y}` to ax, ay. Several groups multiply.

    Raises:
      UserError: an unbalanced brace, or content that is neither a range nor alternatives.
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
    inside, tails = pattern[start + 1 : end], expand_braces(pattern[end + 1 :])
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = span.groups()
        if int(first) > int(last):
            raise UserError(f"{pattern}: the range {{{inside}}} runs backwards")
        # As in a shell: {08..12} keeps its zeros, {8..12} has none.
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        middles = [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
    elif "," in inside:
        middles = inside.split(",")
    else:
        raise UserError(f"{pattern}: {{{inside}}} is neither a range like 00000..01234 nor alternatives like a,b")
    return [pattern[:start] + middle + tail for middle in middles for tail in tails]
