"""Small files of a run."""

from __future__ import annotations

import contextlib
import itertools
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


# First bytes of the small file that stands for a large one in a clone without Git LFS.
_LFS_MARK = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is Git LFS's pointer to a large file, and not that file."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(_LFS_MARK)) == _LFS_MARK
    except OSError:
        return False


def lfs_hint(file: Path) -> str:
    """What a pointer of Git LFS is, and how to get the file that it stands for."""
    return f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` in {file.parent}"


def append_text(path: Path, text: str) -> None:
    """Appends text to a file and closes it."""
    # Closed after each write: on a mounted bucket, others see the contents of the last closing.
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


# A file of JSON lines in a bucket is cut into parts of about so many bytes: what is appended costs the upload of one of them.
PART_BYTES = 4 << 20


def part_names(name: str) -> Iterator[str]:
    """metrics.jsonl, metrics.jsonl.1, metrics.jsonl.2, ... without an end."""
    yield name
    for i in itertools.count(1):
        yield f"{name}.{i}"


def split_lines(data: bytes, size: int) -> list[bytes]:
    """Cuts lines into parts of at most `size` bytes, but for longer lines. A part that is followed by another never changes
    while lines are appended.
    """
    parts = []
    while len(data) > size:
        end = data.rfind(b"\n", 0, size) + 1 or data.find(b"\n") + 1 or len(data)
        parts.append(data[:end])
        data = data[end:]
    return [*parts, data]


def join_parts(folder: Path) -> None:
    """Joins the parts of each file of JSON lines in a folder, as a copy of a bucket has them. It may be stopped at any moment."""
    for first in folder.glob("*.jsonl"):
        names = itertools.takewhile(lambda name: (folder / name).exists(), part_names(first.name))
        parts = [folder / name for name in names]
        if len(parts) < 2:
            continue
        begin, rest = first.read_bytes(), b"".join(part.read_bytes() for part in parts[1:])
        # Otherwise an earlier call was stopped before it had removed the parts.
        if not begin.endswith(rest):
            whole = first.with_name(f"{first.name}.tmp")
            whole.write_bytes(begin + rest)
            os.replace(whole, first)
        for part in reversed(parts[1:]):
            part.unlink()


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
