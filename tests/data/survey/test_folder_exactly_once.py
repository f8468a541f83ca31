"""Folders with captions of every kind and with classes: each example once an epoch, on any hosts, across a resume."""

import collections
import json

import numpy as np
import pytest

from gigagan_jax.config import DataConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.pipeline import build_pipeline
from gigagan_jax.data.sources import make_source
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.data.small_source import text_of
from tests.data.survey.folders import coco, write_all, write_parquet

N = 24
NAMES = [f"{i:02d}.png" for i in range(N)]
SAID = {name: f"this is {name}" for name in NAMES}
ROWS = [{"file_name": name, "text": SAID[name]} for name in NAMES]


def write_coco(root):
    write_all(root, {f"train2017/{name}": None for name in NAMES})
    data = coco(NAMES, 1)
    for image, annotation in zip(data["images"], data["annotations"], strict=True):
        annotation["caption"] = SAID[image["file_name"]]
    write_all(root, {"annotations/captions_train2017.json": data})


KINDS = {
    "caption": lambda root: write_all(root, {n[:-4] + ".caption": SAID[n] for n in NAMES}),
    "upper": lambda root: write_all(root, {n[:-4] + ".TXT": SAID[n] for n in NAMES}),
    "double": lambda root: write_all(root, {n + ".txt": SAID[n].encode("utf-16") for n in NAMES}),
    "json": lambda root: write_all(root, {n[:-4] + ".json": {"caption": SAID[n]} for n in NAMES}),
    "jsonl": lambda root: write_all(root, {"metadata.jsonl": "\n".join(map(json.dumps, ROWS))}),
    "csv": lambda root: write_all(
        root, {"metadata.csv": "file_name,text\n" + "\n".join(f"{n},{SAID[n]}" for n in NAMES)}
    ),
    "parquet": lambda root: write_parquet(root / "metadata.parquet", file_name=NAMES, text=[SAID[n] for n in NAMES]),
    "coco": write_coco,
}


def open_kind(root, kind, **fields):
    if kind != "coco":
        write_all(root, dict.fromkeys(NAMES))
    KINDS[kind](root)
    return make_source(DataConfig(path=str(root), **fields))


def read_batches(source, hosts, batches, state=None, batch_size=4, **options):
    """(examples of each host, state)"""
    seen, state_after = [], None
    for host in range(hosts):
        with build_pipeline(
            source,
            resolution=8,
            batch_size=batch_size,
            seed=0,
            tokenizer=ByteTokenizer(40),
            process_index=host,
            process_count=hosts,
            num_threads=0,
            **options,
        ) as data:
            if state is not None:
                data.restore(state)
            for _ in range(batches):
                batch = next(data)
                seen += zip(batch["index"].tolist(), map(text_of, batch["tokens"]), strict=True)
            state_after = data.state()
    return seen, state_after


@pytest.mark.parametrize("kind", KINDS)
def test_each_picture_comes_once_with_its_caption(tmp_path, kind):
    source = open_kind(tmp_path, kind)
    for hosts, then in ((1, 4), (2, 1), (4, 2)):
        stop = int(np.random.default_rng(hosts).integers(1, 5))
        before, state = read_batches(source, hosts, stop)
        rest, _ = read_batches(source, then, 6 - stop, state)
        assert collections.Counter(i for i, _ in before + rest) == dict.fromkeys(range(N), 1)
        for i, text in before + rest:
            assert text == SAID[source.name(i).rpartition("/")[2]]


@pytest.mark.parametrize("kind", ["caption", "double", "json", "jsonl", "parquet", "coco"])
def test_a_picture_without_a_caption_is_replaced_and_counted(tmp_path, kind):
    source = open_kind(tmp_path, kind)
    # The caption of one picture is taken away, and the folder opened anew.
    if kind in ("caption", "double", "json"):
        (tmp_path / {"caption": "05.caption", "double": "05.png.txt", "json": "05.json"}[kind]).unlink()
    elif kind == "jsonl":
        write_all(tmp_path, {"metadata.jsonl": "\n".join(json.dumps(r) for r in ROWS if r["file_name"] != NAMES[5])})
    elif kind == "parquet":
        texts = [SAID[n] if n != NAMES[5] else None for n in NAMES]
        write_parquet(tmp_path / "metadata.parquet", file_name=NAMES, text=texts)
    else:
        path = tmp_path / "annotations" / "captions_train2017.json"
        data = json.loads(path.read_text())
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 5]
        path.write_text(json.dumps(data))
    again = make_source(DataConfig(path=str(tmp_path)))
    # Names alone are the identity: a caption that is mended later does not end the run.
    assert again.identity() == source.identity()
    seen, state = read_batches(again, 1, 6, max_bad_fraction=0.05)
    assert state["quarantine"] == {"tried": N, "causes": {"caption_missing": 1}}
    assert 5 not in {i for i, _ in seen}
    with pytest.raises(UserError, match="1 of 24 images have no caption, more than"):
        make_source(DataConfig(path=str(tmp_path), max_bad_fraction=0.01))
    assert make_source(DataConfig(path=str(tmp_path), captions="optional")).captions(5) == ()


def test_classes_by_number_below_a_split(tmp_path):
    names = [f"{split}/{c}/{i}.png" for split in ("train", "val") for c in range(12) for i in range(2)]
    write_all(tmp_path, dict.fromkeys(names))
    source = make_source(DataConfig(path=str(tmp_path)), condition="class")
    for hosts in (1, 2, 4):
        before, state = read_batches(source, hosts, 2)
        rest, _ = read_batches(source, 1, 4, state)
        assert collections.Counter(i for i, _ in before + rest) == dict.fromkeys(range(N), 1)
    assert all(source.read(i).label == int(source.name(i).split("/")[0]) for i in range(N))
