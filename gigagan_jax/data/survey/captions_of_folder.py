"""Finds the captions of a folder's pictures: files beside them, metadata tables, COCO's JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
import posixpath
from collections.abc import Sequence

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import decode_text
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.survey import tables
from gigagan_jax.data.survey.file_names import CAPTION_NAMES, suffix_of
from gigagan_jax.data.survey.folder_contents import CaptionFiles, FolderContents
from gigagan_jax.data.survey.listing import Listing
from gigagan_jax.data.survey.splits import choose_split
from gigagan_jax.data.survey.tables import UnreadableTable

# Preference among tables of one folder.
_TABLE_ORDER = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json")
# JSON files that are opened to see whether they hold captions.
_SAMPLED = 8
# Tables of any other name that are tried where nothing else has captions.
_TRIED_TABLES = 8


@dataclasses.dataclass
class CaptionSurvey:
    """What was found of captions.

    Attributes:
      names: the pictures; fewer than the listing's where a split of COCO leaves others out.
      table, table_name: as in FolderContents.
      notes: sentences for the report.
      left_out: pictures of other splits: how many, and the first.
      split, splits: as in Survey.
    """

    names: list[str]
    table: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    table_name: str = ""
    layout: str = "files"
    notes: list[str] = dataclasses.field(default_factory=list)
    left_out: tuple[int, str] = (0, "")
    split: str = ""
    splits: dict[str, int] = dataclasses.field(default_factory=dict)


class _Pictures:
    """The pictures of a listing by path, and by path without its ending."""

    def __init__(self, names: Sequence[str]):
        self.names = set(names)
        self._stems: dict[str, str] | None = None

    def by_stem(self, stem: str) -> str | None:
        # Built where a table has names without endings: millions of names take memory.
        if self._stems is None:
            self._stems = {}
            for name in sorted(self.names):
                self._stems.setdefault(name[: len(name) - len(suffix_of(name))], name)
        return self._stems.get(stem)


def find_captions(listing: Listing, caption_keys: Sequence[str], split: str) -> CaptionSurvey:
    """Finds tables of captions, and the pictures that they leave to other splits.

    Raises:
      UserError: COCO's files have splits, and `split` is none of them.
    """
    found = CaptionSurvey(listing.pictures)
    # Shared by all tables: the set of a million names is built once.
    pictures = _Pictures(listing.pictures)
    coco = {name: s for name in sorted(listing.captions) if (s := tables.coco_split(name)) is not None}
    if coco and _read_coco(found, listing, pictures, coco, split):
        return found
    # A table named like a picture is that picture's own JSON.
    candidates = [n for n in (*listing.tables, *sorted(listing.captions)) if suffix_of(n) in _TABLE_ORDER]
    candidates = [n for n in candidates if pictures.by_stem(n[: len(n) - len(suffix_of(n))]) is None]
    named = [n for n in candidates if tables.is_table_name(n)]
    _read_tables(found, listing, pictures, named, caption_keys)
    beside = CaptionFiles.of(listing.captions)
    if not found.table and not any(beside.find(name) for name in listing.pictures):
        others = [n for n in candidates if n not in named and n not in coco][:_TRIED_TABLES]
        _read_tables(found, listing, pictures, others, caption_keys)
    return found


def _read_tables(
    found: CaptionSurvey, listing: Listing, pictures: _Pictures, candidates: list[str], caption_keys: Sequence[str]
) -> None:
    """Reads the best table of each folder."""
    by_folder = collections.defaultdict(list)
    for name in candidates:
        by_folder[posixpath.dirname(name)].append(name)
    used = []
    for folder, files in sorted(by_folder.items()):
        order = lambda n: (not posixpath.basename(n).lower().startswith("meta"), _TABLE_ORDER.index(suffix_of(n)), n)
        files.sort(key=order)
        for i, name in enumerate(files):
            try:
                table = tables.read_table(listing.root / name, caption_keys)
            except UnreadableTable as why:
                found.notes.append(f"{name} is not read: {why}")
                continue
            matched, lost = tables.find_names(table, folder, pictures.names.__contains__, pictures.by_stem)
            if not any(matched.values()):
                what = "names none of these pictures" if not matched else f"has none of {', '.join(CAPTION_NAMES[:5])}"
                found.notes.append(f"{name} holds no captions: it {what}")
                continue
            for picture, captions in matched.items():
                kept = found.table.setdefault(picture, [])
                kept += [c for c in dict.fromkeys(captions) if c not in kept]
            used.append(name)
            if lost:
                found.notes.append(f"{lost} of the files that {name} names are not there")
            if files[i + 1 :]:
                found.notes.append(f"{name} is read, not {', '.join(files[i + 1 :][:3])} beside it")
            break
    # Several folders may have a table each: the report then names them together.
    if used:
        found.layout = "table"
        bases = sorted({posixpath.basename(n) for n in used})
        found.table_name = used[0] if len(used) == 1 else bases[0] if len(bases) == 1 else "tables"


def _read_coco(found: CaptionSurvey, listing: Listing, pictures: _Pictures, coco: dict[str, str], split: str) -> bool:
    """Reads COCO's captions of one split; False where no file is COCO's."""
    # {split: (file, captions by file name)}
    readable = {}
    for name, part in coco.items():
        try:
            readable[part] = (name, tables.read_coco(listing.root / name))
        except UnreadableTable as why:
            found.notes.append(f"{name} is not read: {why}")
    if not readable:
        return False
    chosen = choose_split(list(readable), split, str(listing.root))
    name, table = readable[chosen]
    # annotations/captions_train2017.json belongs to the folder above.
    base = posixpath.dirname(name)
    base = posixpath.dirname(base) if posixpath.basename(base) in ("annotations", "annotation") else base
    folders = [posixpath.join(base, f) for f in (chosen, f"images/{chosen}", "images", f"{chosen}/images", "")]
    exists = pictures.names.__contains__
    # The folder in which most of the named files lie.
    results = [(folder, *tables.find_names(table, folder, exists, lambda stem: None)) for folder in folders]
    folder, matched, lost = max(results, key=lambda r: len(r[1]))
    if not matched:
        found.notes.append(f"{name} names none of these pictures")
        return False
    found.layout, found.table_name, found.split = "coco", name, chosen
    found.table = {picture: list(dict.fromkeys(captions)) for picture, captions in matched.items()}
    found.splits = {part: len(t) for part, (_, t) in sorted(readable.items())}
    if lost:
        found.notes.append(f"{lost} of the files that {name} names are not there")
    # A folder of the split holds it whole. A folder of all splits holds others' pictures too.
    own = folder.rstrip("/").endswith((chosen, f"{chosen}/images"))
    inside = folder.rstrip("/") + "/" if folder else ""
    is_kept = (lambda n: n.startswith(inside)) if own or len(readable) == 1 else matched.__contains__
    found.names = [n for n in listing.pictures if is_kept(n)]
    # Counted in the report as passed over.
    others = [n for n in listing.pictures if not is_kept(n)]
    found.left_out = (len(others), others[0] if others else "")
    return True


def build_contents(
    found: CaptionSurvey, listing: Listing, caption_keys: tuple[str, ...]
) -> tuple[FolderContents, dict[str, int]]:
    """The folder's contents with captions, and the number of pictures by the place of their caption."""
    files = CaptionFiles.of(listing.captions, json_first=bool(caption_keys))
    contents = FolderContents(
        root=str(listing.root),
        names=found.names,
        caption_files=files,
        table=found.table,
        table_name=found.table_name,
        # Named keys ask for the table.
        table_first=bool(caption_keys),
        caption_keys=caption_keys,
    )
    contents = _without_other_json(contents, found, listing)
    counts: collections.Counter[str] = collections.Counter()
    without, first, both = 0, "", 0
    used = set()
    for name in found.names:
        place = contents.place_of(name)
        if place is None:
            without, first = without + 1, first or name
            continue
        counts[place if place == contents.table_name else _kind(name, place)] += 1
        # A picture in both: one of them is not used, and the report says so.
        both += bool(found.table.get(name)) and contents.caption_files.find(name) is not None
        used.add(place)
    if both:
        taken = "the table is" if contents.table_first else "the files are"
        other = "" if contents.table_first else "; --config.data.caption_keys='(\"COLUMN\",)' takes the table"
        who = "1 picture has" if both == 1 else f"{both} pictures have"
        found.notes.append(f"{who} captions in files and in {found.table_name}: {taken} taken{other}")
    # Notes, licences, captions of pictures that are gone.
    texts = sorted(n for n in contents.caption_files.files if n not in used and suffix_of(n) != ".json")
    if texts:
        found.notes.append(f"{len(texts)} text {_files(len(texts))} of no picture ({texts[0]})")
    seen = [f"{len(texts)} text {_files(len(texts))} ({texts[0]})"] if texts else []
    seen += [n for n in found.notes if "holds no captions" in n or "is not read" in n or ".json files" in n]
    return dataclasses.replace(contents, without_caption=(without, first), seen="; ".join(seen)), dict(counts)


def _files(count: int) -> str:
    return "file" if count == 1 else "files"


def _kind(picture: str, place: str) -> str:
    """'.txt' or '.jpg.txt'-like kinds: the ending of the caption file in lower case."""
    ending = suffix_of(place)
    return f"NAME{suffix_of(picture)}{ending}" if place.startswith(picture) else ending


def _without_other_json(contents: FolderContents, found: CaptionSurvey, listing: Listing) -> FolderContents:
    """Takes .json files out of the captions where a sample of them holds none: labels, boxes, settings."""
    files = contents.caption_files
    beside = [p for n in found.names if (p := files.find(n)) is not None and suffix_of(p) == ".json"]
    if not beside:
        return contents
    # A dict keeps the order in which the keys were met.
    keys: dict[str, None] = {}
    for name in beside[:: max(1, len(beside) // _SAMPLED)]:
        try:
            data = (listing.root / name).read_bytes()
            if contents.decode(name, data):
                return contents
            values = json.loads(decode_text(data))
            keys |= dict.fromkeys(values if isinstance(values, dict) else ())
        except (BadExample, OSError, ValueError, RecursionError):
            continue
    shown = f"; their keys: {', '.join(list(keys)[:8])}: name one by --config.data.caption_keys" if keys else ""
    found.notes.append(f"the .json files hold no captions{shown}")
    kept = CaptionFiles.of(n for n in files.files if suffix_of(n) != ".json")
    return dataclasses.replace(contents, caption_files=kept)


def check_captions(contents: FolderContents) -> None:
    """Raises UserError where captions are required and no picture has one."""
    count, first = contents.without_caption
    # A few without a caption are bad examples, as in tars.
    if count < len(contents.names):
        return
    stem = first[: len(first) - len(suffix_of(first))]
    seen = f"; seen: {contents.seen}" if contents.seen else ""
    raise UserError(
        f"{first} has no caption file {stem}.txt ({count} of {len(contents.names)} images in {contents.root} lack "
        f"theirs: looked for .txt, .caption, .json, metadata tables and COCO's JSON{seen}); write them, or accept "
        "uncaptioned images with --config.data.captions=optional, or train without text with --config.condition=none"
    )
