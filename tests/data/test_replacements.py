"""Bad examples: the next good one replaces each, the quarantine counts them, and too many end the run."""

import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.folder import FolderSource
from tests.data.small_source import N, SmallSource, take_batches, text_of


@pytest.fixture
def photo_folder(tmp_path):
    """Ten PNG with captions, number 3 truncated."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(10):
        image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    # Half a PNG has a good header: only decoding finds the damage.
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])
    return folder


def test_a_truncated_png_is_replaced_counted_and_named_once(make_pipeline, photo_folder, tmp_path, caplog):
    # The folder does not exist yet.
    listed = tmp_path / "lists" / "quarantine.jsonl"
    options = {"batch_size": 10, "caption_dropout": 0, "quarantine_path": listed}
    pipeline = make_pipeline(FolderSource(photo_folder), **options)
    with caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(pipeline, 3))
    for batch in batches:
        # 4 comes twice: for itself and for 3.
        assert sorted(batch["index"]) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
        for index, tokens in zip(batch["index"], batch["tokens"], strict=True):
            assert text_of(tokens) == f"number {index}"
    assert pipeline.state()["quarantine"] == {"tried": 30, "causes": {"image_undecodable": 3}}
    assert pipeline.quarantine.names == {"3.png": "image_undecodable"}
    assert len(caplog.records) == 1
    assert "3.png" in caplog.text
    # A second run does not list it again.
    take_batches(make_pipeline(FolderSource(photo_folder), **options), 2)
    assert [json.loads(line) for line in listed.read_text().splitlines()] == [
        {"name": "3.png", "cause": "image_undecodable"}
    ]


def test_hosts_keep_separate_lists_and_torn_lines_are_survived(make_pipeline, photo_folder, tmp_path):
    listed = tmp_path / "bad.jsonl"
    # A run killed while it wrote left half a line.
    listed.write_text('{"name": "0.p')
    for host in range(2):
        take_batches(
            make_pipeline(FolderSource(photo_folder), process_index=host, process_count=2, quarantine_path=listed), 10
        )
    assert listed.read_text().splitlines()[1:] == ['{"name": "3.png", "cause": "image_undecodable"}']
    # Host 1 writes a file of its own.
    assert (tmp_path / "bad.1.jsonl").read_text() == '{"name": "3.png", "cause": "image_undecodable"}\n'


def test_replacement_is_the_next_good_one_in_source_order_around_the_end(make_pipeline):
    source = SmallSource(10, bad={8: "torn", 9: "broken", 0: "broken"})
    pipeline = make_pipeline(source, batch_size=10, max_bad_fraction=0.3, num_threads=0)
    # 8, 9 and 0 are all replaced by 1, the next good one.
    assert sorted(take_batches(pipeline, 1)["index"]) == [1, 1, 1, 1, 2, 3, 4, 5, 6, 7]
    assert pipeline.state()["quarantine"]["causes"] == {"broken": 2, "torn": 1}
    take_batches(pipeline, 10)
    assert [source.reads.count(i) for i in (8, 9, 0)] == [1, 1, 1], "what is known to be bad is not decoded again"


def test_counters_follow_the_consumer_not_the_prefetching(make_pipeline):
    pipeline = make_pipeline(SmallSource(bad={1: "broken"}), batch_size=1, num_threads=4, prefetch_examples=64)
    # 64 examples are read ahead, and must not count yet.
    for taken in range(1, 2 * N + 1):
        next(pipeline)
        assert pipeline.state()["quarantine"]["tried"] == taken
    assert pipeline.state()["quarantine"]["causes"] == {"broken": 2}


@pytest.mark.parametrize("threads", [0, 4])
def test_all_bad_is_an_error(make_pipeline, photo_folder, threads):
    for image in photo_folder.glob("*.png"):
        # Empty files fail without a decoder.
        image.write_bytes(b"")
    pipeline = make_pipeline(FolderSource(photo_folder), num_threads=threads, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"all 10 are bad \(10 image_empty\); the first is \d\.png: 0 bytes"):
        next(pipeline)


def test_all_bad_in_a_large_source_is_found_early(make_pipeline):
    source = SmallSource(10**6, bad=dict.fromkeys(range(10**6), "gone"))
    pipeline = make_pipeline(source, num_threads=0)
    with pytest.raises(UserError, match="10000 in a row of 1000000 are bad"):
        next(pipeline)
    # _MAX_BAD_IN_A_ROW of data/reader.py.
    assert len(source.reads) == 10_000


def test_too_many_bad_is_an_error_but_not_before_enough_were_tried(make_pipeline):
    # Every second example: replacements are always found at once.
    source = SmallSource(400, bad=dict.fromkeys(range(0, 400, 2), "broken"))
    pipeline = make_pipeline(source, batch_size=10, max_bad_fraction=0.2)
    # 90 examples are fewer than MIN_TRIED of data/quarantine.py.
    take_batches(pipeline, 9)
    with pytest.raises(UserError, match=r"of 100 examples tried are bad, more than max_bad_fraction=0\.2"):
        next(pipeline)
    take_batches(make_pipeline(source, batch_size=10, max_bad_fraction=0.7), 80)


def test_a_few_bad_ones_do_not_end_a_small_set_early(make_pipeline):
    pipeline = make_pipeline(SmallSource(10, bad={2: "broken"}), batch_size=1, max_bad_fraction=0.1)
    take_batches(pipeline, 100)
    strict = make_pipeline(SmallSource(10, bad={2: "broken"}), batch_size=1, max_bad_fraction=0.09)
    # A source of fewer than MIN_TRIED examples is judged after one epoch.
    take_batches(strict, 9)
    with pytest.raises(UserError, match="1 of 10 examples tried are bad"):
        next(strict)


def test_other_errors_of_a_source_are_not_swallowed(make_pipeline):
    class BrokenSource(SmallSource):
        def read(self, i):
            raise RuntimeError("a mistake in the source")

    with pytest.raises(RuntimeError, match="a mistake in the source"):
        next(make_pipeline(BrokenSource()))


def test_an_example_of_no_class_of_the_run_is_bad(make_pipeline):
    pipeline = make_pipeline(SmallSource(), num_classes=8, batch_size=N, max_bad_fraction=0.5)
    # Labels are 0 to 9.
    assert set(take_batches(pipeline, 2)["label"]) == set(range(8))
    assert pipeline.quarantine.causes.keys() == {"label_out_of_range"}
    unknown = SmallSource()
    unknown.read = lambda i: dataclasses.replace(SmallSource().read(i), label=-1)
    with pytest.raises(UserError, match=r"label_missing.*it has no class"):
        next(make_pipeline(unknown, num_classes=8, num_threads=0))
