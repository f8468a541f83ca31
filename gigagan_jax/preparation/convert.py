"""Any data set to tars, folders or ArrayRecord, shard by shard; what is done stays done."""

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

KINDS = ("arrayrecord", "tar", "folder")
WORK = ".convert"
LEFT_OUT = "left_out.jsonl"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Task of one shard: the examples start ... stop of a source, in their order.

    Attributes:
      source: to read from.
      out: to write to.
      kind: one of KINDS.
      name: of the data set; part of the names of ArrayRecord files.
      shard_size: examples in a shard; the last one may have fewer, and what cannot be read is left out.
      check_images: leave out images that cannot be decoded, too.
    """

    source: Source
    out: Output
    kind: str
    name: str
    shard_size: int
    check_images: bool

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self.shard_size)

    def file(self, number: int) -> str:
        """Name of a shard in `out`: 00000.tar, 00000 (a folder), NAME-train.array_record-00000-of-00003."""
        if self.kind == "arrayrecord":
            return array_record_format.shard_name(self.name, number, self.count)
        return f"{number:05d}" + (".tar" if self.kind == "tar" else "")

    def __call__(self, number: int) -> dict[str, Any]:
        """Writes a shard; returns {"examples", "files", "bytes", "left_out": [{"index", "name", "cause", "detail"}, ...]}.

        Raises:
          UserError: it cannot be written, or what lies there is not what was written.
        """
        left_out: list[dict[str, Any]] = []
        write = {"tar": shards.write_tar, "folder": shards.write_folder, "arrayrecord": shards.write_array_record}
        with self.out.scratch() as folder:
            made = folder / self.file(number)
            count, *extent = write[self.kind](made, self._items(number, left_out))
            self._compare(extent, Output(str(folder)), made.name)
            self.out.publish(made, made.name)
            if self.out.local:
                self._compare(extent, self.out, made.name)
        return {"examples": count, "files": extent[0], "bytes": extent[1], "left_out": left_out}

    def _compare(self, written: list[int], place: Output, name: str) -> None:
        found = place.extent(name)
        if found != tuple(written):
            raise UserError(
                f"{place}/{name} holds {found[0]} files, {found[1]} bytes of the {written[0]} files, {written[1]} bytes "
                "written to it: does something else change that folder? The same command makes it again"
            )

    def _items(self, number: int, left_out: list[dict[str, Any]]) -> Iterator[shards.Item]:
        start = number * self.shard_size
        digits = max(4, len(str(self.shard_size - 1)))
        for i in range(start, min(start + self.shard_size, len(self.source))):
            try:
                record = self.source.read(i)
                image, suffix = shards.portable(record, self.check_images)
            except BadExample as bad:
                left_out.append(told(self.source, i, bad))
                continue
            yield shards.Item(f"{number:05d}{i - start:0{digits}d}", image, suffix, record)

    def is_whole(self, number: int, result: dict[str, Any]) -> bool:
        """Whether the shard lies there as it was written."""
        return self.out.extent(self.file(number)) == (result["files"], result["bytes"])


def told(source: Source, i: int, bad: BadExample) -> dict[str, Any]:
    """A bad example as a line of a report."""
    return {"index": i, "name": source.name(i), "cause": bad.cause, "detail": bad.detail}


def convert(
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
    """Writes a data set anew. The same command goes on where it was stopped; shards that are whole are not made again.

    Args:
      source: what to write; its filters are applied, its captions as they were read.
      out: folder of the new one; empty, or of this very conversion.
      kind: "arrayrecord", "tar" (img2dataset's layout) or "folder".
      name: of the data set, in names of ArrayRecord files.
      shard_size: examples of a shard.
      check_images: leave out images that cannot be decoded; otherwise they are copied as they are.
      workers, runner, beam_args, quiet: as for `run_tasks`.

    Returns:
      {"examples", "shards", "bytes", "left_out": {cause: how many}}; each that was left out is named in left_out.jsonl

    Raises:
      UserError: `out` holds something else or cannot be written; whatever the source raises.
    """
    if kind not in KINDS:
        raise UserError(f"--to={kind}: must be one of {', '.join(KINDS)}")
    if shard_size < 1:
        raise UserError(f"--shard_size={shard_size}: a shard holds at least 1 example")
    if kind == "arrayrecord":  # a name that is refused at the end would be a pity
        with tempfile.TemporaryDirectory() as folder:
            array_record_format.write_tfds_metadata(Path(folder), name, [])
    task = Conversion(source, out, kind, name, shard_size, check_images)
    work = out.sub(WORK)
    _begin(task, work)
    with work.held("lock", "another convert writes to this folder"):
        out.clear_scratch()
        results = run_tasks(
            task,
            range(task.count),
            workers=workers,
            runner=runner,
            beam_args=beam_args,
            results=work.sub("shards"),
            is_whole=task.is_whole,
            title=f"converting to {kind}",
            quiet=quiet,
        )
        _finish(task, work, results)
    return {
        "examples": sum(result["examples"] for result in results),
        "shards": len(results),
        "bytes": sum(result["bytes"] for result in results),
        "left_out": dict(Counter(bad["cause"] for result in results for bad in result["left_out"]).most_common()),
    }


def _finish(task: Conversion, work: Output, results: list[dict[str, Any]]) -> None:
    """Writes what describes the whole, and clears up."""
    out = task.out
    left_out = [bad for result in results for bad in result["left_out"]]
    out.write_text(LEFT_OUT, "".join(json.dumps(bad) + "\n" for bad in left_out))
    if task.kind == "arrayrecord":
        size = sum(result["bytes"] for result in results)
        _describe(out, task.name, [result["examples"] for result in results], size)
    for place in (out, work, work.sub("shards")):
        place.clear_scratch()


def _begin(task: Conversion, work: Output) -> None:
    """Marks the folder as that of this conversion."""
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
        if names := task.out.names():
            raise UserError(f"--out={task.out} holds other files ({names[0]}): choose an empty folder")
        work.write_text("begun.json", json.dumps(mark, indent=1))
        return
    try:
        begun = json.loads(text)
        other = [key for key, value in mark.items() if begun.get(key) != value]
    except (ValueError, AttributeError):
        other = ["begun.json"]
    if other:
        raise UserError(f"--out={task.out} holds another conversion (other: {', '.join(other)}): choose another folder")


def _describe(out: Output, name: str, lengths: list[int], size: int) -> None:
    """The files by which tfds reads the folder."""
    with tempfile.TemporaryDirectory() as folder:
        array_record_format.write_tfds_metadata(Path(folder), name, lengths, num_bytes=size)
        for file in sorted(Path(folder).iterdir()):
            out.write_text(file.name, file.read_text(encoding="utf-8"))
