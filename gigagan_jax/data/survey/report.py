"""What a path holds, as one value, and as the few lines that every verb prints before it uses the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

# The contents import nothing of this module; for the checker alone.
if TYPE_CHECKING:
    from gigagan_jax.data.survey.folder_contents import FolderContents


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
        # The address of a bucket, the name of a data set, or nothing for drawn data.
        what = f": {self.what}" if self.what else ""
        lines = [f"data: {self.path or self.given or self.kind} (read as {self.kind}){what}"]
        return lines
