"""Examples to batches: an endless, reshuffled, sharded stream that can resume at any position.

Everything depends on one number, the position k = 0, 1, 2 ... of an example in the endless stream. Epoch k // n is a
permutation of the source; where another data set took its place, epochs count from there. Crop, flip, caption and caption
dropout are drawn from (seed, k). Global batch b of size B is the positions b B ... (b + 1) B - 1, counted from where the run
started. Each host reads the rows of its devices.
Threads, worker processes, hosts and resumes therefore change how the stream is read, but not its content.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.flags
import grain

from gigagan_jax.core.errors import Unreachable, UserError
from gigagan_jax.data.embeddings import Embeddings
from gigagan_jax.data.quarantine import Quarantine
from gigagan_jax.data.reader import (
    DECODE_MARGIN,
    Batch,
    ChunkDataset,
    ExamplePreparer,
    ExampleReader,
    ReadReport,
    RecordDecoder,
    chunk_size,
    concatenate_chunks,
    start_worker,
)
from gigagan_jax.data.sampling import order_of_stream
from gigagan_jax.data.source import Source
from gigagan_jax.data.tokenizers import Tokenizer
from gigagan_jax.data.transforms import CROPS, FILTERS


def build_pipeline(
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
    num_classes: int = 0,
) -> "Pipeline":
    """Builds the stream of training batches.

    Args:
      source: the data set.
      resolution: side R of the images, in pixels.
      batch_size: GLOBAL batch size B, over all hosts.
      seed: of order and augmentation; 0 <= seed < 2**63.
      tokenizer: captions to int32 [N, L].
      crop, resize_filter: as in `transforms.resize_and_crop`.
      flip: mirror half of the images.
      caption_dropout: probability of replacing a caption by the null caption.
      process_index, process_count: this host, and their number H. Host i reads rows i B / H ... (i + 1) B / H - 1.
      rows: rows of each global batch for this host, ascending, in place of those. Hosts that share a row all read it.
      num_threads: threads that read and decode, in each worker process; 0 reads in the caller's thread.
      num_workers: processes that read and decode; 0 reads in this process.
      prefetch_examples: examples kept ready; None for two batches of this host.
      clean_captions: pass captions through `captions.clean_all`.
      fast_decode: decode large JPEGs at a fraction of their size that is at least 3 R.
      start_example: position of the first example to deliver; see `Pipeline.state`.
      max_bad_fraction: share of bad examples that ends the run, judged after 100 examples or an epoch.
      quarantine_path: file with one JSON object {name, cause} a bad example; hosts after the first add their index.
      clip_tokenizer: adds `clip_tokens`, where the CLIP of the contrastive loss has a tokenizer of its own.
      embeddings: stored text embeddings, delivered with their captions.
      num_classes: of a class-conditional run, where an example of no class is bad; 0 takes any label.

    Raises:
      UserError: an argument out of its range, an empty source, or a quarantine_path that cannot be written.
    """
    _check_images(resolution, crop, resize_filter, caption_dropout)
    _check_stream(len(source), seed, start_example, max_bad_fraction)
    _check_readers(num_threads, num_workers, prefetch_examples)
    # Callables of module level: worker processes receive them by pickle.
    prepare = ExamplePreparer(
        resolution, tokenizer, crop, flip, caption_dropout, resize_filter, clip_tokenizer, embeddings
    )
    # DECODE_MARGIN: below three times the resolution, the decoder's scaling would show.
    decode = RecordDecoder(clean_captions, DECODE_MARGIN * resolution if fast_decode else None, num_classes)
    path = _host_file(quarantine_path, process_index)
    return Pipeline(
        reader=ExampleReader(source, seed, max_bad_fraction, decode, prepare),
        batch_size=batch_size,
        rows=_host_rows(rows, batch_size, process_index, process_count),
        quarantine=Quarantine(size=len(source), max_bad_fraction=max_bad_fraction, path=path),
        num_threads=num_threads,
        num_workers=num_workers,
        prefetch_examples=prefetch_examples or 0,
        start_example=start_example,
    )


# ---------------------------------------------------------------- the border: arguments of build_pipeline
# config/validation.py checks settings of a config. Tools and tests call build_pipeline without one.


def _check_argument(valid: bool, message: str) -> None:
    if not valid:
        raise UserError(message)


# Raised here, not in worker processes: those report an exception as another type.
def _check_images(resolution: int, crop: str, resize_filter: str, caption_dropout: float) -> None:
    _check_argument(resolution > 0, f"resolution={resolution} must be positive")
    _check_argument(crop in CROPS, f"unknown crop {crop!r}; there are {', '.join(CROPS)}")
    _check_argument(
        resize_filter in FILTERS, f"unknown resize_filter {resize_filter!r}; there are {', '.join(FILTERS)}"
    )
    _check_argument(0 <= caption_dropout <= 1, f"caption_dropout={caption_dropout} is a probability: 0 ... 1")


def _check_stream(size: int, seed: int, start_example: int, max_bad_fraction: float) -> None:
    _check_argument(size > 0, "the data set is empty")
    # Mixtures and reshuffles derive seeds in the same range.
    _check_argument(0 <= seed < 2**63, f"seed={seed} must lie in 0 ... 2**63 - 1")
    _check_argument(start_example >= 0, f"start_example={start_example} must not be negative")
    _check_argument(0 <= max_bad_fraction <= 1, f"max_bad_fraction={max_bad_fraction} is a fraction: 0 ... 1")


def _check_readers(num_threads: int, num_workers: int, prefetch_examples: int | None) -> None:
    _check_argument(num_threads >= 0, f"num_threads={num_threads} must not be negative")
    _check_argument(num_workers >= 0, f"num_workers={num_workers} must not be negative")
    _check_argument(
        prefetch_examples is None or prefetch_examples > 0, f"prefetch_examples={prefetch_examples} must be positive"
    )


def _host_rows(rows: Sequence[int] | None, batch_size: int, index: int, count: int) -> Sequence[int]:
    """The rows of each global batch that host `index` of `count` reads."""
    _check_argument(count > 0 and 0 <= index < count, f"process {index} of {count}")
    _check_argument(batch_size > 0, f"batch_size={batch_size} must be positive")
    if rows is None:
        _check_argument(
            batch_size % count == 0,
            f"batch_size={batch_size} does not divide by the {count} hosts; use a multiple of {count}",
        )
        rows = range(index * batch_size // count, (index + 1) * batch_size // count)
    # Ascending without repeats: the step assembles the global batch from rows in this order.
    _check_argument(
        len(rows) > 0 and all(0 <= row < batch_size for row in rows) and list(rows) == sorted(set(rows)),
        f"rows={list(rows)} must be ascending rows of a batch of {batch_size}",
    )
    return rows


def _host_file(path: str | os.PathLike | None, index: int) -> Path | None:
    """A host's own list of bad examples: hosts may share the folder, and appends of two hosts could interleave."""
    if path is None:
        return None
    file = Path(path)
    return file.with_name(f"{file.stem}.{index}{file.suffix}") if index > 0 else file


# ---------------------------------------------------------------- the stream


class EarlierData(NamedTuple):
    """A data set that a stream had before another took its place.

    identity: of the source.
    examples: their number; 0 where the state of then did not say.
    end: position of the first example of the next data set.
    """

    identity: str
    examples: int
    end: int


class Pipeline:
    """Endless iterator of this host's batches, built by `build_pipeline`. For use from one thread; must be closed.

    Each batch is a dict: `image` uint8 [b, R, R, 3], `tokens` int32 [b, L], `label` int32 [b] (-1 = unknown), and
    `index`, the place in the source of the example that was used (a replacement's, if one was bad): int32 [b], or int64
    for sources too long for it.

    `next` raises UserError when too much of the data is bad.
    """

    def __init__(
        self,
        *,
        reader: ExampleReader,
        quarantine: Quarantine,
        batch_size: int,
        rows: Sequence[int],
        num_threads: int,
        num_workers: int,
        prefetch_examples: int,
        start_example: int,
    ):
        self.embeddings = reader.prepare.embeddings
        self.quarantine = quarantine
        # Shared by all iterators: `restore` keeps its record of known bad examples.
        self._reader = reader
        self._seed = reader.seed
        self._identity = reader.source.identity()
        self._batch_size = batch_size
        self._rows = rows
        self._threads, self._workers = num_threads, num_workers
        self._prefetch = prefetch_examples or 2 * len(rows)
        self._examples_seen = start_example
        # (position, salt) of each reshuffle: from that position on, the order is another one.
        self._reorders: tuple[tuple[int, int], ...] = ()
        # Data sets that the stream had before this one.
        self._earlier: tuple[EarlierData, ...] = ()
        self._batches = self._start_reading()

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> Batch:
        batch, reports = self._next_batch()
        # Counted at delivery: prefetched batches are no part of `state`.
        self._examples_seen += self._batch_size
        for index, failed in reports:
            self.quarantine.record_example(index, failed)
        return batch

    @property
    def source(self) -> Source:
        """The data set that is read."""
        return self._reader.source

    def describe_source(self) -> dict[str, Any]:
        """Number of examples and the steps of the filter report, ready for JSON."""
        source = self._reader.source
        # Only sources with metadata have filters, so the attribute is no part of Source.
        report = getattr(source, "filter_report", None)
        return {"examples": len(source), "filters": report["steps"] if report else []}

    def state(self) -> dict[str, Any]:
        """The position of the stream, ready for JSON. Prefetched batches that were not delivered do not count.

        `examples_seen` is global, the position of the next example, and does not depend on the number of hosts.
        The counters under `quarantine` are those of this host.
        """
        state = {
            "examples_seen": self._examples_seen,
            "seed": self._seed,
            "source": self._identity,
            "examples": len(self._reader.source),
            "quarantine": self.quarantine.state(),
        }
        # Left out where empty: `restore` reads a missing key as none.
        if self._reorders:
            state["reorders"] = [list(reorder) for reorder in self._reorders]
        if self._earlier:
            state["earlier"] = [list(earlier) for earlier in self._earlier]
        return state

    def restore(self, state: Mapping[str, Any], *, accept_data: bool = False) -> bool:
        """Continues exactly where `state` was taken, for any batch size and number of hosts before.

        A late position costs no more time than an early one.

        Args:
          state: of `state()`.
          accept_data: a state of another data set goes on with this one: its first epoch begins at the position of the state.

        Returns:
          whether the state was of another data set

        Raises:
          UserError: the state belongs to another data set or another seed, or cannot be read.
        """
        # Everything is read before anything changes: a refused state leaves the pipeline as it was.
        try:
            examples_seen, seed, identity = int(state["examples_seen"]), int(state["seed"]), str(state["source"])
            # The checkpoint holds process 0's counters: all processes go on from those.
            counters = {"tried": int(state["quarantine"]["tried"]), "causes": dict(state["quarantine"]["causes"])}
            reorders = tuple((int(start), int(salt)) for start, salt in state.get("reorders", ()))
            earlier = tuple(EarlierData(str(x[0]), int(x[1]), int(x[2])) for x in state.get("earlier", ()))
            # States of before had no such number.
            examples = int(state.get("examples", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the data position in the checkpoint cannot be read: {error!r}") from error
        _check_argument(examples_seen >= 0, f"the data position in the checkpoint is negative: {examples_seen}")
        other_data = identity != self._identity
        # Accepted data may be larger, but a label must not become another class.
        _check_argument(
            not other_data or identity != getattr(self._reader.source, "sorted_identity", None),
            "the checkpoint numbers these class folders in sorted order (0, 1, 10, 11, 2 ...), as earlier versions did, and "
            "the order is now that of the numbers: every label would mean another class; start a new run in another workdir",
        )
        # A rollback may go back to before the data were accepted: they were accepted once.
        known = {data.identity for data in self._earlier}
        _check_argument(
            # Positions are indices into the order of one data set. In another, they mean other examples.
            not other_data or accept_data or identity in known,
            f"the checkpoint was made with another data set ({examples or '?'} -> {len(self._reader.source)} examples, identity "
            f"{identity} -> {self._identity}): files were added, removed or renamed, or the path differs; --accept=data goes on "
            "with these data in a new order; otherwise resume with the same data or start a new run",
        )
        _check_argument(
            # Another seed would repeat some examples of this epoch and skip others.
            seed == self._seed,
            f"the checkpoint was made with seed={seed}, this run has seed={self._seed}: resume with seed={seed}",
        )
        # The old iterator holds prefetched batches of the old position.
        self.close()
        self.quarantine.restore(counters)
        self._examples_seen = examples_seen
        self._reorders = reorders
        self._earlier = (*earlier, EarlierData(identity, examples, examples_seen)) if other_data else earlier
        self._batches = self._start_reading()
        return other_data

    def example_name(self, position: int) -> str:
        """The source's name of the example at a position of the stream, before any replacement."""
        return self._reader.source.name(self._current_order()[position])

    def _current_order(self) -> Sequence[int]:
        source = self._reader.source
        starts = [earlier.end for earlier in self._earlier]
        return order_of_stream(source.shuffled_order, len(source), self._seed, starts, self._reorders)

    def close(self) -> None:
        """Stops the reading threads. The pipeline delivers nothing after it, until a `restore`."""
        self._batches.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next_batch(self) -> tuple[Batch, list[ReadReport]]:
        try:
            batch, reports, failure = next(self._batches)
        # grain raises RuntimeError for a worker that was killed, usually by the kernel for want of memory.
        except RuntimeError as error:
            if self._workers and "worker" in str(error).lower():
                raise Unreachable(
                    f"a process that reads the data was lost ({str(error).splitlines()[0]}): if memory ran out, set "
                    "fewer config.data.workers or config.data.threads; the same command resumes from "
                    "the last checkpoint"
                ) from error
            raise
        # Raised in the consumer's thread, with the message of the worker.
        if failure is not None:
            raise failure
        return batch, reports

    def _start_reading(self) -> grain.DatasetIterator:
        start, batch_size, rows = self._examples_seen, self._batch_size, self._rows
        # Zero readers within one process: chunk_size then returns 1.
        size = chunk_size(len(rows), max(1, self._threads) * self._workers)

        def position_of_row(i: int) -> int:
            # `i` counts this host's rows from the start. Positions also count the rows of other hosts.
            batch, row = divmod(i, len(rows))
            return start + batch * batch_size + rows[row]

        chunks = ChunkDataset(self._reader, self._current_order(), position_of_row, size)
        # In chunks, divided among the workers. Fewer than the threads would leave some idle.
        ahead = max(-(-self._prefetch // size) // max(1, self._workers), self._threads) if self._threads else 0
        stream = chunks.to_iter_dataset(grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead))
        if self._workers:
            # grain reads absl's flags and raises where they are unparsed. This program has none.
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()
            # At least one chunk each, or a worker would wait for its consumer.
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=max(1, -(-self._prefetch // size // self._workers))
            )
            stream = stream.mp_prefetch(options, worker_init_fn=start_worker)
        # chunk_size divides the rows, so no remainder is dropped from an endless stream.
        return iter(stream.batch(len(rows) // size, drop_remainder=True, batch_fn=concatenate_chunks))
