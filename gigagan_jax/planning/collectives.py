"""Bytes that a chip sends to others in one step, by kind of collective, read from the compiled program.

One chip of a group of n sends these bytes in a ring; `size` is of the whole array that the chip holds or receives:

    all-reduce 2 (n - 1) / n size, collective-permute size
    all-gather (n - 1) / n size, reduce-scatter (n - 1) / n size, all-to-all (n - 1) / n size

None of them grows with n for an array of one size. This is what makes weak scaling possible.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from gigagan_jax.planning.hlo import HloModule, Instruction, shape_bytes

# The five kinds of the report, by their names in HLO.
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# Rare kinds count as the common one that moves as many bytes.
_ALIASES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}
# A send to another slice goes through the host; this attribute names the collective that it belongs to.
_TRANSFER_TYPE = "_xla_megascale_transfer_type"
# A limit on nested fusions, so that a malformed program cannot recurse without end.
_MAX_FUSION_DEPTH = 64


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the compiled program.

    Attributes:
      kind: of KINDS.
      array_bytes: bytes of the whole array that each chip holds or receives.
      group_size: number of chips that exchange.
      crosses_slices: whether a group contains chips of several slices.
      overlapped: whether other operations run at the same time.
      times: number of executions in one step.
      op_name, frame: the code that it comes from, see `hlo.Instruction`.
    """

    kind: str
    array_bytes: int
    group_size: int
    crosses_slices: bool
    overlapped: bool
    times: int
    op_name: str
    frame: int

    @property
    def bytes_sent(self) -> float:
        """Bytes that a chip sends in one execution."""
        n = self.group_size
        # A ring all-reduce is a reduce-scatter and an all-gather, hence the 2.
        # A permutation sends the whole array, or nothing where a chip is alone in its group.
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": float(n > 1)}.get(self.kind, (n - 1) / n)
        return share * self.array_bytes


def find_collectives(module: HloModule, slices: Sequence[int]) -> list[Collective]:
    """All collectives of one step; a start and its end count once, as do fusions that share an asynchronous one.

    Args:
      module: the compiled program.
      slices: the slice of each device in the order of the mesh.
    """
    exchanges: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for run in module.executed_instructions():
        for i, inside in _find_exchanges(module, run.instruction):
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
            # A separate start and end leave a gap in which the scheduler places other operations.
            overlapped = shared or i.opcode.endswith("-start") or run.instruction.opcode == "async-start"
            exchanges.append(
                _make_collective(_ALIASES.get(kind, kind), i, groups, inside, slices, overlapped, run.times)
            )
    return exchanges


def _make_collective(
    kind: str,
    i: Instruction,
    groups: list[list[int]],
    inside: str,
    slices: Sequence[int],
    overlapped: bool,
    times: int,
) -> Collective:
    # Groups of one instruction may differ in size; the largest one takes longest.
    group = max((len(g) for g in groups), default=1)
    array = shape_bytes(_result_shape(i))
    if kind == "send":
        # This part goes to the other slices through the hosts.
        # The exchange inside each slice is an instruction of its own.
        found = re.search(rf'{_TRANSFER_TYPE}="(\w+)"', i.rest)
        kind, group = found[1].lower().replace("_", "-") if found else "", len(set(slices))
        array = shape_bytes(_tuple_elements(i.shape)[0]) * (group if kind == "all-gather" else 1)
        return Collective(
            kind if kind in KINDS else "collective-permute", array, group, True, True, times, i.op_name, i.stack_frame
        )
    if inside.startswith("all-reduce-scatter"):
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and the slice that a chip keeps.
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        # The result is one shard; the formula counts the whole array.
        array *= group
    # Device numbers of the program follow the order of the mesh, as `slices` does.
    outside = any(len({slices[d] for d in g if d < len(slices)}) > 1 for g in groups)
    return Collective(kind, array, group, outside, overlapped, times, i.op_name, i.stack_frame)


def _find_exchanges(
    module: HloModule, i: Instruction, inside: str = "", depth: int = 0
) -> list[tuple[Instruction, str]]:
    """The collectives of an operation, those inside its fusion included: (instruction, name of its computation)."""
    base = i.opcode.removesuffix("-start")
    if base in KINDS or base in _ALIASES or (i.opcode == "send" and _TRANSFER_TYPE in i.rest):
        return [(i, inside)]
    if i.opcode != "fusion" or depth > _MAX_FUSION_DEPTH:
        return []
    # Asynchronous gathers are fused with the product that consumes them.
    called = i.read_attribute("calls")
    return [x for part in module.computations.get(called, ()) for x in _find_exchanges(module, part, called, depth + 1)]


def _result_shape(i: Instruction) -> str:
    """The shape of the result. The tuple of a start holds its operand, its result and internal flags."""
    if i.opcode in ("all-gather-start", "collective-permute-start") and i.shape.startswith("("):
        # Element 0 is the operand, element 1 the result.
        return _tuple_elements(i.shape)[1]
    return i.shape


def _tuple_elements(shape: str) -> list[str]:
    """The shapes of the elements of a tuple, '(f32[8]{0}, bf16[4])'."""
    # Layouts such as {1,0:T(8,128)} contain commas too; only commas outside all brackets separate elements.
    elements, depth, current = [], 0, ""
    for c in shape[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            elements.append(current)
            current = ""
        else:
            current += c
    return [*elements, current]


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """Groups of devices that exchange, parsed from the attributes of an instruction.

    HLO writes lists `{{0,1},{2,3}}`, a reshaped range `[2,4]<=[4,2]T(1,0)`, axes of a mesh `mesh['a'=4,'b'=2] {'a'}`,
    or the pairs of a permutation. Without groups, or in an unknown form, all devices exchange.
    """
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])]
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _reshaped_range(found[2]).reshape([int(n) for n in found[1].split(",")]).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _groups_by_axes(found[1], found[2], found[3])
    return [list(range(devices))]


def _reshaped_range(text: str) -> np.ndarray:
    """'[4,2]T(1,0)' -> the numbers 0..7 reshaped to [4, 2], transposed and flattened."""
    dims, _, order = text.partition("T")
    shape = [int(n) for n in dims.strip("[]").split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([int(n) for n in order.strip("()").split(",")]) if order else numbers).reshape(-1)


def _groups_by_axes(axes: str, between: str, used: str) -> list[list[int]]:
    """mesh['a'=4,'b'=2] {'a'}: one group for each index along the other axes; 'a':(before)size is a part of an axis."""
    sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = list(sizes)
    order = re.search(r"(\[[\d,]+\](?:T\([\d,]+\))?)", between)
    numbers = _reshaped_range(order[1]) if order else np.arange(math.prod(sizes.values()))
    # Each axis is split into (before, used, after). `used` is the whole axis, a part of it, or 1.
    split: list[int] = []
    inner: list[int] = []
    parts = {k: (int(b or 1), int(n or 0)) for k, b, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)}
    for name in names:
        before, n = parts.get(name, (1, 1))
        n = n or sizes[name]
        split += [before, n, sizes[name] // (before * n)]
        inner.append(3 * names.index(name) + 1)
    # The used parts go last, so that each row of the reshaped result is one group.
    outer = [a for a in range(len(split)) if a not in inner]
    group = math.prod(split[a] for a in inner)
    return numbers.reshape(split).transpose(outer + inner).reshape(-1, group).tolist()


def summarize_collectives(found: Sequence[Collective]) -> list[dict]:
    """One row for each kind and network: bytes that a chip sends in a step, number of exchanges, overlapped bytes."""
    groups: dict[tuple[str, bool], list[Collective]] = defaultdict(list)
    for c in found:
        groups[c.kind, c.crosses_slices].append(c)
    rows = []
    for (kind, outside), some in sorted(groups.items()):
        sent = sum(c.bytes_sent * c.times for c in some)
        rows.append(
            {
                "kind": kind,
                "network": "between slices" if outside else "inside a slice",
                "bytes_sent": sent,
                "bytes_overlapped": sum(c.bytes_sent * c.times for c in some if c.overlapped),
                "exchanges": sum(c.times for c in some),
                "largest_group": max(c.group_size for c in some),
            }
        )
    return sorted(rows, key=lambda row: -row["bytes_sent"])
