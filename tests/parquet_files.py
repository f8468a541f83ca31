"""Small Parquet files of images for tests."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gigagan_jax.data.example import BadExample


def make_picture(i):
    """PNG file of 5 x 4 pixels."""
    file = io.BytesIO()
    # The seed makes each picture recognizable.
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_table(path, columns, row_group_size=3, **options):
    """Writes a table; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **options)
    return str(path)


def make_columns(rows):
    return {
        "url": [f"https://example.org/{i}" for i in rows],
        "image": [make_picture(i) for i in rows],
        # Blanks around the text must be stripped.
        "caption": [f" caption {i} ü " for i in rows],
        # Row 4 has no label.
        "label": pa.array([i % 3 if i != 4 else None for i in rows], pa.int16()),
    }


def cause_of(read, i):
    with pytest.raises(BadExample) as error:
        read(i)
    return error.value.cause
