"""Webdataset tars as img2dataset writes them (`.jpg`, `.txt`, `.json` for each key), read by random access."""

import json
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
from gigagan_jax.data.sources import filters as filtering
from gigagan_jax.data.sources import tar_index
from gigagan_jax.data.sources.tar_headers import BLOCK, is_header_of
from gigagan_jax.data.sources.tar_index import FAULTS, NOTHING
from gigagan_jax.data.storage import Storage, is_local, local

_log = logging.getLogger(__name__)
_NEAR = 64 << 10  # bytes between image and caption that are cheaper to read than to leave out
INDEX_NAME = "gigagan_index"


class TarSource(Source):
    """Tars by pattern. The first use indexes them (`tools/prepare_data.py index` does it ahead of time).

    Args:
      path: tars: a file, a folder, or a pattern for `Storage.expand`.
      index: folder of the index; empty: `gigagan_index` beside the tars, or where that cannot be written in `workdir`.
      workdir: see `index`.
      storage: to read with.
      caption_required: whether an example without a caption is bad; otherwise it has none.
      caption_keys: keys of the `.json` member that hold captions; empty: lines of the `.txt` member.
      filters: which examples to keep.
      workers: processes to index with; 0: one for each core.
      refresh: look at every tar whether it changed since it was indexed; otherwise at local ones.

    Raises:
      UserError: no tar there, a compressed one, an index that cannot be written, metadata without a column that a filter
        needs, or nothing left after the filters.
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
        self.paths = self._storage.expand(path, tar_index.SHARD_SUFFIXES)
        self._caption_required, self._caption_keys = caption_required, tuple(caption_keys)
        folder = index_folder(self.paths, index, workdir)
        kind = "json" if caption_keys else "text"
        self.index = tar_index.opened(folder, self._storage, self.paths, kind, workers, refresh)
        self.report = self._account()
        damaged = self.index.about["damaged"]
        if damaged:
            _log.warning(
                "%d tars are damaged or end too early: examples behind the damage are lost, and not counted: %s",
                len(damaged),
                ", ".join(damaged[:10]) + (" ..." if len(damaged) > 10 else ""),
            )
        selected = filtering.select_tars(
            self.index, folder, self.paths, self._storage, filters or FilterConfig(), workers
        )
        self._rows: Any = selected[0] if selected else None
        self.funnel: dict[str, Any] | None = selected[1] if selected else None
        self._identity = self.index.about["identity"]
        if self.funnel is not None:
            self._identity = self.funnel["identity"]
        if not len(self):
            why = self.funnel_table() if self.funnel else "the tars hold no example"
            raise UserError(f"{path}: no example is left; {why}")
        self.has_labels = "label" in self.index.columns

    def _account(self) -> str:
        a = self.index.about
        faults = ", ".join(f"{n} {cause}" for cause, n in a["faults"].items())
        bad = f"; without a caption: {a['without_caption']}" if a["without_caption"] else ""
        return f"{a['examples']} examples in {len(self.paths)} tars{bad}{'; bad: ' + faults if faults else ''}"

    def funnel_table(self) -> str:
        """What the filters left, step by step; one line each."""
        return filtering.table(self.funnel) if self.funnel else self.report

    def __len__(self) -> int:
        return len(self.index) if self._rows is None else len(self._rows)

    def _row(self, i: int) -> int:
        return i if self._rows is None else int(self._rows[i])

    def __getstate__(self):
        state = self.__dict__.copy()
        if isinstance(self._rows, np.memmap):  # mapped again, not copied
            state["_rows"] = Path(str(self._rows.filename))
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        if isinstance(self._rows, Path):
            self._rows = np.load(self._rows, mmap_mode="r")

    def name(self, i: int) -> str:
        """Tar and key: "00000.tar/000000012"."""
        row = self._row(i)
        return f"{self.index.shards[self.index.shard_of(row)]}/{self.index.key(row)}"

    def identity(self) -> str:
        return self._identity

    def read(self, i: int) -> Record:
        """Image and captions in one read where they lie near each other.

        Raises BadExample with a cause of FAULTS, of `decode_captions`, or `caption_missing`, `caption_empty`,
        `tar_missing`, `tar_changed` (the tar is not the one that was indexed).
        """
        row = self._row(i)
        image, caption = self._places(row)
        data = self._fetch(row, [image, caption] if caption else [image])
        label = int(self.index.columns["label"][row]) if self.has_labels else UNKNOWN_LABEL
        return Record(data[0], self._captions(data[1] if caption else None), label, self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        row = self._row(i)
        _, caption = self._places(row)
        return self._captions(self._fetch(row, [caption])[0] if caption else None)

    def _places(self, row: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """(offset, size) of image and caption."""
        columns = self.index.columns
        fault = FAULTS[min(columns["fault"][row], len(FAULTS) - 1)]
        if fault:
            raise BadExample(fault, "found by indexing")
        place = lambda what: (int(columns[f"{what}_block"][row]) * BLOCK, int(columns[f"{what}_size"][row]))
        caption = place("caption")
        if caption[1] != NOTHING:
            return place("image"), caption
        if self._caption_required:
            kind = ".json" if self._caption_keys else ".txt"
            raise BadExample("caption_missing", f"no {kind} member of this key in the tar")
        return place("image"), None

    def _fetch(self, row: int, places: list[tuple[int, int]]) -> list[bytes]:
        """Data of members of one example, their headers compared with the index."""
        path, key = self.paths[self.index.shard_of(row)], self.index.key(row)
        first = min(offset for offset, _ in places) - BLOCK
        last = max(offset + size for offset, size in places)
        if last - first > sum(size + BLOCK for _, size in places) + _NEAR:
            return [data for place in places for data in self._fetch(row, [place])]
        try:
            data = self._storage.read(path, first, last - first)
        except (OSError, FileNotFoundError) as e:
            raise BadExample("tar_missing", str(e)) from None
        out = []
        for offset, size in places:
            start = offset - first
            if not is_header_of(data[start - BLOCK : start], size, key) or len(data) < start + size:
                raise BadExample(
                    "tar_changed",
                    f"{path} is not as it was indexed: tools/prepare_data.py index --path=... indexes it again",
                )
            out.append(data[start : start + size])
        return out

    def _captions(self, data: bytes | None) -> tuple[str, ...]:
        captions: tuple[str, ...] = ()
        if data is not None:
            captions = _from_json(data, self._caption_keys) if self._caption_keys else decode_captions(data)
        if self._caption_required and not captions:
            raise BadExample("caption_empty", "no text in it")
        return captions


def _from_json(data: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Texts, or lists of them, under some keys of a JSON object."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BadExample("caption_undecodable", f"not JSON: {e}") from None
    out: list[str] = []
    for key in keys:
        value = values.get(key) if isinstance(values, dict) else None
        out += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v.strip()]
    return tuple(v.strip() for v in out)


def index_folder(paths: Sequence[str], index: str, workdir: Path | None) -> Path:
    """Where the index of some tars belongs.

    Raises:
      UserError: neither beside the tars nor in a workdir.
    """
    if index:
        return Path(local(index)) if is_local(index) else _refuse(f"config.data.index={index}: must be a local folder")
    if all(map(is_local, paths)):
        missing = next((p for p in paths if not os.path.isdir(os.path.dirname(os.path.abspath(local(p))))), None)
        if missing:
            return _refuse(f"{missing}: there is no such folder; check config.data.path")
        beside = Path(os.path.commonpath([os.path.dirname(os.path.abspath(local(p))) for p in paths])) / INDEX_NAME
        writable = lambda p: os.access(p, os.W_OK | os.X_OK)
        if writable(beside) or (not beside.exists() and writable(beside.parent)):
            return beside
    if workdir is not None:
        return workdir / INDEX_NAME
    return _refuse(f"the tars lie where nothing can be written ({paths[0]}): set config.data.index to a local folder")


def _refuse(message: str) -> Path:
    raise UserError(message)
