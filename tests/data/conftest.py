"""The pipeline fixture of these tests."""

import pytest

from gigagan_jax.data.pipeline import build_pipeline
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests.data.small_source import SmallSource


@pytest.fixture
def make_pipeline():
    """`build_pipeline` with every kind of randomness switched on; closes its pipelines after the test."""
    pipelines = []

    def make_one(source=None, **options):
        defaults = {
            "resolution": 8,
            "batch_size": 8,
            "seed": 0,
            "tokenizer": ByteTokenizer(20),
            "crop": "random",
            "flip": True,
            "caption_dropout": 0.3,
            # More than one thread, and no divisor of the batch.
            "num_threads": 3,
        }
        pipeline = build_pipeline(SmallSource() if source is None else source, **(defaults | options))
        pipelines.append(pipeline)
        return pipeline

    yield make_one
    for pipeline in pipelines:
        pipeline.close()
