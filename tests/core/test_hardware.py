"""Names of devices, as JAX has them, to figures of chips."""

import dataclasses

import jax
import pytest

from gigagan_jax.core.hardware import CHIPS, chip_name, count_chips, peak_flops, smallest_card


@dataclasses.dataclass
class Device:
    device_kind: str


@dataclasses.dataclass
class Core(Device):
    coords: tuple
    slice_index: int = 0


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        # An inference chip that is not in the table.
        ("TPU v4 lite", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_kinds(kind, name):
    assert chip_name(kind) == name
    assert peak_flops([Device(kind)] * 4) == (4 * CHIPS[name].flops if name else None)


def test_two_cores_are_one_chip_and_slices_are_apart():
    # Two slices of two chips, and two cores a chip.
    cores = [Core("TPU v4", (x, 0, 0), s) for s in (0, 1) for x in (0, 1) for _ in (0, 1)]
    assert count_chips(cores) == 4
    assert peak_flops(cores) == 4 * 275e12


def test_of_a_cpu_nothing_is_known():
    assert peak_flops(jax.devices()) is None
    assert peak_flops([]) is None
    # CPU devices have no coordinates, so each counts as a chip.
    assert count_chips(jax.devices()) == 8


def test_the_smallest_card_has_room_in_the_share_that_jax_takes():
    gb = 1e9
    assert smallest_card(1) == 8
    assert smallest_card(6 * gb) == 8  # three quarters of it
    assert smallest_card(6 * gb + 1) == 12
    assert smallest_card(60 * gb + 1) is None
