"""Converts samples to uint8, draws labelled grids, and names the files of samples."""

from __future__ import annotations

import bisect
import dataclasses
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.image_encoding import encode_image, replace_surrogates, write_atomically

GRID_BACKGROUND = (250, 250, 248)
_TEXT = (38, 38, 42)
_FAINT_TEXT = (110, 110, 116)
# By default images of up to _SMALL pixels are enlarged to about _READABLE pixels.
_SMALL = 32
_READABLE = 64
# Letters of the prompt in a file name.
_SLUG_LENGTH = 60
# Punctuation without a glyph in the font.
_PLAIN_PUNCTUATION = str.maketrans({"–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "..."})


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Converts images in [-1, 1], float `[..., H, W, 3]`, to uint8 of the same shape. Values outside are clipped.

    Raises:
      ValueError: the shape or dtype is wrong, or a value is NaN or infinite (the message counts them).
    """
    x = np.asarray(x)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise ValueError(f"images must be [..., H, W, 3], got shape {list(x.shape)}")
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        raise ValueError(f"images must be floats in [-1, 1], got {x.dtype}")
    # bfloat16 has 8 bits: half a grey level would be lost in the sum below.
    x = x.astype(np.float32)
    finite = np.isfinite(x)
    if not finite.all():
        raise ValueError(f"{x.size - int(finite.sum())} of {x.size} image values are NaN or infinite")
    # Rounds half up. The train step maps grey level g to g / 127.5 - 1.
    return np.clip(np.floor(x * 127.5 + 128.0), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Where the parts of a grid lie, in pixels.

    Attributes:
      width, height: of the whole picture.
      left, top: of the first image.
      scale: by which images are enlarged.
      label_width: of the column of row labels; 0 without them.
      font: of the labels.
      line: height of a line of text, and the margin.
    """

    width: int
    height: int
    left: int
    top: int
    scale: int
    label_width: int
    font: ImageFont.FreeTypeFont
    line: int


def lay_out_grid(
    rows: int,
    cols: int,
    height: int,
    width: int,
    row_labels: Sequence[str] | None,
    has_col_labels: bool = False,
    has_title: bool = False,
    *,
    scale: int | None = None,
    pad: int = 2,
) -> GridLayout:
    """Lays out a grid before its images exist; arguments are those of `draw_grid`.

    Raises:
      ValueError: the scale or pad is wrong.
    """
    # Pixels of a small model are hard to see.
    if scale is None:
        side = max(height, width)
        scale = max(1, round(_READABLE / side)) if side <= _SMALL else 1
    if scale < 1 or pad < 0:
        raise ValueError(f"scale must be at least 1 and pad at least 0, got {scale} and {pad}")
    # 13 to 28 pixels: legible beside images of any size.
    font = _load_font(min(28, max(13, height * scale // 8)))
    line = _line_height(font)
    # The column is as wide as the longest label, up to about 30 letters; a longer label is wrapped.
    label_w = 0
    if row_labels is not None:
        widest = max(font.getlength(_clean_label(text)) for text in row_labels)
        label_w = int(min(widest, font.getlength("n" * 30))) + 1
    left = line + (label_w + line if row_labels is not None else 0)
    top = line + (2 * line if has_title else 0) + (line + line // 3 if has_col_labels else 0)
    total_w = left + cols * width * scale + (cols - 1) * pad + line
    total_h = top + rows * height * scale + (rows - 1) * pad + line
    return GridLayout(total_w, total_h, left, top, scale, label_w, font, line)


def draw_grid(
    images: np.ndarray,
    row_labels: Sequence[str] | None,
    col_labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
    pad: int = 2,
) -> Image.Image:
    """Draws a grid of images: a row for each prompt, a column for each seed.

    The labels use Pillow's own font, which has the Latin letters only. Accents are left out, and other scripts show as
    boxes; `save_png` keeps the prompt unchanged.

    Args:
      images: uint8 `[rows, cols, H, W, 3]`.
      row_labels: one text a row, to its left, wrapped and shortened if it is long; None for no labels.
      col_labels: one short text a column, above it; None for no labels.
      title: one line above the grid.
      scale: integer factor by which each image is enlarged without smoothing; None enlarges images of up to 32 pixels
        to about 64 pixels.
      pad: pixels between two images.

    Raises:
      ValueError: the shape, dtype, scale or pad is wrong, or the number of labels is not that of the rows or columns.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"a grid takes uint8 [rows, cols, H, W, 3], got {images.dtype} {list(images.shape)}")
    rows, cols, height, width, _ = images.shape
    for name, labels, count in (("row", row_labels, rows), ("col", col_labels, cols)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name}_labels has {len(labels)} texts for {count} {name}s")
    grid = lay_out_grid(rows, cols, height, width, row_labels, bool(col_labels), bool(title), scale=scale, pad=pad)
    left, top, scale, font, line = grid.left, grid.top, grid.scale, grid.font, grid.line
    cell_h, cell_w, margin, label_w = height * scale, width * scale, grid.line, grid.label_width
    # As many lines as a row is high: a label must not reach into the next row.
    room = max(1, (cell_h + pad) // line)
    wrapped = [_wrap_text(text, font, label_w, room) for text in row_labels or ()]

    out = Image.new("RGB", (grid.width, grid.height), GRID_BACKGROUND)
    draw = ImageDraw.Draw(out)
    if title:
        big = _load_font(round(font.size * 1.25))
        draw.text((margin, margin), _shorten_to_width(title, big, grid.width - 2 * margin), fill=_TEXT, font=big)
    for c, text in enumerate(col_labels or ()):
        x = left + c * (cell_w + pad) + cell_w / 2
        draw.text((x, top - line // 3), _shorten_to_width(text, font, cell_w), fill=_FAINT_TEXT, font=font, anchor="md")
    for r, lines in enumerate(wrapped):
        y = top + r * (cell_h + pad) + (cell_h - line * len(lines)) / 2
        for i, text in enumerate(lines):
            draw.text((margin + label_w, y + (i + 0.5) * line), text, fill=_TEXT, font=font, anchor="rm")
    for r in range(rows):
        for c in range(cols):
            # Repeated pixels: an interpolated image would hide the pixels that the model draws.
            cell = images[r, c].repeat(scale, axis=0).repeat(scale, axis=1)
            out.paste(Image.fromarray(cell), (left + c * (cell_w + pad), top + r * (cell_h + pad)))
    return out


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str] | None = None) -> Image.Image:
    """Joins pictures from left to right with aligned tops, each under its title.

    Raises:
      ValueError: there are no pictures, or the number of titles is another.
    """
    if not pictures:
        raise ValueError("side_by_side takes at least one picture")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"side_by_side got {len(titles)} titles for {len(pictures)} pictures")
    font = _load_font(min(32, max(16, max(p.height for p in pictures) // 40)))
    line = _line_height(font)
    top = 2 * line if titles else 0
    gap = line // 2
    out = Image.new(
        "RGB",
        (sum(p.width for p in pictures) + gap * (len(pictures) - 1), top + max(p.height for p in pictures)),
        GRID_BACKGROUND,
    )
    draw = ImageDraw.Draw(out)
    x = 0
    for i, picture in enumerate(pictures):
        if titles:
            text = _shorten_to_width(titles[i], font, picture.width)
            draw.text((x + picture.width / 2, top * 0.75), text, fill=_TEXT, font=font, anchor="mm")
        out.paste(picture, (x, top))
        x += picture.width + gap
    return out


def save_png(path: str | os.PathLike[str], image: Image.Image | np.ndarray, metadata: Mapping[str, str]) -> None:
    """`image_encoding.save_image` of a PNG, whatever the name's ending.

    Raises:
      UserError: the file cannot be written.
      ValueError: the array or a key is invalid.
    """
    try:
        data = encode_image(image, "PNG", metadata)
    except OSError as e:
        raise UserError(f"cannot write the image {path}: {e}; choose another format") from None
    write_atomically(Path(path), data)


def file_name(index: int, prompt: str, seed: int, ending: str = ".png", digits: int = 4) -> str:
    """Returns a short file name that is valid on any file system: `0003_a-handwritten-seven_seed42.png`.

    Accents and letters outside ASCII are left out; index and seed distinguish such images.

    Args:
      index: of the image in its job.
      prompt, seed: of the image.
      ending: of the file, with its dot.
      digits: of the index, with leading zeros; names sort by index where it suffices for all.
    """
    # Cut first: a prompt has no limit, and the normalization of a very long one is slow.
    folded = unicodedata.normalize("NFKD", prompt[:1000]).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", folded.replace("'", "")).strip("-")
    if len(words) > _SLUG_LENGTH:
        # At a word's end, if there is one.
        cut = words[: _SLUG_LENGTH + 1]
        words = cut.rsplit("-", 1)[0] if "-" in cut else cut[:_SLUG_LENGTH]
    return f"{index:0{digits}d}_{words or 'image'}_seed{seed}{ending}"


def _load_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    # Pillow without FreeType returns a bitmap font, which has no sizes.
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    # Leading of 30 %: descenders must not touch the next line.
    return round(font.size * 1.3)


def _clean_label(text: str) -> str:
    """Prepares text for drawing: one line without accents and control characters, of at most 500 characters."""
    # NFKD separates letters from their accents, which are then dropped.
    text = unicodedata.normalize("NFKD", replace_surrogates(text[:500])).translate(_PLAIN_PUNCTUATION)
    kept = (c for c in text if not unicodedata.combining(c))
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in kept).split())


def _shorten_to_width(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Returns the longest prefix of the text that fits in `width` pixels, with an ellipsis if text is cut."""
    text = _clean_label(text)
    if font.getlength(text) <= width:
        return text
    kept = _count_fitting(text, font, width - font.getlength("…"))
    return text[:kept].rstrip() + "…"


def _count_fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Returns how many of the first letters of the text fit in `width` pixels."""
    # The width of a prefix grows with its length, which bisection needs.
    return bisect.bisect_right(range(1, len(text) + 1), width, key=lambda n: font.getlength(text[:n]))


def _wrap_text(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Wraps text to at most `max_lines` lines of at most `width` pixels; a word longer than a line is broken."""
    lines: list[str] = []
    words = _clean_label(text).split(" ")
    while words:
        # The last line takes what is left, shortened.
        if len(lines) == max_lines - 1:
            return [*lines, _shorten_to_width(" ".join(words), font, width)]
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        line = " ".join(words[:taken])
        words = words[taken:]
        if font.getlength(line) > width:
            # At least one letter a line, or the loop would not end.
            kept = max(1, _count_fitting(line, font, width))
            line, rest = line[:kept], line[kept:]
            if rest:
                words.insert(0, rest)
        lines.append(line)
    return lines
