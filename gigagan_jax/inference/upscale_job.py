"""Upscales images and image files: passes of the network, the final resize, alpha, and the list of files of a job."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.progress import ProgressBar
from gigagan_jax.inference.image_reader import ImageFile, read_image, read_size
from gigagan_jax.inference.image_writer import FORMATS, ImageWriter, OutputImage, check_output, fit_format, format_of
from gigagan_jax.inference.row_bands import ArrayRows, NoisyRows, Rows, StreamRows, from_float, resize_bands
from gigagan_jax.inference.tiling import Progress, Tiling, match_colors

_log = logging.getLogger(__name__)

# A scale beyond it is a mistake of the command line.
MAX_SCALE = 64.0
# Endings of the files that a folder job takes.
_INPUT_ENDINGS = {*FORMATS, ".bmp", ".gif", ".ppm", ".pgm", ".jp2", ".avif", ".tga"}
# Grey is shown to the network as three equal channels.
_COLOR_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an image is upscaled.

    Attributes:
      scale: output pixels per input pixel on each axis, at least 1; None for the network's factor.
      color_match: give the result the input's mean and deviation per channel.
    """

    scale: float | None = None
    color_match: bool = False


def output_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of the result, in pixels."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def count_passes(factor: int, scale: float) -> int:
    """Passes of a network of this factor until the image is at least as large as wanted."""
    # At least one: at scale 1 the network restores, and the resize goes back. 4.000000001 is meant as 4.
    return next(n for n in itertools.count(1) if factor**n >= scale - 1e-9)


def upscale_bands(
    tiling: Tiling, pixels: np.ndarray, settings: Settings, progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """Upscales an image.

    Args:
      tiling: the network in tiles.
      pixels: uint8, uint16 or float32 in [-1, 1], [H, W, 3].
      settings: the scale, and more.
      progress: counts tiles; its total is set here.

    Yields:
      float32 [rows, W * scale, 3] in [-1, 1] from top to bottom. A band is valid until the next one is asked for.

    Raises:
      UserError: the device has too little memory.
    """
    model = tiling.model
    height, width = pixels.shape[:2]
    scale = settings.scale or float(model.factor)
    passes = count_passes(model.factor, scale)
    # Before each pass, and after the last.
    sizes = [(height * model.factor**n, width * model.factor**n) for n in range(passes + 1)]
    if progress is not None:
        progress.total = sum(tiling.count_tiles(*size) for size in sizes[:-1])
    target = output_size(height, width, scale)
    source: Rows = ArrayRows(pixels)
    # Fixed before the tiles, and the same for every pass: each is to keep the colours of its input.
    match = match_colors(model, source) if settings.color_match else None
    for n in range(passes):
        # Each pass has noise of its own.
        noisy = NoisyRows(source, model.noise, model.seed + (n << 32)) if model.noise else source
        bands = tiling(noisy, progress)
        if match is not None:
            bands = map(match, bands)
        if tiling.wrap and sizes[n + 1] != target:
            # What comes next reads the last rows of a repeating image first: it is made whole, in 16 bits.
            source = ArrayRows(_collect(bands, *sizes[n + 1]))
        else:
            source = StreamRows(bands, *sizes[n + 1])
    # A resize to the same size would only blur.
    return bands if target == sizes[-1] else resize_bands(source, *target, wrap=tiling.wrap)


def _collect(bands: Iterator[np.ndarray], height: int, width: int) -> np.ndarray:
    """uint16 [height, width, 3]"""
    out = np.empty((height, width, _COLOR_CHANNELS), np.uint16)
    top = 0
    for band in bands:
        out[top : top + len(band)] = from_float(band, np.uint16)
        top += len(band)
    return out


def upscale_array(
    tiling: Tiling, pixels: np.ndarray, settings: Settings | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Upscales an image in memory.

    Args:
      tiling: the network in tiles.
      pixels: uint8 or uint16 [H, W, C]; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
      settings, progress: as `upscale_bands` takes them.

    Returns:
      the same dtype and C, [H * scale, W * scale, C].
    """
    settings = settings or Settings()
    height, width = output_size(pixels.shape[0], pixels.shape[1], settings.scale or float(tiling.model.factor))
    out = np.empty((height, width, pixels.shape[2]), pixels.dtype)
    top = 0
    # The same way as a file goes, without one.
    image = ImageFile(pixels, "", None, None)
    dtype = np.uint8 if pixels.dtype == np.uint8 else np.uint16
    for band in _finished_bands(tiling, image, settings, pixels.shape[2], dtype, progress):
        out[top : top + len(band)] = band
        top += len(band)
    return out


def upscale_file(
    tiling: Tiling,
    source: Path,
    target: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    text: dict[str, str] | None = None,
    quiet: bool = False,
) -> None:
    """Upscales an image file.

    Args:
      tiling: the network in tiles.
      source: the file to read.
      target: the file to write; its ending names the format.
      settings: the scale, and more.
      overwrite: replace the target.
      text: by keyword, stored in a PNG.
      quiet: show no progress.

    Raises:
      UserError: a file cannot be read or written, or the device has too little memory.
    """
    image = read_image(source)
    height, width = image.pixels.shape[:2]
    scale = settings.scale or float(tiling.model.factor)
    # What the image is; what the file can hold of it may be less.
    wanted = OutputImage(
        *output_size(height, width, scale),
        channels=image.pixels.shape[2],
        depth=8 * image.pixels.itemsize,
        icc=image.icc,
        exif=image.exif,
        text=text or {},
    )
    output, lost = fit_format(wanted, format_of(target))
    # Nothing is lost without a word.
    for note in (*image.notes, *lost):
        _log.info("%s: %s", source.name, note)
    dtype = np.uint8 if output.depth == 8 else np.uint16
    # The number of tiles is known when the passes are planned.
    progress = ProgressBar(source.name, 1, " tiles", quiet=quiet)
    try:
        with ImageWriter(target, output, overwrite) as writer:
            for band in _finished_bands(tiling, image, settings, output.channels, dtype, progress):
                writer.write(band)
    except FloatingPointError as error:
        raise UserError(f"{source}: the model's image is broken ({error}): has its training diverged?") from None
    except MemoryError:
        raise UserError(f"{source}: this machine has no memory for {output.width} x {output.height} pixels") from None
    finally:
        progress.close()


def check_file(source: Path, target: Path, scale: float, overwrite: bool) -> None:
    """Checks by the header of a file what can be checked before a network is loaded.

    Raises:
      UserError: as `upscale_file` raises it.
    """
    size = output_size(*read_size(source), scale)
    check_output(target, OutputImage(*size, channels=_COLOR_CHANNELS), overwrite)


def _finished_bands(
    tiling: Tiling,
    image: ImageFile,
    settings: Settings,
    channels: int,
    dtype: type[np.unsignedinteger],
    progress: Progress | None,
) -> Iterator[np.ndarray]:
    """Bands [rows, W * scale, channels] as they are written: grey averaged, alpha beside the colours or over white."""
    color, alpha = image.color, image.alpha
    grey = color.shape[2] == 1
    if alpha is not None:
        color = fill_transparent(color, alpha)
    # A view: grey is not copied three times.
    pixels = np.broadcast_to(color, (*color.shape[:2], _COLOR_CHANNELS))
    size = output_size(color.shape[0], color.shape[1], settings.scale or float(tiling.model.factor))
    # Lanczos: what the network would add to an outline is no detail.
    alphas = None if alpha is None else StreamRows(resize_bands(ArrayRows(alpha), *size, wrap=tiling.wrap), *size)
    top = 0
    for band in upscale_bands(tiling, pixels, settings, progress):
        if grey:
            # The network may tint what it draws.
            band = band.mean(-1, keepdims=True)
        if alphas is not None:
            cover = alphas.take(np.arange(top, top + len(band)))
            if channels == band.shape[2]:
                # Lanczos overshoots at an outline.
                share = (cover.clip(-1, 1) + 1) / 2
                band = band.clip(-1, 1) * share + (1 - share)
            else:
                band = np.concatenate([band, cover], axis=-1)
        top += len(band)
        yield from_float(band, dtype)


def fill_transparent(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Gives pixels without cover the colour of what is near: theirs is often black, and would darken the outline.

    Args:
      color: uint8 or uint16 [H, W, C].
      alpha: the same dtype, [H, W, 1].

    Returns:
      [H, W, C] of the same dtype.
    """
    if alpha.all() or not alpha.any():
        return color
    # Sums of 1, 4, 16, ... pixels, weighted by their cover, until every sum has some.
    cover = alpha.astype(np.float32)
    sums = [np.concatenate([color * cover, cover], axis=-1)]
    while not sums[-1][..., -1].all():
        padded = np.pad(sums[-1], [(0, n % 2) for n in sums[-1].shape[:2]] + [(0, 0)])
        h, w, c = padded.shape
        sums.append(padded.reshape(h // 2, 2, w // 2, 2, c).sum((1, 3)))
    filled = sums[-1]
    # Back from the coarsest: a pixel without cover takes the mean of the coarser sums around it.
    for finer in reversed(sums[:-1]):
        coarse = _double(_double(filled, 0), 1)[: finer.shape[0], : finer.shape[1]]
        # With little weight: it must not outweigh a neighbour with cover at the next level.
        coarse *= 1e-3 / coarse[..., -1:]
        filled = np.where(finer[..., -1:] > 0, finer, coarse)
    near = filled[..., :-1] / filled[..., -1:]
    return np.where(alpha > 0, color, np.rint(near).astype(color.dtype))


def _double(x: np.ndarray, axis: int) -> np.ndarray:
    """Twice as long along an axis, by linear interpolation; the edge is repeated."""
    x = np.moveaxis(x, axis, 0)
    ends = np.concatenate([x[:1], x, x[-1:]])
    pairs = np.stack([0.75 * x + 0.25 * ends[:-2], 0.75 * x + 0.25 * ends[2:]], axis=1)
    return np.moveaxis(pairs.reshape(-1, *x.shape[1:]), 0, axis)


def find_inputs(names: Sequence[str]) -> list[Path]:
    """Files of names, folders (their image files, without their subfolders) and patterns, each once, in order.

    Raises:
      UserError: a name is missing, or a folder or pattern has no images.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.suffix.lower() in _INPUT_ENDINGS and f.is_file())
            if not found:
                raise UserError(f"{path} holds no images ({', '.join(sorted(_INPUT_ENDINGS))})")
        elif path.exists() or not glob.has_magic(name):
            # A missing file of a job is one of its failures: the others are done.
            found = [path]
        else:
            found = [f for f in map(Path, sorted(glob.glob(name, recursive=True))) if f.is_file()]
            if not found:
                raise UserError(f"{name} matches no files")
        files += found
    # A file may match two patterns, and have a name in full and in short.
    once: dict[str, Path] = {}
    for file in files:
        once.setdefault(os.path.abspath(file), file)
    return list(once.values())


def is_job(names: Sequence[str], files: Sequence[Path]) -> bool:
    """Whether the inputs are several files, a folder or a pattern, and not one file."""
    return len(files) != 1 or Path(names[0]) != files[0]


def name_outputs(files: Sequence[Path], out: Path | None, job: bool, suffix: str, ending: str | None) -> list[Path]:
    """The output file of each input: NAME_out.png.

    Args:
      files: the inputs.
      out: a folder; for one input also a file, whose ending is kept; None for the folder of each input.
      job: there may be several inputs, and `out` is a folder.
      suffix: added to the name, after `_`; may be empty.
      ending: "png", "jpg", "webp" or "tif", "auto" for that of the input; None for "png".

    Raises:
      UserError: `out` is a file and the inputs are several, its ending is that of a format which is not written, the
        output would have the name of its input, or a job with an empty suffix would write beside its inputs.
    """
    is_file = out is not None and not out.is_dir() and out.suffix.lower() in FORMATS
    if out is not None and not out.exists() and not job and not is_file and _names_image(out):
        raise UserError(
            f"--out={out}: {out.suffix} cannot be written, the name must end in one of {', '.join(FORMATS)}"
        )
    if out is not None and not out.is_dir() and (out.exists() or is_file if job else out.exists() and not is_file):
        raise UserError(f"--out={out} is a file: name a folder for the images")
    if out is not None and is_file and not job:
        # The ending decides, whatever --format says.
        names = [out]
    else:
        names = []
        for file in files:
            own = file.suffix.lower() if file.suffix.lower() in FORMATS else ".png"
            last = own if ending == "auto" else f".{ending or 'png'}"
            names.append((out or file.parent) / f"{file.stem}{f'_{suffix}' if suffix else ''}{last}")
    # a.png and a.jpg in one folder: both keep their ending within the name.
    twice = {name for name in names if names.count(name) > 1}
    names = [
        n.with_name(f"{f.stem}_{f.suffix[1:]}{n.name[len(f.stem) :]}") if n in twice else n
        for f, n in zip(files, names, strict=True)
    ]
    for file, name in zip(files, names, strict=True):
        # The next run of the same command could not tell its inputs from these.
        if job and not suffix and name.parent.resolve() == file.parent.resolve():
            raise UserError(f"{name} would lie among the inputs: give --out=FOLDER or a --suffix")
        if name.resolve() == file.resolve():
            raise UserError(f"{name} is the input itself: give --out or --suffix")
    return names


def _names_image(path: Path) -> bool:
    """Whether the ending is that of an image format, of those that Pillow knows."""
    Image.init()
    return path.suffix.lower() in {*Image.registered_extensions(), *_INPUT_ENDINGS, ".heic", ".jxl", ".exr"}


def check_unique(files: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raises UserError where two inputs have one output."""
    made: dict[str, Path] = {}
    for file, output in zip(files, outputs, strict=True):
        other = made.setdefault(os.path.abspath(output), file)
        if other != file:
            raise UserError(f"{other} and {file} would both be written to {output}: give them separate commands")


def without_own_outputs(files: Sequence[Path], outputs: Sequence[Path]) -> list[Path]:
    """The files that are not the output of another one: a folder is often upscaled into itself, and then again."""
    # Links and `..` name one file in several ways.
    made = {o.resolve() for o in outputs}
    return [f for f in files if f.resolve() not in made]


def run_job(
    tiling: Tiling,
    pairs: Sequence[tuple[Path, Path]],
    settings: Settings,
    *,
    overwrite: bool,
    text: dict[str, str] | None = None,
    quiet: bool = False,
) -> tuple[int, int, list[str]]:
    """Upscales files one after the other, and goes on after a failure.

    Args:
      tiling: the network in tiles.
      pairs: input and output.
      settings, overwrite, text, quiet: as `upscale_file` takes them. Outputs that exist are kept without `overwrite`.

    Returns:
      (files written, outputs kept, one line a failure)
    """
    written, kept, failures = 0, 0, []
    for source, target in pairs:
        try:
            if target.exists() and not overwrite:
                # So that a job that was stopped goes on by the same command.
                kept += 1
                continue
            upscale_file(tiling, source, target, settings, overwrite=overwrite, text=text, quiet=quiet)
            written += 1
            # One path a line, for programs that read it.
            print(target, flush=True)
        # One file that breaks a library must not cost the others.
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{source}: {type(error).__name__}: {error}"
            # Messages of libraries may have several lines.
            failures.append(" ".join(reason.split()))
            _log.info("failed: %s", failures[-1])
    return written, kept, failures
