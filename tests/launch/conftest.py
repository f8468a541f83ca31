"""Launchers run as they are, with programs of this machine in the place of gcloud, srun and the like."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = '{ printf %s "${0##*/}"; printf "\\0%s" "$@"; printf "\\n"; } >>"$CALLS"\n'


@dataclasses.dataclass
class Stand:
    """A folder of programs that stand first on the PATH, and what they were called with."""

    folder: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def program(self, name, body=""):
        """A bash program that writes its arguments down, then does `body`."""
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{RECORD}{body}")
        file.chmod(0o755)
        return file

    def run(self, *command, **environment):
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": f"{self.folder}/calls"} | self.environment | environment
        return subprocess.run(
            [str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    def calls(self, name=None):
        """Argument lists, the program's name first."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        calls = [line.split("\0") for line in lines]
        return [c for c in calls if name in (None, c[0])]


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


def codes(folder, *numbers):
    """The body of a program that ends with these exit codes, one a call."""
    (folder / "codes").write_text("\n".join(map(str, numbers)) + "\n")
    return f'code=$(head -n1 "{folder}/codes"); sed -i 1d "{folder}/codes"; exit "$code"\n'


@pytest.fixture
def ends_with(tmp_path):
    return lambda *numbers: codes(tmp_path, *numbers)
