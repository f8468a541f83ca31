"""A folder of small photographs, some of them broken."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

COUNT = 30
BAD = {"007.jpg": "image_empty", "011.jpg": "image_undecodable", "023.jpg": "image_undecodable"}  # the last: cut short


def write_photos(folder):
    """COUNT pieces of scikit-learn's photographs in five formats, one to three captions each; those in BAD are broken."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(COUNT):
        height, width = (int(n) for n in rng.integers(20, 120, 2))
        piece = Image.fromarray(photographs[i % 2][40 : 40 + height, 60 : 60 + width])
        suffix = ("jpg", "jpg", "png", "webp", "gif", "bmp")[i % 6]
        suffix = "jpg" if f"{i:03d}.jpg" in BAD else suffix
        piece.save(folder / f"{i:03d}.{suffix}")
        captions = [f"a piece of picture {i}, in words number {j}" for j in range(1 + i % 3)]
        (folder / f"{i:03d}.txt").write_text("\n".join(captions))
    (folder / "007.jpg").write_bytes(b"")
    (folder / "011.jpg").write_bytes(b"this is no image")
    (folder / "023.jpg").write_bytes((folder / "023.jpg").read_bytes()[:-200])
    return folder
