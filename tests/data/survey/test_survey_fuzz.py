"""2,000 folders, metadata files and tables, each damaged by chance: nothing crashes, and no picture is left uncounted."""

import json
import os
import random
import shutil

import pytest

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.survey import file_names, survey_path
from tests.data.survey.folders import HEIC, LFS, PNG, coco, write_all, write_parquet

STEMS = ["a", "b", "c d", "é", "IMG_2023.05.00", "🐱", "0", "x[1]", "train", "metadata", "-", "a{b}"]
ENDINGS = [".png", ".PNG", ".jpg", ".tif", ".heic", ".svg", ".mp4", ".jpe", ".webp", ".CR2", ".avif", ".psd"]
CAPTIONS = [".txt", ".TXT", ".caption", ".captions", ".json", ".Txt"]
FOLDERS = [
    "",
    "",
    "train/",
    "val/",
    "train/cat/",
    "val/dog/",
    "0/",
    "10/",
    "2/",
    ".git/",
    "__MACOSX/",
    "a/b/c/",
    "images/",
]
TABLES = [
    "metadata.jsonl",
    "metadata.csv",
    "captions.json",
    "list.tsv",
    "annotations/captions_train2017.json",
    "meta.json",
]
STORED = [PNG, PNG, PNG, b"", HEIC, LFS, b"<html>", PNG[:20]]


def damage(data, rng):
    """Bytes with a few changes: cut, doubled, replaced, with a null or a byte that is not UTF-8."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randint(0, len(data))
        change = rng.choice([b"", b"\0", b"\xff\xfe", b'"', b"{", b"\n", b",", bytes(rng.randbytes(3)), b"[" * 2000])
        data[place : place + rng.choice([0, 1, 10, 1000])] = change
    return bytes(data)


def table_of(name, pictures, rng):
    rows = [{"file_name": p, "text": f"caption {i}"} for i, p in enumerate(pictures)]
    if "captions_" in name:
        data = json.dumps(coco(pictures))
    elif name.endswith(".jsonl"):
        data = "\n".join(map(json.dumps, rows))
    elif name.endswith(".json"):
        data = json.dumps(
            rng.choice([rows, dict.fromkeys(pictures, "text"), {p: {"caption": 1} for p in pictures}, 3, None])
        )
    else:
        tab = "\t" if name.endswith(".tsv") else ","
        data = f"file_name{tab}text\n" + "\n".join(f"{r['file_name']}{tab}{r['text']}" for r in rows)
    encoded = data.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    return damage(encoded, rng) if rng.random() < 0.5 else encoded


def write_mutant(root, rng):
    """A folder; returns how many files a person takes for pictures."""
    files = {}
    for _ in range(rng.randint(0, 12)):
        folder, stem = rng.choice(FOLDERS), rng.choice(STEMS)
        files[f"{folder}{stem}{rng.choice(ENDINGS)}"] = rng.choice(STORED)
        if rng.random() < 0.6:
            text = rng.choice(
                [b"a caption", b"", b"\xff", "ü".encode("utf-16"), b'{"caption": "x"}', b'{"caption": 3}']
            )
            files[f"{folder}{stem}{rng.choice(CAPTIONS)}"] = damage(text, rng) if rng.random() < 0.3 else text
    pictures = [n for n in files if file_names.is_picture_name(n)]
    for name in rng.sample(TABLES, rng.randint(0, 2)):
        folder = rng.choice(["", "train/"])
        files[folder + name] = table_of(name, pictures or ["gone.png"], rng)
    for name in rng.sample(["x.tar", "x.tgz", "data/0.tar", "config.json", "metrics.jsonl", "dataset_info.json"], 1):
        if rng.random() < 0.3:
            files[name] = rng.choice([b"", b"x" * 600, damage(bytes(2048), rng)])
    # A file cannot be a folder's name too.
    files = {n: data for n, data in files.items() if not any(other.startswith(n + "/") for other in files)}
    write_all(root, files)
    if rng.random() < 0.1:
        write_parquet(root / "metadata.parquet", file_name=["a.png"], text=["x"])
    if rng.random() < 0.2:
        os.symlink(rng.choice([".", "/nowhere", "link.png"]), root / "link.png")
    # A link to a folder is none, and its pictures are there already.
    return sum(file_names.is_picture_name(f) for _, _, names in os.walk(root) for f in names)


@pytest.mark.slow  # 2,000 folders: half a minute
def test_mutated_folders_crash_nothing_and_leave_no_picture_uncounted(tmp_path):
    read, refused = 0, []
    for seed in range(2000):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        root.mkdir()
        pictures = write_mutant(root, rng)
        condition = rng.choice(["text", "text", "class", "none"])
        captions = rng.choice(["required", "optional"])
        keys = rng.choice([(), (), ("text",), ("caption",)])
        # Named: a damaged tar or table beside pictures does not change the kind.
        data = DataConfig(path=str(root), source="folder", captions=captions, caption_keys=keys, max_bad_fraction=1.0)
        try:
            survey = survey_path(str(root), data, condition)
            counted = len(survey.contents.names) + sum(p.count for p in survey.passed_over.values())
            assert counted == pictures, f"seed {seed}: {counted} of {pictures}"
            assert all("\n" not in line for line in survey.lines())
            source = make_source(data, condition=condition, surveys={str(root): survey})
            assert len(source) == len(survey.contents.names)
            for i in range(len(source)):
                try:
                    record = source[i]
                    assert all(isinstance(c, str) and c for c in record.captions)
                except BadExample:
                    continue
            read += 1
        except UserError as error:
            refused.append(str(error))
        # The kind is found without a crash too.
        try:
            survey_path(str(root), DataConfig(), condition)
        except UserError as error:
            refused.append(str(error))
        shutil.rmtree(root)
    # Most can be read: the mutants are not all beyond reading.
    assert read > 1000
    assert len(refused) > 50
    assert all(len(message.splitlines()) == 1 for message in refused)
