"""Worker processes and the scripts that start them."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_a_script_without_a_main_guard_ends_with_a_hint(tmp_path):
    """Its workers run it once more: they must not wait for the lock that it holds."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            member = tarfile.TarInfo("0.png")
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
    script = tmp_path / "script.py"
    script.write_text(
        "from gigagan_jax.config import DataConfig\n"
        "from gigagan_jax.data.sources import make_source\n"
        f"make_source(DataConfig(path={str(tmp_path)!r}, captions='optional'), condition='none')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a worker process runs the script that started it: put what it does under `if __name__" in done.stderr
    assert "In a script of your own: put what it does under `if __name__" in done.stderr.splitlines()[-1]
