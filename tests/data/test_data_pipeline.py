"""The stream: what is in it must not depend on threads, hosts or resumes, and bad files must not end it."""

import itertools
import json
import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.pipeline import build
from gigagan_jax.data.source import Source, identity_of
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.data.sources.folder import FolderSource
from gigagan_jax.data.tokenizers import ByteTokenizer

N = 23


class SmallSource(Source):
    """N images that differ, of different sizes, three captions each; `bad` maps indices to causes."""

    def __init__(self, n=N, bad=None):
        self.n = n
        self.bad = bad or {}
        self.reads = []

    def __len__(self):
        return self.n

    def read(self, i):
        self.reads.append(i)
        if i in self.bad:
            raise BadExample(self.bad[i], "it says so")
        image = np.random.default_rng(i).integers(0, 256, (8 + i % 3, 12, 3), dtype=np.uint8)
        return Record(image, tuple(f"{i} in wording {j}" for j in range(3)), i % 10, self.name(i))

    def name(self, i):
        return f"small/{i}"

    def identity(self):
        return identity_of("small", map(self.name, range(self.n)))


@pytest.fixture
def make():
    """`build` with every kind of randomness switched on; closes what it made."""
    made = []

    def make(source=None, **options):
        defaults = {
            "resolution": 8,
            "batch_size": 8,
            "seed": 0,
            "tokenizer": ByteTokenizer(20),
            "crop": "random",
            "flip": True,
            "caption_dropout": 0.3,
            "num_threads": 3,
        }
        pipeline = build(SmallSource() if source is None else source, **(defaults | options))
        made.append(pipeline)
        return pipeline

    yield make
    for pipeline in made:
        pipeline.close()


def take(pipeline, batches):
    """The next batches as one, every array concatenated."""
    return join(list(itertools.islice(pipeline, batches)))


def join(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def text_of(tokens):
    return bytes((tokens[tokens > 2] - 3).astype(np.uint8)).decode()


def test_batches_have_the_promised_shapes(make):
    batch = next(make())
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "tokens": ((8, 20), "int32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int32"),
    }


def test_images_captions_and_labels_belong_to_their_index(make):
    source = DigitsSource()
    batch = next(make(source, batch_size=32, tokenizer=ByteTokenizer(48), crop="center", flip=False, caption_dropout=0))
    for image, tokens, label, index in zip(*(batch[k] for k in ("image", "tokens", "label", "index")), strict=True):
        np.testing.assert_array_equal(image, source[index].image)
        assert label == source[index].label
        assert text_of(tokens) in source[index].captions


@pytest.mark.parametrize("n", [1, 2, 23, 100])
def test_each_epoch_has_every_example_exactly_once_in_another_order(make, n):
    index = take(make(SmallSource(n), batch_size=1, num_threads=2), 4 * n)["index"].reshape(4, n)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(n), (4, 1)))
    if n > 2:
        assert len({tuple(epoch) for epoch in index}) == 4


def test_three_seeds_give_three_orders_and_one_seed_one(make):
    orders = [tuple(take(make(seed=seed), 6)["index"]) for seed in (0, 1, 2, 0)]
    assert len(set(orders)) == 3
    assert orders[0] == orders[3]


def test_neighbouring_seeds_share_no_epoch(make):
    epochs = [
        tuple(epoch) for seed in range(4) for epoch in take(make(seed=seed, batch_size=1), 4 * N)["index"].reshape(4, N)
    ]
    assert len(set(epochs)) == 16


def test_threads_and_prefetching_change_nothing(make):
    expected = take(make(num_threads=0), 10)
    assert_same(take(make(num_threads=1, prefetch_examples=1), 10), expected)
    assert_same(take(make(num_threads=7, prefetch_examples=50), 10), expected)


def test_another_process_draws_the_same(make):
    script = (
        "import hashlib, itertools\n"
        "from gigagan_jax.data.pipeline import build\n"
        "from gigagan_jax.data.sources.digits import DigitsSource\n"
        "from gigagan_jax.data.tokenizers import ByteTokenizer\n"
        "options = dict(resolution=6, batch_size=64, seed=7, tokenizer=ByteTokenizer(40), crop='random', flip=True,\n"
        "               caption_dropout=0.5, num_threads=2)\n"
        "digest = hashlib.sha256()\n"
        "with build(DigitsSource(), **options) as pipeline:\n"
        "    for batch in itertools.islice(pipeline, 3):\n"
        "        for key in sorted(batch):\n"
        "            digest.update(batch[key].tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300) for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert [run.stderr for run in runs] == ["", ""], "grain has something to say to the user"


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_make_the_same_global_batches(make, hosts):
    bad = {3: "broken", 4: "broken"}
    alone = list(itertools.islice(make(SmallSource(bad=bad)), 9))
    shards = [
        list(itertools.islice(make(SmallSource(bad=bad), process_index=i, process_count=hosts), 9))
        for i in range(hosts)
    ]
    for step, batch in enumerate(alone):
        assert_same(join([shard[step] for shard in shards]), batch)


def test_resume_equals_the_uninterrupted_stream(make):
    bad = {5: "broken"}
    whole = list(itertools.islice(make(SmallSource(bad=bad)), 30))
    for taken in (0, 1, 2, 13, 24):  # 24 * 8 is in the ninth epoch of 23.
        first = make(SmallSource(bad=bad))
        for _ in range(taken):
            next(first)
        state = json.loads(json.dumps(first.state()))
        assert state["examples_seen"] == 8 * taken
        second = make(SmallSource(bad=bad))
        next(second)  # Whatever was read before is forgotten.
        second.restore(state)
        assert second.state() == state
        assert_same(take(second, 30 - taken), join(whole[taken:]))
        third = make(SmallSource(bad=bad), start_example=state["examples_seen"])
        assert_same(take(third, 5), join(whole[taken : taken + 5]))


def test_the_state_after_a_resume_equals_that_of_the_uninterrupted_run(make):
    source = SmallSource(bad={5: "broken", 11: "torn"})
    whole = make(source)
    for _ in range(12):
        next(whole)
    first = make(source)
    for _ in range(5):
        next(first)
    second = make(source)
    second.restore(first.state())
    for _ in range(7):
        next(second)
    assert second.state() == whole.state()
    assert sum(whole.state()["quarantine"]["causes"].values()) > 4


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_resume_on_another_number_of_hosts(make, hosts):
    whole = list(itertools.islice(make(), 12))
    two = [make(process_index=i, process_count=2) for i in range(2)]
    for pipeline in two:
        take(pipeline, 5)
    states = [pipeline.state() for pipeline in two]
    assert states[0]["examples_seen"] == states[1]["examples_seen"] == 40
    resumed = [make(process_index=i, process_count=hosts) for i in range(hosts)]
    for pipeline in resumed:
        pipeline.restore(states[0])
    for step in range(5, 12):
        assert_same(join([next(pipeline) for pipeline in resumed]), whole[step])


def test_resume_with_another_batch_size_continues_the_same_stream(make):
    whole = take(make(), 15)
    first = make()
    take(first, 2)
    second = make(batch_size=12)
    second.restore(first.state())  # after 16 examples, which are no whole batches of 12
    rest = take(second, 8)
    assert_same(rest, {key: value[16:112] for key, value in whole.items()})
    assert second.state()["examples_seen"] == 112


def test_a_late_start_reads_nothing_before_it(make):
    source = SmallSource()
    pipeline = make(source, start_example=10**12 + 5, num_threads=0)
    next(pipeline)
    assert len(source.reads) == 8
    assert pipeline.state()["examples_seen"] == 10**12 + 13


def test_restore_refuses_another_source_or_seed(make):
    state = make().state()
    with pytest.raises(UserError, match="another data set"):
        make(SmallSource(N + 1)).restore(state)
    with pytest.raises(UserError, match=r"with seed=0, this run has seed=1"):
        make(seed=1).restore(state)
    with pytest.raises(UserError, match="cannot be read"):
        make().restore({"examples_seen": 3})
    with pytest.raises(UserError, match="cannot be read"):
        make().restore(state | {"quarantine": None})


def test_caption_dropout_rate_and_its_null_caption(make):
    null = ByteTokenizer(20).null()
    for rate in (0.0, 0.1, 1.0):
        tokens = take(make(caption_dropout=rate, batch_size=100), 15)["tokens"]
        dropped = (tokens == null).all(axis=1).mean()
        assert abs(dropped - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(tokens))


def test_all_captions_and_both_orientations_are_drawn(make):
    source = DigitsSource()
    batch = take(make(source, batch_size=500, tokenizer=ByteTokenizer(48), caption_dropout=0), 4)
    wordings = [source[i].captions.index(text_of(t)) for i, t in zip(batch["index"], batch["tokens"], strict=True)]
    assert min(np.bincount(wordings, minlength=8)) > 2000 / 8 * 0.7
    images = zip(batch["index"], batch["image"], strict=True)
    flipped = [np.array_equal(image, source[i].image[:, ::-1]) for i, image in images]
    assert 0.45 < np.mean(flipped) < 0.55


def test_captions_do_not_depend_on_how_images_are_cropped(make):
    tokens = [take(make(crop=crop, flip=flip), 5)["tokens"] for crop, flip in (("random", True), ("center", False))]
    np.testing.assert_array_equal(*tokens)


def test_augmentation_differs_from_epoch_to_epoch(make):
    stream = take(make(SmallSource(1), batch_size=1), 30)
    assert len({image.tobytes() for image in stream["image"]}) > 5
    assert len({tokens.tobytes() for tokens in stream["tokens"]}) == 4


# --- bad examples


@pytest.fixture
def folder(tmp_path):
    """Ten PNG with captions, number 3 truncated."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(10):
        image = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])
    return folder


def test_a_truncated_png_is_replaced_counted_and_named_once(make, folder, tmp_path, caplog):
    listed = tmp_path / "lists" / "quarantine.jsonl"
    options = {"batch_size": 10, "caption_dropout": 0, "quarantine_path": listed}
    pipeline = make(FolderSource(folder), **options)
    with caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(pipeline, 3))
    for batch in batches:
        assert sorted(batch["index"]) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
        for index, tokens in zip(batch["index"], batch["tokens"], strict=True):
            assert text_of(tokens) == f"number {index}"
    assert pipeline.state()["quarantine"] == {"tried": 30, "causes": {"image_undecodable": 3}}
    assert pipeline.quarantine.names == {"3.png": "image_undecodable"}
    assert len(caplog.records) == 1
    assert "3.png" in caplog.text
    take(make(FolderSource(folder), **options), 2)  # A second run does not list it a second time.
    assert [json.loads(line) for line in listed.read_text().splitlines()] == [
        {"name": "3.png", "cause": "image_undecodable"}
    ]


def test_hosts_keep_separate_lists_and_torn_lines_are_survived(make, folder, tmp_path):
    listed = tmp_path / "bad.jsonl"
    listed.write_text('{"name": "0.p')
    for host in range(2):
        take(make(FolderSource(folder), process_index=host, process_count=2, quarantine_path=listed), 10)
    assert listed.read_text().splitlines()[1:] == ['{"name": "3.png", "cause": "image_undecodable"}']
    assert (tmp_path / "bad.1.jsonl").read_text() == '{"name": "3.png", "cause": "image_undecodable"}\n'


def test_replacement_is_the_next_good_one_in_source_order_around_the_end(make):
    source = SmallSource(10, bad={8: "torn", 9: "broken", 0: "broken"})
    pipeline = make(source, batch_size=10, max_bad_fraction=0.3, num_threads=0)
    assert sorted(take(pipeline, 1)["index"]) == [1, 1, 1, 1, 2, 3, 4, 5, 6, 7]
    assert pipeline.state()["quarantine"]["causes"] == {"broken": 2, "torn": 1}
    take(pipeline, 10)
    assert [source.reads.count(i) for i in (8, 9, 0)] == [1, 1, 1], "what is known to be bad is not decoded again"


def test_counters_follow_the_consumer_not_the_prefetching(make):
    pipeline = make(SmallSource(bad={1: "broken"}), batch_size=1, num_threads=4, prefetch_examples=64)
    for taken in range(1, 2 * N + 1):
        next(pipeline)
        assert pipeline.state()["quarantine"]["tried"] == taken
    assert pipeline.state()["quarantine"]["causes"] == {"broken": 2}


@pytest.mark.parametrize("threads", [0, 4])
def test_all_bad_is_an_error(make, folder, threads):
    for image in folder.glob("*.png"):
        image.write_bytes(b"")
    pipeline = make(FolderSource(folder), num_threads=threads, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"all 10 are bad \(10 image_empty\); the first is \d\.png: 0 bytes"):
        next(pipeline)


def test_all_bad_in_a_large_source_is_found_early(make):
    source = SmallSource(10**6, bad=dict.fromkeys(range(10**6), "gone"))
    pipeline = make(source, num_threads=0)
    with pytest.raises(UserError, match="10000 in a row of 1000000 are bad"):
        next(pipeline)
    assert len(source.reads) == 10_000


def test_too_many_bad_is_an_error_but_not_before_enough_were_tried(make):
    source = SmallSource(400, bad=dict.fromkeys(range(0, 400, 2), "broken"))
    pipeline = make(source, batch_size=10, max_bad_fraction=0.2)
    take(pipeline, 9)
    with pytest.raises(UserError, match=r"of 100 examples tried are bad, more than max_bad_fraction=0\.2"):
        next(pipeline)
    take(make(source, batch_size=10, max_bad_fraction=0.7), 80)


def test_a_few_bad_ones_do_not_end_a_small_set_early(make):
    pipeline = make(SmallSource(10, bad={2: "broken"}), batch_size=1, max_bad_fraction=0.1)
    take(pipeline, 100)
    strict = make(SmallSource(10, bad={2: "broken"}), batch_size=1, max_bad_fraction=0.09)
    take(strict, 9)
    with pytest.raises(UserError, match="1 of 10 examples tried are bad"):
        next(strict)


def test_other_errors_of_a_source_are_not_swallowed(make):
    class Broken(SmallSource):
        def read(self, i):
            raise RuntimeError("a mistake in the source")

    with pytest.raises(RuntimeError, match="a mistake in the source"):
        next(make(Broken()))


# --- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "does not divide by the 4 hosts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"seed": -1}, "seed=-1"),
        ({"crop": "middle"}, "unknown crop 'middle'; there are center, random, none"),
        ({"resize_filter": "cubic"}, "unknown resize_filter 'cubic'; there are lanczos"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction=-0.1"),
        ({"start_example": -1}, "start_example=-1"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"resolution": 0}, "resolution=0"),
        ({"source": SmallSource(0)}, "the data set is empty"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_list_that_cannot_be_written_is_an_error(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the list of bad examples"):
        make(quarantine_path=tmp_path / "file" / "bad.jsonl")


def test_close_ends_the_threads(make):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    before = set(readers())
    pipeline = make(num_threads=4)
    next(pipeline)
    mine = set(readers()) - before
    assert mine
    pipeline.close()
    pipeline.close()
    for thread in mine:
        thread.join(timeout=60)
        assert not thread.is_alive()
