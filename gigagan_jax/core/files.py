"""Small files of a run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out`, which gets that name when all went well and is removed when it did not.

    Raises:
      UserError: `out` exists, or cannot be written.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        if out.exists():
            raise UserError(f"--out={out} exists: name a new folder")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from error


def append_text(path: Path, text: str) -> None:
    """Appends text to a file and closes it."""
    # Closed after each write: on a mounted bucket, others see the contents of the last closing.
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines. Damaged lines and a missing or unreadable file are ignored."""
    try:
        # Bytes: a damaged line may not be UTF-8.
        with open(path, "rb") as file:
            for line in file:
                # RecursionError: a damaged line can nest brackets thousands of levels deep.
                with contextlib.suppress(ValueError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value
    except OSError:
        return
