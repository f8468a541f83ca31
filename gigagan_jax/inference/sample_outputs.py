"""Where samples go: one picture, a folder of images, or tars of WebDataset; what of a job is there already."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Protocol

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.image_encoding import ENDINGS, replace_surrogates, write_atomically

METADATA_FILE = "metadata.jsonl"
RECORD_FILE = ".job.json"
# Images of a tar, where its name has a number and nothing else is said.
SHARD_SIZE = 10_000
# %05d, or {00000..00029}.
_NUMBER = re.compile(r"%0?(\d*)d|\{(\d+)\.\.(\d+)\}")
# Temporary files of image_encoding.write_atomically.
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")
# Of the tar format: blocks, and the size that files are filled up to.
_BLOCK, _RECORD = 512, 10240


@dataclasses.dataclass(frozen=True)
class Destination:
    """What `--out` names.

    Attributes:
      path: file or folder; of tars the name with its number, if it has one.
      kind: "file", "folder" or "tars".
      ending: of the images, with its dot.
      shard_size: images of a tar; 0 for all in one.
      shards: tars that a range {00000..00029} names; 0 without one.
    """

    path: Path
    kind: str
    ending: str
    shard_size: int = 0
    shards: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One image of a job.

    Attributes:
      index: in the job.
      name: of its file, without the ending.
      prompt: empty without a condition.
      seed: of its latent code.
    """

    index: int
    name: str
    prompt: str
    seed: int


def parse_destination(out: str, image_format: str | None = None, shard_size: int | None = None) -> Destination:
    """Reads `--out`, `--format` and `--shard_size`.

    Args:
      out: `.png`, `.jpg`, `.jpeg` or `.webp` is one picture; `.tar` is a tar, or several, with a number such as %05d or
        {00000..00029} in the name; a name without an ending, with a slash at its end, or of an existing folder is a folder.
      image_format: "png", "jpg" or "webp", of the images of a folder or tar.
      shard_size: images of a tar.

    Raises:
      UserError: another ending, something else of this name is there, or the flags do not fit each other.
    """
    if not out:
        raise UserError("--out is empty: name a file or a folder ('.' is the current one)")
    # Not Path.expanduser, which raises for an unknown home.
    path = Path(os.path.expanduser(out))
    suffix = path.suffix.lower()
    ending = f".{image_format or 'png'}"
    if shard_size is not None and shard_size < 1:
        raise UserError(f"--shard_size={shard_size}: must be at least 1")
    # A folder may be called x.png. ".5" of v1.5 is a number, and no ending.
    if path.is_dir() or out.endswith(("/", os.sep)) or not re.fullmatch(r"\.[a-z][a-z0-9]{0,4}", suffix):
        kind = "folder"
    elif suffix in ENDINGS:
        kind = "file"
        if image_format is not None and ENDINGS[ending] != ENDINGS[suffix]:
            raise UserError(f"--out={out} is a {suffix} by its name, and --format={image_format}: leave --format out")
        ending = suffix
    elif suffix == ".tar":
        kind = "tars"
    else:
        raise UserError(
            f"--out={out}: {suffix} cannot be written; use {', '.join(ENDINGS)} for a picture, .tar for tars, or a folder (with "
            "a slash at the end it may have any name)"
        )
    if shard_size is not None and kind != "tars":
        raise UserError(f"--shard_size={shard_size}: shards are of tars; --out={out} is no .tar")
    if kind == "folder" and path.exists() and not path.is_dir():
        raise UserError(f"--out={out} is a file: name a folder, or a file that ends in {', '.join(ENDINGS)} or .tar")
    if kind == "file" and not _may_write(path):
        raise UserError(f"--out={out} cannot be written: choose a folder that you may write to")
    if kind != "tars":
        return Destination(path, kind, ending)
    found = _NUMBER.search(path.name)
    shards = int(found[3]) - int(found[2]) + 1 if found and found[2] else 0
    if found and found[2] and shards < 1:
        raise UserError(f"--out={out}: the range ends before it begins")
    # Either says how many images a tar gets.
    if shards and shard_size:
        raise UserError(f"--out={out} names {shards} tars: leave --shard_size out, or write %05d for the number")
    # One name for several tars: a number is added.
    if shard_size and not found:
        path = path.with_name(f"{path.stem}-%05d.tar")
    return Destination(path, kind, ending, (shard_size or (SHARD_SIZE if found and not shards else 0)), shards)


def _may_write(file: Path) -> bool:
    # The nearest folder that exists: the others will be made in it.
    folder = next((p for p in (file.parent, *file.parent.parents) if p.exists()), Path("."))
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


class JobOutput(Protocol):
    """The files of a job. One process writes them, and only within its lock.

    Attributes:
      record: file that says which job this is, which is also its lock.
      metadata: a line of JSON an image.
    """

    record: Path
    metadata: Path

    def find_foreign(self) -> Path | None:
        """A file that is in the way where there is no record; None without one."""

    def find_missing(self, samples: Iterable[Sample]) -> Iterator[int]:
        """Yields the indices of the samples that are to be made."""

    def locate(self, sample: Sample) -> dict[str, str]:
        """What the metadata say of the place of an image."""

    def prepare(self, sample: Sample, image: bytes) -> None:
        """Writes what needs no order. Called from threads."""

    def commit(self, sample: Sample, image: bytes, line: str) -> None:
        """Writes what needs an order. Called in the order of `find_missing`."""

    def close(self) -> None:
        """Closes files that are open."""


class FolderOutput:
    """`JobOutput` of a file an image, with metadata.jsonl beside them."""

    def __init__(self, destination: Destination):
        self.folder, self.ending = destination.path, destination.ending
        self.record, self.metadata = self.folder / RECORD_FILE, self.folder / METADATA_FILE

    def find_foreign(self) -> Path | None:
        with os.scandir(self.folder) as entries:
            return next(
                (Path(e.path) for e in entries if e.name == METADATA_FILE or Path(e.name).suffix.lower() in ENDINGS),
                None,
            )

    def find_missing(self, samples: Iterable[Sample]) -> Iterator[int]:
        there = set()
        # One listing: a look at each of many thousand files is slow on a network disk.
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name):
                    # Of a process that was killed: the lock is held.
                    os.unlink(entry.path)
                # A machine that lost its power may leave names of empty files.
                elif entry.name.endswith(self.ending) and entry.stat().st_size:
                    there.add(entry.name)
        return (s.index for s in samples if s.name + self.ending not in there)

    def locate(self, sample: Sample) -> dict[str, str]:
        return {"file_name": sample.name + self.ending}

    def prepare(self, sample: Sample, image: bytes) -> None:
        write_atomically(self.folder / (sample.name + self.ending), image)

    def commit(self, sample: Sample, image: bytes, line: str) -> None:
        pass

    def close(self) -> None:
        pass


class TarOutput:
    """`JobOutput` of tars: NAME.png, NAME.txt (the prompt) and NAME.json an image.

    A tar has its name when it is complete; until then it is `.NAME.part`, which grows by whole images.

    Args:
      destination: of tars.
      total: images of the job.
    """

    def __init__(self, destination: Destination, total: int):
        self.path, self.ending = destination.path, destination.ending
        self._total = total
        self._size = destination.shard_size or math.ceil(total / max(1, destination.shards))
        if destination.shards > total:
            raise UserError(f"--out={self.path} names {destination.shards} tars for {total} images: name fewer")
        base = _NUMBER.sub("", self.path.stem).strip("-_.")
        folder = self.path.parent
        # Several jobs may have their tars in one folder.
        self.record = folder / (f".{base}.job.json" if base else RECORD_FILE)
        self.metadata = folder / (f"{base}.{METADATA_FILE}" if base else METADATA_FILE)
        # Bytes of the parts that hold whole images, by shard.
        self._whole: dict[int, int] = {}
        # The part that is being written.
        self._shard = -1
        self._file: IO[bytes] | None = None

    def _shard_path(self, shard: int) -> Path:
        def number(found: re.Match[str]) -> str:
            first, width = (int(found[2]), len(found[2])) if found[2] else (0, int(found[1] or 0))
            return f"{first + shard:0{width}d}"

        return self.path.with_name(_NUMBER.sub(number, self.path.name, count=1))

    def _part_path(self, shard: int) -> Path:
        path = self._shard_path(shard)
        return path.with_name(f".{path.name}.part")

    def _shards(self) -> range:
        return range(math.ceil(self._total / self._size))

    def find_foreign(self) -> Path | None:
        return next((p for p in (*map(self._shard_path, self._shards()), self.metadata) if p.exists()), None)

    def find_missing(self, samples: Iterable[Sample]) -> Iterator[int]:
        shard, complete, going_on = -1, False, False
        whole: Iterator[tuple[str, int]] = iter(())
        for sample in samples:
            if sample.index // self._size != shard:
                shard = sample.index // self._size
                # A tar gets its name last.
                complete = self._shard_path(shard).exists()
                whole = iter(()) if complete else _whole_samples(self._part_path(shard), self.ending)
                self._whole[shard], going_on = 0, not complete
            if complete:
                continue
            name, end = next(whole, ("", 0)) if going_on else ("", 0)
            last = sample.index == min((shard + 1) * self._size, self._total) - 1
            # The last image is made again: it also completes the tar.
            if name == sample.name and not last:
                self._whole[shard] = end
            else:
                # A tar grows at its end alone: what follows is made again.
                going_on = False
                yield sample.index

    def locate(self, sample: Sample) -> dict[str, str]:
        return {"tar": self._shard_path(sample.index // self._size).name, "file_name": sample.name + self.ending}

    def prepare(self, sample: Sample, image: bytes) -> None:
        pass

    def commit(self, sample: Sample, image: bytes, line: str) -> None:
        shard = sample.index // self._size
        # The JSON last: it ends what belongs to an image.
        members = [(self.ending, image), (".json", line.encode())]
        if sample.prompt:
            members.insert(1, (".txt", sample.prompt.encode("utf-8", "replace")))
        try:
            if shard != self._shard or self._file is None:
                self.close()
                self._open_part(shard)
            assert self._file is not None
            self._file.write(b"".join(_tar_member(sample.name + ending, data) for ending, data in members))
            # The last one of the tar, or of the job.
            if sample.index + 1 in ((shard + 1) * self._size, self._total):
                # Two empty blocks end a tar.
                self._file.write(bytes(2 * _BLOCK + -(self._file.tell() + 2 * _BLOCK) % _RECORD))
                self.close()
                os.replace(self._part_path(shard), self._shard_path(shard))
        except OSError as e:
            raise UserError(
                f"cannot write {self._shard_path(shard)}: {e.strerror or e}; the same command goes on"
            ) from None

    def _open_part(self, shard: int) -> None:
        whole, self._shard = self._whole.get(shard, 0), shard
        # It stays open over many images.
        self._file = open(self._part_path(shard), "r+b" if whole else "wb")  # noqa: SIM115
        # Not "ab": what is after the last whole image is dropped.
        self._file.truncate(self._file.seek(whole))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _tar_member(name: str, data: bytes) -> bytes:
    # Without times: a job that was stopped and went on gives the same bytes as one that was not.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % _BLOCK)


def _whole_samples(part: Path, ending: str) -> Iterator[tuple[str, int]]:
    """(name, where its bytes end) of each image of an unfinished tar whose members are all there."""
    try:
        size = part.stat().st_size
        with open(part, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            name = ""
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                stem, _, last = member.name.rpartition(".")
                if end > size:
                    return
                if f".{last}" == ending:
                    name = stem
                # The last one of each image.
                elif last == "json" and stem == name:
                    yield name, end
                # The list of members would grow with the tar.
                tar.members = []  # type: ignore[attr-defined]
    except (OSError, tarfile.TarError):
        return


def json_line(values: dict[str, object]) -> str:
    """One line of a metadata file."""
    return replace_surrogates(json.dumps(values, ensure_ascii=False)) + "\n"
