"""`lax.scan` where a loop pays, straight-line code where it does not.

A loop is traced and compiled once however often it runs, which is what keeps a deep network's program small on TPUs and
GPUs. XLA's CPU compiler rewrites the kernel gradient of a convolution into the form that its fast code takes in the entry
computation only: inside a loop it is left to naive code, 30 to 100 times slower (docs/performance.md has the smallest case).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gigagan_jax.parallel import sharding

Body = Callable[[Any, Any], tuple[Any, Any]]


def scan(body: Body, carry: Any, stacked: Any, count: int) -> tuple[Any, Any]:
    """As `jax.lax.scan`, but unrolled for a count of one, and on CPUs always.

    Args:
      body: (carry, slice of `stacked`) -> (carry, output); outputs may be None.
      carry: the first carry.
      stacked: tree of arrays [count, ...].
      count: how often `body` runs; at least 1.

    Returns:
      (last carry, outputs stacked on a leading axis of `count`)
    """
    if count > 1 and sharding.mesh_platform() != "cpu":
        return jax.lax.scan(body, carry, stacked, length=count)
    # Straight-line code: XLA's CPU compiler has its fast convolutions in the entry computation only.
    leaves, structure = jax.tree.flatten(stacked)
    # A split's gradient is one concatenation; that of `count` slices would be as many padded copies of the whole.
    parts = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
    outputs = []
    for i in range(count):
        carry, out = body(carry, jax.tree.unflatten(structure, [jnp.squeeze(part[i], 0) for part in parts]))
        outputs.append(out)
    # Outputs of None are no leaves: nothing is stacked where the body returns none.
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
