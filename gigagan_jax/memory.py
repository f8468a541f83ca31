"""How this process and its workers treat freed memory, and how workers end."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import threading


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
