"""Times reading webdataset tars, all in one run on one machine; what counts are the ratios. Writes JSON.

    python tools/bench.py data [--tars=10] [--each=200] [--repeats=3] [--json=FILE]

The tars are made here, of photographs that come with scikit-learn, as JPEGs of 400 to 640 px. Compared, each with the same
decoding and resizing to 64 px:

    bare        a loop over the tars with Python's tarfile, no shuffle, one core
    pipeline    the training pipeline (random access in the shuffled order, tokens, batches) in one thread
    workers=N   the training pipeline with N worker processes, beside the package webdataset with N workers (pip install
                -e '.[bench,test]')
    indexing    building the index of a thousand tars of a hundred examples, beside reading their headers one by one,
                with none of it in the page cache
    memory      resident memory of the pipeline after each of ten epochs
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.data import pipeline
from gigagan_jax.data.decoding import decode_to_pil
from gigagan_jax.data.sources import tar_index
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.storage import Storage
from gigagan_jax.data.tokenizers import ByteTokenizer
from gigagan_jax.data.transforms import resize_and_crop

RESOLUTION, BATCH, LENGTH = 64, 64, 77


def write_tars(folder: Path, tars: int, each: int, sides: tuple[int, int] = (400, 640)) -> None:
    """Tars of pieces of photographs in img2dataset's layout."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(x) for x in load_sample_images().images]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    progress = ProgressBar("writing tars", tars)
    for shard in range(tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(each):
                width, height = (int(x) for x in rng.integers(*sides, 2))
                left, top = (float(x) for x in rng.integers(0, 100, 2))
                piece = photographs[i % 2].resize((width, height), box=(left, top, 540.0, 400.0))
                data = io.BytesIO()
                piece.save(data, "JPEG", quality=90)
                for suffix, value in (("jpg", data.getvalue()), ("json", b"{}"), ("txt", f"photograph {i}".encode())):
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    info.size = len(value)
                    tar.addfile(info, io.BytesIO(value))
        progress.step()


def write_members(folder: Path, tars: int, each: int) -> None:
    """Tars with members of the sizes of small JPEGs, and random bytes in them: for indexing, which reads no image."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(1 << 20)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(each):
                for suffix, size in (("jpg", int(rng.integers(5_000, 35_000))), ("json", 700), ("txt", 60)):
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    info.size = size
                    tar.addfile(info, io.BytesIO(noise[:size]))


def prepare(data: bytes) -> np.ndarray:
    """What every contestant does to an image."""
    return resize_and_crop(decode_to_pil(data), RESOLUTION)


def bare(folder: Path) -> Iterator[int]:
    """One image after the other, in the order of the tars, without end."""
    while True:
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        prepare(tar.extractfile(member).read())  # type: ignore[union-attr]
                        yield 1


def ours(folder: Path, workers: int, threads: int) -> Iterator[int]:
    """Batches of the training pipeline, without end."""
    with pipeline.build_pipeline(
        TarSource(str(folder)), resolution=RESOLUTION, batch_size=BATCH, seed=0, tokenizer=ByteTokenizer(LENGTH),
        num_workers=workers, num_threads=threads,
    ) as data:  # fmt: skip
        for batch in data:
            yield len(batch["image"])


def webdataset(folder: Path, workers: int) -> Iterator[int]:
    """Batches of the package webdataset: shuffled shards, a shuffle buffer of 1,000, without end."""
    import webdataset as wds

    tokenizer = ByteTokenizer(LENGTH)
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker)
        .shuffle(1000)
        .to_tuple("jpg", "txt")
        .map_tuple(prepare, functools.partial(_tokens, tokenizer))
        .batched(BATCH)
        .repeat()
    )
    for images, _ in wds.WebLoader(data, batch_size=None, num_workers=workers):
        yield len(images)


def _tokens(tokenizer: ByteTokenizer, text: bytes) -> np.ndarray:
    return tokenizer([text.decode()])[0]


def rate(make: Callable[[], Iterator[int]], images: int) -> float:
    """Images a second, once some batches for each worker were delivered: what is ready then is ready at the end too."""
    stream = make()
    for _ in range(8):
        next(stream)
    start, seen = time.perf_counter(), 0
    for n in stream:
        seen += n
        if seen >= images:
            break
    took = time.perf_counter() - start
    stream.close()  # type: ignore[attr-defined]
    return seen / took


def compare(contestants: dict[str, Callable[[], Iterator[int]]], images: int, repeats: int) -> dict[str, float]:
    """Median rates, the contestants taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, make in contestants.items():
            rates[name].append(rate(make, images))
            print(f"  turn {turn + 1} of {repeats}  {name:22} {rates[name][-1]:8.1f} images/s", flush=True)
    return {name: statistics.median(values) for name, values in rates.items()}


def indexing(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds to index tars in this process, to walk their headers with tarfile, and with bare reads of 512 bytes."""
    paths = sorted(str(p) for p in folder.glob("*.tar"))

    def forget() -> None:
        """Drops the tars from this machine's page cache, so that their headers come from the disk."""
        os.sync()
        for path in paths:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def headers() -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                at, size = 0, os.path.getsize(path)
                while at < size:
                    header = os.pread(file.fileno(), 512, at)
                    at += 512 + -(-int(header[124:135].strip(b" \0") or b"0", 8) // 512) * 512

    def by_tarfile() -> None:
        for path in paths:
            with tarfile.open(path) as tar:
                tar.getmembers()

    def index(workers: int) -> None:
        with tempfile.TemporaryDirectory() as target:
            tar_index.build_index(Path(target), Storage(), paths, workers=workers, quiet=True)

    cores = os.cpu_count() or 1
    contestants = {
        "headers": headers,
        "tarfile": by_tarfile,
        "index": lambda: index(1),
        f"index_{cores}": lambda: index(0),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            forget()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def memory(folder: Path, epochs: int) -> list[float]:
    """Resident MiB after each epoch."""
    source = TarSource(str(folder))
    resident = []
    with pipeline.build_pipeline(
        source, resolution=RESOLUTION, batch_size=BATCH, seed=0, tokenizer=ByteTokenizer(LENGTH), num_threads=2
    ) as data:
        for _ in range(epochs):
            for _ in range(len(source) // BATCH):
                next(data)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1))
    return resident


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=10)
    parser.add_argument("--each", type=int, default=200, help="examples of a tar")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if min(args.tars, args.each, args.repeats, args.workers) < 1 or args.tars * args.each < 2 * BATCH:
        raise UserError(
            f"--tars, --each, --repeats and --workers must be positive, and tars * each at least {2 * BATCH}"
        )
    cli.check_writable(args.json)
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place) / "tars", Path(place) / "small"
        write_tars(folder, args.tars, args.each)
        images = args.tars * args.each
        contestants: dict[str, Callable[[], Iterator[int]]] = {
            "bare": lambda: bare(folder),
            "pipeline": lambda: ours(folder, 0, 0),
        }
        for n in sorted({1, args.workers}):
            contestants[f"pipeline, workers={n}"] = lambda n=n: ours(folder, n, 1)  # type: ignore[misc]
            if all(map(importlib.util.find_spec, ("webdataset", "torch"))):
                contestants[f"webdataset, workers={n}"] = lambda n=n: webdataset(folder, n)  # type: ignore[misc]
            else:
                print("the packages webdataset and torch are not here: pip install -e '.[bench,test]'")
        rates = compare(contestants, 3 * images, args.repeats)
        write_members(small, 1000, 100)
        seconds = indexing(small, args.repeats)
        resident = memory(folder, 10)
    out: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "images": images,
        "images_per_second": {name: round(r, 1) for name, r in rates.items()},
        "indexing_seconds": {name: round(s, 3) for name, s in seconds.items()},
        "resident_mib_after_each_epoch": resident,
        "ratios": {
            "pipeline / bare": round(rates["pipeline"] / rates["bare"], 3),
            **{
                f"pipeline / webdataset, workers={n}": round(
                    rates[f"pipeline, workers={n}"] / rates[f"webdataset, workers={n}"], 3
                )
                for n in sorted({1, args.workers})
                if f"webdataset, workers={n}" in rates
            },
            "index / headers": round(seconds["index"] / seconds["headers"], 3),
            "index / tarfile": round(seconds["index"] / seconds["tarfile"], 3),
        },
    }
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.main(verb)
