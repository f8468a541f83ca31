"""The entry point of all verbs: parser, exit codes, and one-line errors."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import exit_past_threads, tune_malloc
from gigagan_jax.parallel import watchdog
from gigagan_jax.parallel.devices import memory_error, platform_error

# EX_TEMPFAIL: stopped by SIGTERM, with the state saved where there was a step to save. Launchers run the same command again.
RESTART = 75
# 128 + SIGINT, as shells report it: stopped by the user; a second Ctrl-C saves nothing.
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def main(verb: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and exits with its code: 2 and one line for bad input."""
    # Before anything allocates: glibc applies the limits to later allocations only.
    tune_malloc()
    try:
        code = verb(sys.argv[1:] if argv is None else argv) or 0
    except UserError as e:
        code = _report_error(e)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = INTERRUPTED
        watchdog.report_failure("interrupted", code)
        watchdog.exit_without_waiting(code)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`). Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
        watchdog.report_failure("its output was closed by who read it", code)
    except Exception as e:
        # The first call that touches a device raises it, wherever that is.
        refused = platform_error(e) or memory_error(e)
        if refused is None:
            watchdog.end_all_processes(e)
            raise
        code = _report_error(refused)
    # After a failure, other processes may be in a collective, and a normal exit would wait for them.
    if code not in (0, RESTART, INTERRUPTED):
        watchdog.exit_without_waiting(code)
        exit_past_threads(code)
    sys.exit(code)


def _report_error(error: UserError) -> int:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr, flush=True)
    watchdog.report_failure(message, error.code)
    return error.code


@contextlib.contextmanager
def end_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM is an exception, so that what is half written is removed."""

    def stop(number: int, frame: object) -> NoReturn:
        print("stopped by SIGTERM", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def local_folder(text: str) -> Path:
    """Type for argparse: a folder or file on a disk of this machine."""
    if "://" in text:
        raise UserError(f"{text}: only a place on a disk can be used here; name one, and copy what is there")
    return Path(text)


def check_writable(file: Path | None) -> None:
    """Raises UserError for an output file that cannot be written, before the long work and not after it."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise UserError(f"{file} cannot be written: name a file in a folder you may write to")
