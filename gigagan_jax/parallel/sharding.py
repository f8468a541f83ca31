"""Device mesh, logical-axis rules, shardings of parameters and activations.

A parameter carries one logical axis name per dimension; the rules of the config map names to mesh axes. An unknown name,
a mesh axis used twice in one array, and a dimension that does not divide are errors, never silent replication. Moments and
averages are sharded as their parameter, and over the axes of `rules.optimizer` too (ZeRO-1: Rajbhandari et al., 2020).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError

# The slowest network first: devices that are neighbours in the last axis are neighbours in the machine.
AXES = ("slice", "data", "fsdp", "tensor")
# The one rule that belongs to no dimension: optimizer_spec applies it.
OPTIMIZER = "optimizer"
# Smaller moments and averages stay unsharded: sharding one saves less than 64 kB (float32), and costs a collective.
MIN_ELEMENTS_TO_SHARD = 2**14
# The order in which XLA's partitioner keeps the examples of a batch where they belong; see DEFAULT_RULES.
BATCH_ORDER = ("fsdp", "slice", "data")

# A context variable and not a global: threads that trace different meshes must not see each other's.
_current_mesh: contextvars.ContextVar[tuple[Any, Mapping[str, str]] | None] = contextvars.ContextVar(
    "mesh", default=None
)


def check_rules(rules: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raises UserError for a rule of an unknown logical axis, or one that names no mesh axis."""
    for name in rules:
        if name not in known:
            raise UserError(f"unknown config key config.rules.{name}; known: {', '.join(sorted(known))}")
        _mesh_axes(name, rules, f"config.rules.{name}")


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Devices along AXES, with -1 filled in.

    Raises:
      UserError: the mesh does not fit the number of devices.
    """
    sizes = [config.slices, config.data, config.fsdp, config.tensor]
    names = ("slices", *AXES[1:])
    # Messages name slices only where there are several.
    shown = " x ".join(f"{a}={s}" for a, s in zip(names, sizes, strict=True) if a != "slices" or s != 1)
    if any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"config.mesh ({shown}): every axis is a positive number, or -1 for what the others leave")
    if sizes.count(-1) > 1:
        raise UserError(f"config.mesh ({shown}): only one axis may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if devices % known:
            # Flags to copy.
            flags = " ".join(f"--config.mesh.{a}=1" for a, s in zip(names, sizes, strict=True) if s > 1)
            raise UserError(
                f"config.mesh ({shown}): {known} does not divide the {devices} device{'s' * (devices != 1)} here; {flags} fits "
                "any number of them"
            )
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise UserError(
            f"config.mesh ({shown}) needs {known} devices, there are {devices}; set one axis to -1 to fill up"
        )
    return tuple(sizes)  # type: ignore[return-value]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config over `devices` (all of them by default).

    With several slices, each axis but the first stays within one. Devices without a slice index (CPUs, GPUs of one
    machine) are grouped in their order.

    Raises:
      UserError: the mesh does not fit the number of devices, or a slice would be cut.
    """
    devices = jax.devices() if devices is None else devices
    # Auto: the partitioner propagates shardings between the constraints of `constrain`.
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        # Only multi-slice TPUs have the attribute, and it may be None.
        groups.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    slices, found = shape[0], len(groups)
    # Only the data-centre network joins slices of TPUs. Machines with GPUs share one network and may form one slice.
    exact = devices[0].platform == "tpu" and found > 1
    # Slices of the config may split or join slices of the hardware, but no part may lie across a border.
    even = len({len(g) for g in groups.values()}) == 1 and not (slices % found and found % slices)
    if (exact and slices != found) or (slices > 1 and not even):
        raise UserError(
            f"config.mesh.slices={slices}: the {len(devices)} devices are of {found} slices, and a part of the mesh would "
            f"lie across two; use --config.mesh.slices={found}"
        )
    if slices == 1:
        # Not implemented for a mesh axis that is no product of whole axes of the TPU's torus. The code below splits them.
        with contextlib.suppress(NotImplementedError):
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    ordered = [device for k in sorted(groups) for device in groups[k]]
    each = len(ordered) // slices
    parts = [
        mesh_utils.create_device_mesh(shape[1:], ordered[i : i + each], allow_split_physical_axes=True)
        for i in range(0, len(ordered), each)
    ]
    return Mesh(np.stack(parts), AXES, axis_types=types)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The same mesh without devices, to compute specs and sizes."""
    return AbstractMesh(mesh_shape(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> int:
    """Number of shards of the batch axis."""
    return math.prod(mesh.shape[a] for a in _mesh_axes("batch", rules, "batch"))


def check_batch(batch: int, micro_batches: int, mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> None:
    """Raises UserError when a micro-batch does not divide over the devices that share it, or its axes are wrong for the mesh."""
    # Replicas along these axes would compute the same gradients from the same images.
    idle = [a for a in AXES[:2] if mesh.shape[a] > 1 and a not in _mesh_axes("batch", rules, "batch")]
    if idle:
        raise UserError(
            f"config.rules.batch={rules['batch']!r} leaves out the mesh axis {idle[0]!r}: its {mesh.shape[idle[0]]} copies of "
            f"the model would all see the same images; use {','.join(BATCH_ORDER)!r}"
        )
    # A bug of XLA's partitioner (jaxlib 0.10.2), not an error of the rule: see DEFAULT_RULES.
    axes = [a for a in _mesh_axes("batch", rules, "batch") if mesh.shape[a] > 1]
    if mesh.shape["tensor"] > 1 and axes != [a for a in BATCH_ORDER if a in axes]:
        raise UserError(
            f"config.rules.batch={rules['batch']!r}: in this order XLA mixes up the examples of a batch between devices when "
            f"tensor > 1; use {','.join(BATCH_ORDER)!r}"
        )
    shards = batch_shards(mesh, rules)
    # Each micro-batch is sharded by itself, so each must divide.
    micro = batch // micro_batches
    if micro % shards:
        raise UserError(
            f"config.batch_size={batch} in {micro_batches} micro-batches is {micro} images at a time, "
            f"which does not divide over {shards} devices ({rules['batch']}); use a multiple of {shards * micro_batches}"
        )


def _mesh_axes(name: str | None, rules: Mapping[str, str], where: str) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in rules:
        raise UserError(f"{where}: logical axis {name!r} has no rule; known: {', '.join(sorted(rules))}")
    # An empty rule gives no axes: the dimension is replicated.
    axes = tuple(a for a in rules[name].split(",") if a)
    for a in axes:
        if a not in AXES:
            raise UserError(f"config.rules.{name}={rules[name]!r}: {a!r} is not a mesh axis ({', '.join(AXES)})")
    return axes


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Mapping[str, str], where: str
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry the logical `names`.

    Raises:
      UserError: no rule for a name, a mesh axis used twice, or a dimension that does not divide.
    """
    if len(names) != len(shape):
        raise ValueError(f"{where}: {len(names)} axis names for shape {tuple(shape)}")
    # `used` is over all dimensions: a mesh axis may shard only one of them.
    entries: list[Any] = []
    used: set[str] = set()
    for name, dim in zip(names, shape, strict=True):
        axes = tuple(a for a in _mesh_axes(name, rules, where) if mesh.shape[a] > 1)
        size = math.prod(mesh.shape[a] for a in axes)
        if dim % size:
            # The largest size of this axis with which the dimension would divide.
            fits = math.gcd(dim, size)
            mend = f"use config.mesh.{axes[0]}={fits}" if len(axes) == 1 and fits > 1 else "use a smaller mesh axis"
            raise UserError(
                f"{where} {tuple(shape)}: dimension {name}={dim} does not divide over {'x'.join(axes)}={size}; "
                f"{mend} and let another take the rest (config.mesh.data=-1), or change config.rules.{name}"
            )
        for a in axes:
            if a in used:
                raise UserError(f"{where}: mesh axis {a!r} would be used twice ({', '.join(map(str, names))})")
            used.add(a)
        # The canonical form of one axis is its name, and of no axis None.
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def optimizer_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Mapping[str, str], where: str
) -> PartitionSpec:
    """PartitionSpec of the moments and the average of a parameter: as the parameter, and over `rules.optimizer` too.

    The axes go to the dimension that is longest on a device, among those that divide; the last one of equal ones. An array
    without such a dimension, or with fewer than MIN_ELEMENTS_TO_SHARD elements, is sharded as its parameter.

    Raises:
      UserError: as `partition_spec`.
    """
    parameter_spec = partition_spec(names, shape, mesh, rules, where)
    parts = [((e,) if isinstance(e, str) else tuple(e or ())) for e in parameter_spec]
    axes = tuple(a for a in _mesh_axes(OPTIMIZER, rules, where) if mesh.shape[a] > 1)
    size = math.prod(mesh.shape[a] for a in axes)
    # A mesh axis that the parameter uses already cannot shard it again.
    if size == 1 or math.prod(shape) < MIN_ELEMENTS_TO_SHARD or any(a in p for a in axes for p in parts):
        return parameter_spec
    # Sizes on one device, after the parameter's own sharding.
    local = [d // math.prod(mesh.shape[a] for a in p) for d, p in zip(shape, parts, strict=True)]
    best = max((i for i, d in enumerate(local) if d % size == 0), key=lambda i: (local[i], i), default=None)
    if best is None:
        return parameter_spec
    # Appended: the parameter's own axes stay the outer ones, so a gather yields the parameter's shard.
    parts[best] += axes
    return PartitionSpec(*(p[0] if len(p) == 1 else p or None for p in parts))


def local_rows(where: NamedSharding, shape: Sequence[int]) -> list[int]:
    """Indices along the first axis of the rows that this process's devices hold, ascending."""
    # Devices that replicate a row report it several times, hence the set.
    slices = [index[0] for index in where.addressable_devices_indices_map(tuple(shape)).values()]  # type: ignore[index]
    return sorted({row for s in slices for row in range(*s.indices(shape[0]))})


def array_from_rows(local: np.ndarray, rows: Sequence[int], where: NamedSharding, length: int) -> jax.Array:
    """The global array of `length` rows. This process passes `local`, the `rows` that `local_rows` returned."""
    # Devices ask for ranges of global rows, and each range is contiguous in `local` too: rows ascend.
    position = {row: i for i, row in enumerate(rows)}

    def local_block(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(length)
        return local[position[start] : position[start] + stop - start][(slice(None), *index[1:])]

    return jax.make_array_from_callback((length, *local.shape[1:]), where, local_block)


@contextlib.contextmanager
def use_mesh(mesh: Any, rules: Mapping[str, str]) -> Iterator[None]:
    """Within it, `constrain` applies `rules` on `mesh`. Outside of it, models run without constraints, as on one device."""
    # The token restores an outer mesh.
    token = _current_mesh.set((mesh, rules))
    try:
        yield
    finally:
        _current_mesh.reset(token)


def mesh_platform() -> str:
    """Platform of the current mesh's devices ("cpu", "gpu", "tpu"); JAX's default without a mesh or with an abstract one."""
    current = _current_mesh.get()
    # An abstract mesh has no devices.
    if current is None or not isinstance(current[0], Mesh):
        return jax.default_backend()
    return current[0].devices.flat[0].platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with the sharding that its logical axis `names` have in the current mesh."""
    current = _current_mesh.get()
    if current is None:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, partition_spec(names, x.shape, mesh, rules, "activation"))
    )


def gather_parameter(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """All-gathers a parameter over `fsdp` for a layer's computation; it stays sharded over `tensor`.

    Otherwise the partitioner may gather the activations of the whole batch where a shard of a weight lies. The gradient is
    reduce-scattered to the parameter's sharding.
    """
    current = _current_mesh.get()
    # Without fsdp every device holds its shard as it computes with it.
    if current is None or current[0].shape["fsdp"] == 1:
        return x
    mesh, rules = current
    gathered_rules = {k: ",".join(a for a in v.split(",") if a == "tensor") for k, v in rules.items()}
    stored, gathered = (
        NamedSharding(mesh, partition_spec(names, x.shape, mesh, r, "parameter")) for r in (rules, gathered_rules)
    )
    return x if stored.spec == gathered.spec else _reshard(x, stored, gathered)


# A custom gradient, so that the gradient is scattered at this place and not where the partitioner chooses.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: jax.Array, source: NamedSharding, target: NamedSharding) -> jax.Array:
    # Both constraints: with the target alone, the partitioner may choose another sharding for the source.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, source), target)


def _reshard_forward(x: jax.Array, source: NamedSharding, target: NamedSharding) -> tuple[jax.Array, None]:
    return _reshard(x, source, target), None


def _reshard_backward(source: NamedSharding, target: NamedSharding, _: None, g: jax.Array) -> tuple[jax.Array]:
    # The gradient takes the opposite way, again with both constraints.
    return (_reshard(g, target, source),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


def scatter_gradient(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Shards a gradient as the moments of its parameter (a reduce-scatter).

    It takes the parameter's sharding first. Otherwise the partitioner computes each shard of a gradient where it is needed,
    and gathers the activations of the whole batch there.
    """
    return _constrain_twice(x, names, partition_spec, optimizer_spec)


def gather_update(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """All-gathers an updated parameter from the sharding of its moments: once, not at each use."""
    return _constrain_twice(x, names, optimizer_spec, partition_spec)


def _constrain_twice(x: jax.Array, names: Sequence[str | None], *specs: Callable[..., PartitionSpec]) -> jax.Array:
    current = _current_mesh.get()
    if current is None:
        return x
    mesh, rules = current
    for spec_of in specs:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(names, x.shape, mesh, rules, "parameter")))
    return x
