"""Stored text embeddings: each caption gets its own, whatever parts, examples and captions lie before it."""

import dataclasses

import numpy as np
import pytest

from gigagan_jax.config import Config
from gigagan_jax.data import embeddings
from gigagan_jax.data.example import Record
from tests.data.test_data_pipeline import SmallSource

WIDTH, LENGTH = 4, 8


class Wordy(SmallSource):
    """Ten images with none to three captions."""

    def __init__(self):
        super().__init__(10)

    def read(self, i):
        record = super().read(i)
        return Record(record.image, record.captions[: i % 4], record.label, record.name)


def said(example, caption):
    rng = np.random.default_rng((example, caption))
    tokens = 1 + (example + caption) % LENGTH
    return embeddings.Said(rng.normal(size=(tokens, WIDTH)).astype(np.float32), rng.normal(size=3).astype(np.float32))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Embeddings of Wordy in parts of four examples, and the config that they were made with."""
    monkeypatch.setattr(embeddings, "PART_SIZE", 4)
    config, source = Config(), Wordy()
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, length=LENGTH),
        loss=dataclasses.replace(config.loss, clip=(1.0, 1.0)),
    )
    for number in range(3):
        examples = range(4 * number, min(4 * number + 4, len(source)))
        rows = [[said(i, j) for j in range(len(source.captions(i)))] for i in examples]
        embeddings.write_part(tmp_path / embeddings.part_name(number), rows, WIDTH, np.float32)
    embeddings.write_null(tmp_path, said(99, 0))
    embeddings.write_index(tmp_path, embeddings.describe(config, source), {})
    return tmp_path, config


def test_each_caption_has_its_own_embeddings(folder):
    where, config = folder
    source = Wordy()
    stored = embeddings.Embeddings(where, config, source)
    asked = [(i, j) for i in range(len(source)) for j in range(len(source.captions(i)))]
    assert len(asked) == 13
    for example, caption in [*asked, (3, None)]:
        want = said(99, 0) if caption is None else said(example, caption)
        found = stored.of(example, caption)
        np.testing.assert_array_equal(found["features"][: len(want.features)], want.features)
        assert found["features"].shape == (LENGTH, WIDTH)
        assert not found["features"][len(want.features) :].any()
        np.testing.assert_array_equal(found["clip_text"], want.clip_text)


def test_a_caption_that_came_later_is_refused(folder, refused):
    where, config = folder
    stored = embeddings.Embeddings(where, config, Wordy())
    refused(lambda: stored.of(5, 1), "part-00001.safetensors", "lacks caption 1 of example 5")
