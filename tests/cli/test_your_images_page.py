"""docs/your_images.md, followed from the first command to the last on small folders, with the tiny size of configs/own.py."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT

PAGE = (ROOT / "docs" / "your_images.md").read_text()
VARIANTS = {"": ":tiny", ":unconditional": ":unconditional-tiny", ":class": ":class-tiny"}


def commands():
    lines = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert all(line.startswith("python ") for line in lines)
    return lines


def draw(folder, count, captions=True):
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{count}_{i}.png")
        if captions:
            (folder / f"{count}_{i}.txt").write_text(f"a photo of thing {i % 3}")


def test_the_page_is_of_what_there_is():
    """Every variant that a command names exists, and the words of the page are those of the config."""
    from configs import own

    for variant in re.findall(r"configs/own\.py:([\w-]+)", PAGE):
        own.get_config(variant)
    for word in (*own.CONDITIONS, *own.SIZES, *map(str, own.BATCHES)):
        assert f"`{word}`" in PAGE


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    draw(tmp_path / "photos", 18)
    draw(tmp_path / "more_photos", 17)
    for name in ("chelsea", "coffee", "flower"):
        draw(tmp_path / "classes" / name, 6 + len(name), captions=False)
    for line in commands():
        if "--accept=data" in line:
            draw(tmp_path / "photos", 3)
        # Toy width, in place of what takes minutes to compile; each start of a run goes a little further.
        if "--dry_run" not in line:
            line = re.sub(r"configs/own\.py(:[\w-]*)?", lambda m: f"configs/own.py{VARIANTS[m[1] or '']}", line)
        line = line.replace("=configs/", f"={ROOT}/configs/").replace("tools/", f"{ROOT}/tools/")
        if " -m gigagan_jax.train" in line and "dry_run" not in line:
            end = 0.064 if "--accept" in line else 0.032
            line += f" --config.total_kimg={end} --config.checkpoint_kimg=0.016 --compilation_cache={tmp_path}/xla"
        out = subprocess.run(
            ["bash", "-c", line.replace("python ", f"{sys.executable} ", 1)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.returncode == 0, (line, out.stderr[-2000:])
    for name in ("cat.png", "free.png", "coffee.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"photos", "free", "classes", "later"}
