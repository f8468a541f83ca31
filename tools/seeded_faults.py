"""Seeds faults, one at a time, in a copy of the checkout, and says which test of the default tier catches each.

    python tools/seeded_faults.py [--json=FILE] [--only=NAME ...] [--again]

The faults are listed in tools/seeded_faults.toml. A fault is caught where a test of its files fails with it and passes without
it. With --json each result is a line of FILE as it comes, and what is there already is not done again. The exit code is 1 where
a fault was not caught. See docs/testing.md.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax import cli
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.formatting import format_duration

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tools" / "seeded_faults.toml"
_PYTEST = ("-m", "pytest", "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider")
_TESTS_FAILED = 1  # exit code of pytest
# A line of pytest's summary; an error in a fixture is an ERROR, and catches nothing.
_FAILED = re.compile(r"^FAILED (\S+::.+?)(?: - .*)?$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A bug that a test is to catch.

    name: short, unique
    file: of the package, relative to the root
    says: what is wrong, in one sentence
    old, new: text of the file, which occurs once, and what takes its place
    tests: files that are to catch it
    """

    name: str
    file: str
    says: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a fault.

    outcome: "caught", "survived", or why the run proves nothing ("error": no test failed and yet pytest did, or the test fails
      without the fault too; "timeout")
    test: that failed first; empty for none
    seconds: until then
    detail: the last lines of an "error"
    """

    name: str
    file: str
    outcome: str
    test: str
    seconds: float
    detail: str = ""


def read_faults(file: Path = LIST) -> list[Fault]:
    """The faults of a list.

    Raises:
      UserError: no such list, or an entry that is not one.
    """
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))["fault"]
        return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} is no list of faults ({type(e).__name__}: {e})") from e


def check(faults: Sequence[Fault], root: Path) -> None:
    """Raises UserError for a fault that cannot be seeded in a checkout, or has a name or a module that another one has."""
    for field in ("name", "file"):
        values = [getattr(fault, field) for fault in faults]
        if twice := [v for v in values if values.count(v) > 1]:
            raise UserError(f"seeded faults: {field} {twice[0]!r} is there {values.count(twice[0])} times")
    for fault in faults:
        missing = [f for f in (fault.file, *fault.tests) if not (root / f).is_file()]
        if missing or not fault.tests:
            raise UserError(f"seeded fault {fault.name}: there is no file {missing[0] if missing else 'of tests'}")
        count = (root / fault.file).read_text(encoding="utf-8").count(fault.old)
        if count != 1:
            raise UserError(f"seeded fault {fault.name}: its text occurs {count} times in {fault.file}, not once")


def copy_checkout(root: Path, target: Path) -> None:
    """Copies the files of a checkout that git knows or would add.

    Raises:
      UserError: it is no checkout of git.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"{root}: git cannot list its files ({e})") from None
    for name in filter(None, names):
        if (root / name).is_file():  # not what was removed and not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_python(arguments: Sequence[str], root: Path, seconds: float) -> tuple[int | None, str]:
    """(exit code, output) of Python in a checkout, from which alone the project is imported; None after `seconds`."""
    # No bytecode: a fault may leave a file's size and second as they were.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            out, _ = child.communicate(timeout=seconds)
            return child.returncode, out
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if child.poll() is None:  # with all that the tests have started
                os.killpg(child.pid, signal.SIGKILL)


def check_copy(root: Path) -> None:
    """Raises UserError where Python in a copy would import the project from elsewhere."""
    _, out = run_python(["-c", "import gigagan_jax; print(gigagan_jax.__file__)"], root, 60)
    if Path(out.strip()).resolve() != (root / "gigagan_jax" / "__init__.py").resolve():
        raise UserError(f"the copy of the checkout is not what Python imports there, but {out.strip()[-200:]}")


def first_failed(output: str) -> str:
    """Name of the first test that pytest says has failed; empty for none."""
    found = _FAILED.search(output)
    return found[1] if found else ""


def outcome_of(fault: Fault, root: Path, seconds: float) -> Result:
    """Seeds a fault in a copy of the checkout, runs its tests, and takes it out again."""
    file = root / fault.file
    whole = file.read_text(encoding="utf-8")
    began = time.monotonic()
    try:
        file.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
        code, output = run_python([*_PYTEST, *fault.tests], root, seconds)
    finally:
        file.write_text(whole, encoding="utf-8")
    test, taken = first_failed(output), round(time.monotonic() - began, 1)
    result = lambda outcome, detail="": Result(fault.name, fault.file, outcome, test, taken, detail)
    if code is None:
        return result("timeout")
    if code == 0:
        return result("survived")
    if code != _TESTS_FAILED or not test:
        return result("error", "\n".join(output.splitlines()[-5:]))
    # A test that fails in any case proves nothing.
    code, output = run_python([*_PYTEST, test], root, seconds)
    return result("caught") if code == 0 else result("error", f"{test} fails without the fault too")


def read_results(file: Path | None) -> dict[str, Result]:
    """Results by the fault's name, the newest of each; none where there is no file.

    Raises:
      UserError: a file of something else.
    """
    if file is None or not file.exists():
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return {r.name: r for r in (Result(**json.loads(line)) for line in lines)}
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"--json={file} holds no results of this tool ({type(e).__name__}: {e})") from e


def table(faults: Iterable[Fault], results: dict[str, Result]) -> str:
    """Markdown, a row for each fault that has a result."""
    lines = ["| module | fault | caught by | seconds |", "|---|---|---|---|"]
    for fault in faults:
        if result := results.get(fault.name):
            module = fault.file.removeprefix("gigagan_jax/")
            file, _, name = result.test.partition("::")
            name = name.replace("|", r"\|")  # or it ends the cell
            by = f"`{Path(file).name}::{name}`" if result.outcome == "caught" else f"**{result.outcome}**"
            lines.append(f"| `{module}` | {fault.says} | {by} | {result.seconds:.0f} |")
    return "\n".join(lines)


def chosen(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """The faults of these names, all for none. Raises UserError for an unknown name."""
    known = [fault.name for fault in faults]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise UserError(f"--only={name}: there is no such fault{f'; did you mean {near[0]}?' if near else ''}")
    return [fault for fault in faults if not names or fault.name in names]


def seed(
    faults: Sequence[Fault], known: dict[str, Result], json_file: Path | None, seconds: float
) -> dict[str, Result]:
    """Seeds the faults that have no result yet, with a line of progress for each; returns all results."""
    results = dict(known)
    todo = [fault for fault in faults if fault.name not in results]
    if not todo:
        return results
    with tempfile.TemporaryDirectory(prefix="seeded_faults_") as folder:
        copy = Path(folder).resolve()
        copy_checkout(ROOT, copy)
        check_copy(copy)
        began = time.monotonic()
        for i, fault in enumerate(todo, 1):
            result = results[fault.name] = outcome_of(fault, copy, seconds)
            if json_file is not None:
                with open(json_file, "a", encoding="utf-8") as out:
                    out.write(json.dumps(dataclasses.asdict(result)) + "\n")
            left = (time.monotonic() - began) / i * (len(todo) - i)
            by = f" by {result.test}" if result.outcome == "caught" else f" {result.detail}".rstrip()
            said = f"{fault.name}: {result.outcome}{by} ({result.seconds:.0f} s)"
            print(f"{i} of {len(todo)}  {said}  ETA {format_duration(left)}", flush=True)
    return results


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each result, as it comes; gone on from")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this fault; may be repeated")
    parser.add_argument("--again", action="store_true", help="also those that FILE has a result of")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the tests of one fault (600)")
    args: Any = parser.parse_args(argv)
    if not args.timeout > 0:
        raise UserError(f"--timeout={args.timeout:g}: must be greater than 0")
    cli.check_writable(args.json)
    faults = read_faults()
    check(faults, ROOT)
    known = read_results(args.json)
    faults = chosen(faults, args.only)
    results = seed(faults, {} if args.again else known, args.json, args.timeout)
    print(table(faults, results))
    missed = [f"{f.name} ({results[f.name].outcome})" for f in faults if results[f.name].outcome != "caught"]
    print(
        f"{len(faults) - len(missed)} of {len(faults)} faults caught" + (f"; not {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    cli.main(verb)
