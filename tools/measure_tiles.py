"""Measures whether an upscaled image shows its tiles: each tile size against the image that one pass gives.

    python tools/measure_tiles.py --checkpoint=docs/weights/photos --image=photo.jpg --tiles=64,128,256 [--whole] [--random]

Columns: share of pixels within one level of 255 of the untiled image; the largest difference; the mean difference within 8 pixels
of a tile border, over that inside tiles (a seam raises it). --whole lets attention see whole tiles, as the paper's network does,
and --random takes initial weights.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gigagan_jax import cli
from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_table
from gigagan_jax.evaluation.image_quality import measure_seams
from gigagan_jax.inference.tiling import Axis, Tiling, plan_axis
from gigagan_jax.inference.upscale_job import upscale_array
from gigagan_jax.inference.upscaler import Upscaler

_HEAD = ("tile, px", "tiles", "within 1 level", "largest", "mean at borders", "mean inside", "ratio")


def tile_borders(axis: Axis) -> list[int]:
    """Output pixels where one tile's share passes to the next."""
    borders = []
    for left, right in zip(axis.windows[:-1], axis.windows[1:], strict=True):
        a, b = left.segments[0], right.segments[0]
        # The middle of a cross-fade; without one both are the same place.
        borders.append((a.at + a.stop - a.start + b.at) // 2)
    return borders


def with_whole_attention(config: Config) -> Config:
    """The config with attention over the whole map: the same parameters."""
    g = config.generator
    attention = dataclasses.replace(g.attention, window=0)
    return dataclasses.replace(config, generator=dataclasses.replace(g, attention=attention))


def load_upscaler(args: argparse.Namespace) -> Upscaler:
    """The upscaler of the flags."""
    upscaler = Upscaler.from_pretrained(args.checkpoint)
    if args.whole or args.random:
        config = with_whole_attention(upscaler.config) if args.whole else upscaler.config
        other = Upscaler(config, upscaler.mesh)
        other.params = other.module.init(0, other.shardings) if args.random else upscaler.params
        upscaler = other
    return upscaler


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="workdir, folder or hub id of an upsampler")
    parser.add_argument("--image", type=Path, required=True, help="the small image")
    parser.add_argument("--tiles", default="64,128,192", help="tile sizes in input pixels, commas between")
    parser.add_argument("--whole", action="store_true", help="attention over whole tiles instead of windows")
    parser.add_argument("--random", action="store_true", help="initial weights instead of the trained ones")
    parser.add_argument("--json", type=Path, help="file to which one JSON line a tile size is added")
    args = parser.parse_args(argv)
    try:
        tiles = [int(text) for text in args.tiles.split(",")]
        with Image.open(args.image) as file:
            image = np.asarray(file.convert("RGB"))
    except (ValueError, OSError) as error:
        raise UserError(f"--tiles={args.tiles} --image={args.image}: {error}") from None
    model = load_upscaler(args).tile_model()
    untiled = upscale_array(Tiling(model, max(image.shape)), image)
    rows = []
    for tile in tiles:
        tiling = Tiling(model, tile)
        tiled = upscale_array(tiling, image)
        difference = np.abs(tiled.astype(int) - untiled.astype(int))
        axes = [plan_axis(n, model, tiling.tile) for n in image.shape[:2]]
        across, along = (tile_borders(axis) for axis in axes)
        if not across and not along:
            raise UserError(f"--tiles={tile}: the image is one tile of this size")
        seams = measure_seams(tiled, untiled, across, along)
        within = float((difference.max(-1) <= 1).mean())
        figures = (within, int(difference.max()), seams.at_borders, seams.inside, seams.ratio)
        rows.append((str(tiling.tile), str(tiling.count_tiles(*image.shape[:2])), *(f"{x:.4g}" for x in figures)))
        if args.json:
            line = dict(zip(_HEAD[2:], figures, strict=True)) | {"tile": tiling.tile, "whole": args.whole}
            with args.json.open("a") as out:
                out.write(json.dumps(line | {"random": args.random, "image": args.image.name}) + "\n")
    print(format_table(rows, _HEAD))
    return 0


if __name__ == "__main__":
    cli.main(verb)
