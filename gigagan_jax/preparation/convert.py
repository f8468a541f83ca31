"""Conversion of any data set to tars, folders or ArrayRecord, one shard at a time. Finished shards are kept."""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources import array_record_format
from gigagan_jax.preparation import shards
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.tasks import run_tasks

OUTPUT_KINDS = ("arrayrecord", "tar", "folder")
# Hidden, so that a source that lists the folder does not find it.
WORK = ".convert"
LEFT_OUT = "left_out.jsonl"
# Of the shards' content. A change makes begun conversions refuse to continue.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Task of one shard: it writes consecutive examples of a source, in their order.

    Attributes:
      source: to read from.
      out: to write to.
      kind: one of OUTPUT_KINDS.
      name: of the data set; part of the names of ArrayRecord files.
      shard_size: examples in a shard. The last shard may have fewer. Unreadable examples are left out.
      check_images: also leave out images that cannot be decoded.
    """

    source: Source
    out: Output
    kind: str
    name: str
    shard_size: int
    check_images: bool

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self.shard_size)

    def shard_file(self, number: int) -> str:
        """Name of a shard in `out`: 00000.tar, 00000 (a folder), NAME-train.array_record-00000-of-00003."""
        if self.kind == "arrayrecord":
            return array_record_format.shard_name(self.name, number, self.shard_count)
        return f"{number:05d}" + (".tar" if self.kind == "tar" else "")

    def __call__(self, number: int) -> dict[str, Any]:
        """Writes a shard.

        Returns:
          {"examples", "files", "bytes", "left_out": [{"index", "name", "cause", "detail"}, ...]}

        Raises:
          UserError: the shard cannot be written, or the written files are incomplete.
        """
        left_out: list[dict[str, Any]] = []
        write = {"tar": shards.write_tar, "folder": shards.write_folder, "arrayrecord": shards.write_array_record}
        with self.out.scratch_folder() as folder:
            shard = folder / self.shard_file(number)
            count, *written = write[self.kind](shard, self._read_items(number, left_out))
            # Compared before and after publishing: a clean-up of the folder may remove files during both.
            self._verify_extent(written, Output(str(folder)), shard.name)
            self.out.publish(shard, shard.name)
            # An address is listed once, perhaps before this upload. `is_complete` checks uploads in the next run.
            if self.out.local:
                self._verify_extent(written, self.out, shard.name)
        # Plain JSON: run_tasks keeps it in a file.
        return {"examples": count, "files": written[0], "bytes": written[1], "left_out": left_out}

    def _verify_extent(self, written: list[int], place: Output, name: str) -> None:
        found = place.measure_extent(name)
        if found != tuple(written):
            raise UserError(
                f"{place}/{name} holds {found[0]} files, {found[1]} bytes of the {written[0]} files, "
                f"{written[1]} bytes written to it: does something else change that folder? "
                "The same command makes it again"
            )

    def _read_items(self, number: int, left_out: list[dict[str, Any]]) -> Iterator[shards.Item]:
        start = number * self.shard_size
        # img2dataset's keys: five digits of the shard, four or more of the example.
        digits = max(4, len(str(self.shard_size - 1)))
        for i in range(start, min(start + self.shard_size, len(self.source))):
            try:
                record = self.source.read(i)
                image, suffix = shards.to_portable(record, self.check_images)
            except BadExample as bad:
                left_out.append(describe_bad_example(self.source, i, bad))
                continue
            # Numbered by source index: keys do not move when another example becomes readable.
            yield shards.Item(f"{number:05d}{i - start:0{digits}d}", image, suffix, record)

    def is_complete(self, number: int, result: dict[str, Any]) -> bool:
        """Whether the shard exists with the size that `result` records."""
        return self.out.measure_extent(self.shard_file(number)) == (result["files"], result["bytes"])


def describe_bad_example(source: Source, i: int, bad: BadExample) -> dict[str, Any]:
    """A bad example as a line of a report."""
    return {"index": i, "name": source.name(i), "cause": bad.cause, "detail": bad.detail}


def convert_source(
    source: Source,
    out: Output,
    kind: str,
    *,
    name: str = "images",
    shard_size: int = 10_000,
    check_images: bool = False,
    workers: int = 0,
    runner: str | None = None,
    beam_args: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes a data set in another format. The same command resumes an interrupted conversion and keeps whole shards.

    Args:
      source: the data set; its filters apply, its captions are copied unchanged.
      out: folder for the result; empty, or begun by the same conversion.
      kind: "arrayrecord", "tar" (img2dataset's layout) or "folder".
      name: of the data set, in names of ArrayRecord files.
      shard_size: examples of a shard.
      check_images: leave out images that cannot be decoded; otherwise they are copied unchanged.
      workers, runner, beam_args, quiet: as for `run_tasks`.

    Returns:
      {"examples", "shards", "bytes", "left_out": {cause: count}}; left_out.jsonl names each example that was left out.

    Raises:
      UserError: `out` holds something else or cannot be written, or an error of the source.
    """
    if kind not in OUTPUT_KINDS:
        raise UserError(f"--to={kind}: must be one of {', '.join(OUTPUT_KINDS)}")
    if shard_size < 1:
        raise UserError(f"--shard_size={shard_size}: a shard holds at least 1 example")
    # The metadata comes last, hours later. A name that it refuses must fail now.
    if kind == "arrayrecord":
        with tempfile.TemporaryDirectory() as folder:
            array_record_format.write_tfds_metadata(Path(folder), name, [])
    task = Conversion(source, out, kind, name, shard_size, check_images)
    work = out.subfolder(WORK)
    _claim_output(task, work)
    with work.hold_lock("lock", "another convert writes to this folder"):
        # Under the lock: what lies there belongs to a killed run.
        out.clear_scratch()
        results = run_tasks(
            task,
            range(task.shard_count),
            workers=workers,
            runner=runner,
            beam_args=beam_args,
            # Kept after the end: the same command then checks the shards and writes only lost ones.
            results=work.subfolder("shards"),
            is_complete=task.is_complete,
            title=f"converting to {kind}",
            quiet=quiet,
        )
        # Still under the lock: a second convert must not clear the scratch folder now.
        _finish_output(task, work, results)
    return {
        "examples": sum(result["examples"] for result in results),
        "shards": len(results),
        "bytes": sum(result["bytes"] for result in results),
        "left_out": dict(Counter(bad["cause"] for result in results for bad in result["left_out"]).most_common()),
    }


def _finish_output(task: Conversion, work: Output, results: list[dict[str, Any]]) -> None:
    """Writes the files that describe the whole data set, and removes scratch folders."""
    out = task.out
    # From the results of all runs: a resumed conversion lists what its earlier runs left out too.
    left_out = [bad for result in results for bad in result["left_out"]]
    out.write_text(LEFT_OUT, "".join(json.dumps(bad) + "\n" for bad in left_out))
    if task.kind == "arrayrecord":
        size = sum(result["bytes"] for result in results)
        _write_tfds_metadata(out, task.name, [result["examples"] for result in results], size)
    for place in (out, work, work.subfolder("shards")):
        place.clear_scratch()


def _claim_output(task: Conversion, work: Output) -> None:
    """Marks the folder as belonging to this conversion, or checks that it does."""
    # Everything that the bytes of a shard depend on: shards of two conversions must not mix.
    mark = {
        "version": _VERSION,
        "source": task.source.identity(),
        "examples": len(task.source),
        "to": task.kind,
        "name": task.name,
        "shard_size": task.shard_size,
        "check_images": task.check_images,
    }
    text = work.read_text("begun.json")
    if text is None:
        # Hidden files do not count: .convert itself may exist without its mark.
        if names := task.out.list_names():
            raise UserError(f"--out={task.out} holds other files ({names[0]}): choose an empty folder")
        work.write_text("begun.json", json.dumps(mark, indent=1))
        return
    try:
        begun = json.loads(text)
        differing = [key for key, value in mark.items() if begun.get(key) != value]
    # AttributeError: JSON that is no object.
    except (ValueError, AttributeError):
        differing = ["begun.json"]
    if differing:
        raise UserError(
            f"--out={task.out} holds another conversion (other: {', '.join(differing)}): choose another folder"
        )


def _write_tfds_metadata(out: Output, name: str, lengths: list[int], size: int) -> None:
    """Writes the files by which tfds reads the folder."""
    # `out` may be an address. The format's writer needs a local folder.
    with tempfile.TemporaryDirectory() as folder:
        array_record_format.write_tfds_metadata(Path(folder), name, lengths, num_bytes=size)
        for file in sorted(Path(folder).iterdir()):
            out.write_text(file.name, file.read_text(encoding="utf-8"))
