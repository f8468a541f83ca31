"""Lists a folder once: pictures, what may be captions, tables, archives, and what is passed over and why."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER, CONFIG_FILE, METRICS_FILE, SNAPSHOTS_FOLDER
from gigagan_jax.data.survey import file_names
from gigagan_jax.data.survey.report import PassedOver

_TABLES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".csv", ".tsv")
# What a run writes beside its checkpoints and shows as pictures, where the workdir is the folder of pictures itself.
_RUN_FOLDERS = (CHECKPOINTS_FOLDER, SNAPSHOTS_FOLDER)


class _Counter:
    """Counts passed-over files by reason, with the first of each in order."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        # The least name, so that every machine gives the same example whatever the order of its file system.
        self.examples[reason] = min(name, self.examples.get(reason, name))

    def result(self) -> dict[str, PassedOver]:
        return {reason: PassedOver(n, self.examples[reason]) for reason, n in sorted(self.counts.items())}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files below a folder, by their paths relative to it with forward slashes, sorted.

    Attributes:
      root: the folder.
      pictures: files that the source reads as pictures.
      captions: files whose ending is one of CAPTION_SUFFIXES.
      tables: Parquet, Arrow, CSV, TSV and JSON lines.
      tars: plain tars.
      archives: packed tars, zips and others of which no picture can be read.
      records: ArrayRecord files.
      broken: pictures that are links to nowhere. They are in `pictures` too: the quarantine counts them.
      passed_over: files that look like pictures and are not read, by reason.
    """

    root: Path
    pictures: list[str]
    captions: set[str]
    tables: list[str]
    tars: list[str]
    archives: list[str]
    records: list[str]
    broken: list[str]
    passed_over: dict[str, PassedOver]


def list_folder(root: Path, workdir: Path | None = None) -> Listing:
    """Lists a folder and all folders below it. Hidden ones, litter of systems and folders of runs are passed over.

    Args:
      root: the folder.
      workdir: folder of the run, which is no data.

    Raises:
      UserError: there is no such folder, or a part of it cannot be read.
    """
    try:
        if not root.exists():
            raise UserError(f"no image folder {root}: there is nothing at this path; check data.path")
        if not root.is_dir():
            raise UserError(f"{root} is a file, not a folder of images; check data.path")
        return _list_entries(root, workdir)
    except OSError as error:
        raise UserError(
            f"cannot read the image folder {root}: {error.strerror} ({error.filename}); check its permissions"
        ) from error


def _list_entries(root: Path, workdir: Path | None) -> Listing:
    found = Listing(root, [], set(), [], [], [], [], [], {})
    passed = _Counter()
    # A set: a folder may hold millions of files.
    pictures = set(file_names.picture_suffixes())
    for name, entry, reason in _walk(root, workdir):
        suffix = file_names.suffix_of(entry.name)
        reason = reason or file_names.unread_reason(suffix)
        lower = name.lower()
        if reason is not None:
            if suffix in pictures or file_names.unread_reason(suffix):
                passed.add(reason, name)
        elif suffix in pictures:
            # Neither a pipe nor a socket: reading it would wait for ever.
            if _is_kind(entry.is_file):
                found.pictures.append(name)
            elif entry.is_symlink():
                found.pictures.append(name)
                found.broken.append(name)
            else:
                passed.add("not a file", name)
        # Whether a text belongs to a picture shows when all names are known.
        elif suffix in file_names.CAPTION_SUFFIXES:
            found.captions.add(name)
        elif suffix in _TABLES:
            found.tables.append(name)
        # Shards end in -00000-of-00010.
        elif ".array_record" in lower:
            found.records.append(name)
        elif suffix in file_names.TAR_SUFFIXES:
            found.tars.append(name)
        elif lower.endswith(file_names.ARCHIVE_SUFFIXES) or ".tfrecord" in lower:
            found.archives.append(name)
    # Directories are listed in the order of the file system, which differs between hosts.
    for names in (found.pictures, found.tables, found.tars, found.archives, found.records, found.broken):
        names.sort()
    return dataclasses.replace(found, passed_over=passed.result())


def _walk(root: Path, workdir: Path | None) -> Iterator[tuple[str, os.DirEntry[str], str | None]]:
    """All files below a folder: (relative path, entry, reason to pass it over).

    A folder's own files come before those of its folders, which come in sorted order.
    """
    # Compared by identity: the two paths may be spelled in different ways.
    own = None if workdir is None else _identify(workdir)
    seen: set[tuple[int, int]] = set()
    # A stack of (folder, its relative path, reason why all in it is passed over).
    todo: list[tuple[str, str, str | None]] = [(str(root), "", None)]
    while todo:
        folder, relative, reason = todo.pop()
        here = _identify(Path(folder))
        # A link that leads back up would never end.
        if here in seen:
            continue
        if here is not None:
            seen.add(here)
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError:
            # Systems close folders such as lost+found to users.
            if reason is None:
                raise
            continue
        if relative and reason is None and (_same(here, own) or _is_run(listed)):
            reason = "in folders of runs"
        # The workdir may be the folder of pictures itself.
        is_top_run = not relative and (_same(here, own) or _is_run(listed))
        # Files are delivered before any folder is entered.
        folders = []
        for entry in listed:
            name = relative + entry.name
            if _is_kind(entry.is_dir):
                why = "in folders of runs" if is_top_run and entry.name in _RUN_FOLDERS else _reason_of_name(entry.name)
                folders.append((entry.path, name + "/", reason or why))
            else:
                hidden = "resource forks of macOS" if entry.name.startswith("._") else _reason_of_name(entry.name)
                yield name, entry, reason or hidden
        # Sorted, so that every machine keeps the same one of two links to one folder. What is passed over comes last:
        # a link in it must not hide a folder of pictures.
        todo += sorted((f for f in folders if f[2] is None), reverse=True)
        todo[:0] = sorted((f for f in folders if f[2] is not None), reverse=True)


def _reason_of_name(name: str) -> str | None:
    if name.lower() in file_names.LITTER_FOLDERS:
        return "in folders that systems make"
    # .git, .ipynb_checkpoints, .thumbnails
    return "hidden files and folders" if name.startswith(".") else None


def _is_run(entries: list[os.DirEntry[str]]) -> bool:
    """Whether a folder is the workdir of a run."""
    # A config.json alone is a model's, or anything's.
    names = {entry.name for entry in entries}
    return CONFIG_FILE in names and (CHECKPOINTS_FOLDER in names or METRICS_FILE in names)


def _same(here: tuple[int, int] | None, own: tuple[int, int] | None) -> bool:
    return here is not None and here == own


def _is_kind(question: Callable[[], bool]) -> bool:
    """The answer of `entry.is_file` or `entry.is_dir`; False for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False


def _identify(folder: Path) -> tuple[int, int] | None:
    """What two paths to one folder share; None where there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
