"""Parses the text of a compiled program: operations, numbers of executions, cycles, and source code.

The text of a compiled module is a list of computations. The entry runs, and so do the computations that it calls. The
body of a loop counts once for each trip, a conditional as its slower branch, a called or asynchronous computation
once. A fusion is one operation; the computation inside it does not run by itself, and its parts carry no time.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import PurePath

# The compiler writes the largest unsigned number where it has no estimate.
_NO_ESTIMATE = 2**62
# "ENTRY %main.5 (x: f32[8]) -> f32[8] {"; names may have dots and dashes.
_COMPUTATION_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
# Both are in the backend_config, as a number or as a string.
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
# Metadata of JAX: the named scopes, and the index into the table of stack frames.
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    # The line from the opening parenthesis on: operands and attributes.
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _NAMES.findall(self.rest[: _closing_parenthesis(self.rest, 0)])

    def read_attribute(self, name: str) -> str:
        """The computation or word after `name=`; empty without such an attribute."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate for one execution; None where it has no estimate."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found and int(found[1]) < _NO_ESTIMATE else None

    @property
    def op_name(self) -> str:
        """JAX's name of the operation that the instruction comes from."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def stack_frame(self) -> int:
        """Index of its stack frame; 0 without one."""
        found = _FRAME_ID.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def uses_matrix_units(self) -> bool:
        """Whether it runs on the matrix units. Only for these the compiler models windows."""
        return '"cost_model_type":"COST_MODEL_TYPE_CLASSIC"' in self.rest


def _closing_parenthesis(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`; the length of `text` if none does."""
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
class InstructionRun:
    """An executed instruction and its number of executions in one step."""

    instruction: Instruction
    computation: str
    times: int


class HloModule:
    """A compiled module, parsed from its text.

    Attributes:
      computations: {name: its instructions}.
      entry: name of the computation that runs.
      unknown_loops: loops with an unknown trip count; they count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.unknown_loops: list[str] = []
        self._tables: dict[str, dict[int, str]] = {}
        current: list[Instruction] | None = None
        table: dict[int, str] | None = None
        for line in text.splitlines():
            # Instructions are indented. Headers of computations and the tables at the end are not.
            if line[:1] in (" ", "\t"):
                if current is not None and (found := _parse_instruction(line)):
                    current.append(found)
                continue
            if head := _COMPUTATION_HEADER.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            # XLA writes stack frames once, as tables of "number value" lines; instructions have the number only.
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, {})
            elif table is not None and line[:1].isdigit():
                number, _, value = line.partition(" ")
                table[int(number)] = value

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        # Names are unique within a computation only.
        return {c: {i.name: i for i in lines} for c, lines in self.computations.items()}

    def executed_instructions(self) -> Iterator[InstructionRun]:
        """Every instruction that runs in one step, in order, without those inside fusions."""
        # The list is filled while the caller iterates; a second iteration starts anew.
        self.unknown_loops = []
        yield from self._walk_computation(self.entry, 1)

    def _walk_computation(self, computation: str, times: int) -> Iterator[InstructionRun]:
        for i in self.computations.get(computation, ()):
            yield InstructionRun(i, computation, times)
            for called, often in self._called_computations(computation, i):
                yield from self._walk_computation(called, times * often)

    def _called_computations(self, computation: str, i: Instruction) -> list[tuple[str, int]]:
        if i.opcode == "while":
            trips = self.trip_count(computation, i)
            if trips is None:
                self.unknown_loops.append(i.name)
            return [(i.read_attribute("body"), 1 if trips is None else trips)]
        if i.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            branches = _NAMES.findall(listed[1]) if listed else []
            # A conditional on a boolean names its two branches by attributes of their own.
            branches = branches or [i.read_attribute("true_computation"), i.read_attribute("false_computation")]
            # Which branch runs is known at run time only; the slower one gives an upper bound.
            return [(max(branches, key=self._branch_cycles), 1)]
        if i.opcode == "call":
            return [(i.read_attribute("to_apply"), 1)]
        if i.opcode == "async-start":
            return [(i.read_attribute("calls") or i.read_attribute("called_computation"), 1)]
        return []

    def _branch_cycles(self, computation: str) -> int:
        return sum((r.instruction.estimated_cycles or 0) * r.times for r in self._walk_computation(computation, 1))

    # -- loops

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Trip count of a `while` in `computation`; None if it is unknown.

        The compiler may note it. Otherwise it follows from a counter, which the condition compares with a constant
        and the body increases by a constant. JAX's scan and fori_loop compile to this form.
        """
        # The TPU compiler of jax 0.10.2 does not note the count, hence the search for the counter below.
        if noted := _TRIP_COUNT.search(loop.rest):
            return int(noted[1])
        lines = self.computations.get(loop.read_attribute("condition"), [])
        root = next((i for i in lines if i.root), None)
        names = self._by_name.get(loop.read_attribute("condition"), {})
        # The comparison may be fused: then parameters of the fusion stand for instructions of the condition.
        if root is not None and root.opcode == "fusion":
            outer = [names.get(o) for o in root.operands]
            inner = self.computations.get(root.read_attribute("calls"), [])
            root = next((i for i in inner if i.root), None)
            names = {i.name: i for i in inner}
            for i in inner:
                given = outer[int(i.rest[1 : _closing_parenthesis(i.rest, 0)])] if i.opcode == "parameter" else None
                if given is not None:
                    names[i.name] = given
        if root is None or root.opcode != "compare" or len(root.operands) != 2:
            return None
        left, right = (names.get(o) for o in root.operands)
        direction = root.read_attribute("direction")
        if left is not None and left.opcode == "constant":
            # "10 > i" is "i < 10".
            left, right, direction = right, left, {"GT": "LT", "GE": "LE"}.get(direction, "")
        if left is None or right is None or left.opcode != "get-tuple-element" or direction not in ("LT", "LE"):
            return None
        start = self._initial_value(computation, loop, left)
        # The limit may also be in the state of the loop, with a constant initial value.
        limit = _parse_integer(right) if right.opcode == "constant" else self._initial_value(computation, loop, right)
        if limit is None:
            return None
        # Rounded up: the last trip may step over the limit.
        return max(0, -(-(limit - (start or 0) + (direction == "LE")) // self._counter_step(computation, loop, left)))

    def _counter_step(self, computation: str, loop: Instruction, counter: Instruction) -> int:
        """The increment of the counter in the body; 1 where it is unknown."""
        names = self._by_name.get(loop.read_attribute("body"), {})
        root = next((i for i in names.values() if i.root), None)
        index = int(counter.read_attribute("index"))
        if root is None or root.opcode != "tuple" or index >= len(root.operands):
            return 1
        new = names.get(root.operands[index])
        # Copies and bitcasts pass the value of their operand on.
        while new is not None and new.opcode in ("copy", "bitcast") and new.operands:
            new = names.get(new.operands[0])
        if new is None or new.opcode != "add":
            return 1
        # One operand of the sum is the counter, the other the increment: a constant, or an invariant of the state.
        for by in map(names.get, new.operands):
            if by is not None and by.opcode == "constant":
                return max(1, _parse_integer(by) or 1)
            if by is not None and by.opcode == "get-tuple-element" and by.read_attribute("index") != str(index):
                return max(1, self._initial_value(computation, loop, by) or 1)
        return 1

    def _initial_value(self, computation: str, loop: Instruction, element: Instruction) -> int | None:
        """The constant initial value of an element of a loop's state; None if it is no constant."""
        names = self._by_name.get(computation, {})
        index = element.read_attribute("index")
        state = names.get(loop.operands[0]) if loop.operands else None
        if state is None or state.opcode != "tuple" or not index.isdigit() or int(index) >= len(state.operands):
            return None
        found = names.get(state.operands[int(index)])
        while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
            found = names.get(found.operands[0])
        return _parse_integer(found) if found is not None and found.opcode == "constant" else None

    # -- the source code

    def call_stack(self, frame: int) -> list[tuple[str, str]]:
        """(file, qualified function) of a stack frame and its callers, outermost first; files without their folders.

        [("step", "TrainStep.g_loss"), ("generator", "SynthesisBlock.__call__"), ...]
        """
        frames = []
        while frame in self._frame_table:
            location, parent = self._frame_table[frame]
            frames.append(self._function_table.get(location, ("?", "?")))
            # Parents come before their children; anything else would loop forever.
            if parent >= frame:
                break
            frame = parent
        return frames[::-1]

    @functools.cached_property
    def _frame_table(self) -> dict[int, tuple[int, int]]:
        # The tables write the parent as its number plus one, so that 1 stands for no parent.
        table = self._tables.get("StackFrames", {})
        return {
            n: (_read_field(v, "file_location_id"), _read_field(v, "parent_frame_id") - 1) for n, v in table.items()
        }

    @functools.cached_property
    def _function_table(self) -> dict[int, tuple[str, str]]:
        functions = {n: v.strip('"') for n, v in self._tables.get("FunctionNames", {}).items()}
        files = {n: PurePath(v.strip('"')).stem for n, v in self._tables.get("FileNames", {}).items()}
        return {
            n: (files.get(_read_field(v, "file_name_id"), "?"), functions.get(_read_field(v, "function_name_id"), "?"))
            for n, v in self._tables.get("FileLocations", {}).items()
        }


def _read_field(text: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0


def _parse_instruction(line: str) -> Instruction | None:
    # "ROOT %add.3 = f32[8]{0} add(%x, %y), metadata={...}"
    name, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    root = name.startswith("ROOT ")
    # The shape of a tuple contains spaces; that of an array does not.
    end = _closing_parenthesis(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    found = _OPCODE.match(rest, end)
    if not found:
        return None
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), rest[:end], found[1], rest[found.end() - 1 :], root)


def _parse_integer(constant: Instruction) -> int | None:
    text = constant.rest[1 : _closing_parenthesis(constant.rest, 0)]
    return int(text) if re.fullmatch(r"-?\d+", text) else None


# Types without their width in their name, and those that are packed below a byte.
_ELEMENT_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0}


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, such as `f32[8,128]{1,0:T(8,128)}`, without padding."""
    total = 0
    for kind, dims in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]", shape):
        digits = re.search(r"\d+", kind)
        bits = _ELEMENT_BITS[kind] if kind in _ELEMENT_BITS else int(digits[0]) if digits else 8
        n = 1
        for d in filter(None, dims.split(",")):
            n *= int(d)
        total += (n * bits + 7) // 8
    return total
