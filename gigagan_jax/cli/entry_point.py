"""What all verbs share: the parser, exit codes, and errors of one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import keep_memory
from gigagan_jax.parallel import watchdog

RESTART = 75  # EX_TEMPFAIL: stopped by SIGTERM with its state saved; launchers run the same command again
INTERRUPTED = 130  # by the user, with its state saved


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def main(verb: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and leaves with its exit code: 2 and one line for bad input."""
    keep_memory()
    try:
        code = verb(sys.argv[1:] if argv is None else argv) or 0
    except UserError as e:
        message = " ".join(str(e).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        code = e.code
        watchdog.fail(message, code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = INTERRUPTED
        watchdog.fail("interrupted", code)
        watchdog.leave(code)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
        watchdog.fail("its output was closed by who read it", code)
    except Exception as e:
        watchdog.unexpected(e)
        raise
    if code not in (0, RESTART, INTERRUPTED):
        watchdog.leave(code)
    sys.exit(code)


def local_folder(text: str) -> Path:
    """A folder on a disk of this machine, for argparse."""
    if "://" in text:
        raise UserError(f"{text}: only folders on a mounted disk can be used; mount the bucket")
    return Path(text)


def writable(file: Path | None) -> None:
    """Raises UserError for an output file that could not be written at the end of long work."""
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise UserError(f"{file} cannot be written: name a file in a folder you may write to")
