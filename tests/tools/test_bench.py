"""The batch that the bench makes is one that the step can learn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax import sharding
from gigagan_jax.config import MeshConfig
from gigagan_jax.training.batch import abstract_batch, batch_shardings
from gigagan_jax.training.mismatch import wrong_captions
from tools.bench import synthetic_batch


def batch_of(config):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return synthetic_batch(config, batch_shardings(config, mesh))


def test_wrong_captions_are_valid(tiny):
    batch = batch_of(tiny)
    t = jax.random.normal(jax.random.key(0), (tiny.batch_size, 8))
    _, valid = wrong_captions(jax.random.key(1), t, batch["tokens"], batch["label"], tiny.loss.mismatch_group)
    assert valid.all()


def test_stored_features_are_drawn_in_their_own_type(tiny):
    config = dataclasses.replace(
        tiny, dtype="bfloat16", data=dataclasses.replace(tiny.data, embeddings="folder"), loss=tiny.loss
    )
    batch, shapes = batch_of(config), abstract_batch(config)
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (s.shape, s.dtype) for k, s in shapes.items()}
    assert batch["features"].dtype == jnp.bfloat16
    assert np.asarray(batch["features"], np.float32).std() == pytest.approx(1, abs=0.1)
