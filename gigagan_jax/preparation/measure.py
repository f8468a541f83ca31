"""What examples are like: sizes, formats, captions, faults; as counts that add up over parts of a data set."""

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
from gigagan_jax.preparation.convert import told
from gigagan_jax.preparation.output import Output
from gigagan_jax.preparation.tasks import run_tasks

_CHUNK, _TASKS = 500, 2000  # at least so many examples in a task; so many tasks where there are enough
_DIGITS, _EXACT = 3, 10_000  # of a counted value: there are not many of them, however large the data set
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # EXIF
NUMBERS = ("width", "height", "short_side", "aspect", "bytes", "captions", "characters", "words")
WORDS = ("format", "mode", "label")


def rounded(value: float) -> float:
    """To three significant digits; whole numbers up to 10,000 stay."""
    if value == round(value) and abs(value) <= _EXACT:
        return float(value)
    digits = _DIGITS - 1 - math.floor(math.log10(abs(value)))
    return round(float(value), digits)


@dataclasses.dataclass
class Measured:
    """Counts of some examples.

    Attributes:
      examples: how many were looked at.
      bad: {cause: how many}.
      listed: each bad one: {"index", "name", "cause", "detail"}.
      numbers: for each of NUMBERS {value as by `rounded`: how many}.
      words: for each of WORDS {value: how many}.
      marks: how many are animated, rotated by EXIF, with alpha, or without a caption.
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

    def add(self, name: str, value: float) -> None:
        """Counts a number."""
        self.numbers[name][rounded(value)] += 1

    def merge(self, other: "Measured") -> None:
        """Adds the counts of other examples."""
        self.examples += other.examples
        self.bad.update(other.bad)
        self.listed += other.listed
        self.marks.update(other.marks)
        for name, numbers in other.numbers.items():
            self.numbers[name].update(numbers)
        for name, words in other.words.items():
            self.words[name].update(words)

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
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
    def from_json(cls, data: dict[str, Any]) -> "Measured":
        """Of `to_json`, before or after JSON."""
        counters = lambda groups: {name: Counter(dict(counts)) for name, counts in groups.items()}
        numbers, words = counters(data["numbers"]), counters(data["words"])
        return cls(data["examples"], Counter(data["bad"]), data["listed"], numbers, words, Counter(data["marks"]))


def quantiles(counts: Counter[float], at: Sequence[float]) -> list[float]:
    """Values below which these shares lie; NaN of nothing."""
    if not counts:
        return [math.nan] * len(at)
    values = sorted(counts)
    ends = np.cumsum([counts[v] for v in values])
    places = np.searchsorted(ends, np.ceil(np.asarray(at) * ends[-1]).clip(1))
    return [values[int(p)] for p in places]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Task of some examples of a source.

    Attributes:
      source: to read from.
      decode: decode each image; otherwise its header is read.
    """

    source: Source
    decode: bool

    def __call__(self, indices: Iterable[int]) -> dict[str, Any]:
        out = Measured()
        for i in indices:
            out.examples += 1
            try:
                record = self.source.read(int(i))
                if self.decode and not isinstance(record.image, np.ndarray):
                    decode_image(record.image)
                _look(out, record)
            except BadExample as bad:
                out.bad[bad.cause] += 1
                out.listed.append(told(self.source, int(i), bad))
        return out.to_json()


def _look(out: Measured, record: Record) -> None:
    if isinstance(record.image, np.ndarray):
        height, width = record.image.shape[:2]
        size, format, mode = record.image.nbytes, "pixels", "RGB"
        marks: list[str] = []
    else:
        size = len(record.image)
        width, height, format, mode, marks = _header(record.image)
    out.marks.update(marks)
    for name, value in (
        ("width", width),
        ("height", height),
        ("short_side", min(width, height)),
        ("aspect", width / height),
        ("bytes", size),
        ("captions", len(record.captions)),
    ):
        out.add(name, value)
    for caption in record.captions:
        out.add("characters", len(caption))
        out.add("words", len(caption.split()))
    if not record.captions:
        out.marks["without_caption"] += 1
    out.words["format"][format] += 1
    out.words["mode"][mode] += 1
    if record.label != UNKNOWN_LABEL:
        out.words["label"][str(record.label)] += 1


def _header(data: bytes) -> tuple[int, int, str, str, list[str]]:
    """(width, height, format, mode, marks) of an image file, upright. Raises BadExample as `decode_image` does."""
    if not data:
        raise BadExample("image_empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise BadExample("decompression_bomb", f"{width} x {height} pixels, {limit} pixels are allowed")
            if not width or not height:
                raise BadExample("image_undecodable", f"{width} x {height} pixels")
            marks = ["animated"] if getattr(image, "is_animated", False) else []
            if "A" in image.getbands() or "transparency" in image.info:
                marks.append("alpha")
            try:
                orientation = image.getexif().get(_ORIENTATION, 1)
            except Exception:  # broken metadata costs the rotation, not the image
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
    except Exception as error:  # decoders answer broken bytes with whatever exception they fall over
        raise BadExample("image_undecodable", f"{type(error).__name__}: {error}") from error


def choose(count: int, sample: int, seed: int) -> list[Any]:
    """Which examples to look at, parted into tasks; `sample` of them drawn by `seed`, 0 for all."""
    total = count if not sample else min(sample, count)
    chunk = max(_CHUNK, -(-total // _TASKS))
    if total == count:
        return [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    drawn = np.random.default_rng(seed).choice(count, sample, replace=False, shuffle=False)
    drawn.sort()
    return [drawn[start : start + chunk].tolist() for start in range(0, sample, chunk)]


def measure(
    source: Source, sample: int, seed: int, decode: bool, *, results: Output | None = None, **how: Any
) -> Measured:
    """Looks at a sample of a source, or at all of it; the rest as for `run_tasks`. Raises UserError as that does."""
    items = choose(len(source), sample, seed)
    out = Measured()
    if results is not None:  # what was found of other data, or by another sample, is not this
        tars = getattr(source, "index", None)
        versions = hashlib.sha256(tars.stamps.tobytes()).hexdigest() if isinstance(tars, TarIndex) else ""
        asked = json.dumps([source.identity(), versions, len(source), sample, seed if sample else 0, decode])
        results = results.sub(hashlib.sha256(asked.encode()).hexdigest()[:16])
    for part in run_tasks(Measure(source, decode), items, results=results, **how):
        out.merge(Measured.from_json(part))
    return out
