"""Floating-point operations of a function, from its trace: matrix products and convolutions, loops counted by their trips.

The compiler's own count takes the body of a scan once, however often it runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of one call with arguments like `args` (arrays or ShapeDtypeStructs); recomputation included."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            shape = e.invars[0].aval.shape
            total += 2 * math.prod(e.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif e.primitive.name == "conv_general_dilated":
            kernel, numbers = e.invars[1].aval.shape, e.params["dimension_numbers"]
            per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # A stride of the backward pass is a dilation of the input: the zeros between cost nothing.
            zeros = math.prod(e.params["lhs_dilation"])
            total += 2 * math.prod(e.outvars[0].aval.shape) * per_output // zeros
        trips = e.params["length"] if e.primitive.name == "scan" else 1
        total += trips * sum(_count(inner) for inner in core.jaxprs_in_params(e.params))
    return total
