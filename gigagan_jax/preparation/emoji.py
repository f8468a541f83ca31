"""Emoji sets as captioned pictures: openly licensed vectors, drawn at any size. Needs resvg-py (pip install -e '.[emoji]').

A set is an npm package of Iconify (`npm pack @iconify-json/noto`, unpacked): icons.json has the vectors by name, info.json the
title and licence. A picture is a cell: a concept in a style.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source
from gigagan_jax.preparation.emoji_concepts import CONCEPTS

# The word for the style of each set. Sets that are not here are called by their title.
STYLES = {
    "noto": "noto",
    "noto-v1": "old noto",
    "twemoji": "twitter",
    "openmoji": "openmoji",
    "fluent-emoji-flat": "flat",
    "fluent-emoji": "glossy",
    "emojione": "emojione",
}
# {concept} has its article.
TEMPLATES = (
    "{concept}, {style} style",
    "{concept} in {style} style",
    "{style} style: {concept}",
    "an emoji of {concept}, {style} style",
)
PARTS = ("train", "held_out", "all")
# One cell of ten is held out, at most one style of a concept of the 64.
_HELD_OUT_SHARE = 0.1
_BACKGROUND = "#ffffff"


@dataclasses.dataclass(frozen=True)
class EmojiSet:
    """One package.

    Attributes:
      prefix: its name among Iconify's sets.
      style: in captions.
      license: SPDX name; author: who drew it.
      icons: {concept, as a slug: SVG body}.
      size: (width, height) of the bodies' coordinates, for those that have none of their own.
      sizes: {concept: (left, top, width, height)} of those.
    """

    prefix: str
    style: str
    license: str
    author: str
    icons: dict[str, str]
    size: tuple[float, float]
    sizes: dict[str, tuple[float, float, float, float]]

    def to_svg(self, concept: str) -> str:
        """A whole SVG file."""
        left, top, width, height = self.sizes.get(concept, (0.0, 0.0, *self.size))
        # A square around the picture: the model's images are square, and nothing is to be squeezed.
        side = max(width, height)
        view = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
        head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {head} viewBox="{view}" width="{side:g}" height="{side:g}">{self.icons[concept]}</svg>'


def read_set(folder: str | Path) -> EmojiSet:
    """Reads a package.

    Raises:
      UserError: the folder is no unpacked package of an Iconify set.
    """
    folder = Path(folder)
    # npm packs everything under package/.
    if not (folder / "icons.json").is_file() and (folder / "package" / "icons.json").is_file():
        folder = folder / "package"
    if not (folder / "icons.json").is_file():
        raise UserError(
            f"--packages: {folder} is no package of an Iconify set (it has no icons.json): "
            "npm pack @iconify-json/noto, and unpack the .tgz into a folder"
        )
    icons, info = _read_json(folder / "icons.json"), _read_json(folder / "info.json")
    try:
        shown = {name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")}
        default = (float(icons.get("width", 16)), float(icons.get("height", 16)))
        sizes = {
            name: tuple(float(icon.get(k, d)) for k, d in zip(_BOX, (0, 0, *default), strict=True))
            for name, icon in shown.items()
            if any(k in icon for k in _BOX)
        }
        return EmojiSet(
            prefix=str(icons["prefix"]),
            style=STYLES.get(icons["prefix"], str(info["name"]).lower()),
            license=str(info["license"]["spdx"]),
            author=str(info["author"]["name"]),
            icons={name: str(icon["body"]) for name, icon in shown.items()},
            size=default,
            sizes=sizes,  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"--packages: {folder} is no package of an Iconify set ({type(error).__name__}: {error} in its JSON)"
        ) from error


_BOX = ("left", "top", "width", "height")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--packages: {path} cannot be read as JSON ({error}): unpack the package again") from error


def read_tags(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """{concept, as a slug: its tags} of the npm package `openmoji`. Raises UserError where the folder is none."""
    path = Path(folder) / "data" / "openmoji.json"
    if not path.is_file():
        path = Path(folder) / "package" / "data" / "openmoji.json"
    if not path.is_file():
        raise UserError(f"--tags: {folder} is not the npm package openmoji: it has no data/openmoji.json")
    found = {}
    for entry in _read_json(path):
        if not isinstance(entry, dict):
            raise UserError(f"--tags: {path} is no list of emoji: unpack the package again")
        words = tuple(w.strip() for w in str(entry.get("tags", "")).split(",") if w.strip())
        found[str(entry.get("annotation", "")).lower().replace(" ", "-")] = words
    return found


def common_concepts(sets: Sequence[EmojiSet]) -> list[str]:
    """Slugs that every set draws, in the order of the alphabet; skin tones are left out."""
    names = set.intersection(*(set(s.icons) for s in sets))
    return sorted(name for name in names if "skin-tone" not in name)


def held_out_cells(concepts: Sequence[str], styles: int) -> set[tuple[int, int]]:
    """{(concept, style)}: a tenth of the cells, evenly spread; each concept is in others, and so is each style."""
    size = len(concepts)
    count = round(size * styles * _HELD_OUT_SHARE)
    passes = range(-(-count // size)) if count else range(0)
    # With more than ten styles a concept has several cells: the step between them must not lead to the same style.
    step = next(s for s in range(1, styles + 1) if len({p * (size + s) % styles for p in passes}) == len(passes))
    cells = set()
    for k in range(count):
        concept = k * size // count if count <= size else k % size
        cells.add((concept, (k + k // size * step) % styles))
    return cells


class EmojiSource(Source):
    """Cells of concepts and styles, drawn as they are read.

    Args:
      sets: the styles.
      size: side of a picture in pixels.
      concepts: slugs; empty: every one that all sets draw.
      part: "train", "held_out" (cells that training never shows) or "all".
      hold_out: what training never shows, together: "cells" (a tenth, each concept and style is in others), "concepts" (a
        tenth, in every style), or styles by their name.
      tags: {slug: words} for one more wording.

    Attributes:
      concepts: slugs.

    Raises:
      UserError: a size that no model has, no set, two sets of one style, or a concept that a set does not draw.
    """

    def __init__(
        self,
        sets: Sequence[EmojiSet],
        size: int,
        *,
        concepts: Sequence[str] = CONCEPTS,
        part: str = "train",
        hold_out: Sequence[str] = ("cells",),
        tags: dict[str, tuple[str, ...]] | None = None,
    ):
        if part not in PARTS:
            raise UserError(f"part={part!r}: must be one of {', '.join(PARTS)}")
        # Models have 4 px times a power of two.
        if not 16 <= size <= 4096 or size & (size - 1):
            raise UserError(f"--size={size}: models have sides of 16, 32, 64 and so on to 4096 pixels")
        if len(sets) < 2:
            raise UserError(f"--packages: {len(sets)} sets: name two or more, or whole concepts would be held out")
        if len({s.style for s in sets}) < len(sets):
            raise UserError(f"--packages: two sets of one style ({', '.join(s.style for s in sets)}): name each once")
        self.concepts = tuple(concepts) or tuple(common_concepts(sets))
        for s in sets:
            missing = [name for name in self.concepts if name not in s.icons]
            if missing:
                raise UserError(f"--concepts: the set {s.prefix} does not draw {missing[0]} ({len(missing)} in all)")
        # By name: which cells are held out must not depend on the order of folders.
        self.sets, self.size, self.tags = tuple(sorted(sets, key=lambda s: s.prefix)), size, tags or {}
        hidden = self._find_hidden(hold_out)
        every = [(c, s) for c in range(len(self.concepts)) for s in range(len(sets))]
        self.cells = [cell for cell in every if part == "all" or (cell in hidden) == (part == "held_out")]
        self._part = part

    def _find_hidden(self, hold_out: Sequence[str]) -> set[tuple[int, int]]:
        hidden: set[tuple[int, int]] = set()
        count, styles = len(self.concepts), [s.style for s in self.sets]
        for name in hold_out:
            if name == "cells":
                hidden |= held_out_cells(self.concepts, len(styles))
            elif name == "concepts":
                step = round(1 / _HELD_OUT_SHARE)
                hidden |= {(c, s) for c in range(step // 2, count, step) for s in range(len(styles))}
            elif name in styles:
                hidden |= {(c, styles.index(name)) for c in range(count)}
            else:
                known = ", ".join(("cells", "concepts", *styles))
                raise UserError(f"--hold_out={name}: must be one of {known}; commas between several")
        return hidden

    def __len__(self) -> int:
        return len(self.cells)

    def read(self, i: int) -> Record:
        concept, style = self.cells[i]
        drawn = self.sets[style]
        return Record(
            image=rasterize(drawn.to_svg(self.concepts[concept]), self.size),
            captions=self.captions(i),
            # Of the cell: captions with one label are no wrong captions of each other (training/mismatched_captions.py), and
            # a concept in another style is.
            label=concept * len(self.sets) + style,
            name=self.name(i),
            license=f"{drawn.license}, {drawn.author}",
        )

    def captions(self, i: int) -> tuple[str, ...]:
        concept, style = self.cells[i]
        slug = self.concepts[concept]
        return emoji_captions(slug, self.sets[style].style, self.tags.get(slug, ()))

    def name(self, i: int) -> str:
        concept, style = self.cells[i]
        return f"{self.sets[style].prefix}/{self.concepts[concept]}"

    def identity(self) -> str:
        digest = hashlib.sha256(f"{self.size} {self._part} labels of cells {sorted(self.tags.items())}".encode())
        for i, (concept, style) in enumerate(self.cells):
            digest.update(f"\0{self.name(i)}\0{self.sets[style].icons[self.concepts[concept]]}".encode())
        return digest.hexdigest()[:16]


def emoji_captions(slug: str, style: str, tags: Sequence[str] = ()) -> tuple[str, ...]:
    """All wordings of a cell."""
    words = slug.replace("-", " ")
    plural = words.endswith("s") and not words.endswith(("ss", "us"))
    concept = words if plural else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    captions = tuple(t.format(concept=concept, style=style) for t in TEMPLATES)
    return (*captions, f"{concept} ({', '.join(tags[:3])}), {style} style") if tags else captions


def rasterize(svg: str, size: int) -> bytes:
    """Draws an SVG on white: a PNG of size x size pixels.

    Raises:
      BadExample: cause `svg_undrawable`.
      UserError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("drawing emoji needs resvg-py: pip install -e '.[emoji]'") from error
    try:
        # No fonts: letters of emoji are outlines.
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=svg, width=size, height=size, background=_BACKGROUND, skip_system_fonts=True
            )
        )
    except ValueError as error:
        raise BadExample("svg_undrawable", str(error)) from error
