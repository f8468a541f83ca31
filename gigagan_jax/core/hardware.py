"""What is known of accelerators without having one: peaks, memory and clocks, by the makers' data sheets."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      flops: dense bfloat16 FLOP/s at its peak.
      memory: GiB.
      clock: Hz, of a TPU, as the compiler's own figures have it; 0 where no estimate is made with it.
    """

    flops: float
    memory: float
    clock: float = 0.0


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
# What JAX calls a TPU: its v5p is plainly "TPU v5".
_TPUS = {
    "TPU v4": "v4",
    "TPU v5e": "v5e",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "TPU v6 lite": "v6e",
}
_GPUS = ("H100 PCIe", "H100 NVL", "H200", "H100", "A100")  # parts of their names; the narrower first


def chip_name(kind: str) -> str | None:
    """The key of CHIPS for a `device_kind` of JAX; None for a kind that is not there, such as a CPU."""
    return _TPUS.get(kind) or next((name for name in _GPUS if name in kind), None)


def count_chips(devices: Sequence[Any]) -> int:
    """Chips that the devices of JAX are on: some TPUs show each of a chip's two cores as a device."""
    where = lambda i, d: (getattr(d, "slice_index", 0), d.coords) if hasattr(d, "coords") else i
    return len({where(i, d) for i, d in enumerate(devices)})


def peak_flops(devices: Sequence[Any]) -> float | None:
    """bfloat16 FLOP/s of all these devices together at their peak; None where it is not known."""
    name = chip_name(devices[0].device_kind) if devices else None
    return CHIPS[name].flops * count_chips(devices) if name else None
