"""Resizing, cropping and flipping of one image. Pure functions; randomness comes from a generator argument."""

import numpy as np
from PIL import Image

CROPS = ("center", "random", "patch", "none", "pad")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


def resize_and_crop(
    image: np.ndarray | Image.Image,
    resolution: int,
    *,
    crop: str = "center",
    filter: str = "lanczos",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Resizes and crops to a square.

    Args:
      image: uint8 [H, W, 3] or an RGB image of Pillow, larger or smaller than the result.
      resolution: side R of the result, in pixels.
      crop: 'center' or 'random' scale the short side to R and keep the middle, or any, R x R window of it.
        'patch' keeps any R x R window of the image as it is; an image with a shorter side is scaled up as by 'random'.
        'none' keeps the whole image and squeezes it to R x R; 'pad' keeps it and its aspect, on a white square.
      filter: a key of FILTERS. When shrinking, each of them except 'nearest' averages over the pixels it covers.
      rng: source of the window's position for 'random' and 'patch'; the other crops do not use it.

    Returns:
      uint8 [R, R, 3].

    Raises:
      ValueError: unknown crop or filter, 'random' or 'patch' without rng, or an image of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        # Image.fromarray takes other shapes and dtypes too, as images of other modes.
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if filter not in FILTERS:
        raise ValueError(f"unknown filter {filter!r}; there are {', '.join(FILTERS)}")
    # Pillow orders sizes as (width, height), NumPy as [H, W].
    width, height = image.size
    side = min(height, width)
    if crop == "center":
        # Half pixels are allowed: resize() takes a fractional box.
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    elif crop in ("random", "patch"):
        if rng is None:
            raise ValueError(f"crop={crop!r} needs a generator")
        # A patch is not scaled: its pixels are those of the file.
        side = min(side, resolution) if crop == "patch" else side
        # The upper bound is exclusive: + 1 includes the last window.
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        box = (left, top, left + side, top + side)
    elif crop == "none":
        box = (0, 0, width, height)
    elif crop == "pad":
        return _pad_to_square(image, resolution, filter)
    else:
        raise ValueError(f"unknown crop {crop!r}; there are {', '.join(CROPS)}")
    # One call with a box: Pillow does not compute pixels outside the crop.
    return np.array(image.resize((resolution, resolution), FILTERS[filter], box=box))


def _pad_to_square(image: Image.Image, resolution: int, filter: str) -> np.ndarray:
    width, height = image.size
    scale = resolution / max(height, width)
    # A very long and thin image would round to no pixel at all.
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    # White, as decode_to_pil composes alpha over white.
    square = np.full((resolution, resolution, 3), 255, np.uint8)
    top, left = (resolution - inner[1]) // 2, (resolution - inner[0]) // 2
    square[top : top + inner[1], left : left + inner[0]] = np.array(image.resize(inner, FILTERS[filter]))
    return square


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors [H, W, 3] left to right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image
