"""Worker processes of this machine: how they treat memory, how they end, and one at a time in a folder."""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import Progress


def keep_memory() -> None:
    """Lets glibc keep what is freed instead of giving it back to the kernel.

    XLA's CPU runtime allocates its temporaries anew every step, image decoders their pixels for every image; on two cores
    the page faults were a quarter of the digits model's time (75 ms a step, 57 ms with this) and a fifth of the time to read
    images. Elsewhere it changes nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for name, value in ((mmap_threshold, 32 << 20), (trim_threshold, 2_000_000_000), (top_pad, 64 << 20)):
        mallopt(name, value)


def release_memory() -> None:
    """Gives the kernel back what glibc keeps, a gigabyte after compiling. Elsewhere it does nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def end_with_parent() -> None:
    """Ends this worker process as soon as the process that started it is gone, however that ended.

    A parent that is killed has no time to tell its workers, which would go on with what they were given. Does nothing in a
    process that `multiprocessing` did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def begin_worker() -> None:
    """What each worker process does first."""
    end_with_parent()
    keep_memory()


def parallel(
    task: Callable[[Any], Any], items: Sequence[Any], workers: int, title: str, quiet: bool = False
) -> Iterator[Any]:
    """task(item) for each item in order, in processes that end with this one, with progress.

    Raises:
      UserError: a process was lost; whatever the task raises.
    """
    workers = min(workers or os.cpu_count() or 1, len(items))
    progress = Progress(title, len(items), quiet=quiet)
    if workers <= 1:
        for item in items:
            yield task(item)
            progress.step()
        return
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    # Not forked: JAX, whose threads a fork would lose, may be running here.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker) as pool:
        try:
            for result in pool.map(task, items, chunksize=max(1, min(16, len(items) // (4 * workers)))):
                yield result
                progress.step()
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a worker process was lost, perhaps for want of memory: set fewer --workers; the same command "
                "goes on where it was"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def locked(file: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Holds a lock file, which the kernel gives back however this process ends; worker processes do not inherit it.

    Does nothing on Windows and on file systems without locks.

    Args:
      file: in a folder that is there.
      busy: called where another process holds it: what it raises is the end, otherwise this process waits.

    Raises:
      OSError: the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(opened)
