"""Writes folders as people have them, from a few stored pictures."""

import base64
import json

# 1 px pictures, stored: encoding thousands of them takes longer than the tests.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def write(root, **files):
    """Writes files below a folder: {path: text, bytes, or anything for JSON}; "a.png" takes a picture for None."""
    return write_all(root, files)


def write_all(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = PNG
        elif not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def coco(names, wordings=2):
    """COCO's captions of pictures."""
    return {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": f"{name}, wording {k}"}
            for i, name in enumerate(names)
            for k in range(wordings)
        ],
    }


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
