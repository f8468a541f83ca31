"""Statistics of examples: sizes, formats, captions and faults, as counts that add up over parts of a data set."""

import dataclasses
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import UNKNOWN_LABEL, BadExample, Record
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources.tar_index import TarIndex
from gigagan_jax.preparation.convert import describe_bad_example
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.tasks import run_tasks

# Examples of a task at least, and tasks at most: each task costs one result file.
_CHUNK, _TASKS = 500, 2000
# Significant digits of a counted value, and the largest integer that stays exact.
# They bound the number of distinct values, however large the data set is.
_DIGITS, _EXACT = 3, 10_000
# The EXIF tag, and its values that exchange width and height.
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
NUMBERS = ("width", "height", "short_side", "aspect", "bytes", "captions", "characters", "words")
WORDS = ("format", "mode", "label")


def round_value(value: float) -> float:
    """Rounds to three significant digits; whole numbers up to 10,000 stay exact."""
    # Sizes stay exact where people look for them: 1024, not 1020.
    if value == round(value) and abs(value) <= _EXACT:
        return float(value)
    digits = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    return round(float(value), digits)


@dataclasses.dataclass
class Measurements:
    """Counts of some examples.

    Attributes:
      examples: number of examples, good and bad.
      bad: {cause: count}.
      listed: a dict for each bad example: {"index", "name", "cause", "detail"}.
      numbers: for each of NUMBERS {value rounded by `round_value`: count}.
      words: for each of WORDS {value: count}.
      marks: counts of images that are animated, rotated by EXIF, with alpha, or without a caption.
    """

    examples: int = 0
    bad: Counter[str] = dataclasses.field(default_factory=Counter)
    listed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    numbers: dict[str, Counter[float]] = dataclasses.field(default_factory=lambda: {n: Counter() for n in NUMBERS})
    words: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: {n: Counter() for n in WORDS})
    marks: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def good(self) -> int:
        return self.examples - sum(self.bad.values())

    def add_number(self, name: str, value: float) -> None:
        """Counts one value of a number."""
        self.numbers[name][round_value(value)] += 1

    def merge(self, other: "Measurements") -> None:
        """Adds the counts of other examples."""
        self.examples += other.examples
        self.bad.update(other.bad)
        # In the order of the tasks, and so of the source.
        self.listed += other.listed
        self.marks.update(other.marks)
        for name, numbers in other.numbers.items():
            self.numbers[name].update(numbers)
        for name, words in other.words.items():
            self.words[name].update(words)

    def to_json(self) -> dict[str, Any]:
        """The counts, ready for JSON; `from_json` reads them."""
        # Pairs, not objects: keys of JSON objects are strings, and these keys are numbers.
        pairs = lambda groups: {name: sorted(counts.items()) for name, counts in groups.items()}
        return {
            "examples": self.examples,
            "bad": dict(self.bad),
            "listed": self.listed,
            "numbers": pairs(self.numbers),
            "words": pairs(self.words),
            "marks": dict(self.marks),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Measurements":
        """Reads the result of `to_json`, before or after JSON."""
        counters = lambda groups: {name: Counter(dict(counts)) for name, counts in groups.items()}
        numbers, words = counters(data["numbers"]), counters(data["words"])
        return cls(data["examples"], Counter(data["bad"]), data["listed"], numbers, words, Counter(data["marks"]))


def count_quantiles(counts: Counter[float], at: Sequence[float]) -> list[float]:
    """Quantiles of counted values, by the inverted distribution function; NaN without values."""
    if not counts:
        return [math.nan] * len(at)
    values = sorted(counts)
    # ends[p] examples have values up to values[p].
    ends = np.cumsum([counts[v] for v in values])
    # At share 0, the rank would be 0. The smallest value has rank 1.
    places = np.searchsorted(ends, np.ceil(np.asarray(at) * ends[-1]).clip(1))
    return [values[int(p)] for p in places]


@dataclasses.dataclass(frozen=True)
class MeasureTask:
    """Task that measures some examples of a source.

    Attributes:
      source: to read from.
      decode: decode each image; otherwise only its header is read.
    """

    source: Source
    decode: bool

    def __call__(self, indices: Iterable[int]) -> dict[str, Any]:
        found = Measurements()
        for i in indices:
            found.examples += 1
            try:
                record = self.source.read(int(i))
                # Before measuring: an example that fails must not count in the sizes.
                if self.decode and not isinstance(record.image, np.ndarray):
                    decode_image(record.image)
                _measure_record(found, record)
            except BadExample as bad:
                found.bad[bad.cause] += 1
                found.listed.append(describe_bad_example(self.source, int(i), bad))
        return found.to_json()


def _measure_record(found: Measurements, record: Record) -> None:
    if isinstance(record.image, np.ndarray):
        height, width = record.image.shape[:2]
        # Data that was never encoded: arrays of digits or TFDS.
        size, format, mode = record.image.nbytes, "pixels", "RGB"
        marks: list[str] = []
    else:
        size = len(record.image)
        width, height, format, mode, marks = _read_header(record.image)
    found.marks.update(marks)
    for name, value in (
        ("width", width),
        ("height", height),
        ("short_side", min(width, height)),
        ("aspect", width / height),
        ("bytes", size),
        ("captions", len(record.captions)),
    ):
        found.add_number(name, value)
    for caption in record.captions:
        found.add_number("characters", len(caption))
        found.add_number("words", len(caption.split()))
    if not record.captions:
        found.marks["without_caption"] += 1
    found.words["format"][format] += 1
    found.words["mode"][mode] += 1
    # Data without labels has no table of classes.
    if record.label != UNKNOWN_LABEL:
        found.words["label"][str(record.label)] += 1


def _read_header(data: bytes) -> tuple[int, int, str, str, list[str]]:
    """(width, height, format, mode, marks) of an image file, upright. Raises BadExample as `decode_image` does."""
    if not data:
        raise BadExample("image_empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # The limits of decode_image, so that both ways of measuring report the same causes.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise BadExample("decompression_bomb", f"{width} x {height} pixels, {limit} pixels are allowed")
            if not width or not height:
                raise BadExample("image_undecodable", f"{width} x {height} pixels")
            marks = ["animated"] if getattr(image, "is_animated", False) else []
            # Palette images and RGB PNGs declare transparency in `info`, without a band.
            if "A" in image.getbands() or "transparency" in image.info:
                marks.append("alpha")
            try:
                orientation = image.getexif().get(_ORIENTATION, 1)
            # Corrupt metadata costs the rotation, not the image.
            except Exception:
                orientation = 1
            if orientation != 1:
                marks.append("rotated")
            if orientation in _QUARTER_TURNS:
                width, height = height, width
            return width, height, str(image.format), image.mode, marks
    except BadExample:
        raise
    except Image.DecompressionBombError as error:
        raise BadExample("decompression_bomb", str(error)) from error
    # Decoders raise exceptions of many types for corrupt bytes.
    except Exception as error:
        raise BadExample("image_undecodable", f"{type(error).__name__}: {error}") from error


def choose_examples(count: int, sample: int, seed: int) -> list[Any]:
    """Chooses the examples to measure, divided into tasks: `sample` of them drawn by `seed`, or all for 0."""
    total = count if not sample else min(sample, count)
    chunk = max(_CHUNK, -(-total // _TASKS))
    # Ranges pickle as three numbers, however many examples they stand for.
    if total == count:
        return [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    drawn = np.random.default_rng(seed).choice(count, sample, replace=False, shuffle=False)
    # Sorted: a task reads neighbouring examples, mostly of one shard.
    drawn.sort()
    return [drawn[start : start + chunk].tolist() for start in range(0, sample, chunk)]


def measure_source(
    source: Source, sample: int, seed: int, decode: bool, *, results: Output | None = None, **how: Any
) -> Measurements:
    """Measures a sample of a source, or all of it. The other arguments and errors are those of `run_tasks`."""
    items = choose_examples(len(source), sample, seed)
    total = Measurements()
    # Results of other data or of another sample go to other folders.
    if results is not None:
        tars = getattr(source, "index", None)
        # identity() knows names only. The stamps change when a tar is rewritten under its name.
        versions = hashlib.sha256(tars.stamps.tobytes()).hexdigest() if isinstance(tars, TarIndex) else ""
        request = json.dumps([source.identity(), versions, len(source), sample, seed if sample else 0, decode])
        results = results.subfolder(hashlib.sha256(request.encode()).hexdigest()[:16])
    for part in run_tasks(MeasureTask(source, decode), items, results=results, **how):
        total.merge(Measurements.from_json(part))
    return total
