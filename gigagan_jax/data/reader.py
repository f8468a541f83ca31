"""Reading, decoding and preparing of examples, in threads and worker processes.

Processes exchange chunks: some consecutive rows of a batch. A chunk is small enough that all threads work on one batch,
and large enough that sending it costs little.
"""

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
from gigagan_jax.data.embeddings import Embeddings
from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record
from gigagan_jax.data.quarantine import MIN_TRIED, FailedExample, format_causes
from gigagan_jax.data.source import Source
from gigagan_jax.data.tokenizers import Tokenizer
from gigagan_jax.data.transforms import random_flip, resize_and_crop

Batch = dict[str, np.ndarray]
# (index of the requested example, that example and its bad replacements where it is bad)
ReadReport = tuple[int, tuple[FailedExample, ...]]
# (rows of a batch, one report a row, None or why the run cannot continue)
Chunk = tuple[Batch, list[ReadReport], UserError | None]
# Multiple of the resolution to which `fast_decode` scales JPEGs down. From 3 on, the resampling filter determines
# the result, not the decoder's scaling: above 50 dB for a photograph (tests/data/test_decoding.py).
DECODE_MARGIN = 3
# This many bad examples in a row mean that the data set is missing, not that some files are broken.
_MAX_BAD_IN_A_ROW = 10_000


def start_worker(number: int, count: int) -> None:
    """Initialises a worker process of grain, number `number` of `count`."""
    # Schedulers signal every process of a job. The main process decides, and needs data to complete its step.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    begin_worker()


def chunk_size(rows: int, readers: int) -> int:
    """Rows of a chunk: a divisor of `rows`, at most 32, that gives each reader some; 1 within one process."""
    # Within one process nothing is sent, and single rows balance the threads best.
    limit = min(32, max(1, rows // readers)) if readers else 1
    return next(size for size in range(limit, 0, -1) if rows % size == 0)


class ChunkDataset(grain.MapDataset):
    """Element c holds rows c * size ... (c + 1) * size - 1 of this host's stream, as a Chunk."""

    def __init__(self, reader: "ExampleReader", order: Sequence[int], position: Callable[[int], int], size: int):
        super().__init__()
        self._reader, self._order, self._position, self._size = reader, order, position, size
        self._failure: UserError | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        # Prefetching threads would otherwise each search for a readable example once more.
        if self._failure is not None:
            return {}, [], self._failure
        try:
            positions = [self._position(i) for i in range(index * self._size, (index + 1) * self._size)]
            examples = [self._reader(k, self._order[k]) for k in positions]
        # Returned as data: an exception raised in a worker process arrives as another type.
        except UserError as error:
            self._failure = error
            return {}, [], error
        batch = {key: np.stack([example[key] for example, _ in examples]) for key in examples[0][0]}
        return batch, [report for _, report in examples], None


@dataclasses.dataclass(frozen=True)
class DecodedExample:
    """A decoded example without its name. Its image may be a Pillow image, which saves a copy before the resize."""

    image: np.ndarray | Image.Image
    captions: tuple[str, ...]
    label: int


class RecordDecoder:
    """Turns a Record into a DecodedExample. Raises BadExample.

    Args:
      clean: pass captions through `captions.clean_all`.
      least: as in `decode_to_pil`.
      num_classes: of a class-conditional run; 0 takes any label.
    """

    def __init__(self, clean: bool, least: int | None, num_classes: int = 0):
        self._clean, self._least, self._num_classes = clean, least, num_classes

    def __call__(self, record: Record) -> DecodedExample:
        # A lookup on the device would take another class's row without notice.
        if self._num_classes and not 0 <= record.label < self._num_classes:
            if record.label == UNKNOWN_LABEL:
                raise BadExample("label_missing", "it has no class")
            raise BadExample("label_out_of_range", f"it is of class {record.label}, of {self._num_classes} from 0 on")
        captions = record.captions
        if self._clean and captions:
            captions = clean_all(captions)
            # An example without captions is unconditional. One whose captions were only markup is bad data.
            if not captions:
                raise BadExample("caption_empty", "clean_captions leaves nothing of its captions")
        image = record.image if isinstance(record.image, np.ndarray) else decode_to_pil(record.image, self._least)
        return DecodedExample(image, captions, record.label)


@dataclasses.dataclass(frozen=True)
class ExamplePreparer:
    """Draws caption, crop and flip of a decoded example. Returns one row of a batch.

    Attributes are the arguments of `pipeline.build_pipeline` with the same names. Picklable: worker processes need it.
    """

    resolution: int
    tokenizer: Tokenizer
    crop: str
    flip: bool
    caption_dropout: float
    resize_filter: str
    clip_tokenizer: Tokenizer | None
    embeddings: Embeddings | None

    def __call__(self, example: DecodedExample, index: int, rng: np.random.Generator) -> Batch:
        # Drawn first, and always both: captions do not depend on how images are cropped.
        choice, drop = rng.random(2)
        which: int | None = None
        if example.captions and drop >= self.caption_dropout:
            which = int(choice * len(example.captions))
        # The empty caption is the null caption of every tokenizer.
        caption = "" if which is None else example.captions[which]
        extra: Batch = {} if self.clip_tokenizer is None else {"clip_tokens": self.clip_tokenizer([caption])[0]}
        if self.embeddings is not None:
            extra |= self.embeddings.caption_embedding(index, which)
        image = resize_and_crop(example.image, self.resolution, crop=self.crop, filter=self.resize_filter, rng=rng)
        return {
            "image": random_flip(image, rng) if self.flip else image,
            "tokens": self.tokenizer([caption])[0],
            "label": np.asarray(example.label, np.int32),
            **extra,
        }


class ExampleReader:
    """Reads the example at a position of the stream, or the next good one after a bad one.

    Runs in several threads, and in worker processes.
    """

    def __init__(
        self, source: Source, seed: int, max_bad_fraction: float, decode: RecordDecoder, prepare: ExamplePreparer
    ):
        self.source, self.seed, self.prepare = source, seed, prepare
        self._decode = decode
        self._index_dtype = np.int32 if len(source) <= 2**31 else np.int64
        # Known bad examples are not decoded again. Single dict operations are atomic, so this needs no lock.
        self._bad: dict[int, FailedExample] = {}
        self._max_bad_fraction = max_bad_fraction

    def __call__(self, k: int, first: int) -> tuple[Batch, ReadReport]:
        """Reads example `first` for position `k`. Raises UserError where neither it nor a replacement is readable."""
        bad: list[FailedExample] = []
        candidates = self.source.replacement_range(first)
        # A run that allows this share of bad examples must survive that many in a row.
        allowed = min(int(self._max_bad_fraction * len(candidates)), _MAX_BAD_IN_A_ROW)
        for step in range(min(len(candidates), max(MIN_TRIED, allowed))):
            # In source order from `first` on, around the end: a later read of `first` finds the same replacement.
            index = candidates[(first - candidates.start + step) % len(candidates)]
            example = self._read_example(index)
            if isinstance(example, FailedExample):
                bad.append(example)
                continue
            # Seeded by the position, not the index: each epoch draws another crop.
            row = self.prepare(example, index, np.random.default_rng((self.seed, k)))
            return row | {"index": np.asarray(index, self._index_dtype)}, (first, tuple(bad))
        causes: dict[str, int] = {}
        for failed in bad:
            causes[failed.cause] = causes.get(failed.cause, 0) + 1
        extent = "all" if len(bad) == len(candidates) else f"{len(bad)} in a row of"
        raise UserError(
            f"no readable example: {extent} {len(candidates)} are bad ({format_causes(causes)}); "
            f"the first is {bad[0].name}: {bad[0].detail or bad[0].cause}"
        )

    def _read_example(self, index: int) -> DecodedExample | FailedExample:
        known = self._bad.get(index)
        if known is not None:
            return known
        try:
            return self._decode(self.source.read(index))
        # Only BadExample: an error in a source itself must end the run, not empty the data set.
        except BadExample as error:
            failed = FailedExample(index=index, name=self.source.name(index), cause=error.cause, detail=error.detail)
            self._bad[index] = failed
            return failed


def concatenate_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Joins the chunks of one batch. A failure in any of them is the result."""
    failure = next((why for _, _, why in chunks if why is not None), None)
    if failure is not None:
        return {}, [], failure
    batch = {key: np.concatenate([chunk[key] for chunk, _, _ in chunks]) for key in chunks[0][0]}
    return batch, [report for _, reports, _ in chunks for report in reports], None
