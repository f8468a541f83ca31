"""docs/pytorch.md, followed from the first command to the last."""

import re
import subprocess
import sys

import pytest
import safetensors.numpy
from PIL import Image

from tests.runs import ROOT

PAGE = (ROOT / "docs" / "pytorch.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path):
    there, back, own = blocks("bash")
    shell = lambda text, where: subprocess.run(["bash", "-euc", text], cwd=where, check=True)
    # From the root of a clone, which the outputs are to leave clean.
    place = lambda text: (
        text.replace("python tools", f"{sys.executable} tools")
        .replace("python -m", f"{sys.executable} -m")
        .replace("=digits_torch", f"={tmp_path}/digits_torch")
        .replace("=digits_later", f"={tmp_path}/digits_later")
        .replace("=runs/digits_later", f"={tmp_path}/runs")
        .replace("=digits_tensors", f"={tmp_path}/digits_tensors")
        .replace("=runs/digits_again", f"={tmp_path}/again")
        .replace("=later.png", f"={tmp_path}/later.png")
    )
    shell(place(there), ROOT)
    code = "\n".join(blocks("python"))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "digits_torch", check=True)
    shell(place(back), ROOT)
    shell(place(own), ROOT)
    assert (tmp_path / "again" / "checkpoints").is_dir()
    with Image.open(tmp_path / "later.png") as picture:
        assert picture.size[0] > 100
    table = safetensors.numpy.load_file(tmp_path / "digits_torch" / "model.safetensors")
    for key in ("mapping.layers.0.weight", "levels.1.blocks.0.conv0.filters"):
        assert key in table
