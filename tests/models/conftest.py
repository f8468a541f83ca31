"""Networks and layers as pure functions; strict dtype promotion (the optimizers of optax need the standard one)."""

import jax
import pytest

from gigagan_jax.config import DEFAULT_RULES, MeshConfig
from gigagan_jax.models.network import Network
from gigagan_jax.parallel import sharding


@pytest.fixture(scope="module", autouse=True)
def strict_promotion():  # of a module, as the fixtures that trace: another setting would be another compilation
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def build():
    """build(make, seed) -> (Module, parameters on one device), where make(rngs) gives the layer.

    Drawn by NumPy: nothing is compiled, and the layers are made as the networks are.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def build(make, seed=0):
        module = Network("test", make)
        params = module.init(seed, module.shardings(mesh, DEFAULT_RULES))
        return module, params

    return build
