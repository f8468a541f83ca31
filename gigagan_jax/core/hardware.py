"""Peak FLOP/s, memory and clocks of accelerators, from the makers' data sheets."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      flops: peak dense bfloat16 FLOP/s.
      memory: GiB.
      clock: Hz, of a TPU, from the figures of its compiler; 0 where no estimate uses it.
    """

    flops: float
    memory: float
    clock: float = 0.0


# GPUs: without sparsity, which doubles the figures in the headlines of their data sheets.
CHIPS = {
    "v4": Chip(275e12, 32, 1.05e9),
    "v5e": Chip(197e12, 16, 1.5e9),
    "v5p": Chip(459e12, 95, 1.75e9),
    "v6e": Chip(918e12, 32, 1.75e9),
    "A100": Chip(312e12, 80),
    "H100 PCIe": Chip(756e12, 80),
    "H100 NVL": Chip(835e12, 94),
    "H100": Chip(989e12, 80),
    "H200": Chip(989e12, 141),
}
# `device_kind` of JAX -> chip. JAX calls a v5p plainly "TPU v5".
_TPUS = {
    "TPU v4": "v4",
    "TPU v5e": "v5e",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "TPU v6 lite": "v6e",
}
# Parts of the names that JAX reports. "H100" is part of the first two names, so it comes later.
_GPUS = ("H100 PCIe", "H100 NVL", "H200", "H100", "A100")

# GB of the memory of usual graphics cards, and the share of it that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says other.
CARDS = (8, 12, 16, 24, 32, 48, 80)
JAX_SHARE = 0.75


def smallest_card(needed: float) -> int | None:
    """The smallest of CARDS, in GB, whose share for JAX holds so many bytes; None where none does."""
    return next((size for size in CARDS if needed <= size * 1e9 * JAX_SHARE), None)


def chip_name(kind: str) -> str | None:
    """The key of CHIPS for a `device_kind` of JAX; None for an unknown kind, such as a CPU."""
    return _TPUS.get(kind) or next((name for name in _GPUS if name in kind), None)


def count_chips(devices: Sequence[Any]) -> int:
    """Number of chips of these devices. Some TPUs show each of a chip's two cores as a device."""
    # Cores of one chip share its coordinates. Devices without coordinates (GPUs, CPUs) are chips of their own.
    place = lambda i, d: (getattr(d, "slice_index", 0), d.coords) if hasattr(d, "coords") else i
    return len({place(i, d) for i, d in enumerate(devices)})


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Peak bfloat16 FLOP/s of all these devices together; None for unknown devices."""
    name = chip_name(devices[0].device_kind) if devices else None
    return CHIPS[name].flops * count_chips(devices) if name else None


def memory_stats(device: Any) -> dict[str, int] | None:
    """Memory of a device in bytes, by JAX's names; None where it does not tell, as a CPU."""
    try:
        return device.memory_stats()
    # Backends without the function raise errors of several types.
    except Exception:
        return None
