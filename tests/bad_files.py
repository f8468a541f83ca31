"""Real files of every kind that web data has, unusual and bad, and two tars of them."""

import tarfile

import numpy as np
from PIL import Image

from tests.img2dataset import add_member, encoded, pieces


def photograph():
    return next(pieces())[1]


def grey_ramp():
    return np.repeat(np.arange(0, 65536, 1024, dtype=np.uint16)[None, :], 48, axis=0)


def good_files():
    """Images of unusual kinds, with the pixels that they stand for (None: any) and how far off those may be."""
    image = photograph()
    rotated = Image.fromarray(image)
    exif = rotated.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    other = Image.fromarray(255 - image)
    alpha = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])
    wide = Image.fromarray(grey_ramp())
    frames = {"save_all": True, "append_images": [other]}
    return {
        "cmyk.jpg": (encoded(Image.fromarray(image).convert("CMYK"), quality=95), image, 40),
        "sixteen.png": (encoded(wide, "PNG"), np.repeat((grey_ramp() // 257)[..., None], 3, 2), 1),
        "animated.webp": (encoded(Image.fromarray(image), "WEBP", lossless=True, **frames), image, 0),
        "animated_too.gif": (encoded(Image.fromarray(image).quantize(), "GIF", **frames), None, 0),
        "alpha.png": (encoded(Image.fromarray(alpha), "PNG"), np.full_like(image, 255), 0),
        "rotated.jpg": (encoded(rotated, quality=95, exif=exif), np.rot90(image, -1), 60),
        "grey.jpg": (encoded(Image.fromarray(image).convert("L")), None, 0),
        "palette.png": (encoded(Image.fromarray(image).quantize(), "PNG"), None, 0),
        "text_is_no_jpeg.jpg": (encoded(image, "PNG"), image, 0),  # a PNG by another name
    }


def bad_members():
    """key -> (members of the example, cause)."""
    jpeg = encoded(photograph())
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    caption = b"a caption"
    return {
        "truncated": ({"jpg": jpeg[: len(jpeg) // 2], "txt": caption}, "image_undecodable"),
        "zero": ({"jpg": b"", "txt": caption}, "image_empty"),
        "text": ({"jpg": b"<html>404 Not Found</html>", "txt": caption}, "image_undecodable"),
        "bomb": ({"png": bomb, "txt": caption}, "decompression_bomb"),
        "silent": ({"jpg": jpeg}, "caption_missing"),
        "blank": ({"jpg": jpeg, "txt": b"  \n\n"}, "caption_empty"),
        "latin": ({"jpg": jpeg, "txt": "café".encode("latin-1")}, "caption_undecodable"),
        "imageless": ({"txt": caption, "json": b"{}"}, "image_missing"),
        "../escape": ({"jpg": jpeg, "txt": caption}, "unsafe_name"),
        "/absolute": ({"jpg": jpeg, "txt": caption}, "unsafe_name"),
    }


def write_bad_tars(folder):
    """00000.tar: unusual and bad examples, one after the other; 00001.tar: good ones, cut short in the fourth."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, (data, _, _) in good_files().items():
            add_member(tar, name, data)
            add_member(tar, name.rpartition(".")[0] + ".txt", b"good")
        for key, (members, _) in bad_members().items():
            for suffix, data in members.items():
                add_member(tar, f"{key}.{suffix}", data)
    with tarfile.open(folder / "00001.tar", "w") as tar:
        for i, (caption, image) in zip(range(6), pieces(), strict=False):
            add_member(tar, f"{i:09d}.jpg", encoded(image))
            add_member(tar, f"{i:09d}.txt", caption.encode())
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: whole.index(b"000000003.txt") - 1700])
    return folder


def expected():
    """Cause of each bad example of `write_bad_tars`, by its name."""
    bad = {f"00000.tar/{key}": cause for key, (_, cause) in bad_members().items()}
    return bad | {"00001.tar/000000003": "tar_truncated"}
