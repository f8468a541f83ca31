"""Frozen networks: written by transformers' torch classes with random weights, read by the production loader."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained.weights import Weights, load_params
from gigagan_jax.parallel import sharding


@pytest.fixture(scope="session")
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def read(mesh):
    """read(make, rows, folder, **predicates) -> (Module, parameters): the production loader, float32, one device."""

    def read(make, rows, folder, **predicates):
        module = Network("test", make)
        where = module.shardings(mesh, DEFAULT_RULES)
        weights = Weights(folder)
        return module, load_params(
            module, rows, weights, shardings=where, dtype_of=lambda s: jnp.float32, **predicates
        )[0]

    return read


@pytest.fixture(scope="session")
def save(random_weights):
    """save(model, folder): random weights of sensible size, so that no output hides another; written by transformers."""

    def save(model, folder, seed=0, **options):
        random_weights(model, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval().save_pretrained(folder, **options)
        return model

    return save


@pytest.fixture(scope="session")
def error():
    """Largest difference, relative to the largest value of the reference."""

    def error(ours, theirs):
        ours, theirs = np.asarray(ours), theirs.detach().numpy()
        assert ours.shape == theirs.shape
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    return error
