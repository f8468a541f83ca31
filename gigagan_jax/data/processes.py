"""Several processes of this machine: work on many items, and one at a time in a folder."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.data.progress import Progress
from gigagan_jax.errors import UserError
from gigagan_jax.memory import begin_worker


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
