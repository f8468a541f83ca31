"""What a chip sends to others in one step, by kind, from the compiled program.

Bytes that one chip of a group of n sends, as a ring moves them; `size` is the array that the chip has or gets in whole:

    all-reduce 2 (n - 1) / n size, all-gather (n - 1) / n size, reduce-scatter (n - 1) / n size, all-to-all (n - 1) / n size,
    collective-permute size

None of them grows with n for an array of one size, which is why weak scaling is possible at all.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from gigagan_jax.planning.hlo import Instruction, Module, size

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_ALIASES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
_TRANSFER = "_xla_megascale_transfer_type"
_MOST = 64  # how deep fusions may be inside of each other


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of the compiled program.

    Attributes:
      kind: of KINDS.
      size: bytes of the array that each chip has or gets in whole.
      group: chips that exchange.
      outside: whether a group has chips of several slices.
      overlapped: whether the compiler lets other operations run meanwhile.
      times: how often it runs in one step.
      op_name, frame: where it comes from.
    """

    kind: str
    size: int
    group: int
    outside: bool
    overlapped: bool
    times: int
    op_name: str
    frame: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends for one run of it."""
        n = self.group
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": float(n > 1)}.get(self.kind, (n - 1) / n)
        return share * self.size


def collectives(module: Module, slices: Sequence[int]) -> list[Collective]:
    """All exchanges of one step. A start and its end are one, and so are the fusions that share an asynchronous one.

    Args:
      module: the compiled program.
      slices: the slice of each device in the order of the mesh.
    """
    out: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for run in module.runs():
        for i, inside in _found(module, run.instruction):
            kind = i.opcode.removesuffix("-start")
            # Fusions between the start and the end of an asynchronous exchange repeat it, with one channel.
            shared = "async_collective_fusion_config" in i.rest
            if shared:
                channel = re.search(r"channel_id=(\d+)", i.rest)
                mark = (run.computation, channel[1] if channel else i.name)
                if mark in seen:
                    continue
                seen.add(mark)
            groups = replica_groups(i.rest, len(slices))
            overlapped = shared or i.opcode.endswith("-start") or run.instruction.opcode == "async-start"
            out.append(_collective(_ALIASES.get(kind, kind), i, groups, inside, slices, overlapped, run.times))
    return out


def _collective(
    kind: str,
    i: Instruction,
    groups: list[list[int]],
    inside: str,
    slices: Sequence[int],
    overlapped: bool,
    times: int,
) -> Collective:
    group = max((len(g) for g in groups), default=1)
    array = size(_result(i))
    if kind == "send":
        # To the other slices, by way of the hosts; what is exchanged inside of each slice stands beside it.
        found = re.search(rf'{_TRANSFER}="(\w+)"', i.rest)
        kind, group = found[1].lower().replace("_", "-") if found else "", len(set(slices))
        array = size(_elements(i.shape)[0]) * (group if kind == "all-gather" else 1)
        return Collective(
            kind if kind in KINDS else "collective-permute", array, group, True, True, times, i.op_name, i.frame
        )
    if inside.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU compiler's form of it: a fusion of the sum and of the part that is kept
    elif kind == "reduce-scatter":
        array *= group
    outside = any(len({slices[d] for d in g if d < len(slices)}) > 1 for g in groups)
    return Collective(kind, array, group, outside, overlapped, times, i.op_name, i.frame)


def _found(module: Module, i: Instruction, inside: str = "", depth: int = 0) -> list[tuple[Instruction, str]]:
    """The exchanges that an operation is or has in its fusion: (instruction, the computation that it is in)."""
    base = i.opcode.removesuffix("-start")
    if base in KINDS or base in _ALIASES or (i.opcode == "send" and _TRANSFER in i.rest):
        return [(i, inside)]
    if i.opcode != "fusion" or depth > _MOST:
        return []
    called = i.attribute("calls")
    return [x for part in module.computations.get(called, ()) for x in _found(module, part, called, depth + 1)]


def _result(i: Instruction) -> str:
    """The shape of what an exchange gives; a start also carries what it was given and flags of its own."""
    if i.opcode in ("all-gather-start", "collective-permute-start") and i.shape.startswith("("):
        return _elements(i.shape)[1]
    return i.shape


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    out, depth, current = [], 0, ""
    for c in shape[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            out.append(current)
            current = ""
        else:
            current += c
    return [*out, current]


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """Groups of devices that exchange, of an instruction's attributes.

    As lists `{{0,1},{2,3}}`, as a reshaped range `[2,4]<=[4,2]T(1,0)`, as axes of a mesh `mesh['a'=4,'b'=2] {'a'}`, or as the
    pairs of a permutation; nothing said, or nothing known, is all devices.
    """
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])]
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _range(found[2]).reshape([int(n) for n in found[1].split(",")]).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _by_axes(found[1], found[2], found[3])
    return [list(range(devices))]


def _range(text: str) -> np.ndarray:
    """[4,2]T(1,0) -> a range, reshaped, transposed and flat again"""
    dims, _, order = text.partition("T")
    shape = [int(n) for n in dims.strip("[]").split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([int(n) for n in order.strip("()").split(",")]) if order else numbers).reshape(-1)


def _by_axes(axes: str, between: str, used: str) -> list[list[int]]:
    """mesh['a'=4,'b'=2] {'a'}: one group for each place along the other axes; a part of an axis is 'a':(before)size."""
    sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = list(sizes)
    order = re.search(r"(\[[\d,]+\](?:T\([\d,]+\))?)", between)
    numbers = _range(order[1]) if order else np.arange(math.prod(sizes.values()))
    # Each axis as (before, used, after): the whole of it, a part, or nothing.
    split: list[int] = []
    inner: list[int] = []
    parts = {k: (int(b or 1), int(n or 0)) for k, b, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)}
    for name in names:
        before, n = parts.get(name, (1, 1))
        n = n or sizes[name]
        split += [before, n, sizes[name] // (before * n)]
        inner.append(3 * names.index(name) + 1)
    outer = [a for a in range(len(split)) if a not in inner]
    group = math.prod(split[a] for a in inner)
    return numbers.reshape(split).transpose(outer + inner).reshape(-1, group).tolist()


def summary(found: Sequence[Collective]) -> list[dict]:
    """By kind and network: bytes that a chip sends in a step, how many exchanges, what part is overlapped."""
    groups: dict[tuple[str, bool], list[Collective]] = defaultdict(list)
    for c in found:
        groups[c.kind, c.outside].append(c)
    rows = []
    for (kind, outside), some in sorted(groups.items()):
        sent = sum(c.sent * c.times for c in some)
        rows.append(
            {
                "kind": kind,
                "network": "between slices" if outside else "inside a slice",
                "bytes_sent": sent,
                "bytes_overlapped": sum(c.sent * c.times for c in some if c.overlapped),
                "exchanges": sum(c.times for c in some),
                "largest_group": max(c.group for c in some),
            }
        )
    return sorted(rows, key=lambda row: -row["bytes_sent"])
