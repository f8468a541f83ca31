"""Small files of a run."""

from __future__ import annotations

from pathlib import Path


def append_text(path: Path, text: str) -> None:
    """Appends text to a file and closes it."""
    # Closed after each write: on a mounted bucket, others see the contents of the last closing.
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
