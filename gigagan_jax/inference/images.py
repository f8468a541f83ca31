"""Images as people see them: uint8 arrays, labelled grids, PNG files that carry how they were made."""

from __future__ import annotations

import bisect
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from gigagan_jax.core.errors import UserError

_GROUND = (250, 250, 248)
_TEXT = (38, 38, 42)
_FAINT_TEXT = (110, 110, 116)
_SMALL = 32  # images up to this side are enlarged by default,
_READABLE = 64  # to about this side
_SLUG_LENGTH = 60
# What the font has no letter for, beside accents.
_PLAIN_PUNCTUATION = str.maketrans({"–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "..."})


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Images of [-1, 1], float `[..., H, W, 3]`, as uint8 of the same shape; rounds half up, clips what lies outside.

    Raises:
      ValueError: the shape or dtype is another, or a value is NaN or infinite (the message counts them).
    """
    x = np.asarray(x)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise ValueError(f"images must be [..., H, W, 3], got shape {list(x.shape)}")
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        raise ValueError(f"images must be floats in [-1, 1], got {x.dtype}")
    x = x.astype(np.float32)
    finite = np.isfinite(x)
    if not finite.all():
        raise ValueError(f"{x.size - int(finite.sum())} of {x.size} image values are NaN or infinite")
    return np.clip(np.floor(x * 127.5 + 128.0), 0, 255).astype(np.uint8)


def grid(
    images: np.ndarray,
    row_labels: Sequence[str] | None,
    col_labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
    pad: int = 2,
) -> Image.Image:
    """One picture of many: a row for each prompt, a column for each seed.

    The labels are drawn in Pillow's own font, which knows the Latin letters: accents are left out, and other scripts
    show as boxes (`save_png` keeps the prompt as it was).

    Args:
      images: uint8 `[rows, cols, H, W, 3]`.
      row_labels: one text a row, left of it, wrapped and cut with an ellipsis where it is long; None for no labels.
      col_labels: one short text a column, above it; None for no labels.
      title: one line above everything.
      scale: a whole factor by which each image is enlarged, without smoothing; None takes images of up to 32 pixels
        to about 64 and leaves larger ones as they are.
      pad: pixels between two images.

    Raises:
      ValueError: the shape, dtype, scale or pad is wrong, or the labels are not one a row or column.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"a grid takes uint8 [rows, cols, H, W, 3], got {images.dtype} {list(images.shape)}")
    rows, cols, height, width, _ = images.shape
    for name, labels, count in (("row", row_labels, rows), ("col", col_labels, cols)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name}_labels has {len(labels)} texts for {count} {name}s")
    if scale is None:
        side = max(height, width)
        scale = max(1, round(_READABLE / side)) if side <= _SMALL else 1
    if scale < 1 or pad < 0:
        raise ValueError(f"scale must be at least 1 and pad at least 0, got {scale} and {pad}")

    cell_h, cell_w = height * scale, width * scale
    font = _font(min(28, max(13, cell_h // 8)))
    line = _line_height(font)
    margin = line
    # As wide as the longest label asks for, up to about 30 letters: beyond that it is wrapped.
    label_w, wrapped = 0, []
    if row_labels is not None:
        widest = max(font.getlength(_clean(text)) for text in row_labels)
        label_w = int(min(widest, font.getlength("n" * 30))) + 1
        # A label keeps within its row, so that it cannot run into the next.
        wrapped = [_wrap(text, font, label_w, max(1, (cell_h + pad) // line)) for text in row_labels]
    left = margin + (label_w + margin if row_labels is not None else 0)
    top = margin + (2 * line if title else 0) + (line + line // 3 if col_labels is not None else 0)
    total_w = left + cols * cell_w + (cols - 1) * pad + margin
    total_h = top + rows * cell_h + (rows - 1) * pad + margin

    out = Image.new("RGB", (total_w, total_h), _GROUND)
    draw = ImageDraw.Draw(out)
    if title:
        big = _font(round(font.size * 1.25))
        draw.text((margin, margin), _ellipsis(title, big, total_w - 2 * margin), fill=_TEXT, font=big)
    for c, text in enumerate(col_labels or ()):
        x = left + c * (cell_w + pad) + cell_w / 2
        draw.text((x, top - line // 3), _ellipsis(text, font, cell_w), fill=_FAINT_TEXT, font=font, anchor="md")
    for r, lines in enumerate(wrapped):
        y = top + r * (cell_h + pad) + (cell_h - line * len(lines)) / 2
        for i, text in enumerate(lines):
            draw.text((margin + label_w, y + (i + 0.5) * line), text, fill=_TEXT, font=font, anchor="rm")
    for r in range(rows):
        for c in range(cols):
            cell = images[r, c].repeat(scale, axis=0).repeat(scale, axis=1)
            out.paste(Image.fromarray(cell), (left + c * (cell_w + pad), top + r * (cell_h + pad)))
    return out


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str] | None = None) -> Image.Image:
    """Pictures from left to right, tops aligned, each under its title (say, one grid for each truncation).

    Raises:
      ValueError: there are no pictures, or the titles are not one a picture.
    """
    if not pictures:
        raise ValueError("side_by_side takes at least one picture")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"side_by_side got {len(titles)} titles for {len(pictures)} pictures")
    font = _font(min(32, max(16, max(p.height for p in pictures) // 40)))
    line = _line_height(font)
    top = 2 * line if titles else 0
    gap = line // 2
    out = Image.new(
        "RGB",
        (sum(p.width for p in pictures) + gap * (len(pictures) - 1), top + max(p.height for p in pictures)),
        _GROUND,
    )
    draw = ImageDraw.Draw(out)
    x = 0
    for i, picture in enumerate(pictures):
        if titles:
            text = _ellipsis(titles[i], font, picture.width)
            draw.text((x + picture.width / 2, top * 0.75), text, fill=_TEXT, font=font, anchor="mm")
        out.paste(picture, (x, top))
        x += picture.width + gap
    return out


def save_png(path: str | os.PathLike[str], image: Image.Image | np.ndarray, metadata: Mapping[str, str]) -> None:
    """Writes a PNG whole or not at all, with `metadata` as text in it; folders that are missing are made.

    Args:
      path: the file, replaced if it is there.
      image: a picture, or uint8 `[H, W, 3]`.
      metadata: keys of 1 to 79 Latin letters, values in any script.

    Raises:
      UserError: the file cannot be written there.
      ValueError: the array or a key is not as described.
    """
    path = Path(path)
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ValueError(f"save_png takes uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
        image = Image.fromarray(array)
    info = PngInfo()
    for key, value in metadata.items():
        if not 1 <= len(key) <= 79 or not key.isascii() or not key.isprintable() or key.strip() != key:
            raise ValueError(f"the PNG text key {key!r} must be 1 to 79 printable ASCII letters")
        # iTXt: UTF-8, so prompts survive in any script. A NUL would end the text for other readers.
        info.add_itxt(key, _encodable(str(value)).replace("\0", "�"))
    # In the same folder, so that the replacement is atomic; short, so that a long name still fits.
    temporary = path.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                image.save(file, format="PNG", pnginfo=info)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(
            f"cannot write the image {path}: {e.strerror or e}; choose a folder that you may write to"
        ) from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text in a PNG, as `save_png` put it there.

    Raises:
      UserError: the file is missing or not a whole PNG.
    """
    try:
        # Not Image.open: its guard against huge pictures would refuse a large grid of our own.
        with open(path, "rb") as file:
            return {key: str(value) for key, value in PngImageFile(file).text.items()}
    except (OSError, SyntaxError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else "not a whole PNG file"
        raise UserError(f"cannot read the image {path}: {reason}") from None


def file_name(index: int, prompt: str, seed: int) -> str:
    """A short name for an image, safe on any file system: `0003_a-handwritten-seven_seed42.png`.

    Letters lose their accents and scripts without ASCII letters are left out: index and seed tell such images apart.
    """
    # Cut first: a prompt has no limit, and normalising a very long one is slow.
    folded = unicodedata.normalize("NFKD", prompt[:1000]).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", folded.replace("'", "")).strip("-")
    if len(words) > _SLUG_LENGTH:
        cut = words[: _SLUG_LENGTH + 1]
        words = cut.rsplit("-", 1)[0] if "-" in cut else cut[:_SLUG_LENGTH]
    return f"{index:04d}_{words or 'image'}_seed{seed}.png"


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.3)


def _encodable(text: str) -> str:
    """Text without lone surrogates, which arguments of a shell may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def _clean(text: str) -> str:
    """Text as it is drawn: one line, no accents or control characters, no more of it than any label can show."""
    text = unicodedata.normalize("NFKD", _encodable(text[:500])).translate(_PLAIN_PUNCTUATION)
    kept = (c for c in text if not unicodedata.combining(c))
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in kept).split())


def _ellipsis(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The longest start of the text that fits in `width` pixels, with an ellipsis if something is cut."""
    text = _clean(text)
    if font.getlength(text) <= width:
        return text
    kept = _fitting(text, font, width - font.getlength("…"))
    return text[:kept].rstrip() + "…"


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many of the first letters of the text fit in `width` pixels."""
    return bisect.bisect_right(range(1, len(text) + 1), width, key=lambda n: font.getlength(text[:n]))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """At most `max_lines` lines of at most `width` pixels; words too long for a line are broken."""
    lines: list[str] = []
    words = _clean(text).split(" ")
    while words:
        if len(lines) == max_lines - 1:
            return [*lines, _ellipsis(" ".join(words), font, width)]
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        line = " ".join(words[:taken])
        words = words[taken:]
        if font.getlength(line) > width:
            kept = max(1, _fitting(line, font, width))
            line, rest = line[:kept], line[kept:]
            if rest:
                words.insert(0, rest)
        lines.append(line)
    return lines
