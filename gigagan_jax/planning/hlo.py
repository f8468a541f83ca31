"""Reads the compiler's program: which operations run, how often, how long it expects each to take, and from which code.

The text of a compiled module is a list of computations. What runs is the entry and what it calls: bodies of loops as often
as they turn, the slower branch of a conditional, called and asynchronous computations once. A fusion is one operation; the
computation inside it is not run by itself, and its parts carry no time.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import PurePath

# The compiler writes the largest unsigned number where it has no estimate.
_NONE = 2**62
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    rest: str  # from the opening parenthesis on
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return _NAMES.findall(self.rest[: _closing(self.rest, 0)])

    def attribute(self, name: str) -> str:
        """The computation or word after `name=`; empty if there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run; None where it makes none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found and int(found[1]) < _NONE else None

    @property
    def op_name(self) -> str:
        """JAX's name of the operation that it was made from."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def frame(self) -> int:
        """Number of its stack frame; 0 if it has none."""
        found = _FRAME.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def matrix(self) -> bool:
        """Whether it runs on the matrix units: only of those does the compiler model the windows."""
        return '"cost_model_type":"COST_MODEL_TYPE_CLASSIC"' in self.rest


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if not depth:
                return i
    return len(text)


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that runs, and how often in one step."""

    instruction: Instruction
    computation: str
    times: int


class Module:
    """A compiled module from its text.

    Attributes:
      computations: {name: its instructions}.
      entry: name of the one that is run.
      unknown_loops: loops whose number of turns could not be read; they are counted once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.unknown_loops: list[str] = []
        self._tables: dict[str, dict[int, str]] = {}
        current: list[Instruction] | None = None
        table: dict[int, str] | None = None
        for line in text.splitlines():
            if line[:1] in (" ", "\t"):
                if current is not None and (found := _instruction(line)):
                    current.append(found)
                continue
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, {})
            elif table is not None and line[:1].isdigit():
                number, _, value = line.partition(" ")
                table[int(number)] = value

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {c: {i.name: i for i in lines} for c, lines in self.computations.items()}

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs in one step, in order; those inside of fusions are not."""
        self.unknown_loops = []
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: str, times: int) -> Iterator[Run]:
        for i in self.computations.get(computation, ()):
            yield Run(i, computation, times)
            for called, often in self._called(computation, i):
                yield from self._walk(called, times * often)

    def _called(self, computation: str, i: Instruction) -> list[tuple[str, int]]:
        if i.opcode == "while":
            turns = self.turns(computation, i)
            if turns is None:
                self.unknown_loops.append(i.name)
            return [(i.attribute("body"), 1 if turns is None else turns)]
        if i.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            branches = _NAMES.findall(listed[1]) if listed else []
            branches = branches or [i.attribute("true_computation"), i.attribute("false_computation")]
            return [(max(branches, key=self._cost), 1)]
        if i.opcode == "call":
            return [(i.attribute("to_apply"), 1)]
        if i.opcode == "async-start":
            return [(i.attribute("calls") or i.attribute("called_computation"), 1)]
        return []

    def _cost(self, computation: str) -> int:
        return sum((r.instruction.cycles or 0) * r.times for r in self._walk(computation, 1))

    # -- loops

    def turns(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a `while` in `computation` runs; None if that cannot be read.

        As the compiler notes it, or from a counter: compared with a constant in the condition and increased by a constant in
        the body, which is what JAX's scan and fori_loop become.
        """
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        lines = self.computations.get(loop.attribute("condition"), [])
        root = next((i for i in lines if i.root), None)
        names = self._by_name.get(loop.attribute("condition"), {})
        if root is not None and root.opcode == "fusion":
            outer = [names.get(o) for o in root.operands]
            inner = self.computations.get(root.attribute("calls"), [])
            root = next((i for i in inner if i.root), None)
            names = {i.name: i for i in inner}
            for i in inner:
                given = outer[int(i.rest[1 : _closing(i.rest, 0)])] if i.opcode == "parameter" else None
                if given is not None:
                    names[i.name] = given
        if root is None or root.opcode != "compare" or len(root.operands) != 2:
            return None
        left, right = (names.get(o) for o in root.operands)
        way = root.attribute("direction")
        if left is not None and left.opcode == "constant":
            left, right, way = right, left, {"GT": "LT", "GE": "LE"}.get(way, "")
        if left is None or right is None or left.opcode != "get-tuple-element" or way not in ("LT", "LE"):
            return None
        start = self._initial(computation, loop, left)
        limit = _integer(right) if right.opcode == "constant" else self._initial(computation, loop, right)
        if limit is None:
            return None
        return max(0, -(-(limit - (start or 0) + (way == "LE")) // self._step(computation, loop, left)))

    def _step(self, computation: str, loop: Instruction, counter: Instruction) -> int:
        """By how much the body increases its counter; 1 where that cannot be read."""
        names = self._by_name.get(loop.attribute("body"), {})
        root = next((i for i in names.values() if i.root), None)
        index = int(counter.attribute("index"))
        if root is None or root.opcode != "tuple" or index >= len(root.operands):
            return 1
        new = names.get(root.operands[index])
        while new is not None and new.opcode in ("copy", "bitcast") and new.operands:
            new = names.get(new.operands[0])
        if new is None or new.opcode != "add":
            return 1
        for by in map(names.get, new.operands):
            if by is not None and by.opcode == "constant":
                return max(1, _integer(by) or 1)
            if by is not None and by.opcode == "get-tuple-element" and by.attribute("index") != str(index):
                return max(1, self._initial(computation, loop, by) or 1)
        return 1

    def _initial(self, computation: str, loop: Instruction, element: Instruction) -> int | None:
        """The constant with which an element of a loop's state starts; None if it is not one."""
        names = self._by_name.get(computation, {})
        index = element.attribute("index")
        state = names.get(loop.operands[0]) if loop.operands else None
        if state is None or state.opcode != "tuple" or not index.isdigit() or int(index) >= len(state.operands):
            return None
        found = names.get(state.operands[int(index)])
        while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
            found = names.get(found.operands[0])
        return _integer(found) if found is not None and found.opcode == "constant" else None

    # -- where the code is

    def stack(self, frame: int) -> list[tuple[str, str]]:
        """(file, qualified function) of a stack frame and its callers, outermost first; files without their folders.

        [("step", "TrainStep.g_loss"), ("generator", "SynthesisBlock.__call__"), ...]
        """
        out = []
        while frame in self._frames:
            location, parent = self._frames[frame]
            out.append(self._functions.get(location, ("?", "?")))
            if parent >= frame:
                break
            frame = parent
        return out[::-1]

    @functools.cached_property
    def _frames(self) -> dict[int, tuple[int, int]]:
        # A parent is written as its number plus one: 1 for none.
        table = self._tables.get("StackFrames", {})
        return {n: (_field(v, "file_location_id"), _field(v, "parent_frame_id") - 1) for n, v in table.items()}

    @functools.cached_property
    def _functions(self) -> dict[int, tuple[str, str]]:
        functions = {n: v.strip('"') for n, v in self._tables.get("FunctionNames", {}).items()}
        files = {n: PurePath(v.strip('"')).stem for n, v in self._tables.get("FileNames", {}).items()}
        return {
            n: (files.get(_field(v, "file_name_id"), "?"), functions.get(_field(v, "function_name_id"), "?"))
            for n, v in self._tables.get("FileLocations", {}).items()
        }


def _field(text: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    root = name.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    found = _OPCODE.match(rest, end)
    if not found:
        return None
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), rest[:end], found[1], rest[found.end() - 1 :], root)


def _integer(constant: Instruction) -> int | None:
    text = constant.rest[1 : _closing(constant.rest, 0)]
    return int(text) if re.fullmatch(r"-?\d+", text) else None


_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}


def size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, as `f32[8,128]{1,0:T(8,128)}`; padding is not counted."""
    total = 0
    for kind, dims in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]", shape):
        digits = re.search(r"\d+", kind)
        bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 8
        n = 1
        for d in filter(None, dims.split(",")):
            n *= int(d)
        total += (n * bits + 7) // 8
    return total
