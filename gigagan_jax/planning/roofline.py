"""The roofline of a matrix operation: its FLOPs at the chip's peak, or its bytes at the memory's bandwidth.

With little effort the compiler does not search for the windows of a matrix product. Its estimate is then up to twelve
times that of a program compiled with effort (docs/planning.md). The roofline does not depend on that search.
"""

import re

from gigagan_jax.planning.hlo import HloModule, Instruction, InstructionRun, shape_bytes

# "size=3x3 stride=2x2 pad=1_1x1_1"; absent entries are 1, or no padding.
_WINDOW = re.compile(r"window=\{([^}]*)\}")
# "b01f_01io->b01f": digits are the spatial dimensions of input, kernel and output.
_LABELS = re.compile(r"dim_labels=([0-9a-z]+)_([0-9a-z]+)->([0-9a-z]+)")


def parse_dimensions(shape: str) -> list[int]:
    """[64, 32, 32] of `bf16[64,32,32]{2,1,0}`."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in filter(None, found[1].split(","))] if found else []


def _count_taps(outputs: int, length: int, taps: int, stride: int, low: int, lhs: int, rhs: int) -> int:
    """Pairs of an output and a tap along one dimension that read an input, not padding or the zeros of a dilation."""
    # Counting each pair is exact for every padding and dilation, and dimensions are short.
    last = (length - 1) * lhs
    total = 0
    for k in range(taps):
        for o in range(outputs):
            place = o * stride + k * rhs - low
            total += 0 <= place <= last and place % lhs == 0
    return total


def convolution_flops(i: Instruction, left: str, right: str) -> int:
    """FLOPs of a convolution of operands with the shapes `left` and `right`; on a TPU every matrix product is one."""
    # Without dim_labels the FLOPs are unknown; 0 leaves the estimate at the cycles.
    labels = _LABELS.search(i.rest)
    if not labels:
        return 0
    inputs, kernel, outputs = labels.groups()
    a, b, c = parse_dimensions(left), parse_dimensions(right), parse_dimensions(i.shape)
    spatial = [s for s in outputs if s.isdigit()]
    window: dict[str, list[str]] = {}
    found = _WINDOW.search(i.rest)
    for part in found[1].split() if found else ():
        name, _, value = part.partition("=")
        window[name] = value.split("x")
    get = lambda name, at, default: int(window[name][at]) if name in window else default
    # Two FLOPs, a multiplication and an addition, for each input feature of the kernel.
    total = 2 * c[outputs.index("b")] * c[outputs.index("f")] * b[kernel.index("i")]
    for s in spatial:
        at = int(s)
        pads = window.get("pad")
        # Only the padding before the first element shifts the window.
        low = int(pads[at].split("_")[0]) if pads else 0
        total *= _count_taps(
            c[outputs.index(s)],
            a[inputs.index(s)],
            get("size", at, 1),
            get("stride", at, 1),
            low,
            get("lhs_dilate", at, 1),
            get("rhs_dilate", at, 1),
        )
    return total


def instruction_flops(module: HloModule, computation: str, i: Instruction) -> int:
    """FLOPs of one execution of an instruction: its convolutions, those inside fusions included."""
    if i.opcode == "convolution":
        shapes = {x.name: x.shape for x in module.computations[computation]}
        left, right = i.operands[:2]
        return convolution_flops(i, shapes[left], shapes[right])
    # Additions and other elementwise work run on the vector units, beside the matrix units.
    inner = i.read_attribute("calls") if i.opcode == "fusion" else ""
    return sum(instruction_flops(module, inner, x) for x in module.computations.get(inner, ()))


def instruction_bytes(module: HloModule, computation: str, i: Instruction) -> int:
    """Bytes that one execution of an instruction reads and writes: its operands and its result, each once."""
    # An operand that stays in on-chip memory is counted too, which makes this an upper bound of the traffic.
    shapes = {x.name: x.shape for x in module.computations[computation]}
    return shape_bytes(i.shape) + sum(shape_bytes(shapes.get(o, "")) for o in i.operands)


def expected_seconds(module: HloModule, run: InstructionRun, clock: float, peak: float, bandwidth: float) -> float:
    """Seconds of all executions of an operation in one step: the smaller of cycles and roofline.

    Only operations on the matrix units have a roofline here: for others the compiler does not search for windows.

    Args:
      clock: Hz.
      peak: FLOP/s.
      bandwidth: bytes/s of the memory.
    """
    i = run.instruction
    expected = (i.estimated_cycles or 0) / clock
    work = instruction_flops(module, run.computation, i) if i.uses_matrix_units else 0
    if work:
        expected = min(expected, max(work / peak, instruction_bytes(module, run.computation, i) / bandwidth))
    return expected * run.times
