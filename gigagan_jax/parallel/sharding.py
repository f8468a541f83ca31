"""Device mesh, logical-axis rules, shardings of parameters and activations. Everything here fails closed.

A parameter carries one logical axis name per dimension; the rules of the config map names to mesh axes. An unknown name,
a mesh axis used twice in one array, and a dimension that does not divide are errors, never silent replication. Moments and
averages are cut as their parameter is, and by the axes of `rules.optimizer` besides (ZeRO-1: Rajbhandari et al., 2020).
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

AXES = ("slice", "data", "fsdp", "tensor")  # slowest network first
OPTIMIZER = "optimizer"  # the rule that names no dimension
# Moments and averages of fewer elements stay whole: cutting one saves less than 64 kB, and costs a collective.
LEAST_CUT = 2**14
# The order in which XLA's partitioner keeps the examples of a batch where they belong; see DEFAULT_RULES.
BATCH_ORDER = ("fsdp", "slice", "data")

_current: contextvars.ContextVar[tuple[Any, Mapping[str, str]] | None] = contextvars.ContextVar("mesh", default=None)


def check_rules(rules: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raises UserError for a rule of an unknown logical axis, or one that names no mesh axis."""
    for name in rules:
        if name not in known:
            raise UserError(f"unknown config key config.rules.{name}; known: {', '.join(sorted(known))}")
        _axes(name, rules, f"config.rules.{name}")


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Devices along AXES, with -1 filled in.

    Raises:
      UserError: the mesh does not fit the number of devices.
    """
    sizes = [config.slices, config.data, config.fsdp, config.tensor]
    names = ("slices", *AXES[1:])
    # Slices are named where there are several.
    shown = " x ".join(f"{a}={s}" for a, s in zip(names, sizes, strict=True) if a != "slices" or s != 1)
    if any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"config.mesh ({shown}): every axis is a positive number, or -1 for what the others leave")
    if sizes.count(-1) > 1:
        raise UserError(f"config.mesh ({shown}): only one axis may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if devices % known:
            raise UserError(f"config.mesh ({shown}): {known} does not divide the {devices} devices here")
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise UserError(
            f"config.mesh ({shown}) needs {known} devices, there are {devices}; set one axis to -1 to fill up"
        )
    return tuple(sizes)  # type: ignore[return-value]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config over `devices` (all of them by default).

    With several slices, each axis but the first stays within one. Devices that do not say which slice they are of (CPUs,
    GPUs of one machine) are cut into groups in their order.

    Raises:
      UserError: the mesh does not fit the number of devices, or a slice would be cut.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    slices, found = shape[0], len(groups)
    # A TPU's slices have no other network between them; machines with GPUs may well be taken together.
    exact = devices[0].platform == "tpu" and found > 1
    even = len({len(g) for g in groups.values()}) == 1 and not (slices % found and found % slices)
    if (exact and slices != found) or (slices > 1 and not even):
        raise UserError(
            f"config.mesh.slices={slices}: the {len(devices)} devices are of {found} slices, and a part of the mesh would "
            f"lie across two; use --config.mesh.slices={found}"
        )
    if slices == 1:
        with contextlib.suppress(NotImplementedError):  # an axis that is no product of whole axes of the torus
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    ordered = [device for k in sorted(groups) for device in groups[k]]
    each = len(ordered) // slices
    parts = [
        mesh_utils.create_device_mesh(shape[1:], ordered[i : i + each], allow_split_physical_axes=True)
        for i in range(0, len(ordered), each)
    ]
    return Mesh(np.stack(parts), AXES, axis_types=types)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The same mesh without any device, for specs and sizes."""
    return AbstractMesh(mesh_shape(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> int:
    """Into how many parts the batch axis is cut."""
    return math.prod(mesh.shape[a] for a in _axes("batch", rules, "batch"))


def check_batch(batch: int, micro_batches: int, mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> None:
    """Raises UserError when a micro-batch does not divide over the devices that share it, or its axes are wrong for the mesh."""
    idle = [a for a in AXES[:2] if mesh.shape[a] > 1 and a not in _axes("batch", rules, "batch")]
    if idle:
        raise UserError(
            f"config.rules.batch={rules['batch']!r} leaves out the mesh axis {idle[0]!r}: its {mesh.shape[idle[0]]} copies of "
            f"the model would all see the same images; use {','.join(BATCH_ORDER)!r}"
        )
    axes = [a for a in _axes("batch", rules, "batch") if mesh.shape[a] > 1]
    if mesh.shape["tensor"] > 1 and axes != [a for a in BATCH_ORDER if a in axes]:
        raise UserError(
            f"config.rules.batch={rules['batch']!r}: in this order XLA mixes up the examples of a batch between devices when "
            f"tensor > 1; use {','.join(BATCH_ORDER)!r}"
        )
    shards = batch_shards(mesh, rules)
    micro = batch // micro_batches
    if micro % shards:
        raise UserError(
            f"config.batch_size={batch} in {micro_batches} micro-batches is {micro} images at a time, "
            f"which does not divide over {shards} devices ({rules['batch']}); use a multiple of {shards * micro_batches}"
        )


def _axes(name: str | None, rules: Mapping[str, str], where: str) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in rules:
        raise UserError(f"{where}: logical axis {name!r} has no rule; known: {', '.join(sorted(rules))}")
    axes = tuple(a for a in rules[name].split(",") if a)
    for a in axes:
        if a not in AXES:
            raise UserError(f"config.rules.{name}={rules[name]!r}: {a!r} is not a mesh axis ({', '.join(AXES)})")
    return axes


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Mapping[str, str], where: str
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions carry the logical `names`.

    Raises:
      UserError: no rule for a name, a mesh axis used twice, or a dimension that does not divide.
    """
    if len(names) != len(shape):
        raise ValueError(f"{where}: {len(names)} axis names for shape {tuple(shape)}")
    entries: list[Any] = []
    used: set[str] = set()
    for name, dim in zip(names, shape, strict=True):
        axes = tuple(a for a in _axes(name, rules, where) if mesh.shape[a] > 1)
        size = math.prod(mesh.shape[a] for a in axes)
        if dim % size:
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
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def optimizer_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Mapping[str, str], where: str
) -> PartitionSpec:
    """PartitionSpec of the moments and the average of a parameter: as the parameter, and cut by `rules.optimizer` too.

    The cut goes through the dimension that is longest on a device of those that divide, the last of equals. An array without
    one, and one with fewer than LEAST_CUT elements, stays as its parameter.

    Raises:
      UserError: as `spec`.
    """
    own = spec(names, shape, mesh, rules, where)
    parts = [((e,) if isinstance(e, str) else tuple(e or ())) for e in own]
    axes = tuple(a for a in _axes(OPTIMIZER, rules, where) if mesh.shape[a] > 1)
    size = math.prod(mesh.shape[a] for a in axes)
    if size == 1 or math.prod(shape) < LEAST_CUT or any(a in p for a in axes for p in parts):
        return own
    local = [d // math.prod(mesh.shape[a] for a in p) for d, p in zip(shape, parts, strict=True)]
    best = max((i for i, d in enumerate(local) if d % size == 0), key=lambda i: (local[i], i), default=None)
    if best is None:
        return own
    parts[best] += axes
    return PartitionSpec(*(p[0] if len(p) == 1 else p or None for p in parts))


def local_rows(where: NamedSharding, shape: Sequence[int]) -> list[int]:
    """Rows (places along the first axis) of an array that this process's devices hold, ascending."""
    slices = [index[0] for index in where.addressable_devices_indices_map(tuple(shape)).values()]  # type: ignore[index]
    return sorted({row for s in slices for row in range(*s.indices(shape[0]))})


def from_rows(local: np.ndarray, rows: Sequence[int], where: NamedSharding, length: int) -> jax.Array:
    """The global array of `length` rows of which this process has `local`, its `rows`; see `local_rows`."""
    place = {row: i for i, row in enumerate(rows)}

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(length)
        return local[place[start] : place[start] + stop - start][(slice(None), *index[1:])]

    return jax.make_array_from_callback((length, *local.shape[1:]), where, part)


@contextlib.contextmanager
def use(mesh: Any, rules: Mapping[str, str]) -> Iterator[None]:
    """Within it, `constrain` applies `rules` on `mesh`. Without it models run unconstrained, as on one device."""
    token = _current.set((mesh, rules))
    try:
        yield
    finally:
        _current.reset(token)


def platform() -> str:
    """What the current mesh's devices are ("cpu", "gpu", "tpu"), whatever the host is; without a mesh JAX's default."""
    current = _current.get()
    if current is None or not isinstance(current[0], Mesh):
        return jax.default_backend()
    return current[0].devices.flat[0].platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with the sharding that its logical axis `names` have in the current mesh."""
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh, rules, "activation")))


def gather(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """A parameter as a layer computes with it: put together from the devices that share it, but for what `tensor` cuts.

    Left to itself the partitioner may bring the activations of the whole batch to where a part of a weight lies. The gradient
    comes back as the parameter lies, summed and scattered.
    """
    current = _current.get()
    if current is None or current[0].shape["fsdp"] == 1:
        return x
    mesh, rules = current
    whole = {k: ",".join(a for a in v.split(",") if a == "tensor") for k, v in rules.items()}
    there, here = (NamedSharding(mesh, spec(names, x.shape, mesh, r, "parameter")) for r in (rules, whole))
    return x if there.spec == here.spec else _moved(x, there, here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: NamedSharding, here: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, there), here)


def _moved_forward(x: jax.Array, there: NamedSharding, here: NamedSharding) -> tuple[jax.Array, None]:
    return _moved(x, there, here), None


def _moved_backward(there: NamedSharding, here: NamedSharding, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (_moved(g, here, there),)


_moved.defvjp(_moved_forward, _moved_backward)


def to_optimizer(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """A gradient, cut as the moments of its parameter are in the current mesh.

    By way of the parameter's own sharding: else the partitioner works out each part of a gradient where it is wanted, and
    brings the activations of the whole batch there.
    """
    return _constrain_twice(x, names, spec, optimizer_spec)


def from_optimizer(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """A parameter that was worked out as its moments are cut, put together again: once, and not wherever it is used."""
    return _constrain_twice(x, names, optimizer_spec, spec)


def _constrain_twice(x: jax.Array, names: Sequence[str | None], *specs: Callable[..., PartitionSpec]) -> jax.Array:
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    for place in specs:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place(names, x.shape, mesh, rules, "parameter")))
    return x
