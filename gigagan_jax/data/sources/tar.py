"""Source of webdataset tars as img2dataset writes them (`.jpg`, `.txt`, `.json` for each key), with random access."""

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import FilterConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.decoding import decode_captions
from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources import filter_tars, json_captions, tar_index
from gigagan_jax.data.sources.filters import format_report
from gigagan_jax.data.sources.tar_headers import BLOCK, is_header_of
from gigagan_jax.data.sources.tar_index import FAULTS, NO_MEMBER
from gigagan_jax.data.storage import Storage, is_local, local_path
from gigagan_jax.data.survey.file_names import SHARD_SUFFIXES

_log = logging.getLogger(__name__)
# A gap of up to 64 KiB between image and caption is read along: one longer read costs less than two reads.
_NEAR = 64 << 10
# JSON members that are read at the start to find the key of the captions.
_LOOKED_AT = 16
INDEX_NAME = "gigagan_index"


class TarSource(Source):
    """Tars by pattern. The first use indexes them; `tools/prepare_data.py index` does so ahead of time.

    Args:
      path: a tar, a folder of tars, or a pattern for `Storage.expand_pattern`.
      index: folder of the index. Empty: `gigagan_index` beside the tars, or in `workdir` if that cannot be written.
      workdir: folder of the run; see `index`.
      storage: reads the tars.
      caption_required: if True, an example without a caption is a bad example.
      caption_keys: keys of the `.json` member that hold captions, "a.b" for the key b of an inner object a. Empty: the
        lines of the `.txt` member; where no tar has one, a key of a usual name in `.json`.
      filters: conditions that examples must meet.
      workers: processes for indexing; 0: one for each core.
      refresh: compares every tar with its index; otherwise only local tars.

    Attributes:
      paths: the tars, in their order.
      index: the TarIndex.
      caption_note: which key of `.json` was taken for the captions, and the flag for others; empty where none had to be.
      report: one line with the number of examples and of bad ones.
      filter_report: {"identity", "steps"} of the filters; None if there are none.
      has_labels: whether any tar has `.cls` members.

    Raises:
      UserError: there is no tar, one is compressed, the index cannot be written, metadata lacks a column that a filter
        reads, no key of `.json` holds the captions that are required, or no example is left.
    """

    def __init__(
        self,
        path: str,
        *,
        index: str = "",
        workdir: Path | None = None,
        storage: Storage | None = None,
        caption_required: bool = True,
        caption_keys: Sequence[str] = (),
        filters: FilterConfig | None = None,
        workers: int = 0,
        refresh: bool = False,
    ):
        self._storage = storage or Storage()
        # Compressed tars are listed too, so that they are refused with a reason instead of not found.
        self.paths = self._storage.expand_pattern(path, SHARD_SUFFIXES)
        self._caption_required, self._caption_keys = caption_required, tuple(caption_keys)
        folder = choose_index_folder(self.paths, index, workdir)
        open_index = functools.partial(
            tar_index.open_index, folder, self._storage, self.paths, workers=workers, refresh=refresh
        )
        # The index stores the place of one caption member, so text and JSON have separate indexes.
        self.index = open_index(captions="json" if caption_keys else "text")
        self.caption_note = ""
        if caption_keys:
            self._check_caption_keys()
        elif self.index.has_captions_in_json:
            # `build_index` made both: tars that it compared just now are not compared again.
            self._choose_caption_keys(open_index(captions="json", refresh=False))
        self.report = self._summarize_index()
        damaged = self.index.about["damaged"]
        # Their number is unknown, because the headers behind the damage could not be read.
        if damaged:
            _log.warning(
                "%d tars are damaged or end too early: examples behind the damage are lost, and not counted: %s",
                len(damaged),
                ", ".join(damaged[:10]) + (" ..." if len(damaged) > 10 else ""),
            )
        if self.index.about.get("unused_images"):
            _log.warning("%s; give each its own name to use it", self._describe_unused())
        # None if no filter is enabled: then rows are indices and no array of them is needed.
        selected = filter_tars.select_tar_examples(
            self.index, folder, self.paths, self._storage, filters or FilterConfig(), workers
        )
        self._rows: Any = selected[0] if selected else None
        self.filter_report: dict[str, Any] | None = selected[1] if selected else None
        # Filters change the data set, so a resumed run must see another identity.
        self._identity = self.index.about["identity"]
        if self.filter_report is not None:
            self._identity = self.filter_report["identity"]
        if not len(self):
            why = self.format_filter_report() if self.filter_report else "the tars hold no example"
            raise UserError(f"{path}: no example is left; {why}")
        self.has_labels = "label" in self.index.columns

    def _describe_unused(self) -> str:
        a = self.index.about
        return f"passed over: {a['unused_images']} images whose example has another one ({a['first_unused']})"

    def _summarize_index(self) -> str:
        # Counts come from indexing, so this line costs no read.
        a = self.index.about
        faults = ", ".join(f"{n} {cause}" for cause, n in a["faults"].items())
        bad = f"; without a caption: {a['without_caption']}" if a["without_caption"] else ""
        note = f"; {self.caption_note}" if self.caption_note else ""
        note += f"; {self._describe_unused()}" if a.get("unused_images") else ""
        return f"{a['examples']} examples in {len(self.paths)} tars{bad}{'; bad: ' + faults if faults else ''}{note}"

    def _check_caption_keys(self) -> None:
        try:
            json_captions.check_caption_keys(self._sample_json(self.index), self._caption_keys, self._json_members)
        except UserError as error:
            # Without the need for a caption, a run goes on as before; but never in silence.
            if self._caption_required:
                raise
            _log.warning("%s", error)

    def _choose_caption_keys(self, index: tar_index.TarIndex) -> None:
        """Takes the captions from the JSON members where the tars have no other captions."""
        objects = self._sample_json(index)
        keys = json_captions.find_caption_keys(objects)
        if not keys:
            # Damaged tars may have lost their texts, and their JSON too: that is for the quarantine.
            if objects and self._caption_required:
                raise json_captions.refuse_unknown_keys(objects, self._json_members)
            return
        self.index, self._caption_keys = index, (keys[0],)
        self.caption_note = json_captions.describe_choice(keys, self._json_members)
        _log.info("%s", self.caption_note)

    @property
    def _json_members(self) -> str:
        return f"the .json members of {self.paths[0]}{' ...' if len(self.paths) > 1 else ''}"

    def _sample_json(self, index: tar_index.TarIndex) -> list[Any]:
        """Reads the JSON members of a few examples: the first ones, and some spread over all tars."""
        # An empty index has no columns.
        if not len(index):
            return []
        spread = np.linspace(0, len(index) - 1, 4 * _LOOKED_AT).astype(np.int64).tolist()
        rows = [*range(min(_LOOKED_AT, len(index))), *spread]
        sizes, faults = index.columns["caption_size"], index.columns["fault"]
        rows = [r for r in dict.fromkeys(rows) if sizes[r] != NO_MEMBER and not faults[r]]
        objects = []
        # Half from the start, half from the rest: later tars may come from elsewhere.
        for row in rows[: _LOOKED_AT // 2] + rows[_LOOKED_AT // 2 :][-_LOOKED_AT // 2 :]:
            place = int(index.columns["caption_block"][row]) * BLOCK, int(sizes[row])
            with contextlib.suppress(BadExample):
                objects.append(json_captions.parse_json(self._read_members(row, [place], index)[0]))
        return objects

    def format_filter_report(self) -> str:
        """Formats the filter report, one line a step; without filters, the report of the index."""
        return format_report(self.filter_report) if self.filter_report else self.report

    def __len__(self) -> int:
        return len(self.index) if self._rows is None else len(self._rows)

    def _index_row(self, i: int) -> int:
        # `i` counts the examples left by the filters; rows of the index count all.
        return i if self._rows is None else int(self._rows[i])

    def __getstate__(self):
        state = self.__dict__.copy()
        # A worker process maps the file again. Pickling would copy all rows into every worker.
        if isinstance(self._rows, np.memmap):
            state["_rows"] = Path(str(self._rows.filename))
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        if isinstance(self._rows, Path):
            self._rows = np.load(self._rows, mmap_mode="r")

    def name(self, i: int) -> str:
        """Tar and key: "00000.tar/000000012"."""
        row = self._index_row(i)
        return f"{self.index.shards[self.index.shard_of(row)]}/{self.index.key_of(row)}"

    def identity(self) -> str:
        return self._identity

    def read(self, i: int) -> Record:
        """Reads image and captions, in one read if they lie near each other.

        Raises BadExample with a cause of FAULTS, of `decode_captions`, or `caption_missing`, `caption_empty`,
        `tar_missing`, `tar_changed` (the tar is not the one that was indexed).
        """
        row = self._index_row(i)
        # Raises before any read if indexing found the example bad.
        image, caption = self._locate_members(row)
        data = self._read_members(row, [image, caption] if caption else [image])
        label = int(self.index.columns["label"][row]) if self.has_labels else UNKNOWN_LABEL
        return Record(data[0], self._decode_captions(data[1] if caption else None), label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        row = self._index_row(i)
        _, caption = self._locate_members(row)
        return self._decode_captions(self._read_members(row, [caption])[0] if caption else None)

    def _locate_members(self, row: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Returns (offset, size) of image and caption; None for no caption. Raises BadExample."""
        columns = self.index.columns
        # min: a damaged index may hold numbers beyond the list.
        fault = FAULTS[min(columns["fault"][row], len(FAULTS) - 1)]
        if fault:
            raise BadExample(fault, "found by indexing")
        # Offsets are stored in blocks of 512 bytes: 32 bits then reach 2 TiB.
        place = lambda what: (int(columns[f"{what}_block"][row]) * BLOCK, int(columns[f"{what}_size"][row]))
        # A size of NO_MEMBER means that the tar has no such member for this key.
        caption = place("caption")
        if caption[1] != NO_MEMBER:
            return place("image"), caption
        if self._caption_required:
            kind = ".json" if self._caption_keys else ".txt"
            raise BadExample("caption_missing", f"no {kind} member of this key in the tar")
        return place("image"), None

    def _read_members(
        self, row: int, places: list[tuple[int, int]], index: tar_index.TarIndex | None = None
    ) -> list[bytes]:
        """Reads members of one example and compares their headers with the index."""
        index = index or self.index
        path, key = self.paths[index.shard_of(row)], index.key_of(row)
        # The header block precedes the data. It is read to detect tars that changed after indexing.
        first = min(offset for offset, _ in places) - BLOCK
        last = max(offset + size for offset, size in places)
        # Far apart: one read a member, as the gap is longer than _NEAR.
        if last - first > sum(size + BLOCK for _, size in places) + _NEAR:
            return [data for place in places for data in self._read_members(row, [place], index)]
        try:
            data = self._storage.read(path, first, last - first)
        except (OSError, FileNotFoundError) as e:
            raise BadExample("tar_missing", str(e)) from None
        out = []
        for offset, size in places:
            start = offset - first
            # Short data means a truncated tar, which gives the same advice.
            if not is_header_of(data[start - BLOCK : start], size, key) or len(data) < start + size:
                raise BadExample(
                    "tar_changed",
                    f"{path} is not as it was indexed: tools/prepare_data.py index --path=... indexes it again",
                )
            out.append(data[start : start + size])
        return out

    def _decode_captions(self, data: bytes | None) -> tuple[str, ...]:
        # With optional captions, a missing and a blank caption both give no caption.
        captions: tuple[str, ...] = ()
        if data is not None:
            captions = (
                json_captions.read_captions(data, self._caption_keys) if self._caption_keys else decode_captions(data)
            )
        if self._caption_required and not captions:
            raise BadExample("caption_empty", "no text in it")
        return captions


def choose_index_folder(paths: Sequence[str], index: str, workdir: Path | None) -> Path:
    """Chooses the folder for the index of some tars: `index`, else beside the tars, else the workdir.

    Raises:
      UserError: `index` is an address, a folder of the tars is missing, or no place can be written.
    """
    if index:
        return (
            Path(local_path(index))
            if is_local(index)
            else _raise_user_error(f"config.data.index={index}: must be a local folder")
        )
    if all(map(is_local, paths)):
        # Reported here, because the index would otherwise go to the workdir before the tars are found missing.
        missing = next((p for p in paths if not os.path.isdir(os.path.dirname(os.path.abspath(local_path(p))))), None)
        if missing:
            return _raise_user_error(f"{missing}: there is no such folder; check config.data.path")
        # Tars of several folders share an index in their common folder.
        beside = Path(os.path.commonpath([os.path.dirname(os.path.abspath(local_path(p))) for p in paths])) / INDEX_NAME
        writable = lambda p: os.access(p, os.W_OK | os.X_OK)
        # An existing index folder must be writable itself; a new one needs a writable parent.
        if writable(beside) or (not beside.exists() and writable(beside.parent)):
            return beside
    if workdir is not None:
        return workdir / INDEX_NAME
    return _raise_user_error(
        f"the tars lie where nothing can be written ({paths[0]}): set config.data.index to a local folder"
    )


def _raise_user_error(message: str) -> Path:
    raise UserError(message)
