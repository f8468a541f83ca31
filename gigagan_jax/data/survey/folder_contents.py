"""The files of a folder of pictures: their names in order, and where their captions are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from gigagan_jax.data.decoding import decode_captions, decode_text
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.survey import tables
from gigagan_jax.data.survey.file_names import CAPTION_SUFFIXES, suffix_of


@dataclasses.dataclass(frozen=True)
class CaptionFiles:
    """Finds the caption file of a picture: `a/b.jpg` has `a/b.txt`, `a/b.TXT`, `a/b.caption`, `a/b.jpg.txt` or `a/b.json`.

    Attributes:
      files: paths of all files that may be captions.
      endings: the endings that occur, as they are spelled, in the order of preference.
    """

    files: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()

    @classmethod
    def of(cls, files: Iterable[str], json_first: bool = False) -> CaptionFiles:
        """Caption files by their names; `json_first` prefers .json to all others."""
        # Frozen: worker processes get a copy, and none may differ.
        kept = frozenset(files)
        order = {suffix: i for i, suffix in enumerate(CAPTION_SUFFIXES)} | ({".json": -1} if json_first else {})
        spelled = {name[-len(suffix) :] for name in kept if (suffix := suffix_of(name)) in order}
        # The usual spelling first: x.txt before x.TXT.
        return cls(kept, tuple(sorted(spelled, key=lambda e: (order[e.lower()], e != e.lower(), e))))

    def find(self, picture: str) -> str | None:
        """The caption file of a picture, or None."""
        # IMG_2023.05.00.jpg: only the last ending is the picture's.
        stem = picture[: len(picture) - len(suffix_of(picture))]
        for ending in self.endings:
            for base in (stem, picture):
                if base + ending in self.files:
                    return base + ending
        return None


@dataclasses.dataclass(frozen=True)
class FolderContents:
    """Pictures of a folder, and what belongs to them.

    Attributes:
      root: the folder.
      names: paths of the pictures relative to the folder, in the order of the examples.
      caption_files: finds captions beside the pictures.
      table: captions by picture, of a metadata file or of COCO's JSON.
      table_name: name of that file, for messages.
      table_first: whether a picture that has both takes its captions from the table.
      caption_keys: keys of captions in .json files; empty: the usual ones.
      classes: names of the class folders in the order of their labels; empty without labels.
      without_caption: pictures without any caption: their number, and the first of them.
      seen: what was seen of captions, in words, for the message where no picture has one.
    """

    root: str
    names: Sequence[str]
    caption_files: CaptionFiles = CaptionFiles()
    table: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    table_name: str = ""
    table_first: bool = False
    caption_keys: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    without_caption: tuple[int, str] = (0, "")
    seen: str = ""

    def place_of(self, picture: str) -> str | None:
        """The caption file of a picture, or the name of the table; None for a picture without a caption."""
        # A row without a caption is none.
        in_table = bool(self.table.get(picture))
        if in_table and self.table_first:
            return self.table_name
        return self.caption_files.find(picture) or (self.table_name if in_table else None)

    def decode(self, place: str, data: bytes) -> tuple[str, ...]:
        """Captions of a caption file; may be empty.

        Raises:
          BadExample: cause `caption_undecodable`.
        """
        if suffix_of(place) != ".json":
            return decode_captions(data)
        try:
            values = json.loads(decode_text(data))
        # Deeply nested JSON raises RecursionError.
        except (ValueError, RecursionError) as error:
            raise BadExample("caption_undecodable", f"{place} is not JSON: {error}") from None
        # Some tools write the text alone, or a list of texts.
        if isinstance(values, dict):
            return tuple(tables.captions_of(values, self.caption_keys))
        return tuple(tables.texts_of(values))
