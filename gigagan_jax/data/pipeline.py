"""Examples to batches: an endless, reshuffled, sharded stream that restarts anywhere.

Everything hangs on one number, the position k = 0, 1, 2 ... of an example in the endless stream. Epoch k // n is a
permutation of the source; crop, flip, caption and caption dropout are drawn from (seed, k). Global batch b of size B
is the positions b B ... (b + 1) B - 1 (from where the run started), and each host reads its contiguous rows of it.
So threads, hosts and resumes can change how the stream is read but not what is in it.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gigagan_jax.data.embeddings import Embeddings
from gigagan_jax.data.quarantine import MIN_TRIED, Bad, Quarantine, describe
from gigagan_jax.data.records import BadExample, Example, Source
from gigagan_jax.data.tokenizers import Tokenizer
from gigagan_jax.data.transforms import CROPS, FILTERS, random_flip, resize_and_crop
from gigagan_jax.errors import UserError

Batch = dict[str, np.ndarray]
Asked = tuple[int, tuple[Bad, ...]]

# As many bad examples side by side are taken for a data set that is not there, not for some broken files in it.
_MAX_BAD_IN_A_ROW = 10_000


def build(
    source: Source,
    *,
    resolution: int,
    batch_size: int,
    seed: int,
    tokenizer: Tokenizer,
    crop: str = "center",
    flip: bool = False,
    caption_dropout: float = 0.0,
    resize_filter: str = "lanczos",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    prefetch_examples: int | None = None,
    start_example: int = 0,
    max_bad_fraction: float = 0.1,
    quarantine_path: str | os.PathLike | None = None,
    clip_tokenizer: Tokenizer | None = None,
    embeddings: Embeddings | None = None,
) -> "Pipeline":
    """Builds the stream of training batches.

    Args:
      source: the data set.
      resolution: side R of the images, in pixels.
      batch_size: GLOBAL batch size B, over all hosts.
      seed: of order and augmentation; 0 <= seed < 2**63.
      tokenizer: captions to int32 [N, L].
      crop: 'center', 'random' or 'none', as in `transforms.resize_and_crop`.
      flip: mirror half of the images.
      caption_dropout: probability with which a caption is replaced by the null caption.
      resize_filter: a key of `transforms.FILTERS`.
      process_index: this host, 0 <= process_index < process_count.
      process_count: number H of hosts; B must be a multiple of it. Each host gets b = B / H rows.
      num_threads: threads that read and decode; 0 reads in the caller's thread.
      prefetch_examples: examples kept ready; None for two batches of this host.
      start_example: position of the first example to deliver; see `Pipeline.state`.
      max_bad_fraction: share of bad examples beyond which the run ends, judged after 100 examples or an epoch.
      quarantine_path: file to which each bad example is appended once, one JSON object {name, cause} a line. Hosts
        other than the first put their index before the suffix: they may share the folder.
      clip_tokenizer: captions to `clip_tokens` too, where the CLIP of the contrastive loss has tokens of its own.
      embeddings: text embeddings made ahead of time, to be delivered with the captions they belong to.

    Raises:
      UserError: an argument out of its range, an empty source, or a quarantine_path that cannot be written.
    """
    _check(len(source) > 0, "the data set is empty")
    _check(len(source) < 2**32, f"the data set has {len(source)} examples; the shuffle reaches 2**32 - 1")
    _check(resolution > 0, f"resolution={resolution} must be positive")
    _check(process_count > 0 and 0 <= process_index < process_count, f"process {process_index} of {process_count}")
    _check(batch_size > 0, f"batch_size={batch_size} must be positive")
    _check(
        batch_size % process_count == 0,
        f"batch_size={batch_size} does not divide by the {process_count} hosts; use a multiple of {process_count}",
    )
    _check(0 <= seed < 2**63, f"seed={seed} must lie in 0 ... 2**63 - 1")
    _check(crop in CROPS, f"unknown crop {crop!r}; there are {', '.join(CROPS)}")
    _check(resize_filter in FILTERS, f"unknown resize_filter {resize_filter!r}; there are {', '.join(FILTERS)}")
    _check(0 <= caption_dropout <= 1, f"caption_dropout={caption_dropout} is a probability: 0 ... 1")
    _check(0 <= max_bad_fraction <= 1, f"max_bad_fraction={max_bad_fraction} is a fraction: 0 ... 1")
    _check(num_threads >= 0, f"num_threads={num_threads} must not be negative")
    _check(
        prefetch_examples is None or prefetch_examples > 0, f"prefetch_examples={prefetch_examples} must be positive"
    )
    _check(start_example >= 0, f"start_example={start_example} must not be negative")
    if quarantine_path is not None and process_index > 0:
        path = Path(quarantine_path)
        quarantine_path = path.with_name(f"{path.stem}.{process_index}{path.suffix}")

    def prepare(example: Example, index: int, rng: np.random.Generator) -> Batch:
        # Drawn first and always both, so that captions do not depend on how images are cropped.
        choice, drop = rng.random(2)
        which: int | None = None
        if example.captions and drop >= caption_dropout:
            which = int(choice * len(example.captions))
        caption = "" if which is None else example.captions[which]
        extra: Batch = {} if clip_tokenizer is None else {"clip_tokens": clip_tokenizer([caption])[0]}
        if embeddings is not None:
            extra |= embeddings.of(index, which)
        image = resize_and_crop(example.image, resolution, crop=crop, filter=resize_filter, rng=rng)
        return {
            "image": random_flip(image, rng) if flip else image,
            "tokens": tokenizer([caption])[0],
            "label": np.asarray(example.label, np.int32),
            **extra,
        }

    return Pipeline(
        reader=_Reader(source, seed, max_bad_fraction, prepare),
        quarantine=Quarantine(size=len(source), max_bad_fraction=max_bad_fraction, path=quarantine_path),
        seed=seed,
        identity=source.identity(),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
        prefetch_examples=prefetch_examples,
        start_example=start_example,
        embeddings=embeddings,
    )


class Pipeline:
    """Endless iterator of this host's batches; made by `build`. To be used from one thread, and closed.

    Each batch is a dict: `image` uint8 [b, R, R, 3], `tokens` int32 [b, L], `label` int32 [b] (-1 = unknown), and
    `index`, the place in the source of the example truly used (a replacement's, if one was bad): int32 [b], or int64
    for sources too long for it.

    `next` raises UserError when too much of the data is bad.
    """

    def __init__(
        self,
        *,
        reader: "_Reader",
        quarantine: Quarantine,
        seed: int,
        identity: str,
        batch_size: int,
        process_index: int,
        process_count: int,
        num_threads: int,
        prefetch_examples: int | None,
        start_example: int,
        embeddings: Embeddings | None = None,
    ):
        self.embeddings = embeddings
        self.quarantine = quarantine
        self._reader = reader
        self._seed = seed
        self._identity = identity
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._first_row = process_index * self._rows
        prefetch = prefetch_examples or 2 * self._rows
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0
        )
        self._examples_seen = start_example
        self._batches = self._start()

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> Batch:
        batch, asked = next(self._batches)
        self._examples_seen += self._batch_size
        for index, faults in asked:
            self.quarantine.record(index, faults)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream stands, ready for JSON; prefetched batches that nobody took are not counted.

        `examples_seen` is global, the position of the next example, and does not depend on the number of hosts.
        The counters under `quarantine` are those of this host.
        """
        return {
            "examples_seen": self._examples_seen,
            "seed": self._seed,
            "source": self._identity,
            "quarantine": self.quarantine.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `state` was taken, whatever the batch size and the number of hosts were then.

        Takes no longer for a late position than for an early one. Raises UserError if the state belongs to another
        data set or another seed, or is no such state.
        """
        try:
            examples_seen, seed, identity = int(state["examples_seen"]), int(state["seed"]), str(state["source"])
            counters = {"tried": int(state["quarantine"]["tried"]), "causes": dict(state["quarantine"]["causes"])}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the data position in the checkpoint cannot be read: {error!r}") from error
        _check(examples_seen >= 0, f"the data position in the checkpoint is negative: {examples_seen}")
        _check(
            identity == self._identity,
            f"the checkpoint was made with another data set (identity {identity}, this one is {self._identity}): "
            "files were added, removed or renamed, or the path differs; resume with the same data or start a new run",
        )
        _check(
            seed == self._seed,
            f"the checkpoint was made with seed={seed}, this run has seed={self._seed}: resume with seed={seed}",
        )
        self.close()
        self.quarantine.restore(counters)
        self._examples_seen = examples_seen
        self._batches = self._start()

    def close(self) -> None:
        """Stops the reading threads. The pipeline delivers nothing after it, until a `restore`."""
        self._batches.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> grain.DatasetIterator:
        start, batch_size, rows, first_row = self._examples_seen, self._batch_size, self._rows, self._first_row

        def position(i: int) -> int:
            batch, row = divmod(i, rows)
            return start + batch * batch_size + first_row + row

        size = len(self._reader.source)
        # Grain shuffles epoch e by seed + e: neighbouring seeds would share all epochs but one.
        shuffle_seed = int(np.random.SeedSequence(self._seed).generate_state(1, np.uint32)[0])
        order = grain.MapDataset.range(size).shuffle(shuffle_seed).repeat()
        return iter(
            _AtPositions(order, position)
            .map(self._reader)
            .to_iter_dataset(self._read_options)
            .batch(rows, drop_remainder=True, batch_fn=_stack)
        )


class _AtPositions(grain.MapDataset):
    """Element i is the pair (k, parent[k]) with k = position(i)."""

    def __init__(self, parent: grain.MapDataset, position: Callable[[int], int]):
        super().__init__(parent)
        self._position = position

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        k = self._position(index)
        return k, self._parent[k]


class _Reader:
    """(k, index) to an example ready to be stacked, and (index, what was bad on the way). Runs in several threads."""

    def __init__(
        self,
        source: Source,
        seed: int,
        max_bad_fraction: float,
        prepare: Callable[[Example, int, np.random.Generator], Batch],
    ):
        self.source = source
        self._seed = seed
        self._prepare = prepare
        self._index_dtype = np.int32 if len(source) <= 2**31 else np.int64
        # Spares a second decoding of what is known to be bad; single dict operations are atomic.
        self._bad: dict[int, Bad] = {}
        allowed = min(int(max_bad_fraction * len(source)), _MAX_BAD_IN_A_ROW)
        self._patience = min(len(source), max(MIN_TRIED, allowed))

    def __call__(self, element: tuple[int, int]) -> tuple[Batch, Asked]:
        k, first = int(element[0]), int(element[1])
        bad: list[Bad] = []
        for step in range(self._patience):
            index = (first + step) % len(self.source)
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
        everything = "all" if len(bad) == len(self.source) else f"{len(bad)} in a row of"
        raise UserError(
            f"no readable example: {everything} {len(self.source)} are bad ({describe(causes)}); "
            f"the first is {bad[0].name}: {bad[0].detail or bad[0].cause}"
        )

    def _read(self, index: int) -> Example | Bad:
        known = self._bad.get(index)
        if known is not None:
            return known
        try:
            return self.source[index]
        except BadExample as error:
            bad = Bad(index=index, name=self.source.name(index), cause=error.cause, detail=error.detail)
            self._bad[index] = bad
            return bad


def _stack(elements: Sequence[tuple[Batch, Asked]]) -> tuple[Batch, list[Asked]]:
    examples = [example for example, _ in elements]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}, [
        asked for _, asked in elements
    ]


def _check(true: bool, message: str) -> None:
    if not true:
        raise UserError(message)
