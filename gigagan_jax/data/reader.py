"""Reading and decoding chunks of batches, in threads and worker processes."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import begin_worker
from gigagan_jax.data.captions import clean_all
from gigagan_jax.data.decoding import decode_to_pil
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.quarantine import MIN_TRIED, Bad, describe
from gigagan_jax.data.source import Source

Batch = dict[str, np.ndarray]
Asked = tuple[int, tuple[Bad, ...]]
_GAP = 3  # times the resolution: from there on the resampling filter decides what is seen, not the decoder's scaling
# As many bad examples side by side are taken for a data set that is not there, not for some broken files in it.
_MAX_BAD_IN_A_ROW = 10_000


def _start_worker(number: int, count: int) -> None:
    # What stops a run is sent to all its processes; the main one decides, and still needs its data to get to a step's end.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    begin_worker()


def _chunk_size(rows: int, readers: int) -> int:
    """Rows of a chunk: a divisor of `rows`, at most 32, that leaves each reader some; 1 within one process."""
    most = min(32, max(1, rows // readers)) if readers else 1
    return next(c for c in range(most, 0, -1) if rows % c == 0)


class _Chunks(grain.MapDataset):
    """Element c: rows c * size and on, as (batch of `size`, what was asked for, None or why the run cannot go on)."""

    def __init__(self, reader: "_Reader", order: Sequence[int], position: Callable[[int], int], size: int):
        super().__init__()
        self._reader, self._order, self._position, self._size = reader, order, position, size
        self._failure: UserError | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        if self._failure is not None:  # one search for a readable example is enough
            return {}, [], self._failure
        try:
            positions = [self._position(i) for i in range(index * self._size, (index + 1) * self._size)]
            examples = [self._reader(k, self._order[k]) for k in positions]
        except UserError as error:  # as data: what is raised in a worker process arrives as another exception
            self._failure = error
            return {}, [], error
        batch = {key: np.stack([example[key] for example, _ in examples]) for key in examples[0][0]}
        return batch, [asked for _, asked in examples], None


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """An example to be prepared: as an Example, but an image that was decoded here is not copied into an array first."""

    image: np.ndarray | Image.Image
    captions: tuple[str, ...]
    label: int


class _Decoder:
    """What a source has read, to what is to be prepared. Raises BadExample."""

    def __init__(self, clean: bool, least: int | None):
        self._clean, self._least = clean, least

    def __call__(self, record: Record) -> _Decoded:
        captions = record.captions
        if self._clean and captions:
            captions = clean_all(captions)
            if not captions:
                raise BadExample("caption_empty", "nothing is left of it by clean_captions")
        image = record.image if isinstance(record.image, np.ndarray) else decode_to_pil(record.image, self._least)
        return _Decoded(image, captions, record.label)


class _Reader:
    """(k, index) to an example ready to be stacked, and (index, what was bad on the way).

    Runs in several threads, and in worker processes.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        max_bad_fraction: float,
        decode: _Decoder,
        prepare: Callable[[_Decoded, int, np.random.Generator], Batch],
    ):
        self.source = source
        self._seed = seed
        self._decode, self._prepare = decode, prepare
        self._index_dtype = np.int32 if len(source) <= 2**31 else np.int64
        # Spares a second decoding of what is known to be bad; single dict operations are atomic.
        self._bad: dict[int, Bad] = {}
        self._max_bad_fraction = max_bad_fraction

    def __call__(self, k: int, first: int) -> tuple[Batch, Asked]:
        bad: list[Bad] = []
        part = self.source.neighbours(first)
        allowed = min(int(self._max_bad_fraction * len(part)), _MAX_BAD_IN_A_ROW)
        for step in range(min(len(part), max(MIN_TRIED, allowed))):
            index = part[(first - part.start + step) % len(part)]
            example = self._read(index)
            if isinstance(example, Bad):
                bad.append(example)
                continue
            # The position's generator, not the index's: each epoch crops anew.
            prepared = self._prepare(example, index, np.random.default_rng((self._seed, k)))
            return prepared | {"index": np.asarray(index, self._index_dtype)}, (first, tuple(bad))
        causes: dict[str, int] = {}
        for one in bad:
            causes[one.cause] = causes.get(one.cause, 0) + 1
        everything = "all" if len(bad) == len(part) else f"{len(bad)} in a row of"
        raise UserError(
            f"no readable example: {everything} {len(part)} are bad ({describe(causes)}); "
            f"the first is {bad[0].name}: {bad[0].detail or bad[0].cause}"
        )

    def _read(self, index: int) -> _Decoded | Bad:
        known = self._bad.get(index)
        if known is not None:
            return known
        try:
            return self._decode(self.source.read(index))
        except BadExample as error:
            bad = Bad(index=index, name=self.source.name(index), cause=error.cause, detail=error.detail)
            self._bad[index] = bad
            return bad


def _concatenate(
    chunks: Sequence[tuple[Batch, list[Asked], UserError | None]],
) -> tuple[Batch, list[Asked], UserError | None]:
    failure = next((why for _, _, why in chunks if why is not None), None)
    if failure is not None:
        return {}, [], failure
    batch = {key: np.concatenate([chunk[key] for chunk, _, _ in chunks]) for key in chunks[0][0]}
    return batch, [asked for _, some, _ in chunks for asked in some], None
