"""Machines by name: shapes of TPU slices, the sizes Google sells them by, GPU nodes, and how fast their networks are."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from gigagan_jax.core.errors import UserError
from gigagan_jax.core.hardware import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Network:
    """Bandwidths of one chip, bytes/s, by the makers' pages; 0 where none is published.

    Attributes:
      memory: of its own memory.
      links: what it can send over all its links inside a slice (half of what is published as bidirectional).
      outside: its share of the data-centre network.
    """

    memory: float
    links: float = 0.0
    outside: float = 0.0


# docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; NVIDIA's data sheets (NVLink, one direction).
NETWORKS = {
    "v4": Network(1228e9, 300e9),
    "v5e": Network(819e9, 200e9, 3.125e9),
    "v5p": Network(2765e9, 600e9, 6.25e9),
    "v6e": Network(1640e9, 400e9, 12.5e9),
    "A100": Network(2039e9, 300e9),
    "H100": Network(3350e9, 450e9),
    "H200": Network(4800e9, 450e9),
}
_TPUS = ("v4", "v5e", "v5p", "v6e")
_CORES = {"v4": 2, "v5p": 2}  # sold by TensorCores, two a chip; the others by chips
_RESERVED = {"v5e": 0.25, "v6e": 0.25}  # GiB, as the compiler's "available HBM" has it
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
_GPUS = {"a100": "A100", "h100": "H100", "h200": "H200"}
_EXAMPLES = "write v5p:4x4x8, v5p-256, v5e-256, v6e:16x16, or h100:8x4 (GPUs a node x nodes)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are joined.

    Attributes:
      name: as JAX's compiler takes it, "v5p:4x4x8"; "h100:8x4" of GPUs.
      kind: key of hardware.CHIPS and of NETWORKS.
      shape: chips along each axis of one slice; GPUs a node.
      slices: how many of them, joined by the data-centre network; nodes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """All chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def tpu(self) -> bool:
        """Whether a compiler for it is at hand."""
        return self.kind in _TPUS

    @property
    def chip(self) -> Chip:
        """Peak, memory and clock of one chip."""
        return CHIPS[self.kind]

    @property
    def usable(self) -> int:
        """Bytes of one chip that a program can have."""
        return int((self.chip.memory - _RESERVED.get(self.kind, 0.0)) * 2**30)

    @property
    def network(self) -> Network:
        """Bandwidths of one chip."""
        return NETWORKS[self.kind]

    @property
    def title(self) -> str:
        """'2 slices of v5p:4x4x8'"""
        return f"{self.slices} slices of {self.name}" if self.tpu and self.slices > 1 else self.name


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that a user wrote: a shape, a size as it is sold, or GPUs.

    Raises:
      UserError: an unknown chip, a size that is not sold as one slice, something else altogether.
    """
    name = text.strip().lower().removeprefix("gpu:")
    if slices < 1:
        raise UserError(f"--slices={slices}: a positive number of slices")
    found = re.fullmatch(r"([a-z0-9]+?)[:x-](\d+(?:x\d+)*)", name)
    if not found:
        raise UserError(f"--topology={text}: {_EXAMPLES}")
    kind, sizes = found[1], tuple(int(n) for n in found[2].split("x"))
    kind = _ALIASES.get(kind, kind)
    if not all(sizes):
        raise UserError(f"--topology={text}: every size is positive; {_EXAMPLES}")
    if kind in _GPUS:
        if slices > 1:
            raise UserError(f"--topology={text} --slices={slices}: of GPUs name the nodes, {kind}:{sizes[0]}x{slices}")
        per_node, nodes = (*sizes, 1)[:2] if len(sizes) < 3 else (0, 0)
        if not per_node:
            raise UserError(f"--topology={text}: of GPUs write {kind}:8 or {kind}:8x4 (GPUs a node x nodes)")
        return Topology(name, _GPUS[kind], (per_node,), nodes)
    if kind not in _TPUS:
        raise UserError(f"--topology={text}: unknown chip {kind!r}; known: {', '.join((*_TPUS, *_GPUS))}")
    if "-" in name:
        sizes = _sold(text, kind, sizes)
    return Topology(f"{kind}:{'x'.join(map(str, sizes))}", kind, sizes, slices)


def _sold(text: str, kind: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """v5p-128 -> (4, 4, 4): the shape of a slice by its size, as equal sides as powers of two allow."""
    cores = _CORES.get(kind, 1)
    chips = sizes[0] // cores
    if len(sizes) > 1 or sizes[0] % cores or chips < 1 or chips & (chips - 1):
        unit = "TensorCores, two a chip" if cores == 2 else "chips"
        raise UserError(
            f"--topology={text}: sizes by name are powers of two ({kind} counts {unit}); else name the shape, {kind}:AxB"
        )
    k = chips.bit_length() - 1
    if cores == 1:
        return 2 ** (k // 2), 2 ** ((k + 1) // 2)
    if k == 2:
        return 2, 2, 1  # one host
    return 2 ** (k // 3), 2 ** ((k + 1) // 3), 2 ** ((k + 2) // 3)


def devices(topology: Topology) -> Sequence[Any]:
    """The devices that the compiler compiles for; nothing can run on them.

    Raises:
      UserError: libtpu is not installed, or it knows no such slice.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: compiling for a TPU needs libtpu: pip install -e '.[tpu]' "
            f"(jax {jax.__version__}; no TPU is needed)"
        )
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    prepare_environment()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more).devices
    except Exception as e:
        # libtpu raises whatever it meets.
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"--topology={topology.name}: the compiler knows no such slice ({why})") from e


def prepare_environment() -> None:
    """Tells JAX and libtpu not to look for the TPU that is not there. Before either does anything."""
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a TPU: no lock file is needed
        # Without these two it writes of missing host bounds and host names.
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
