"""What the default tier must hold, whatever is moved to the slow one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = (
    "tests/training/test_kills.py",
    "tests/training/test_step.py",
    "tests/training/test_run.py",
    "tests/models/test_scan.py",
)
FILES += ("tests/parallel/test_processes.py", "tests/training/test_sharding_parity.py")


def test_sharding_parity_resume_and_kill_stay_in_the_default_tier():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run([*command, "-m", "not slow", *FILES], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.lower() for line in done.stdout.splitlines() if "::" in line]
    for word in ("sharding", "parity", "resume", "kill"):
        assert any(word in name.partition("::")[2] for name in names), word
    for file in FILES:
        assert any(name.startswith(file) for name in names), file


def test_files_of_the_newest_python_are_there():
    files = [line for line in (ROOT / "tests" / "newest.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(files) > 5
    assert all((ROOT / file).is_file() for file in files)
