"""A data set as img2dataset writes it, from photographs that come with scikit-learn and scikit-image."""

import hashlib
import io
import json
import tarfile

import numpy as np
from PIL import Image


def pieces():
    """Endless pieces of the photographs inside scikit-learn and scikit-image, with what they show."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    shown = {"a temple": china, "a flower": flower}
    shown |= {
        "an astronaut": skimage.data.astronaut(),
        "a cup of coffee": skimage.data.coffee(),
        "a cat": skimage.data.cat(),
    }
    rng = np.random.default_rng(0)
    while True:
        for what, image in shown.items():
            height, width = (int(rng.integers(40, 90)) for _ in range(2))
            top, left = (int(rng.integers(n - m)) for n, m in zip(image.shape, (height, width), strict=False))
            yield f"part of {what}", image[top : top + height, left : left + width]


def encoded(image, format="JPEG", **options):
    """An image file's bytes."""
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format, **options)
    return out.getvalue()


def add_member(tar, name, data):
    """One regular file of a tar, as webdataset's writer makes it."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname, info.mtime = len(data), 0o444, "bigdata", "bigdata", 1.7e9
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder, shards=3, each=8):
    """img2dataset's output for webdataset: tars of .jpg, .json and .txt members, a .parquet and statistics beside each."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    parts = pieces()
    for shard in range(shards):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(each + 1):
                key, (caption, image) = f"{shard:05d}{i:04d}", next(parts)
                data = encoded(image, quality=95)
                row = {"url": f"https://example.com/{key}.jpg", "caption": f"{caption} {key}", "key": key}
                row |= {"status": "success", "error_message": None, "width": image.shape[1], "height": image.shape[0]}
                row |= {"original_width": 2 * image.shape[1], "original_height": 2 * image.shape[0], "exif": "{}"}
                row |= {"sha256": hashlib.sha256(data).hexdigest(), "similarity": 0.2 + 0.02 * i, "punsafe": 0.1 * i}
                row |= {"LANGUAGE": ("en", "de")[i % 2], "AESTHETIC_SCORE": None if i == 3 else 4.0 + 0.5 * i}
                if i == each:  # a download that failed: in the table, not in the tar
                    rows.append(row | {"status": "failed_to_download", "error_message": "404", "sha256": None})
                    continue
                rows.append(row)
                add_member(tar, f"{key}.jpg", data)
                add_member(tar, f"{key}.json", json.dumps(row, indent=4).encode())
                add_member(tar, f"{key}.txt", row["caption"].encode())
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        said = {"count": each + 1, "successes": each, "failed_to_download": 1, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(said))
    return folder
