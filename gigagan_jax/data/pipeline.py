"""Examples to batches: an endless, reshuffled, sharded stream that restarts anywhere.

Everything hangs on one number, the position k = 0, 1, 2 ... of an example in the endless stream. Epoch k // n is a
permutation of the source; crop, flip, caption and caption dropout are drawn from (seed, k). Global batch b of size B
is the positions b B ... (b + 1) B - 1 (from where the run started), and each host reads the rows that its devices hold.
So threads, worker processes, hosts and resumes can change how the stream is read but not what is in it.

What travels between processes are chunks, some consecutive rows of a batch: small enough that all threads work on one batch,
large enough that sending them costs little.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.flags
import grain
import numpy as np

from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.data.embeddings import Embeddings
from gigagan_jax.data.quarantine import Quarantine
from gigagan_jax.data.reader import (
    _GAP,
    Asked,
    Batch,
    _chunk_size,
    _Chunks,
    _concatenate,
    _Decoded,
    _Decoder,
    _Reader,
    _start_worker,
)
from gigagan_jax.data.sampling import Reordered
from gigagan_jax.data.source import Source
from gigagan_jax.data.tokenizers import Tokenizer
from gigagan_jax.data.transforms import CROPS, FILTERS, random_flip, resize_and_crop


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
    rows: Sequence[int] | None = None,
    num_threads: int = 8,
    num_workers: int = 0,
    prefetch_examples: int | None = None,
    clean_captions: bool = False,
    fast_decode: bool = False,
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
      crop: 'center', 'random', 'none' or 'pad', as in `transforms.resize_and_crop`.
      flip: mirror half of the images.
      caption_dropout: probability with which a caption is replaced by the null caption.
      resize_filter: a key of `transforms.FILTERS`.
      process_index: this host, 0 <= process_index < process_count.
      process_count: number H of hosts; B must be a multiple of it. Each host gets b = B / H rows.
      rows: which rows of each global batch this host gets, ascending, where its devices do not hold those from
        process_index * b on; hosts that share a row all read it.
      num_threads: threads that read and decode, in each worker process; 0 reads in the caller's thread.
      num_workers: processes that read and decode; 0 does it in this one.
      clean_captions: pass captions through `captions.clean`.
      fast_decode: decode JPEGs at a fraction of their size that is at least 3 R, where they are that large.
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
    _check(resolution > 0, f"resolution={resolution} must be positive")
    _check(process_count > 0 and 0 <= process_index < process_count, f"process {process_index} of {process_count}")
    _check(batch_size > 0, f"batch_size={batch_size} must be positive")
    _check(
        rows is not None or batch_size % process_count == 0,
        f"batch_size={batch_size} does not divide by the {process_count} hosts; use a multiple of {process_count}",
    )
    _check(0 <= seed < 2**63, f"seed={seed} must lie in 0 ... 2**63 - 1")
    _check(crop in CROPS, f"unknown crop {crop!r}; there are {', '.join(CROPS)}")
    _check(resize_filter in FILTERS, f"unknown resize_filter {resize_filter!r}; there are {', '.join(FILTERS)}")
    _check(0 <= caption_dropout <= 1, f"caption_dropout={caption_dropout} is a probability: 0 ... 1")
    _check(0 <= max_bad_fraction <= 1, f"max_bad_fraction={max_bad_fraction} is a fraction: 0 ... 1")
    mine = rows
    if mine is None:
        mine = range(process_index * batch_size // process_count, (process_index + 1) * batch_size // process_count)
    _check(
        len(mine) > 0 and all(0 <= row < batch_size for row in mine) and list(mine) == sorted(set(mine)),
        f"rows={list(mine)} must be ascending rows of a batch of {batch_size}",
    )
    _check(num_threads >= 0, f"num_threads={num_threads} must not be negative")
    _check(num_workers >= 0, f"num_workers={num_workers} must not be negative")
    _check(
        prefetch_examples is None or prefetch_examples > 0, f"prefetch_examples={prefetch_examples} must be positive"
    )
    _check(start_example >= 0, f"start_example={start_example} must not be negative")
    if quarantine_path is not None and process_index > 0:
        path = Path(quarantine_path)
        quarantine_path = path.with_name(f"{path.stem}.{process_index}{path.suffix}")

    def prepare(example: _Decoded, index: int, rng: np.random.Generator) -> Batch:
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

    decode = _Decoder(clean_captions, _GAP * resolution if fast_decode else None)
    return Pipeline(
        reader=_Reader(source, seed, max_bad_fraction, decode, prepare),
        quarantine=Quarantine(size=len(source), max_bad_fraction=max_bad_fraction, path=quarantine_path),
        seed=seed,
        identity=source.identity(),
        batch_size=batch_size,
        rows=mine,
        num_threads=num_threads,
        num_workers=num_workers,
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
        rows: Sequence[int],
        num_threads: int,
        num_workers: int,
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
        self._rows = rows
        self._threads, self._workers = num_threads, num_workers
        self._prefetch = prefetch_examples or 2 * len(rows)
        self._examples_seen = start_example
        self._reorders: tuple[tuple[int, int], ...] = ()  # (position, seed) from which on the order is another one
        self._batches = self._start()

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> Batch:
        batch, asked = self._take()
        self._examples_seen += self._batch_size
        for index, faults in asked:
            self.quarantine.record(index, faults)
        return batch

    def about(self) -> dict[str, Any]:
        """Of the data set: its examples, and what its filters left, ready for JSON."""
        source = self._reader.source
        funnel = getattr(source, "funnel", None)
        return {"examples": len(source), "filters": funnel["steps"] if funnel else []}

    def state(self) -> dict[str, Any]:
        """Where the stream stands, ready for JSON; prefetched batches that nobody took are not counted.

        `examples_seen` is global, the position of the next example, and does not depend on the number of hosts.
        The counters under `quarantine` are those of this host.
        """
        state = {
            "examples_seen": self._examples_seen,
            "seed": self._seed,
            "source": self._identity,
            "quarantine": self.quarantine.state(),
        }
        return state | ({"reorders": [list(one) for one in self._reorders]} if self._reorders else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `state` was taken, whatever the batch size and the number of hosts were then.

        Takes no longer for a late position than for an early one. Raises UserError if the state belongs to another
        data set or another seed, or is no such state.
        """
        try:
            examples_seen, seed, identity = int(state["examples_seen"]), int(state["seed"]), str(state["source"])
            counters = {"tried": int(state["quarantine"]["tried"]), "causes": dict(state["quarantine"]["causes"])}
            reorders = tuple((int(start), int(salt)) for start, salt in state.get("reorders", ()))
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
        self._reorders = reorders
        self._batches = self._start()

    def name(self, position: int) -> str:
        """The source's name of the example that is first asked for at a position of the stream."""
        return self._reader.source.name(self._order()[position])

    def _order(self) -> Sequence[int]:
        order = self._reader.source.shuffled(self._seed)
        for start, salt in self._reorders:
            # A stream of draws of its own, apart from those of other seeds.
            seed = int(np.random.SeedSequence((self._seed, salt)).generate_state(1, np.uint64)[0]) >> 1
            order = Reordered(order, len(self._reader.source), start, seed)
        return order

    def close(self) -> None:
        """Stops the reading threads. The pipeline delivers nothing after it, until a `restore`."""
        self._batches.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take(self) -> tuple[Batch, list[Asked]]:
        try:
            batch, asked, failure = next(self._batches)
        except RuntimeError as error:  # grain's word for a worker that was killed, for want of memory as a rule
            if self._workers and "worker" in str(error).lower():
                raise Unreachable(
                    f"a process that reads the data was lost ({str(error).splitlines()[0]}): if memory ran out, set fewer "
                    "config.data.workers or config.data.threads; the same command goes on from the last checkpoint"
                ) from error
            raise
        if failure is not None:
            raise failure
        return batch, asked

    def _start(self) -> grain.DatasetIterator:
        start, batch_size, rows = self._examples_seen, self._batch_size, self._rows
        chunk = _chunk_size(len(rows), max(1, self._threads) * self._workers)

        def position(i: int) -> int:
            batch, row = divmod(i, len(rows))
            return start + batch * batch_size + rows[row]

        chunks = _Chunks(self._reader, self._order(), position, chunk)
        ahead = max(-(-self._prefetch // chunk) // max(1, self._workers), self._threads) if self._threads else 0
        read = chunks.to_iter_dataset(grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead))
        if self._workers:
            if not absl.flags.FLAGS.is_parsed():  # grain asks absl's flags, which this program has none of
                absl.flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=max(1, -(-self._prefetch // chunk // self._workers))
            )
            read = read.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(read.batch(len(rows) // chunk, drop_remainder=True, batch_fn=_concatenate))


def _check(true: bool, message: str) -> None:
    if not true:
        raise UserError(message)
