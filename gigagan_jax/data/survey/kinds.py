"""Decides how a folder on this machine is read: as pictures, tars, tables or records, at its top or below it."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import glob
import os
import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import LFS_MEND
from gigagan_jax.data.survey import file_names
from gigagan_jax.data.survey.folders import is_lfs_pointer, survey_pictures
from gigagan_jax.data.survey.listing import Listing, list_folder
from gigagan_jax.data.survey.report import OtherReading, Survey
from gigagan_jax.data.survey.splits import choose_split

# Members of tars that are counted at most, to compare tars with the pictures beside them.
_COUNTED = 20_000
_FLAG = "--config.data.source="


def kind_by_suffix(names: Sequence[str]) -> str | None:
    """Returns the first of tar, arrayrecord, parquet, arrow that matches a name, or None."""
    # Tar comes first: img2dataset writes a Parquet file with metadata beside each tar.
    lower = [n.lower() for n in names]
    if any(n.endswith(file_names.SHARD_SUFFIXES) for n in lower):
        return "tar"
    if any(".array_record" in n for n in lower):
        return "arrayrecord"
    # Suffixes of tables are their kinds.
    return next((kind for kind in ("parquet", "arrow") if any(n.endswith(f".{kind}") for n in lower)), None)


def survey_folder(root: Path, data: DataConfig, condition: str, workdir: Path | None) -> Survey:
    """Surveys a folder of this machine.

    Args:
      root: the folder.
      data, condition, workdir: as for `survey_path`; `data.source` is "auto", "folder", "tar" or "parquet".

    Raises:
      UserError: it holds nothing that can be read, or has no such split.
    """
    made_by = _kind_by_metadata(root) if data.source == "auto" else None
    if made_by:
        return Survey(given=str(root), path=str(root), kind=made_by)
    listing = list_folder(root, workdir)
    # Of a webdataset that was packed to save room.
    packed = [n for n in listing.archives if n.lower().endswith(file_names.PACKED_TARS)]
    tables = [n for n in listing.tables if n.lower().endswith(".parquet")]
    # A packed tar is refused by its source with a reason, where nothing else is there.
    shards = listing.tars or ([] if listing.pictures or listing.records or tables else packed)
    files = {"tar": shards, "arrayrecord": listing.records, "parquet": tables}
    kind = data.source if data.source != "auto" else _choose_kind(listing, files)
    others = _other_readings(listing, files, kind)
    if kind == "folder":
        survey = survey_pictures(listing, data, condition)
        return dataclasses.replace(survey, others=others, notes=(*survey.notes, *_archive_notes(listing.archives)))
    beside = [n for n in packed if n not in files[kind]] if kind == "tar" else []
    survey = survey_tables(root, kind, files[kind], data, beside)
    notes = [f"{_count(beside, 'packed tar')}: not read; unpack the packing, not the tar"] if beside else []
    notes += _archive_notes([n for n in listing.archives if n not in files[kind] and n not in beside])
    return dataclasses.replace(survey, others=others, notes=(*survey.notes, *notes))


def _archive_notes(archives: Sequence[str]) -> list[str]:
    return [f"{_count(archives, 'archive')}: what is inside is not read; unpack it"] if archives else []


def survey_tables(root: Path, kind: str, names: Sequence[str], data: DataConfig, beside: Sequence[str] = ()) -> Survey:
    """Finds the effective path of tars, Parquet or ArrayRecord files in a folder.

    Args:
      root: the folder.
      kind: "tar", "parquet" or "arrayrecord".
      names: the files, relative to the folder, sorted; none where the user names a kind that is not there.
      data: the config's `data`.
      beside: files that a source of the folder would take too, and that must not be read.

    Raises:
      UserError: several folders hold files and nothing tells which, or the split is none of theirs.
    """
    if not names:
        return Survey(given=str(root), path=str(root), kind=kind)
    for name in (names[0], names[-1]):
        if is_lfs_pointer(root / name):
            raise UserError(f"{root / name} is {LFS_MEND}")
    kept, splits, split = _choose_split_files(names, data.split, str(root))
    path, notes = _pattern_of(root, [*names, *beside], kept)
    # Where no pattern can say which files, all are read.
    if len(path) == 0:
        path, kept = str(root / posixpath.dirname(kept[0])), list(names)
        notes.append(f"the name of the folder has special characters, and so all splits are read: {', '.join(splits)}")
        splits, split = {}, ""
    outside = len(names) - len(kept)
    if outside and not split:
        notes.append(f"{outside} more below it are not read; --config.data.path=FOLDER reads one of those folders")
    unit = {"tar": "tar", "parquet": "Parquet file", "arrayrecord": "ArrayRecord file"}[kind]
    return Survey(
        given=str(root), path=path, kind=kind, what=_count(kept, unit), split=split, splits=splits, notes=tuple(notes)
    )


def _kind_by_metadata(root: Path) -> str | None:
    """Kinds of folders that a library made: 'tfds' and 'arrow', by the files of their metadata."""
    try:
        names = set(os.listdir(root))
    except OSError:
        # The listing says what is wrong.
        return None
    # Before the suffixes: a folder that TFDS made holds ArrayRecord files too.
    # Both files are needed: other tools write a dataset_info.json too.
    if {"features.json", "dataset_info.json"} <= names:
        return "tfds"
    # By save_to_disk, or the cache of datasets.
    has_arrow = any(n.endswith(".arrow") for n in names)
    if "dataset_dict.json" in names or (has_arrow and names & {"state.json", "dataset_info.json"}):
        return "arrow"
    # Arrow files that were copied without their description.
    if has_arrow and all(n.endswith((".arrow", ".md")) or n.startswith(".") for n in names):
        return "arrow"
    return None


def _choose_kind(listing: Listing, files: dict[str, list[str]]) -> str:
    pictures = len(listing.pictures)
    if not pictures:
        return next((kind for kind, names in files.items() if names), "folder")
    # As many pictures in tars as beside them: the archive that they came in.
    if files["tar"] and _pictures_in_tars(listing.root, files["tar"], pictures + 1) > pictures:
        return "tar"
    if files["arrayrecord"]:
        return "arrayrecord"
    rows, has_paths = _rows_with_images(listing.root, files["parquet"])
    # Rows that name files are these pictures, with their captions.
    return "parquet" if rows >= pictures or has_paths else "folder"


def _other_readings(listing: Listing, files: dict[str, list[str]], kind: str) -> tuple[OtherReading, ...]:
    # Nothing is chosen silently: each reading that was not taken is named.
    others = []
    if kind != "folder" and listing.pictures:
        others.append(OtherReading(_count(listing.pictures, "picture"), f"{_FLAG}folder"))
    units = {"tar": "tar", "arrayrecord": "ArrayRecord file", "parquet": "Parquet file"}
    for other, names in files.items():
        # Parquet beside tars and pictures is their metadata, unless it holds images.
        if other == kind or not names or (other == "parquet" and not any(_rows_with_images(listing.root, names))):
            continue
        others.append(OtherReading(_count(names, units[other]), f"{_FLAG}{other}"))
    return tuple(others)


def _pictures_in_tars(root: Path, names: Sequence[str], enough: int) -> int:
    """Pictures in plain tars, counted up to `enough` or to a bound."""
    # Headers alone are read: tarfile seeks over the data.
    count = read = 0
    for name in names:
        try:
            with tarfile.open(root / name, "r:") as tar:
                for member in tar:
                    read += 1
                    count += member.isfile() and file_names.suffix_of(member.name) in file_names.picture_suffixes()
                    if count >= enough or read >= _COUNTED:
                        # A bound of work: so many members are more than strays.
                        return max(count, enough) if read >= _COUNTED else count
        # A damaged tar has the pictures before its damage.
        except (tarfile.TarError, OSError, EOFError, ValueError):
            continue
    return count


def _rows_with_images(root: Path, names: Sequence[str]) -> tuple[int, bool]:
    """(rows of Parquet files whose first file has pictures as bytes, whether it has paths of pictures)"""
    import pyarrow
    import pyarrow.parquet

    # Imported here: data/sources imports this package.
    from gigagan_jax.data.sources.parquet_schema import IMAGE_KEYS, column_type, is_image, is_text

    if not names:
        return 0, False
    try:
        schema = pyarrow.parquet.read_schema(root / names[0])
        keys = [k for k in IMAGE_KEYS if k in schema.names and is_image(column_type(schema, k))]
        if not keys:
            return 0, False
        if is_text(column_type(schema, keys[0])):
            # imagefolder's metadata.parquet belongs to the pictures: it names the captions only.
            return 0, not posixpath.basename(names[0]).lower().startswith("metadata.")
        return sum(pyarrow.parquet.read_metadata(root / n).num_rows for n in names[:_COUNTED]), False
    # A damaged table beside pictures is none; its source says what is wrong where the user asks for it.
    except Exception:
        return 0, False


def _choose_split_files(names: Sequence[str], wanted: str, where: str) -> tuple[list[str], dict[str, int], str]:
    """(files of the chosen split, files by split, the split); all files where they have no splits.

    A split is a folder (data/train/0.tar) or the beginning of a name (train-00000-of-00002.parquet).
    """
    # The name of the file first: data/train-0.parquet and data/test-0.parquet share a folder.
    by_split = collections.defaultdict(list)
    for name in names:
        *folders, base = name.split("/")
        head = base.split("-", 1)[0].split(".", 1)[0].split("_", 1)[0]
        by_split[next((s for part in (head, *reversed(folders)) if (s := file_names.split_of(part))), "")].append(name)
    if "" in by_split or len(by_split) < 2:
        only = next(iter(by_split))
        return (
            list(names),
            ({only: len(names)} if only and len(by_split) == 1 else {}),
            only if len(by_split) == 1 else "",
        )
    chosen = choose_split(sorted(by_split), wanted, where)
    return by_split[chosen], {s: len(n) for s, n in sorted(by_split.items())}, chosen


def _pattern_of(root: Path, names: Sequence[str], kept: Sequence[str]) -> tuple[str, list[str]]:
    """(path or pattern of files below a folder, notes); an empty path where no pattern can name them.

    Raises:
      UserError: they lie in folders that no pattern covers.
    """
    # Relative to the root; "" is the root itself.
    folders = sorted({posixpath.dirname(n) for n in kept})
    # Files at the top are the data; those below it are strays, unless a split was chosen.
    if "" in folders and len(folders) > 1:
        folders = [""]
    if len(folders) == 1:
        place = root / folders[0]
        inside = [n for n in names if posixpath.dirname(n) == folders[0]]
        if len([n for n in kept if posixpath.dirname(n) == folders[0]]) == len(inside):
            return str(place), []
        if len(kept) == 1:
            return str(root / kept[0]), []
        bases = [posixpath.basename(n) for n in kept]
        # Characters, not folders: names of shards begin alike.
        head = os.path.commonprefix(bases)  # noqa: RUF071
        tail = f"{glob.escape(head)}*{file_names.suffix_of(kept[0])}"
        matched = [n for n in inside if fnmatch.fnmatchcase(posixpath.basename(n), tail)]
        # Where a star takes files of another split along, each name is listed.
        return _escape(str(place), tail if len(matched) == len(kept) else f"{{{','.join(bases)}}}"), []
    parents, depths = {posixpath.dirname(f) for f in folders}, {f.count("/") for f in folders}
    if len(parents) == 1 and len(depths) == 1:
        pattern = _escape(str(root / next(iter(parents))), f"*/*{file_names.suffix_of(kept[0])}")
        if pattern and len(kept) == len([n for n in names if n.endswith(file_names.suffix_of(kept[0]))]):
            return pattern, []
    raise UserError(
        f"{root}: {len(folders)} folders hold such files ({', '.join(folders[:4])}): name one by --config.data.path, or "
        f'several by --config.data.mixture=\'("1:{root / folders[0]}","1:{root / folders[1]}")\''
    )


def _escape(folder: str, tail: str) -> str:
    """A pattern in a folder; "" where braces in the folder's name would be taken for a part of the pattern."""
    return "" if "{" in folder or "}" in folder else f"{glob.escape(folder)}/{tail}"


def _count(names: Sequence[str], unit: str) -> str:
    return f"{len(names)} {unit}{'' if len(names) == 1 else 's'} ({names[0]}{' ...' if len(names) > 1 else ''})"
