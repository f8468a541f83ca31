"""Small data sets in the layouts of Hugging Face `datasets`, written by pyarrow alone."""

import json

import pyarrow as pa

from tests.parquet_files import make_picture

FEATURES = {
    "image": {"_type": "Image"},
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["cat", "dog", "fox"], "_type": "ClassLabel"},
}


def make_table(rows, features=True):
    """Columns image (struct of bytes and path), text and label."""
    table = pa.table(
        {
            "image": [{"bytes": make_picture(i), "path": f"{i}.png"} for i in rows],
            "text": [f"caption {i}" for i in rows],
            "label": pa.array([i % 3 for i in rows], pa.int64()),
        }
    )
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})} if features else None
    return table.replace_schema_metadata(metadata)


def write_arrow(path, table, batch=3, stream=True):
    """Writes a stream or a file for random access, in record batches of `batch` rows; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return str(path)


def save_split(folder, ranges, features=True, **state):
    """What `save_to_disk` writes for one split: a file for each range of rows."""
    names = [f"data-{k:05d}-of-{len(ranges):05d}.arrow" for k in range(len(ranges))]
    for name, rows in zip(names, ranges, strict=True):
        write_arrow(folder / name, make_table(rows, features))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def save_dict(folder, **splits):
    """What `save_to_disk` writes for a DatasetDict: {split: ranges of rows}."""
    for name, ranges in splits.items():
        save_split(folder / name, ranges)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder
