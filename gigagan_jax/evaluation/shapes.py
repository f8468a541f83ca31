"""Evaluates models of drawn shapes: which of the attributes that a caption names the picture shows, and how varied it is.

The reader (shapes_reader.py) says what objects a picture has; this module compares them with what was asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from gigagan_jax.data.sources.shapes_drawing import draw_scene
from gigagan_jax.data.sources.shapes_scenes import (
    HELD_OUT,
    SCENE_RADII,
    SEEN,
    SHAPES,
    SINGLE_RADII,
    SIZES,
    Drawn,
    Scene,
    judged_scenes,
    relation_between,
)
from gigagan_jax.evaluation.fid import frechet_distance, gaussian_moments
from gigagan_jax.evaluation.shapes_reader import ReadObject, read_objects, to_lab

# Scenes that are judged at the end of a run: twelve of each pair of shape and color that is trained, 20 of each other one.
SEEN_SCENES = 12 * len(SEEN)
HELD_OUT_SCENES = 20 * len(HELD_OUT)
ATTRIBUTES = ("shape", "color", "size", "material")
# What `judge_scene` answers; "pair" is shape and color of every object, "all" is everything that the caption names.
QUESTIONS = (*ATTRIBUTES, "count", "relation", "pair", "all")


def size_word(radius: float, max_objects: int) -> str:
    """ "small" or "large": the nearer of the two ranges; radius is a share of the side."""
    radii = SINGLE_RADII if max_objects == 1 else SCENE_RADII
    middle = (radii[SIZES[0]][1] + radii[SIZES[1]][0]) / 2
    return SIZES[int(radius > middle)]


def judge_scene(objects: Sequence[ReadObject], scene: Scene, max_objects: int) -> dict[str, bool]:
    """Compares the objects of a picture with a scene.

    Args:
      objects: of `read_objects`, the largest first.
      scene: what the caption says.
      max_objects: of the data set: 1 has other sizes than 2 and 3.

    Returns:
      {question: answer}; an attribute is right if it is right for every object that was asked for. "relation" is there
      for pairs and trios only.
    """
    readable = [o for o in objects if o.readable]
    asked = scene.objects
    matched = _match(readable, asked, max_objects)
    right = [_right_attributes(o, a, max_objects) if o else dict.fromkeys(ATTRIBUTES, False) for o, a in matched]
    answers = {name: all(r[name] for r in right) for name in ATTRIBUTES}
    answers["pair"] = answers["shape"] and answers["color"]
    answers["count"] = len(readable) == len(asked)
    if scene.relation:
        (first, _), (second, _) = matched[:2]
        answers["relation"] = bool(
            first and second and relation_between(first.x - second.x, first.y - second.y) == scene.relation
        )
    answers["all"] = all(answers.values())
    return answers


def _right_attributes(read: ReadObject, asked: Drawn, max_objects: int) -> dict[str, bool]:
    return {
        "shape": read.shape == asked.shape,
        "color": read.color == asked.color,
        "size": size_word(read.radius, max_objects) == asked.size,
        "material": read.material == asked.material,
    }


def _match(
    objects: Sequence[ReadObject], asked: Sequence[Drawn], max_objects: int
) -> list[tuple[ReadObject | None, Drawn]]:
    """For each object that was asked for the one that is meant; None where the picture has too few.

    A single object is the largest. Several are matched so that as many attributes as possible are right: a caption does
    not say which of the objects in the picture is which.
    """
    candidates: list[ReadObject | None] = [*objects[: len(asked) if len(asked) == 1 else 4]]
    candidates += [None] * (len(asked) - len(candidates))

    def agreement(chosen: Sequence[ReadObject | None]) -> int:
        pairs = zip(chosen, asked, strict=True)
        return sum(sum(_right_attributes(o, a, max_objects).values()) for o, a in pairs if o)

    best = max(itertools.permutations(candidates, len(asked)), key=agreement)
    return list(zip(best, asked, strict=True))


@dataclasses.dataclass(frozen=True)
class ShapesReport:
    """The metrics of `ShapesJudge.judge_images`.

    Attributes:
      seen: {question: share of the pictures where the answer is right}, of pairs of shape and color that are trained.
      held_out: the same of pairs that no training picture has. NaN where nothing was asked.
      seen_shuffled, held_out_shuffled: the same, of pictures compared with each other's captions within their part: what a
        model that ignores captions gets.
      position_variance: variance of the largest object's place within a size, generated over drawn.
      radius_variance: variance of its radius, generated over drawn.
      size_variance: variance of its radius within a size, generated over drawn.
      caption_variance: variance of its place between two pictures of one caption, over drawn; NaN without a second set.
      frechet: distance of the reader's features, in units of their spread over drawn scenes.
      images: number of pictures.
    """

    seen: dict[str, float]
    held_out: dict[str, float]
    seen_shuffled: dict[str, float]
    held_out_shuffled: dict[str, float]
    position_variance: float
    radius_variance: float
    size_variance: float
    caption_variance: float
    frechet: float
    images: int

    def to_dict(self) -> dict[str, float]:
        """Flat, with names such as `seen/color`; without what was not asked."""
        parts = ("seen", "held_out", "seen_shuffled", "held_out_shuffled")
        values = {f"{part}/{name}": value for part in parts for name, value in getattr(self, part).items()}
        for name in ("position_variance", "radius_variance", "size_variance", "caption_variance", "frechet"):
            values[name] = getattr(self, name)
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def format_table(self) -> str:
        """Returns the report as text, one line for each question."""
        lines = [
            f"the judge read {self.images} pictures",
            f"{'right':<32}{'seen':>9}{'shuffled':>11}{'held out':>11}{'shuffled':>11}",
        ]
        titles = {"pair": "shape and color", "all": "everything in the caption"}
        for name in QUESTIONS:
            if np.isfinite(self.seen[name]):
                columns = (self.seen_shuffled, self.held_out, self.held_out_shuffled)
                shares = f"{self.seen[name]:>9.3f}" + "".join(f"{column[name]:>11.3f}" for column in columns)
                lines.append(f"  {titles.get(name, name):<30}{shares}")
        rows = [
            ("variance of the position, of drawn", self.position_variance),
            ("  between pictures of one caption", self.caption_variance),
            ("variance of the radius, of drawn", self.radius_variance),
            ("  within a size", self.size_variance),
            ("Frechet distance of features", self.frechet),
        ]
        lines += [f"{title:<35}{value:>6.2f}" for title, value in rows if np.isfinite(value)]
        return "\n".join(lines)


class ShapesJudge:
    """Asks for scenes and judges pictures of them.

    Args:
      max_objects: of the data set, 1 to 3.
      seen, held_out: scenes of each part.
      seed: of the scenes; none of them is in a training set.
    """

    def __init__(self, max_objects: int = 1, seen: int = SEEN_SCENES, held_out: int = HELD_OUT_SCENES, seed: int = 0):
        self.max_objects = max_objects
        asked = [*judged_scenes(seen, max_objects, SEEN, 2 * seed)]
        asked += judged_scenes(held_out, max_objects, HELD_OUT, 2 * seed + 1)
        self.scenes = [scene for scene, _ in asked]
        self.captions = [caption for _, caption in asked]
        self._seen = seen
        self._drawn: dict[int, list[list[ReadObject]]] = {}

    def judge_images(self, images: np.ndarray, again: np.ndarray | None = None) -> ShapesReport:
        """Compares pictures with what was asked for.

        Args:
          images: uint8 [N, R, R, 3], one for each of `self.captions`.
          again: the same captions drawn once more with other seeds.

        Raises:
          ValueError: another number of pictures, or another shape or dtype.
        """
        for pictures in (images, *(() if again is None else (again,))):
            if len(pictures) != len(self.scenes):
                raise ValueError(f"the judge asked for {len(self.scenes)} pictures, got {len(pictures)}")
        read = [read_objects(image) for image in images]
        drawn = self._read_drawn(images.shape[1])
        position, radius, size = self._variances(read, drawn)
        parts = {"seen": slice(0, self._seen), "held_out": slice(self._seen, None)}
        shares = {}
        for name, part in parts.items():
            objects, scenes = read[part], self.scenes[part]
            others = np.random.default_rng(0).permutation(len(scenes))
            shares[name] = share_right(self._answers(objects, scenes))
            shares[f"{name}_shuffled"] = share_right(self._answers(objects, [scenes[i] for i in others]))
        return ShapesReport(
            **shares,
            position_variance=position,
            radius_variance=radius,
            size_variance=size,
            caption_variance=float("nan") if again is None else _caption_variance(read, again, drawn),
            frechet=_frechet(read, drawn),
            images=len(images),
        )

    def _read_drawn(self, side: int) -> list[list[ReadObject]]:
        """What the reader says of the scenes as they are drawn."""
        # Kept: it is the same for every set of pictures.
        if side not in self._drawn:
            self._drawn[side] = [read_objects(draw_scene(scene, side)) for scene in self.scenes]
        return self._drawn[side]

    def _answers(self, read: Sequence[Sequence[ReadObject]], scenes: Sequence[Scene]) -> list[dict[str, bool]]:
        return [judge_scene(o, s, self.max_objects) for o, s in zip(read, scenes, strict=True)]

    def _variances(self, read: list[list[ReadObject]], drawn: list[list[ReadObject]]) -> tuple[float, float, float]:
        """Generated over drawn, of the largest object: position (mean over sizes), radius, radius (mean over sizes)."""
        # By the size that was read: one object of the wrong size varies more than all radii of a size.
        largest = [[o[0] for o in objects if o and o[0].readable] for objects in (read, drawn)]
        ratios = []
        for size in SIZES:
            generated, real = (
                np.array([(o.x, o.y, o.radius) for o in part if size_word(o.radius, self.max_objects) == size])
                for part in largest
            )
            if len(generated) < 2 or len(real) < 2:
                ratios.append((0.0, 0.0))
                continue
            a, b = generated.var(axis=0, ddof=1), real.var(axis=0, ddof=1)
            ratios.append((a[:2].sum() / b[:2].sum(), a[2] / b[2]))
        position, radius_of_size = np.mean(ratios, axis=0)
        radii = [np.array([o.radius for o in part]) for part in largest]
        radius = radii[0].var(ddof=1) / radii[1].var(ddof=1) if min(map(len, radii)) > 1 else 0.0
        return float(position), float(radius), float(radius_of_size)


def _caption_variance(read: list[list[ReadObject]], again: np.ndarray, drawn: list[list[ReadObject]]) -> float:
    """Of the largest object's place: half the squared distance between two pictures of a caption, over drawn variance."""
    places = [(a[0], b[0]) for a, b in zip(read, map(read_objects, again), strict=True) if a and b]
    if not places:
        return float("nan")
    squares = [((a.x - b.x) ** 2 + (a.y - b.y) ** 2) / 2 for a, b in places]
    real = np.array([(o[0].x, o[0].y) for o in drawn if o]).var(axis=0, ddof=1).sum()
    return float(np.mean(squares) / real)


def share_right(answers: Sequence[dict[str, bool]]) -> dict[str, float]:
    """{question: share of right answers}, of several pictures; NaN for a question that none of them had."""
    asked = {name: [a[name] for a in answers if name in a] for name in QUESTIONS}
    return {name: float(np.mean(values)) if values else float("nan") for name, values in asked.items()}


def _features(objects: list[ReadObject]) -> np.ndarray:
    """[18] of a picture: number of objects, and place, radius, color and fits of the largest; zeros where there is none."""
    if not objects:
        return np.zeros(9 + len(SHAPES) + 3)
    o = objects[0]
    return np.concatenate(
        [[len(objects), o.x, o.y, o.radius, o.explained, 1.0], to_lab(o.rgb), o.by_shape, o.by_material]
    )


def _frechet(read: list[list[ReadObject]], drawn: list[list[ReadObject]]) -> float:
    real = np.stack([_features(o) for o in drawn])
    generated = np.stack([_features(o) for o in read])
    # Columns have units of their own. A floor: some columns do not vary over drawn scenes.
    scale = np.maximum(real.std(axis=0), 0.02)
    return frechet_distance(*gaussian_moments(generated / scale), *gaussian_moments(real / scale))
