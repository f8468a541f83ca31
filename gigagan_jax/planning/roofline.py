"""What a matrix operation of a compiled program needs at least: its multiplications at the peak, or its bytes at the
memory's speed.

With little effort the compiler does not search for the windows in which it walks over a product, and expects a good
program to be ten times slower than it would make it with effort (docs/planning.md). Roofs do not depend on that search.
"""

import re

from gigagan_jax.planning.hlo import Instruction, Module, Run, size

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=([0-9a-z]+)_([0-9a-z]+)->([0-9a-z]+)")


def dimensions(shape: str) -> list[int]:
    """[64, 32, 32] of `bf16[64,32,32]{2,1,0}`."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in filter(None, found[1].split(","))] if found else []


def _taps(out: int, length: int, taps: int, stride: int, low: int, lhs: int, rhs: int) -> int:
    """Pairs of an output and a tap along one dimension that meet an input; neither padding nor the zeros of a dilation."""
    last = (length - 1) * lhs
    total = 0
    for k in range(taps):
        for o in range(out):
            place = o * stride + k * rhs - low
            total += 0 <= place <= last and place % lhs == 0
    return total


def convolution_flops(i: Instruction, left: str, right: str) -> int:
    """FLOPs of a convolution (on a TPU every matrix product is one) whose operands have the shapes `left` and `right`."""
    labels = _LABELS.search(i.rest)
    if not labels:
        return 0
    inputs, kernel, outputs = labels.groups()
    a, b, c = dimensions(left), dimensions(right), dimensions(i.shape)
    spatial = [s for s in outputs if s.isdigit()]
    window: dict[str, list[str]] = {}
    found = _WINDOW.search(i.rest)
    for part in found[1].split() if found else ():
        name, _, value = part.partition("=")
        window[name] = value.split("x")
    get = lambda name, at, default: int(window[name][at]) if name in window else default
    total = 2 * c[outputs.index("b")] * c[outputs.index("f")] * b[kernel.index("i")]
    for s in spatial:
        at = int(s)
        pads = window.get("pad")
        low = int(pads[at].split("_")[0]) if pads else 0
        total *= _taps(
            c[outputs.index(s)],
            a[inputs.index(s)],
            get("size", at, 1),
            get("stride", at, 1),
            low,
            get("lhs_dilate", at, 1),
            get("rhs_dilate", at, 1),
        )
    return total


def flops(module: Module, computation: str, i: Instruction) -> int:
    """FLOPs of one run of an instruction: of the convolutions in it, those inside of fusions included."""
    if i.opcode == "convolution":
        shapes = {x.name: x.shape for x in module.computations[computation]}
        left, right = i.operands[:2]
        return convolution_flops(i, shapes[left], shapes[right])
    inner = i.attribute("calls") if i.opcode == "fusion" else ""
    return sum(flops(module, inner, x) for x in module.computations.get(inner, ()))


def traffic(module: Module, computation: str, i: Instruction) -> int:
    """Bytes that one run of an instruction reads and writes: its operands and its result, each once."""
    shapes = {x.name: x.shape for x in module.computations[computation]}
    return size(i.shape) + sum(size(shapes.get(o, "")) for o in i.operands)


def seconds(module: Module, run: Run, clock: float, peak: float, bandwidth: float) -> float:
    """Of all runs of an operation in one step: by the compiler's cycles, or by the roof where that is less.

    Only what runs on the matrix units has a roof here: of other operations the compiler does not search for windows.

    Args:
      clock: Hz.
      peak: FLOP/s.
      bandwidth: of the memory, bytes/s.
    """
    i = run.instruction
    expected = (i.cycles or 0) / clock
    work = flops(module, run.computation, i) if i.matrix else 0
    if work:
        expected = min(expected, max(work / peak, traffic(module, run.computation, i) / bandwidth))
    return expected * run.times
