"""Surveys a folder of picture files: formats, captions, classes, splits, and what is passed over."""

from __future__ import annotations

import collections
import dataclasses
import posixpath
from collections.abc import Sequence
from pathlib import Path

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import LFS_MEND, LFS_POINTER
from gigagan_jax.data.survey import file_names
from gigagan_jax.data.survey.captions_of_folder import build_contents, find_captions
from gigagan_jax.data.survey.folder_contents import FolderContents
from gigagan_jax.data.survey.listing import Listing
from gigagan_jax.data.survey.report import PassedOver, Survey
from gigagan_jax.data.survey.splits import choose_split, find_class_root, find_split_folders, order_classes

# Pictures whose first bytes are read, to see whether they are there at all.
_SAMPLED = 8
# A pointer of Git LFS is a text of about 130 bytes.
_POINTER_BYTES = 1024


def survey_pictures(listing: Listing, data: DataConfig, condition: str, given: str = "") -> Survey:
    """Says how a folder of pictures is read.

    Args:
      listing: the folder; may hold no picture.
      data: the config's `data`.
      condition: "text", "class" or "none".
      given: the path as the user wrote it.

    Raises:
      UserError: there is no picture that can be read, the splits lack the one that is asked for, or all pictures are
        pointers of Git LFS.
    """
    if not listing.pictures:
        raise UserError(_no_pictures(listing))
    warnings = _check_pointers(listing)
    if listing.broken:
        count = len(listing.broken)
        what = "1 broken link, which counts" if count == 1 else f"{count} broken links, which count"
        warnings.append(f"{what} as unreadable ({listing.broken[0]})")
    # Classes are folders, and their pictures need no captions.
    find = _by_classes if condition == "class" else _by_captions
    survey = find(listing, data, given or str(listing.root))
    assert survey.contents is not None
    count = len(survey.contents.names)
    if not count:
        raise UserError(f"{listing.root}: no picture is left of {len(listing.pictures)} for split {survey.split!r}")
    if condition == "text" and survey.uncaptioned == count and data.captions == "optional":
        warnings.append("NO picture has a caption: training sees no text at all (--config.condition=none says so)")
    formats = collections.Counter(file_names.suffix_of(name) for name in survey.contents.names)
    return dataclasses.replace(
        survey,
        what=f"{count} {'picture' if count == 1 else 'pictures'}",
        formats=dict(sorted(formats.items(), key=lambda f: (-f[1], f[0]))),
        warnings=tuple(warnings),
    )


def _by_classes(listing: Listing, data: DataConfig, given: str) -> Survey:
    prefix, split, splits = find_class_root(listing.pictures, data.split, str(listing.root))
    names, passed = _below(listing, listing.pictures, prefix)
    counts = collections.Counter(name.split("/", 1)[0] for name in names if "/" in name)
    classes = order_classes(list(counts))
    notes = []
    if list(classes) != sorted(classes):
        notes.append("class folders are all numbers: their order is that of the numbers (0, 1, 2 ... 10)")
    # The folder of the classes is the data: its path and names are those of a user who names it himself.
    root = str(listing.root / prefix) if prefix else str(listing.root)
    return Survey(
        given=given,
        path=root,
        kind="folder",
        layout="classes",
        contents=FolderContents(root=root, names=names, classes=classes),
        classes={name: counts[name] for name in classes},
        split=split,
        splits=splits,
        passed_over=passed,
        notes=tuple(notes),
    )


def _by_captions(listing: Listing, data: DataConfig, given: str) -> Survey:
    split, splits, prefix = "", {}, ""
    tops = _split_tables(listing)
    if tops:
        # Hugging Face's imagefolder: train/metadata.jsonl beside train/1.jpg.
        split = choose_split(list(tops), data.split, str(listing.root)) if len(tops) > 1 else next(iter(tops))
        splits, prefix = tops, split + "/"
    names, passed = _below(listing, listing.pictures, prefix)
    if prefix:
        cut = lambda files: [f[len(prefix) :] for f in files if f.startswith(prefix)]
        listing = dataclasses.replace(
            listing, root=listing.root / split, pictures=names, captions=set(cut(listing.captions)),
            tables=cut(listing.tables),
        )  # fmt: skip
    found = find_captions(listing, data.caption_keys, data.split)
    contents, counts = build_contents(found, listing, data.caption_keys)
    if found.left_out[0]:
        passed[f"outside of split {found.split}"] = PassedOver(*found.left_out)
    # Notes in the order in which they were found.
    notes = list(found.notes)
    if not (split or found.split):
        notes += _split_note(listing)
    return Survey(
        given=given,
        path=str(listing.root),
        kind="folder",
        layout=found.layout,
        contents=contents,
        captions=counts,
        uncaptioned=contents.without_caption[0],
        split=split or found.split,
        splits=splits or found.splits,
        passed_over=passed,
        notes=tuple(notes),
    )


def _below(listing: Listing, names: Sequence[str], prefix: str) -> tuple[list[str], dict[str, PassedOver]]:
    """The pictures below a folder, relative to it, and what is passed over with those outside of it."""
    # A copy: the listing is shared.
    passed = dict(listing.passed_over)
    outside = [n for n in names if not n.startswith(prefix)]
    if outside:
        passed[f"outside of {prefix}"] = PassedOver(len(outside), outside[0])
    return [n[len(prefix) :] for n in names if n.startswith(prefix)], passed


def _split_tables(listing: Listing) -> dict[str, int]:
    """{folder of a split: its pictures} where every picture lies in such a folder, and one of them has a metadata table."""
    tops = collections.Counter(n.split("/", 1)[0] if "/" in n else "" for n in listing.pictures)
    # Only metadata.*: a folder of captions beside train/ is no split of classes.
    folders = {posixpath.dirname(n) for n in listing.tables if posixpath.basename(n).lower().startswith("metadata.")}
    if all(map(file_names.split_of, tops)) and folders & tops.keys():
        return dict(sorted(tops.items()))
    return {}


def _split_note(listing: Listing) -> list[str]:
    """Says where folders named like splits are read together."""
    tops = sorted({n.split("/", 1)[0] for n in listing.pictures if "/" in n})
    splits = [t for t in tops if file_names.split_of(t)] or find_split_folders(listing.pictures)
    if len(splits) < 2:
        return []
    return [f"{', '.join(splits)} are all read; --config.data.path={listing.root}/{splits[-1]} reads one of them"]


def _no_pictures(listing: Listing) -> str:
    looked = " ".join(file_names.picture_suffixes())
    message = f"no image in {listing.root}: looked for {looked} in it and below it"
    # What is there instead often says what to do.
    there = [f"{p.count} {reason} ({p.example})" for reason, p in listing.passed_over.items()]
    if listing.archives:
        archives = "1 archive" if len(listing.archives) == 1 else f"{len(listing.archives)} archives"
        there.append(f"{archives} ({listing.archives[0]}), of which nothing inside is read: unpack it")
    tables = [n for n in listing.tables if n.endswith((".csv", ".tsv", ".jsonl"))]
    if tables and not there:
        there.append(
            f"{tables[0]}: a table holds no pictures; where it lists addresses, img2dataset fetches them: "
            "img2dataset --url_list=FILE --output_format=webdataset"
        )
    return f"{message}; there: {'; '.join(there)}" if there else message


def _check_pointers(listing: Listing) -> list[str]:
    """Warns of pointers of Git LFS in place of pictures; raises UserError where all that are sampled are such."""
    names = [n for n in listing.pictures[:: max(1, len(listing.pictures) // _SAMPLED)] if n not in listing.broken]
    # A few files tell: a clone has all of them as pointers, or none.
    pointers = [n for n in names if is_lfs_pointer(listing.root / n)]
    if not pointers:
        return []
    what = f"{pointers[0]} is no picture"
    if len(pointers) == len(names):
        raise UserError(f"{listing.root}: {what}, and so are the others: {LFS_MEND}")
    return [f"{what}, and perhaps others: {LFS_MEND}"]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the text that Git LFS leaves in place of a file until it is fetched."""
    try:
        if path.stat().st_size > _POINTER_BYTES:
            return False
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False
