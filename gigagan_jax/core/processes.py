"""Worker processes on this machine: memory settings, their end, parallel maps, and file locks."""

import atexit
import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar


def count_cores() -> int:
    """Cores that this process may use."""
    # Of Linux: containers and job managers give a process some of them.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def tune_malloc() -> None:
    """Makes glibc keep freed memory instead of returning it to the kernel. Does nothing with another C library."""
    # XLA's CPU runtime allocates its temporaries at every step, image decoders their pixels for every image. On two cores,
    # page faults were a quarter of a step of the digits model (75 ms, 57 ms with this) and a fifth of reading images.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # Parameter numbers of glibc's malloc.h. The kernel gets memory back only above 2 GB free at the top of the heap.
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for name, value in ((mmap_threshold, 32 << 20), (trim_threshold, 2_000_000_000), (top_pad, 64 << 20)):
        mallopt(name, value)


def release_memory() -> None:
    """Returns freed memory to the kernel: a gigabyte after compiling. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def end_with_parent() -> None:
    """Ends this worker process as soon as its parent has ended, however that ended.

    A killed parent cannot stop its workers, and they would go on working. Does nothing in a process that `multiprocessing`
    did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait_for_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        # sys.exit in a thread would end the thread only.
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="end_with_parent", daemon=True).start()


def process_start(number: int) -> str:
    """When a process of this machine was started, in ticks since the boot; "" where there is none, or it has ended."""
    try:
        # Field 22 of proc(5). The name before it may contain spaces, brackets and any bytes: fields are counted after it.
        fields = Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return ""
    # Z, X: it has ended, and its parent has not asked for it yet.
    return "" if fields[0] in "ZX" else fields[19]


# Of scripts that read data by this package: worker processes import them.
_MAIN_GUARD = "put what it does under `if __name__ == '__main__':`"


def machine_identity() -> str:
    """One boot of one machine, and one space of process numbers on it: a container has its own; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


_threads_left = threading.Event()
_at_exit: list[Callable[[], object]] = []


def at_any_exit(act: Callable[[], object]) -> None:
    """Calls `act` when this process ends, also where it ends without Python's own end."""
    atexit.register(act)
    _at_exit.append(act)


def end_at_once(code: int) -> NoReturn:
    """Ends this process without waiting for its threads."""
    for act in _at_exit:
        with contextlib.suppress(Exception):
            act()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_threads_behind() -> None:
    """Lets the verb that ends with an error not wait for threads of a library that wait for something that will not come."""
    _threads_left.set()


def exit_past_threads(code: int) -> None:
    """Ends this process at once where threads were left behind; returns otherwise."""
    if _threads_left.is_set():
        end_at_once(code)


def begin_worker() -> None:
    """Initializer of each worker process."""
    end_with_parent()
    tune_malloc()


def map_parallel(
    task: Callable[[Any], Any], items: Sequence[Any], workers: int, title: str, quiet: bool = False
) -> Iterator[Any]:
    """Yields task(item) for each item in order. Worker processes end with this one; a progress line is printed.

    Raises:
      UserError: a worker process was lost. Errors of the task pass through.
    """
    # 0 workers: one for each core.
    workers = min(workers or count_cores(), len(items))
    progress = ProgressBar(title, len(items), quiet=quiet)
    # No worker processes: they would cost an import of seconds each.
    if workers <= 1:
        for item in items:
            yield task(item)
            progress.step()
        return
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    # Spawn: a fork would copy JAX's locks without the threads that hold them.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker) as pool:
        # Chunks of at most 16, and four a worker at least: slow items at the end keep all workers busy.
        try:
            for result in pool.map(task, items, chunksize=max(1, min(16, len(items) // (4 * workers)))):
                yield result
                progress.step()
        except BrokenProcessPool:
            raise UserError(
                f"{title}: a worker process was lost, perhaps out of memory: set fewer --workers; the same command "
                f"resumes where it stopped. In a script of your own: {_MAIN_GUARD}"
            ) from None
        # Without this, leaving the `with` would finish all items that are queued.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_main_guard() -> None:
    """Raises UserError in a worker process that still imports the script of its parent.

    There the script runs once more, and would wait for what its parent holds.
    """
    import multiprocessing

    # A mark of multiprocessing, by which it refuses to start processes there; a wait for a lock comes before.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(f"a worker process runs the script that started it: {_MAIN_GUARD}")


@contextlib.contextmanager
def hold_file_lock(file: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Holds a lock on a file. The kernel releases it however this process ends; worker processes do not inherit it.

    Does nothing on Windows and on file systems without locks.

    Args:
      file: in an existing folder.
      busy: called if another process holds the lock. If it returns, this process waits for the lock.

    Raises:
      OSError: the file cannot be written.
      UserError: another process holds the lock, and this one is a worker that imports the other's script.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    # 0o666 before the umask: another user of a shared folder must be able to open the file too.
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            # Without blocking first, so that `busy` can say why this process waits.
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check_main_guard()
            busy()
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks.
            pass
        yield
    finally:
        os.close(opened)
