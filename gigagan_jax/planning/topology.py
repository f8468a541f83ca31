"""Accelerators by name: shapes of TPU slices, their sizes as sold, GPU nodes, and the bandwidths of their networks."""

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
class Bandwidths:
    """Bandwidths of one chip in bytes/s, from the vendors' pages; 0 where none is published.

    Attributes:
      memory: of the chip's memory.
      links: of all links inside a slice, in one direction (half of the published bidirectional rate).
      outside: share of the data-centre network.
    """

    memory: float
    links: float = 0.0
    outside: float = 0.0


# docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; NVIDIA's data sheets (NVLink, one direction).
BANDWIDTHS = {
    "v4": Bandwidths(1228e9, 300e9),
    "v5e": Bandwidths(819e9, 200e9, 3.125e9),
    "v5p": Bandwidths(2765e9, 600e9, 6.25e9),
    "v6e": Bandwidths(1640e9, 400e9, 12.5e9),
    "A100": Bandwidths(2039e9, 300e9),
    "H100": Bandwidths(3350e9, 450e9),
    "H200": Bandwidths(4800e9, 450e9),
}
# libtpu has compilers for these.
_TPUS = ("v4", "v5e", "v5p", "v6e")
# The sizes of these count TensorCores, two a chip; the sizes of the others count chips.
_CORES = {"v4": 2, "v5p": 2}
# GiB that a program cannot use, by the "available HBM" in the compiler's messages.
_RESERVED_GIB = {"v5e": 0.25, "v6e": 0.25}
# Google Cloud's accelerator types name the v5e like this.
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
_GPUS = {"a100": "A100", "h100": "H100", "h200": "H200"}
_EXAMPLES = "write v5p:4x4x8, v5p-256, v5e-256, v6e:16x16, or h100:8x4 (GPUs a node x nodes)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and their connections.

    Attributes:
      name: topology name of JAX's compiler, "v5p:4x4x8"; "h100:8x4" for GPUs.
      kind: key of hardware.CHIPS and of NETWORKS.
      shape: chips along each axis of one slice; GPUs of a node.
      slices: number of slices that the data-centre network joins; number of nodes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, for which libtpu has a compiler."""
        return self.kind in _TPUS

    @property
    def chip(self) -> Chip:
        """Peak, memory and clock of one chip."""
        return CHIPS[self.kind]

    @property
    def usable_bytes(self) -> int:
        """Bytes of one chip that a program can use."""
        return int((self.chip.memory - _RESERVED_GIB.get(self.kind, 0.0)) * 2**30)

    @property
    def bandwidths(self) -> Bandwidths:
        """Bandwidths of one chip."""
        return BANDWIDTHS[self.kind]

    @property
    def title(self) -> str:
        """'2 slices of v5p:4x4x8'"""
        return f"{self.slices} slices of {self.name}" if self.is_tpu and self.slices > 1 else self.name


def parse_topology(text: str, slices: int = 1) -> Topology:
    """The topology from the text of a flag: a shape, a size as sold, or GPUs.

    Raises:
      UserError: the chip is unknown, the size is not sold as one slice, or the text has another form.
    """
    name = text.strip().lower().removeprefix("gpu:")
    if slices < 1:
        raise UserError(f"--slices={slices}: a positive number of slices")
    # The chip's name is matched lazily: "v5litepod-16" ends at the separator, not at its first digit.
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
        # "h100:8" is one node.
        per_node, nodes = (*sizes, 1)[:2] if len(sizes) < 3 else (0, 0)
        if not per_node:
            raise UserError(f"--topology={text}: of GPUs write {kind}:8 or {kind}:8x4 (GPUs a node x nodes)")
        return Topology(name, _GPUS[kind], (per_node,), nodes)
    if kind not in _TPUS:
        raise UserError(f"--topology={text}: unknown chip {kind!r}; known: {', '.join((*_TPUS, *_GPUS))}")
    # "v5p-128" is a size, "v5p:4x4x8" a shape.
    if "-" in name:
        sizes = _shape_by_size(text, kind, sizes)
    return Topology(f"{kind}:{'x'.join(map(str, sizes))}", kind, sizes, slices)


def _shape_by_size(text: str, kind: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """v5p-128 -> (4, 4, 4): the shape of a slice by its size, with sides as equal as powers of two allow."""
    cores = _CORES.get(kind, 1)
    chips = sizes[0] // cores
    if len(sizes) > 1 or sizes[0] % cores or chips < 1 or chips & (chips - 1):
        unit = "TensorCores, two a chip" if cores == 2 else "chips"
        raise UserError(
            f"--topology={text}: sizes by name are powers of two ({kind} counts {unit}); "
            f"else name the shape, {kind}:AxB"
        )
    # chips = 2^k, spread over two axes (v5e, v6e) or three (v4, v5p).
    k = chips.bit_length() - 1
    if cores == 1:
        return 2 ** (k // 2), 2 ** ((k + 1) // 2)
    if k == 2:
        # Four chips are one host, which is flat.
        return 2, 2, 1
    return 2 ** (k // 3), 2 ** ((k + 1) // 3), 2 ** ((k + 2) // 3)


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for; no program can run on them.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: compiling for a TPU needs libtpu: pip install -e '.[tpu]' "
            f"(jax {jax.__version__}; no TPU is needed)"
        )
    more: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    # Again, for callers other than the command line; variables that are set already stay.
    prepare_environment()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more).devices
    except Exception as e:
        # libtpu raises exceptions of many types, none of them documented.
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"--topology={topology.name}: the compiler knows no such slice ({why})") from e


def prepare_environment() -> None:
    """Keeps JAX and libtpu from looking for an attached TPU; takes effect only before their first use."""
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    # Values of the user win: setdefault keeps them.
    for name, value in {
        # libtpu otherwise asks the metadata server of a Google Cloud VM.
        "TPU_SKIP_MDS_QUERY": "1",
        # No program runs on a TPU, so several processes may load libtpu without its lock file.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Without these two libtpu warns of missing host bounds and host names.
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
