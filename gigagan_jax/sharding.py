"""Device mesh, logical-axis rules, shardings of parameters and activations. Everything here fails closed.

A parameter carries one logical axis name per dimension; the rules of the config map names to mesh axes. An unknown name,
a mesh axis used twice in one array, and a dimension that does not divide are errors, never silent replication.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gigagan_jax.config import MeshConfig
from gigagan_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

_current: contextvars.ContextVar[tuple[Any, Mapping[str, str]] | None] = contextvars.ContextVar("mesh", default=None)


def check_rules(rules: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Raises UserError for a rule of an unknown logical axis, or one that names no mesh axis."""
    for name in rules:
        if name not in known:
            raise UserError(f"unknown config key config.rules.{name}; known: {', '.join(sorted(known))}")
        _axes(name, rules, f"config.rules.{name}")


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along (data, fsdp, tensor), with -1 filled in.

    Raises:
      UserError: the mesh does not fit the number of devices.
    """
    sizes = [getattr(config, a) for a in AXES]
    shown = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
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
    """The mesh of the config over `devices` (all of them by default)."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The same mesh without any device, for specs and sizes."""
    return AbstractMesh(mesh_shape(config, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> int:
    """Into how many parts the batch axis is cut."""
    return math.prod(mesh.shape[a] for a in _axes("batch", rules, "batch"))


def check_batch(batch: int, micro_batches: int, mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> None:
    """Raises UserError when a micro-batch does not divide over the devices that share the batch."""
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
            raise UserError(
                f"{where} {tuple(shape)}: dimension {name}={dim} does not divide over {'x'.join(axes)}={size}"
            )
        for a in axes:
            if a in used:
                raise UserError(f"{where}: mesh axis {a!r} would be used twice ({', '.join(map(str, names))})")
            used.add(a)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


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


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with the sharding that its logical axis `names` have in the current mesh."""
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, x.shape, mesh, rules, "activation")))
