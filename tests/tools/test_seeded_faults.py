"""The list of seeded faults fits the checkout, and what their runner makes of pytest's words."""

import dataclasses
import json
from pathlib import Path

import pytest

from gigagan_jax.core.errors import UserError
from tools import seeded_faults
from tools.seeded_faults import ROOT, Fault, Result, check, chosen, first_failed, outcome_of, read_faults, table


def test_every_fault_can_be_seeded_and_has_a_module_of_its_own():
    faults = read_faults()
    assert len(faults) >= 22
    check(faults, ROOT)
    for fault in faults:
        compile((ROOT / fault.file).read_text().replace(fault.old, fault.new), fault.file, "exec")
        assert fault.says.endswith(".")
        assert fault.old != fault.new


def test_a_list_that_does_not_fit(tmp_path, refused):
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "test_a.py").write_text("")
    fault = Fault("a", "a.py", "Wrong.", "x = 1", "x = 2", ("test_a.py",))
    check([fault], tmp_path)
    refused(lambda: check([dataclasses.replace(fault, old="= 1")], tmp_path), "fault a", "occurs 2 times", "a.py")
    refused(lambda: check([dataclasses.replace(fault, old="z")], tmp_path), "occurs 0 times")
    refused(lambda: check([dataclasses.replace(fault, tests=("test_b.py",))], tmp_path), "no file test_b.py")
    refused(lambda: check([fault, dataclasses.replace(fault, name="b")], tmp_path), "file 'a.py' is there 2 times")
    refused(lambda: chosen([fault], ["aa"]), "did you mean a?")


@pytest.mark.parametrize(
    "broken, fixed, outcome",
    [
        ((1, "FAILED test_a.py::test_x[a b] - assert 1 == 2\n1 failed"), (0, ""), "caught"),
        ((0, "1 passed"), (0, ""), "survived"),
        ((1, "ERROR test_a.py::test_x - in a fixture\n1 error"), (0, ""), "error"),
        ((2, "ERROR test_a.py - SyntaxError"), (0, ""), "error"),
        ((1, "FAILED test_a.py::test_x[a b] - assert 1 == 2"), (1, ""), "error"),
        ((None, ""), (0, ""), "timeout"),
    ],
)
def test_only_a_test_that_fails_with_the_fault_alone_has_caught_it(tmp_path, monkeypatch, broken, fixed, outcome):
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    fault = Fault("a", "a.py", "Wrong.", "x = 1", "x = 2", ("test_a.py",))
    run = lambda arguments, root, seconds: fixed if file.read_text() == "x = 1\n" else broken
    monkeypatch.setattr(seeded_faults, "run_python", run)
    result = outcome_of(fault, tmp_path, 1.0)
    assert result.outcome == outcome
    assert result.test == first_failed(broken[1])
    assert file.read_text() == "x = 1\n"


def test_results_are_gone_on_from(tmp_path, monkeypatch, capsys):
    faults = read_faults()[:2]
    monkeypatch.setattr(seeded_faults, "read_faults", lambda: faults)
    monkeypatch.setattr(seeded_faults, "copy_checkout", lambda root, target: None)
    monkeypatch.setattr(seeded_faults, "check_copy", lambda root: None)
    done = []

    def outcome(fault, root, seconds):
        done.append(fault.name)
        test = "tests/test_a.py::test_b"
        return Result(fault.name, fault.file, "survived" if len(done) == 2 else "caught", test, 1.0)

    monkeypatch.setattr(seeded_faults, "outcome_of", outcome)
    file = tmp_path / "results.json"
    a, b = (fault.name for fault in faults)
    assert seeded_faults.verb([f"--json={file}", f"--only={a}"]) == 0
    assert seeded_faults.verb([f"--json={file}"]) == 1
    assert done == [a, b]
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == [a, b]
    assert seeded_faults.verb([f"--json={file}", "--again"]) == 0
    assert done == [a, b, a, b]
    out = capsys.readouterr().out
    assert f"not {b} (survived)" in out
    assert "| `test_a.py::test_b` | 1 |" in table(faults, seeded_faults.read_results(file))


def test_bad_flags(tmp_path, refused):
    file = tmp_path / "results.json"
    file.write_text("[]\n")
    refused(lambda: seeded_faults.verb([f"--json={file}"]), "holds no results")
    refused(lambda: seeded_faults.verb([f"--json={tmp_path / 'no' / 'results.json'}"]), "cannot be written")
    refused(lambda: seeded_faults.verb(["--timeout=0"]), "--timeout=0")
    refused(lambda: seeded_faults.verb(["--no"]), "--no")
    with pytest.raises(UserError, match="no list of faults"):
        read_faults(Path(__file__))
