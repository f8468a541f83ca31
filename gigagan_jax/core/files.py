"""Small files of a run."""

from __future__ import annotations

from pathlib import Path


def append(path: Path, text: str) -> None:
    """Adds to a file, which is opened for it and closed: of a bucket that is mounted others see what was there at a closing."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
