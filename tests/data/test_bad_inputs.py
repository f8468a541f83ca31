"""Files of every kind that web data has: which are decoded, which are replaced, and how the quarantine counts them."""

import collections
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from gigagan_jax.core.errors import UserError
from gigagan_jax.data import pipeline
from gigagan_jax.data.decoding import decode_image
from gigagan_jax.data.example import BadExample
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.bad_files import expected, good_files, photograph, write_bad_tars
from tests.img2dataset import add_member, encoded, pieces


@pytest.fixture(scope="module")
def bad_tars(tmp_path_factory):
    return write_bad_tars(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("name", good_files())
def test_unusual_images_are_handled(name):
    # `tolerance` allows for lossy formats, in grey levels.
    data, pixels, tolerance = good_files()[name]
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3
    # Quantised and grey images have no reference.
    if pixels is not None:
        assert decoded.shape == pixels.shape
        assert np.abs(decoded.astype(int) - pixels.astype(int)).mean() <= max(tolerance / 10, 0.5)
        assert np.abs(decoded.astype(int) - pixels.astype(int)).max() <= max(tolerance * 3, 1)


def test_bad_ones_are_counted_named_and_replaced(bad_tars, tmp_path):
    source = TarSource(str(bad_tars))
    bad = expected()
    assert len(source) == len(good_files()) + len(bad) + 3
    good = [i for i in range(len(source)) if source.name(i) not in bad]
    quarantine = tmp_path / "quarantine.jsonl"
    # About half of the examples are bad: a limit of 0.6 keeps the run going.
    with pipeline.build_pipeline(
        source, resolution=16, batch_size=1, seed=0, tokenizer=ByteTokenizer(20), max_bad_fraction=0.6,
        quarantine_path=quarantine,
    ) as data:  # fmt: skip
        order = source.shuffled_order(0)
        for k in range(len(source)):
            batch = next(data)
            following = [(order[k] + step) % len(source) for step in range(len(source))]
            # The replacement is the next good example in source order.
            assert int(batch["index"][0]) == next(i for i in following if i in good)
        causes = data.quarantine.causes
    assert causes == {cause: list(bad.values()).count(cause) for cause in bad.values()}
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["name"]: line["cause"] for line in lines} == bad
    assert len(lines) == len(bad)


def test_too_many_bad_ones_end_the_run_in_one_line(bad_tars):
    source = TarSource(str(bad_tars))
    data = pipeline.build_pipeline(
        source, resolution=16, batch_size=1, seed=0, tokenizer=ByteTokenizer(20), max_bad_fraction=0.3
    )  # fmt: skip
    message = r"11 of \d+ examples tried are bad.*max_bad_fraction=0.3.*caption_empty"
    with data, pytest.raises(UserError, match=message) as refused:
        # Takes batches until the error.
        collections.deque(data, maxlen=1)
    assert "\n" not in str(refused.value)


def mutate_bytes(data, rng):
    """Applies one to eight damages: bytes changed, pieces cut out, doubled, zeroed or cut off."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 700))
        kind = int(rng.integers(6))
        if kind == 0:
            data[at] = int(rng.integers(256))
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = bytes(min(length, len(data) - at))
        elif kind == 4:
            data[at : at + 8] = rng.bytes(8)
        # Rarer than the others: truncation removes most of what the others could damage.
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


@pytest.mark.slow
def test_a_thousand_mutated_images_crash_nothing():
    rng = np.random.default_rng(0)
    image = photograph()
    files = [encoded(image), encoded(image, progressive=True), encoded(image, "PNG"), encoded(image, "WEBP")]
    files += [encoded(Image.fromarray(image).quantize(), "GIF"), encoded(image, "BMP")]
    outcomes = {True: 0, False: 0}
    for i in range(1000):
        try:
            # Half of the images go through the scaled JPEG decoder.
            pixels = decode_image(mutate_bytes(files[i % len(files)], rng), least=(None, 8)[i % 2])
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            outcomes[True] += 1
        except BadExample:
            outcomes[False] += 1
    # Both outcomes occur: the damages are neither harmless nor always fatal.
    assert min(outcomes.values()) > 50


@pytest.mark.slow
def test_a_thousand_mutated_tars_crash_nothing(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "0.tar"
    # Small images keep the tar small, so that damages often hit headers and captions.
    with tarfile.open(path, "w") as tar:
        for i, (caption, image) in zip(range(3), pieces(), strict=False):
            add_member(tar, f"{i}.jpg", encoded(image[::4, ::4]))
            add_member(tar, f"{i}.json", json.dumps({"caption": caption}).encode())
            add_member(tar, f"{i}.txt", caption.encode())
    whole = path.read_bytes()
    outcomes = {"good": 0, "bad": 0, "nothing": 0}
    indexed = 0
    for i in range(1000):
        path.write_bytes(mutate_bytes(whole, rng))
        try:
            source = TarSource(str(path), index=str(tmp_path), workers=1, caption_keys=("caption",) if i % 2 else ())
        # A tar whose headers are all damaged has no example, or looks like a compressed one.
        except UserError as e:
            outcomes["nothing"] += bool(re.search("no example|compressed", str(e)))
            continue
        for j in range(len(source)):
            source.name(j)
            try:
                assert source[j].captions
                outcomes["good"] += 1
            except BadExample:
                outcomes["bad"] += 1
        indexed += 1
    assert indexed + outcomes["nothing"] == 1000
    assert outcomes["good"] > 500
    assert outcomes["bad"] > 500
