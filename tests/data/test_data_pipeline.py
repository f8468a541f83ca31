"""The stream: its content does not depend on threads, hosts or resumes."""

import itertools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.data.small_source import N, SmallSource, assert_same, join_batches, take_batches, text_of


def test_batches_have_the_promised_shapes(make_pipeline):
    batch = next(make_pipeline())
    # 8 rows, images of 8 px, captions of 20 tokens.
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "tokens": ((8, 20), "int32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int32"),
    }


def test_images_captions_and_labels_belong_to_their_index(make_pipeline):
    source = DigitsSource()
    batch = next(
        make_pipeline(source, batch_size=32, tokenizer=ByteTokenizer(48), crop="center", flip=False, caption_dropout=0)
    )
    for image, tokens, label, index in zip(*(batch[k] for k in ("image", "tokens", "label", "index")), strict=True):
        np.testing.assert_array_equal(image, source[index].image)
        assert label == source[index].label
        assert text_of(tokens) in source[index].captions


@pytest.mark.parametrize("n", [1, 2, 23, 100])
def test_each_epoch_has_every_example_exactly_once_in_another_order(make_pipeline, n):
    index = take_batches(make_pipeline(SmallSource(n), batch_size=1, num_threads=2), 4 * n)["index"].reshape(4, n)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(n), (4, 1)))
    # Two examples have two orders only, so epochs may repeat one.
    if n > 2:
        assert len({tuple(epoch) for epoch in index}) == 4


def test_three_seeds_give_three_orders_and_one_seed_one(make_pipeline):
    orders = [tuple(take_batches(make_pipeline(seed=seed), 6)["index"]) for seed in (0, 1, 2, 0)]
    assert len(set(orders)) == 3
    assert orders[0] == orders[3]


def test_neighbouring_seeds_share_no_epoch(make_pipeline):
    # Epoch e of seed s would equal epoch e - 1 of seed s + 1 if epochs were seeded by s + e.
    epochs = [
        tuple(epoch)
        for seed in range(4)
        for epoch in take_batches(make_pipeline(seed=seed, batch_size=1), 4 * N)["index"].reshape(4, N)
    ]
    assert len(set(epochs)) == 16


def test_threads_and_prefetching_change_nothing(make_pipeline):
    expected = take_batches(make_pipeline(num_threads=0), 10)
    assert_same(take_batches(make_pipeline(num_threads=1, prefetch_examples=1), 10), expected)
    assert_same(take_batches(make_pipeline(num_threads=7, prefetch_examples=50), 10), expected)


def test_another_process_draws_the_same(make_pipeline):
    # Hashes of strings, and so orders of sets, differ between processes.
    script = (
        "import hashlib, itertools\n"
        "from gigagan_jax.data.pipeline import build_pipeline\n"
        "from gigagan_jax.data.sources.digits import DigitsSource\n"
        "from gigagan_jax.data.tokenizers import ByteTokenizer\n"
        "options = dict(resolution=6, batch_size=64, seed=7, tokenizer=ByteTokenizer(40), crop='random', flip=True,\n"
        "               caption_dropout=0.5, num_threads=2)\n"
        "digest = hashlib.sha256()\n"
        "with build_pipeline(DigitsSource(), **options) as pipeline:\n"
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
    assert [run.stderr for run in runs] == ["", ""], "grain prints to the user's terminal"


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_make_the_same_global_batches(make_pipeline, hosts):
    # Replacements must not depend on the host that needs them.
    bad = {3: "broken", 4: "broken"}
    # One host, whose batches are the reference.
    alone = list(itertools.islice(make_pipeline(SmallSource(bad=bad)), 9))
    shards = [
        list(itertools.islice(make_pipeline(SmallSource(bad=bad), process_index=i, process_count=hosts), 9))
        for i in range(hosts)
    ]
    for step, batch in enumerate(alone):
        assert_same(join_batches([shard[step] for shard in shards]), batch)


def test_resume_equals_the_uninterrupted_stream(make_pipeline):
    bad = {5: "broken"}
    whole = list(itertools.islice(make_pipeline(SmallSource(bad=bad)), 30))
    # 24 * 8 is in the ninth epoch of 23.
    for taken in (0, 1, 2, 13, 24):
        first = make_pipeline(SmallSource(bad=bad))
        for _ in range(taken):
            next(first)
        state = json.loads(json.dumps(first.state()))
        assert state["examples_seen"] == 8 * taken
        second = make_pipeline(SmallSource(bad=bad))
        # `restore` must discard batches that were read ahead.
        next(second)
        second.restore(state)
        assert second.state() == state
        assert_same(take_batches(second, 30 - taken), join_batches(whole[taken:]))
        # start_example alone gives the same stream, without the counters.
        third = make_pipeline(SmallSource(bad=bad), start_example=state["examples_seen"])
        assert_same(take_batches(third, 5), join_batches(whole[taken : taken + 5]))


def test_the_state_after_a_resume_equals_that_of_the_uninterrupted_run(make_pipeline):
    source = SmallSource(bad={5: "broken", 11: "torn"})
    whole = make_pipeline(source)
    for _ in range(12):
        next(whole)
    first = make_pipeline(source)
    for _ in range(5):
        next(first)
    second = make_pipeline(source)
    second.restore(first.state())
    for _ in range(7):
        next(second)
    assert second.state() == whole.state()
    # Some replacements happened on both sides of the resume.
    assert sum(whole.state()["quarantine"]["causes"].values()) > 4


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_resume_on_another_number_of_hosts(make_pipeline, hosts):
    whole = list(itertools.islice(make_pipeline(), 12))
    two = [make_pipeline(process_index=i, process_count=2) for i in range(2)]
    for pipeline in two:
        take_batches(pipeline, 5)
    # Either host's state resumes the run.
    states = [pipeline.state() for pipeline in two]
    assert states[0]["examples_seen"] == states[1]["examples_seen"] == 40
    resumed = [make_pipeline(process_index=i, process_count=hosts) for i in range(hosts)]
    for pipeline in resumed:
        pipeline.restore(states[0])
    for step in range(5, 12):
        assert_same(join_batches([next(pipeline) for pipeline in resumed]), whole[step])


def test_resume_with_another_batch_size_continues_the_same_stream(make_pipeline):
    whole = take_batches(make_pipeline(), 15)
    first = make_pipeline()
    take_batches(first, 2)
    second = make_pipeline(batch_size=12)
    # After 16 examples, which are no whole number of batches of 12.
    second.restore(first.state())
    rest = take_batches(second, 8)
    assert_same(rest, {key: value[16:112] for key, value in whole.items()})
    assert second.state()["examples_seen"] == 112


def test_a_late_start_reads_nothing_before_it(make_pipeline):
    source = SmallSource()
    # Without threads nothing is read ahead.
    pipeline = make_pipeline(source, start_example=10**12 + 5, num_threads=0)
    next(pipeline)
    assert len(source.reads) == 8
    assert pipeline.state()["examples_seen"] == 10**12 + 13


def test_restore_refuses_another_source_or_seed(make_pipeline):
    state = make_pipeline().state()
    with pytest.raises(UserError, match="another data set"):
        make_pipeline(SmallSource(N + 1)).restore(state)
    with pytest.raises(UserError, match=r"with seed=0, this run has seed=1"):
        make_pipeline(seed=1).restore(state)
    with pytest.raises(UserError, match="cannot be read"):
        make_pipeline().restore({"examples_seen": 3})
    with pytest.raises(UserError, match="cannot be read"):
        make_pipeline().restore(state | {"quarantine": None})


def test_caption_dropout_rate_and_its_null_caption(make_pipeline):
    null = ByteTokenizer(20).null_tokens()
    for rate in (0.0, 0.1, 1.0):
        # 1,500 draws of each rate.
        tokens = take_batches(make_pipeline(caption_dropout=rate, batch_size=100), 15)["tokens"]
        dropped = (tokens == null).all(axis=1).mean()
        # Four standard deviations of a binomial share; 0 at the ends.
        assert abs(dropped - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(tokens))


def test_all_captions_and_both_orientations_are_drawn(make_pipeline):
    source = DigitsSource()
    batch = take_batches(make_pipeline(source, batch_size=500, tokenizer=ByteTokenizer(48), caption_dropout=0), 4)
    wordings = [source[i].captions.index(text_of(t)) for i, t in zip(batch["index"], batch["tokens"], strict=True)]
    # 2,000 draws of 8 wordings: 250 each, standard deviation 15.
    assert min(np.bincount(wordings, minlength=8)) > 2000 / 8 * 0.7
    images = zip(batch["index"], batch["image"], strict=True)
    flipped = [np.array_equal(image, source[i].image[:, ::-1]) for i, image in images]
    assert 0.45 < np.mean(flipped) < 0.55


def test_captions_do_not_depend_on_how_images_are_cropped(make_pipeline):
    tokens = [
        take_batches(make_pipeline(crop=crop, flip=flip), 5)["tokens"]
        for crop, flip in (("random", True), ("center", False))
    ]
    # Crop and flip draw from the same generator, but after the caption.
    np.testing.assert_array_equal(*tokens)


def test_augmentation_differs_from_epoch_to_epoch(make_pipeline):
    stream = take_batches(make_pipeline(SmallSource(1), batch_size=1), 30)
    assert len({image.tobytes() for image in stream["image"]}) > 5
    # Three wordings and the null caption.
    assert len({tokens.tobytes() for tokens in stream["tokens"]}) == 4


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "does not divide by the 4 hosts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"seed": -1}, "seed=-1"),
        ({"crop": "middle"}, "unknown crop 'middle'; there are center, random, patch, none"),
        ({"resize_filter": "cubic"}, "unknown resize_filter 'cubic'; there are lanczos"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction=-0.1"),
        ({"start_example": -1}, "start_example=-1"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"resolution": 0}, "resolution=0"),
        ({"source": SmallSource(0)}, "the data set is empty"),
    ],
)
def test_bad_arguments(make_pipeline, options, message):
    with pytest.raises(UserError, match=message):
        make_pipeline(**options)


def test_a_list_that_cannot_be_written_is_an_error(make_pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the list of bad examples"):
        make_pipeline(quarantine_path=tmp_path / "file" / "bad.jsonl")


def test_close_ends_the_threads(make_pipeline):
    def reader_threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    # Other tests' pipelines may still have threads.
    before = set(reader_threads())
    pipeline = make_pipeline(num_threads=4)
    next(pipeline)
    started = set(reader_threads()) - before
    assert started
    # A second close does nothing.
    pipeline.close()
    pipeline.close()
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()
