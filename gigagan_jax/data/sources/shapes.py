"""Drawn scenes with captions: what a model was asked for can be read back from the pixels (evaluation/shapes.py).

Example `i` is drawn from (data.shapes.seed, i) alone.
"""

import dataclasses
import hashlib

import numpy as np

from gigagan_jax.config import ShapesConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import Record
from gigagan_jax.data.source import Source
from gigagan_jax.data.sources.shapes_drawing import draw_scene
from gigagan_jax.data.sources.shapes_scenes import (
    ALL_PAIRS,
    COLORS,
    COUNTS,
    HELD_OUT,
    MATERIALS,
    SEEN,
    SHAPES,
    Scene,
    random_scene,
)


class ShapesSource(Source):
    """Drawn scenes: uint8 [side, side, 3], three or four captions each. The label is the pair of shape and color of the
    first object, an index of `classes`.

    Raises:
      UserError: a setting is out of its range.
    """

    classes = tuple(f"{color} {shape}" for shape, color in ALL_PAIRS)

    def __init__(self, settings: ShapesConfig):
        if not 1 <= settings.max_objects <= len(COUNTS):
            raise UserError(
                f"config.data.shapes.max_objects={settings.max_objects} must be 1 to {len(COUNTS)}: "
                "scenes have no more objects"
            )
        if not 16 <= settings.side <= 256:
            raise UserError(f"config.data.shapes.side={settings.side} must be 16 to 256 pixels")
        if settings.examples < 1:
            raise UserError(f"config.data.shapes.examples={settings.examples} must be positive")
        if settings.seed < 0:
            raise UserError(f"config.data.shapes.seed={settings.seed} must not be negative")
        self._settings = settings

    def __len__(self) -> int:
        return self._settings.examples

    def scene(self, i: int) -> Scene:
        """The scene of example `i`."""
        s = self._settings
        pairs = SEEN if s.held_out else ALL_PAIRS
        return random_scene(np.random.default_rng((s.seed, i)), s.max_objects, pairs)

    def read(self, i: int) -> Record:
        scene = self.scene(i)
        first = scene.objects[0]
        return Record(
            image=draw_scene(scene, self._settings.side),
            captions=scene.captions(),
            label=ALL_PAIRS.index((first.shape, first.color)),
            name=self.name(i),
        )

    def captions(self, i: int) -> tuple[str, ...]:
        return self.scene(i).captions()

    def name(self, i: int) -> str:
        return f"shapes/{i:07d}"

    def identity(self) -> str:
        # The names say nothing of the pictures: settings and words do.
        facts = (dataclasses.astuple(self._settings), SHAPES, tuple(COLORS.items()), MATERIALS, HELD_OUT)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
