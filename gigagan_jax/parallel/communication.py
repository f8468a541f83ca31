"""Values that the processes of a run share: a broadcast from process 0, and the largest of what all say."""

import importlib
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_said = itertools.count()
_SLOWEST_SECONDS = 3600  # for what one process does while the others wait for its word
# What is asked of the store that JAX's processes share. JAX has no public name for it.
_STORE = (
    *("key_value_set", "key_value_dir_get", "key_value_try_get"),
    *("blocking_key_value_get", "wait_at_barrier"),
)


def _private(module: str) -> Any:
    """A private module of JAX; None where this JAX has none of that name."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def from_zero(mine: Any) -> Any:
    """What process 0 calls this with, on all processes. All call it equally often, and go on together, within an hour: process 0
    may have all files of a checkpoint to compare, and others their data to open.

    Args:
      mine: used on process 0 only; of what JSON knows
    """
    if jax.process_count() == 1:
        return mine
    client = _client()
    if client is None:
        return _broadcast(mine)
    # Over the store and not by a collective: those of CPUs wait for half a minute only.
    key, milliseconds = f"gigagan_jax/said/{next(_said)}", 1000 * _SLOWEST_SECONDS
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(mine))
    client.wait_at_barrier(f"{key}/heard", milliseconds)
    return json.loads(client.blocking_key_value_get(key, milliseconds))


def _broadcast(mine: Any) -> Any:
    """The same by collectives: first how long it is, then the bytes."""
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, text.size)] = text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def _client() -> Any:
    """The key-value store that JAX's processes share; None for a process alone, or where it is not the tested one."""
    client = getattr(_state(), "client", None)
    return client if all(hasattr(client, name) for name in _STORE) else None


def _forget_store() -> None:
    """After a failure to join: nothing more is to be said or asked there."""
    if hasattr(_state(), "client"):
        _state().client = None


def _state() -> Any:
    return getattr(_private("jax._src.distributed"), "global_state", None)


class Agreement:
    """A number that each process has, made the largest of all without waiting for any: the answer comes with the steps.

    Args:
      mesh: of the run.
    """

    def __init__(self, mesh: Mesh):
        flat = mesh.devices.reshape(-1)
        self._length = flat.size
        self._each = NamedSharding(Mesh(flat, ("all",)), PartitionSpec("all"))
        everywhere = NamedSharding(self._each.mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=everywhere)

    def ask(self, mine: int) -> jax.Array:
        """The largest of what all processes ask with, on the device. All processes ask equally often."""
        here = lambda index: np.full(1, mine, np.int32)
        return self._largest(jax.make_array_from_callback((self._length,), self._each, here))
