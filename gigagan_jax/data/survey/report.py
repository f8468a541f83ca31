"""What a path holds, as one value, and as the few lines that every verb prints before it uses the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

# The contents import nothing of this module; for the checker alone.
if TYPE_CHECKING:
    from gigagan_jax.data.survey.folder_contents import FolderContents


# Classes in a report.
_SHOWN = 12


# One example is enough to find the others, and keeps the report short.
@dataclasses.dataclass(frozen=True)
class PassedOver:
    """Files that are not used, for one reason.

    Attributes:
      count: number of files.
      example: path of one of them, relative to the surveyed folder.
    """

    count: int
    example: str


# Never a silent choice: what was not chosen is named with the flag that chooses it.
@dataclasses.dataclass(frozen=True)
class OtherReading:
    """Another way to read the same path.

    Attributes:
      what: what it would read, such as "2 tars (backup.tar ...)".
      flag: the flag that selects it, such as "--config.data.source=tar".
    """

    what: str
    flag: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What lies at a path, and how it is read.

    Attributes:
      given: the path as the user wrote it.
      path: the effective path that the source opens: `given` with `~` expanded, or a folder or pattern below it.
      kind: one of `config.data.SOURCE_KINDS`.
      what: the data in words, such as "30 pictures" or "12 tars".
      layout: how captions and classes are found: "" (kinds other than "folder"), "files", "table", "coco" or "classes".
      formats: pictures by suffix in lower case.
      captions: pictures with a caption, by where it is (".txt", "metadata.jsonl", ...).
      uncaptioned: pictures without a caption; None where captions play no part.
      classes: pictures by class, in the order of the labels.
      split: the split that is read; "" where there are none.
      splits: files by split.
      passed_over: files that are not used, by the reason.
      others: other readings of the path.
      notes: further sentences for the user.
      warnings: sentences that must not be missed.
      contents: of a folder of pictures: its files, so that the source lists it no second time.
    """

    given: str
    path: str
    kind: str
    what: str = ""
    layout: str = ""
    formats: Mapping[str, int] = dataclasses.field(default_factory=dict)
    captions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    uncaptioned: int | None = None
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    split: str = ""
    splits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    passed_over: Mapping[str, PassedOver] = dataclasses.field(default_factory=dict)
    others: tuple[OtherReading, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    contents: FolderContents | None = None

    def lines(self) -> list[str]:
        """The report: a line of what is read and how, then one for each thing worth knowing."""
        # Drawn data have no path.
        formats = ", ".join(f"{n} {suffix}" for suffix, n in self.formats.items())
        what = (f": {self.what}" if self.what else "") + (f" ({formats})" if formats else "")
        lines = [f"data: {self.path or self.kind}, read as {self.kind}{what}"]
        if self.uncaptioned is not None:
            lines.append(f"  captions: {self._captions_line()}")
        if self.classes:
            lines.append(
                f"  classes: {_shorten([f'{name} {n}' for name, n in self.classes.items()], len(self.classes))}"
            )
        # One split alone is said too: it shows what the names were taken for.
        if self.split:
            others = [s for s in self.splits if s != self.split]
            flag = f"; --config.data.split={others[0]} reads another" if others else ""
            lines.append(f"  split: {self.split} of {', '.join(f'{s} {n}' for s, n in self.splits.items())}{flag}")
        # Every picture is counted somewhere.
        for reason, passed in self.passed_over.items():
            lines.append(f"  passed over: {passed.count} {reason} ({passed.example})")
        lines += [f"  other reading: {other.what}: {other.flag}" for other in self.others]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  WARNING: {warning}" for warning in self.warnings]
        return lines

    def _captions_line(self) -> str:
        parts = [f"{n} in {kind}" for kind, n in sorted(self.captions.items(), key=lambda c: (-c[1], c[0]))]
        if self.uncaptioned:
            first = self.contents.without_caption[1] if self.contents else ""
            parts.append(f"{self.uncaptioned} without" + (f" ({first})" if first else ""))
        return ", ".join(parts)


# The last class is shown: its label is the number of classes less one.
def _shorten(parts: list[str], count: int) -> str:
    """'3: a 1, b 2, c 3', the middle left out where there are many."""
    shown = parts if count <= _SHOWN else [*parts[: _SHOWN - 2], "...", parts[-1]]
    return f"{count}: {', '.join(shown)}"
