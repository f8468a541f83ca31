"""Compiles an upsampler's inference for one absent TPU chip: time and memory of a batch of tiles, estimated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gigagan_jax.config import Config, MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.build import build_generator
from gigagan_jax.models.conditioning import Condition
from gigagan_jax.models.upsampler import grid_of
from gigagan_jax.parallel import sharding
from gigagan_jax.planning.compile import CompileSettings, compile_lowered, log_phase
from gigagan_jax.planning.topology import Topology, topology_devices
from gigagan_jax.training.throughput import count_flops


def plan_upscaling(
    config: Config, topology: Topology, settings: CompileSettings, *, size: tuple[int, int], batch: int
) -> dict[str, Any]:
    """The plan of one pass of an upsampler on one chip, weights in the precision of the computation.

    Args:
      config: of an upsampler.
      topology: a slice with that kind of chip; one chip of it is used.
      settings: of the compiler.
      size: height and width of the small images, in pixels.
      batch: images, or tiles, of one pass.

    Raises:
      UserError: the config is of a base model, a side is no multiple of the network's strides, or there is no compiler.
    """
    if not config.is_upsampler:
        raise UserError(f"{config.name} is a base model: tools/plan.py plans its training")
    grid = grid_of(config.upsampler, config.generator)
    if any(side < grid or side % grid for side in size):
        raise UserError(f"--size={size[0]}x{size[1]}: sides must be multiples of {grid}, the network's strides")
    # Inference keeps nothing for a backward pass.
    config = dataclasses.replace(config, remat=False)
    # One chip of the slice: the mesh has the axes of training, each of size one.
    mesh: Mesh = sharding.make_mesh(MeshConfig(), topology_devices(topology)[:1])
    everywhere = NamedSharding(mesh, PartitionSpec())
    module, c = build_generator(config), config
    cast = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(c.dtype), sharding=everywhere)
    params = jax.tree.map(cast, module.abstract())
    given = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    width = c.generator.text.width
    arguments = {
        "w": given((1, c.generator.w_dim)),
        "low": given((batch, *size, 3)),
    }
    if c.condition == "text":
        # The caption is encoded once for an image, whatever the number of its tiles.
        arguments |= {
            "local": given((batch, c.text.length - 1, width), jnp.dtype(c.dtype)),
            "mask": given((batch, c.text.length - 1), jnp.bool_),
        }

    def enlarge(params: Any, arguments: dict[str, jax.Array]) -> jax.Array:
        with sharding.use_mesh(mesh, c.rules):
            condition = Condition(None, arguments.get("local"), arguments.get("mask"))
            return module.bind(params).synthesize(arguments["w"], condition, arguments["low"])[-1]

    with log_phase("tracing the network"):
        lowered = jax.jit(enlarge).lower(params, arguments)
        flops = count_flops(enlarge, params, arguments)
    size_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    kinds = {"parameters": size_of(params), "inputs": size_of(arguments)}
    found = compile_lowered("the network", lowered, flops, mesh, topology, settings, kinds)
    factor = c.resolution // c.upsampler.input_resolution
    about = {
        "config": c.name,
        "chip": topology.kind,
        "size": list(size),
        "output": [side * factor for side in size],
        "batch": batch,
        "parameters": module.count(),
        "dtype": c.dtype,
        "jax": jax.__version__,
        "effort": settings.effort,
    }
    return about | found
