"""Scenes and their captions: one to three objects with a shape, a color, a size, a material and a place.

A few pairs of shape and color are held out: no example of training has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Red, green and blue, 0 to 255, as they are drawn before jitter and material.
COLORS = {
    "red": (222, 40, 45),
    "orange": (245, 140, 25),
    "yellow": (240, 228, 60),
    "green": (50, 165, 65),
    "cyan": (70, 215, 225),
    "blue": (45, 80, 225),
    "purple": (135, 55, 190),
    "pink": (250, 150, 200),
}
MATERIALS = ("plain", "striped", "shiny")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("one", "two", "three")

# Every shape and every color is in a pair that is trained, and in at most two that are held out.
HELD_OUT = (
    ("circle", "purple"),
    ("square", "cyan"),
    ("triangle", "red"),
    ("star", "blue"),
    ("cross", "yellow"),
    ("ring", "green"),
    ("circle", "orange"),
    ("star", "pink"),
)
ALL_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
SEEN = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)

# Range of an object's radius by its size, as a share of the image's side.
SINGLE_RADII = {"small": (0.17, 0.22), "large": (0.30, 0.38)}
SCENE_RADII = {"small": (0.08, 0.10), "large": (0.145, 0.18)}
# Between objects and to the border, as a share of the side.
_MARGIN = 0.04
_BACKGROUND = (20, 55)
_JITTER = 10


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One object of a scene: what its caption says, and what only the picture shows.

    Attributes:
      shape, color, size, material: words of SHAPES, COLORS, SIZES and MATERIALS.
      x, y: centre, as shares of the side, from the upper left corner.
      radius: of the circle around the shape, as a share of the side.
      rgb: its color with jitter, 0 to 255.
    """

    shape: str
    color: str
    size: str
    material: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    def noun(self, plural: bool = False) -> str:
        """Size, material, color and shape: "small striped red circle". Plain objects have no word for it."""
        material = "" if self.material == "plain" else f"{self.material} "
        shape = ("crosses" if self.shape == "cross" else f"{self.shape}s") if plural else self.shape
        return f"{self.size} {material}{self.color} {shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a dark grey ground.

    Attributes:
      objects: one to three.
      kind: "single", "group" (equal objects), or "pair" and "trio": the first object has `relation` to the second.
      relation: one of RELATIONS, or empty.
      background: grey level, 0 to 255.
    """

    objects: tuple[Drawn, ...]
    kind: str
    relation: str
    background: int

    def captions(self) -> tuple[str, ...]:
        """All wordings of the scene; each of them names every attribute."""
        first = self.objects[0]
        if self.kind == "single":
            tail = first.size if first.material == "plain" else f"{first.size} and {first.material}"
            return (
                f"a {first.noun()}",
                f"one {first.noun()}",
                f"a {first.color} {first.shape}, {tail}",
                f"a {first.shape} that is {first.color}, {tail}",
            )
        if self.kind == "group":
            many = f"{COUNTS[len(self.objects) - 1]} {first.noun(plural=True)}"
            return (many, f"a picture of {many}", f"{many} on a dark ground")
        second = self.objects[1]
        opposite = RELATIONS[RELATIONS.index(self.relation) ^ 1]
        extra = f", and a {self.objects[2].noun()}" if self.kind == "trio" else ""
        return (
            f"a {first.noun()} {self.relation} a {second.noun()}{extra}",
            f"one {first.noun()} {self.relation} one {second.noun()}{extra}",
            f"a {second.noun()} {opposite} a {first.noun()}{extra}",
        )


def random_scene(rng: np.random.Generator, max_objects: int = 1, pairs: tuple[tuple[str, str], ...] = SEEN) -> Scene:
    """Draws a scene.

    Args:
      rng: generator of the draws.
      max_objects: 1 gives single objects; 2 and 3 give groups, pairs and trios too.
      pairs: the (shape, color) of its objects.
    """
    kinds = ("single", "group", "pair", "trio")[: max_objects + (max_objects > 1)]
    kind = kinds[int(rng.integers(len(kinds)))]
    background = int(rng.integers(*_BACKGROUND))
    if max_objects == 1:
        return Scene((_at(rng, _look(rng, pairs), SINGLE_RADII),), kind, "", background)
    while True:
        objects = _try_objects(rng, kind, max_objects, pairs)
        # Three large objects in a row do not always fit: another draw does.
        if objects is not None:
            relation = "" if kind in ("single", "group") else _relation_of(*objects[:2])
            return Scene(objects, kind, relation, background)


def _look(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...]) -> tuple[str, str, str, str]:
    shape, color = pairs[int(rng.integers(len(pairs)))]
    return shape, color, SIZES[int(rng.integers(2))], MATERIALS[int(rng.integers(len(MATERIALS)))]


def _at(rng: np.random.Generator, look: tuple[str, str, str, str], radii: dict[str, tuple[float, float]]) -> Drawn:
    shape, color, size, material = look
    radius = float(rng.uniform(*radii[size]))
    low = radius + _MARGIN
    x, y = float(rng.uniform(low, 1 - low)), float(rng.uniform(low, 1 - low))
    red, green, blue = (int(np.clip(v + rng.integers(-_JITTER, _JITTER + 1), 0, 255)) for v in COLORS[color])
    return Drawn(shape, color, size, material, x, y, radius, (red, green, blue))


def _try_objects(
    rng: np.random.Generator, kind: str, max_objects: int, pairs: tuple[tuple[str, str], ...]
) -> tuple[Drawn, ...] | None:
    """Objects that do not touch; None where they did not find room."""
    if kind == "single":
        looks = [_look(rng, pairs)]
    elif kind == "group":
        looks = [_look(rng, pairs)] * int(rng.integers(2, max_objects + 1))
    else:
        looks = [_look(rng, pairs)]
        while len(looks) < (2 if kind == "pair" else 3):
            other = _look(rng, pairs)
            # A caption that names two equal objects apart would have no answer.
            if other not in looks:
                looks.append(other)
    placed: list[Drawn] = []
    for look in looks:
        for _ in range(20):
            drawn = _at(rng, look, SCENE_RADII)
            if all(_apart(drawn, other) for other in placed):
                placed.append(drawn)
                break
        else:
            return None
    if kind in ("pair", "trio") and not _relation_of(*placed[:2]):
        return None
    return tuple(placed)


def _apart(a: Drawn, b: Drawn) -> bool:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius + _MARGIN) ** 2


def relation_between(dx: float, dy: float) -> str:
    """Where the first of two objects lies from the second, by the longer difference; (dx, dy) is first minus second."""
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _relation_of(a: Drawn, b: Drawn) -> str:
    dx, dy = a.x - b.x, a.y - b.y
    # On a diagonal two words would be true.
    if max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return ""
    return relation_between(dx, dy)


def judged_scenes(
    count: int, max_objects: int, pairs: tuple[tuple[str, str], ...], seed: int = 0
) -> Iterator[tuple[Scene, str]]:
    """Yields `count` scenes with a caption each; the pairs come in turn, the wordings too."""
    for i in range(count):
        # A third word: the seeds of training sets have two, and NumPy reads a missing word as 0.
        rng = np.random.default_rng((seed, i, 1))
        scene = random_scene(rng, max_objects, (pairs[i % len(pairs)],) if max_objects == 1 else pairs)
        captions = scene.captions()
        yield scene, captions[(i // len(pairs)) % len(captions)]
