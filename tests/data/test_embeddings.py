"""Stored text embeddings: each caption gets its own, across parts, examples and captions."""

import dataclasses

import numpy as np
import pytest

from gigagan_jax.config import Config
from gigagan_jax.data import embeddings
from gigagan_jax.data.example import Record
from tests.data.small_source import SmallSource

# Features and tokens of a caption.
WIDTH, LENGTH = 4, 8


class CaptionedSource(SmallSource):
    """Ten images with none to three captions."""

    def __init__(self):
        super().__init__(10)

    def read(self, i):
        record = super().read(i)
        return Record(record.image, record.captions[: i % 4], record.label, record.name)


def make_embedding(example, caption):
    rng = np.random.default_rng((example, caption))
    # Lengths differ, so that a wrong offset is seen.
    tokens = 1 + (example + caption) % LENGTH
    return embeddings.CaptionEmbedding(
        rng.normal(size=(tokens, WIDTH)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    )


@pytest.fixture
def stored_embeddings(tmp_path, monkeypatch):
    """A folder with embeddings of CaptionedSource in parts of four examples, and its config."""
    monkeypatch.setattr(embeddings, "PART_SIZE", 4)
    config, source = Config(), CaptionedSource()
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, length=LENGTH),
        # A contrastive loss, so that clip_text is stored and read.
        loss=dataclasses.replace(config.loss, clip=(1.0, 1.0)),
    )
    for number in range(3):
        examples = range(4 * number, min(4 * number + 4, len(source)))
        rows = [[make_embedding(i, j) for j in range(len(source.captions(i)))] for i in examples]
        embeddings.write_part(tmp_path / embeddings.part_name(number), rows, WIDTH, np.float32)
    embeddings.write_null(tmp_path, make_embedding(99, 0))
    embeddings.write_index(tmp_path, embeddings.expected_metadata(config, source), {})
    return tmp_path, config


def test_each_caption_has_its_own_embeddings(stored_embeddings):
    folder, config = stored_embeddings
    source = CaptionedSource()
    stored = embeddings.Embeddings(folder, config, source)
    captions = [(i, j) for i in range(len(source)) for j in range(len(source.captions(i)))]
    assert len(captions) == 13
    # None asks for the null caption.
    for example, caption in [*captions, (3, None)]:
        want = make_embedding(99, 0) if caption is None else make_embedding(example, caption)
        found = stored.caption_embedding(example, caption)
        np.testing.assert_array_equal(found["features"][: len(want.features)], want.features)
        assert found["features"].shape == (LENGTH, WIDTH)
        # Zeros after the end of text.
        assert not found["features"][len(want.features) :].any()
        np.testing.assert_array_equal(found["clip_text"], want.clip_text)


def test_a_caption_that_came_later_is_refused(stored_embeddings, refused):
    folder, config = stored_embeddings
    stored = embeddings.Embeddings(folder, config, CaptionedSource())
    # Example 5 has one caption, number 0.
    refused(lambda: stored.caption_embedding(5, 1), "part-00001.safetensors", "lacks caption 1 of example 5")
