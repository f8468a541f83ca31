"""Communication between processes outside of the step: a broadcast from process 0, and an all-reduce of a flag."""

import importlib
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_broadcast_numbers = itertools.count()
# One process may compare all files of a checkpoint, or open its data, while the others wait.
_WAIT_SECONDS = 3600
# Methods of JAX's key-value store that this package calls. The store has no public API: jax.distributed exports only
# initialize, shutdown and is_initialized. Without these methods the callers fall back to collectives.
_STORE_METHODS = (
    *("key_value_set", "key_value_dir_get", "key_value_try_get"),
    *("blocking_key_value_get", "wait_at_barrier"),
)


def import_private_module(module: str) -> Any:
    """A private module of JAX; None where the installed JAX has none of that name."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def broadcast_from_main(value: Any) -> Any:
    """Returns the value of process 0 on all processes.

    All processes call it equally often. They wait for each other, for an hour at most.

    Args:
      value: of process 0, of JSON's types; the other processes' values are ignored.
    """
    if jax.process_count() == 1:
        return value
    client = shared_store()
    if client is None:
        return _broadcast_by_collectives(value)
    # Through the store: Gloo, which runs the collectives of CPUs, gives up after 30 s (compare jax-ml/jax#40831).
    key, milliseconds = f"gigagan_jax/said/{next(_broadcast_numbers)}", 1000 * _WAIT_SECONDS
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(value))
    # The barrier makes process 0 wait too, so that all processes continue together.
    client.wait_at_barrier(f"{key}/heard", milliseconds)
    return json.loads(client.blocking_key_value_get(key, milliseconds))


def _broadcast_by_collectives(value: Any) -> Any:
    """The same broadcast by collectives: first the length in bytes, then the bytes."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    # All processes must pass arrays of one shape, whatever their own value is.
    padded = np.zeros(length, np.uint8)
    padded[: min(length, text.size)] = text[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def shared_store() -> Any:
    """JAX's key-value store of the run; None for a single process, or where the store lacks a method that is called."""
    client = getattr(_distributed_state(), "client", None)
    return client if all(hasattr(client, name) for name in _STORE_METHODS) else None


def forget_store() -> None:
    """Drops the store after a failure to join, so that the report of the error does not wait for it."""
    if hasattr(_distributed_state(), "client"):
        _distributed_state().client = None


def _distributed_state() -> Any:
    # Private: the client of the store has no public accessor.
    return getattr(import_private_module("jax._src.distributed"), "global_state", None)


class Agreement:
    """An all-reduce (maximum) of one integer a process, dispatched asynchronously: the host does not wait for the result.

    Args:
      mesh: of the run.
    """

    def __init__(self, mesh: Mesh):
        flat = mesh.devices.reshape(-1)
        self._length = flat.size
        # A mesh of one axis over the same devices: the order of the run's axes does not matter to a maximum.
        self._sharding = NamedSharding(Mesh(flat, ("all",)), PartitionSpec("all"))
        # Replicated, so that each process reads the result from its own devices.
        replicated = NamedSharding(self._sharding.mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=replicated)

    def all_max(self, number: int) -> jax.Array:
        """The largest number of all processes, int32 `[]` on the device. All processes call it equally often."""
        # One element a device, so that every process contributes whatever the mesh is.
        local_part = lambda index: np.full(1, number, np.int32)
        return self._largest(jax.make_array_from_callback((self._length,), self._sharding, local_part))
