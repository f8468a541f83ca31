"""Differentiable augmentation: its names, what a config may ask for, and the choice by the size of the data set."""

import dataclasses
from typing import Any

from gigagan_jax.config.config import Config
from gigagan_jax.core.errors import UserError

# In the order in which training/diff_augment.py applies them.
AUGMENTATIONS = ("color", "translation", "cutout")
AUTOMATIC = "auto"
# Images below which D learns them by heart. Zhao et al. (2020) gain on 50,000 (CIFAR-10) and on parts of it, and little above.
FEW_IMAGES = 50_000


def check_augmentations(config: Any) -> None:
    """Raises UserError for a name that is no augmentation."""
    for where, names in (
        ("vision_aided.augment", config.vision_aided.augment),
        ("discriminator.augment", config.discriminator.augment),
    ):
        automatic = where == "discriminator.augment" and tuple(names) == (AUTOMATIC,)
        for name in () if automatic else names:
            if name not in AUGMENTATIONS:
                known = ", ".join(map(repr, AUGMENTATIONS))
                more = f"; ({AUTOMATIC!r},) alone decides by the size of the data set" if "disc" in where else ""
                raise UserError(f"config.{where}={name!r}: must be one of {known}{more}")


def with_augmentations(config: Config, images: int | None) -> Config:
    """Returns the config with `discriminator.augment=("auto",)` decided.

    Args:
      config: of a run.
      images: of the data set, as the run begins; None where there is no data, as in a dry run: few are assumed.
    """
    if tuple(config.discriminator.augment) != (AUTOMATIC,):
        return config
    names = AUGMENTATIONS if images is None or images < FEW_IMAGES else ()
    return dataclasses.replace(config, discriminator=dataclasses.replace(config.discriminator, augment=names))
