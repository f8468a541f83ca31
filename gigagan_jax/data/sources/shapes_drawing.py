"""Drawing of scenes: signed distances to outlines, filled with one pixel of softness."""

import numpy as np

from gigagan_jax.data.sources.shapes_scenes import Scene

# What a dark stripe and the dark end of a shiny object keep of their color.
_DARK_STRIPE = 0.4
_DARK_END = 0.55
# Share of white at the light end of a shiny object.
_LIGHT_END = 0.75
# Radii of the circle around a shape in units of its own outline: shapes of one size look alike in size.
_STAR_INNER = 0.45
_CROSS_ARM = 0.34


def outline_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1 around the origin, negative inside; y grows downwards.

    Near corners it is a bound of the distance: good for a fill of one pixel's softness.

    Raises:
      ValueError: an unknown shape.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "triangle":
        # Three half planes, moved down: the middle of its height is nearer to the origin than its centre.
        low = y - 0.1
        return np.maximum(low, 0.866 * np.abs(x) - 0.5 * low) - 0.5
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - _CROSS_ARM, b - 0.95), np.maximum(a - 0.95, b - _CROSS_ARM))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.25
    if shape == "star":
        return _star_distance(x, y)
    raise ValueError(f"unknown shape {shape!r}")


def _star_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of a star with five points, one of them up."""
    half = np.pi / 5
    length = np.hypot(x, y)
    # Folded into one half of a point: its edge is then one line.
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    u, v = length * np.cos(angle), length * np.sin(angle)
    # The edge, from the tip (1, 0) to the inner corner.
    inner_u, inner_v = _STAR_INNER * np.cos(half), _STAR_INNER * np.sin(half)
    edge_u, edge_v = inner_u - 1.0, inner_v
    norm = np.hypot(edge_u, edge_v)
    return ((u - 1.0) * -edge_v + v * edge_u) / -norm


def coverage(
    shape: str, pixels: tuple[np.ndarray, np.ndarray], places: np.ndarray, softness: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each pixel a shape covers, for several places of it.

    Args:
      shape: a word of SHAPES.
      pixels: ([W], [H]) x and y of the pixels' centres.
      places: [K, 3], x, y and radius, in pixels.
      softness: width of the edge in pixels; 1 fills a pixel by its covered area.

    Returns:
      (coverage [K, H, W] in 0..1, x and y of the pixels [K, H, W] in radii from the centre)
    """
    x, y, radius = (np.asarray(column, np.float32)[:, None, None] for column in np.asarray(places).T)
    u = (np.asarray(pixels[0], np.float32)[None, None, :] - x) / radius
    v = (np.asarray(pixels[1], np.float32)[None, :, None] - y) / radius
    u, v = np.broadcast_arrays(u, v)
    return np.clip(0.5 - outline_distance(shape, u, v) * (radius / softness), 0, 1), u, v


def tone(material: str, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray | float, np.ndarray | float]:
    """(share of white, factor of the object's color) of each pixel of a material; u and v as `coverage` returns them.

    Raises:
      ValueError: an unknown material.
    """
    if material == "plain":
        return 0.0, 1.0
    if material == "striped":
        # Two and a half stripes across, without an edge: no finer than a pixel at 16 px.
        light = 0.5 + 0.5 * np.cos(2 * np.pi * 1.1 * v)
        return 0.0, _DARK_STRIPE + (1 - _DARK_STRIPE) * light
    if material == "shiny":
        # Light comes from the upper left.
        along = np.clip(0.5 - 0.5 * (u + v), 0, 1)
        white = _LIGHT_END * np.clip(2 * along - 1, 0, 1)
        return white, (_DARK_END + (1 - _DARK_END) * np.clip(2 * along, 0, 1)) * (1 - white)
    raise ValueError(f"unknown material {material!r}")


def draw_scene(scene: Scene, side: int) -> np.ndarray:
    """Draws a scene: uint8 [side, side, 3]."""
    image = np.full((side, side, 3), float(scene.background), np.float32)
    for o in scene.objects:
        x, y, radius = o.x * side, o.y * side, o.radius * side
        # Only the object's own window: a scene has three of them.
        columns, rows = (slice(max(0, int(c - radius - 2)), min(side, int(c + radius + 3))) for c in (x, y))
        pixels = (np.arange(side)[columns] + 0.5, np.arange(side)[rows] + 0.5)
        covered, u, v = (a[0] for a in coverage(o.shape, pixels, np.array([[x, y, radius]])))
        white, factor = tone(o.material, u, v)
        filled = np.asarray(white * 255.0)[..., None] + np.asarray(factor)[..., None] * np.asarray(o.rgb, np.float32)
        window = image[rows, columns]
        window += covered[..., None] * (filled - window)
    return np.rint(image).clip(0, 255).astype(np.uint8)
