"""docs/pytorch.md, followed from the first command to the last."""

import re
import subprocess
import sys

import pytest
import safetensors.numpy
from PIL import Image

from configs import photos
from tests.interop.test_torch_upsampler import small
from tests.runs import ROOT
from tests.tools.test_export_upsampler import publish

PAGE = (ROOT / "docs" / "pytorch.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path):
    there, upsampler, back, own = blocks("bash")
    publish(tmp_path / "photos", small(photos, "tiny"))
    shell = lambda text, where: subprocess.run(["bash", "-euc", text], cwd=where, check=True)
    # From the root of a clone, which the outputs are to leave clean.
    place = lambda text: (
        text.replace("python tools", f"{sys.executable} tools")
        .replace("python -m", f"{sys.executable} -m")
        .replace("=docs/weights/photos", f"={tmp_path}/photos")
        .replace("=photos_torch", f"={tmp_path}/photos_torch")
        .replace("=digits_torch", f"={tmp_path}/digits_torch")
        .replace("=digits_later", f"={tmp_path}/digits_later")
        .replace("=runs/digits_later", f"={tmp_path}/runs")
        .replace("=digits_tensors", f"={tmp_path}/digits_tensors")
        .replace("=runs/digits_again", f"={tmp_path}/again")
        .replace("=later.png", f"={tmp_path}/later.png")
    )
    shell(place(there), ROOT)
    sample, enlarge, train = blocks("python")
    subprocess.run([sys.executable, "-c", f"{sample}\n{train}"], cwd=tmp_path / "digits_torch", check=True)
    shell(place(upsampler), ROOT)
    shape = "assert images[-1].shape == (1, 3, 128, 192)"
    subprocess.run([sys.executable, "-c", f"{enlarge}\n{shape}"], cwd=tmp_path / "photos_torch", check=True)
    shell(place(back), ROOT)
    shell(place(own), ROOT)
    assert (tmp_path / "again" / "checkpoints").is_dir()
    with Image.open(tmp_path / "later.png") as picture:
        assert picture.size[0] > 100
    table = safetensors.numpy.load_file(tmp_path / "digits_torch" / "model.safetensors")
    for key in ("mapping.layers.0.weight", "levels.1.blocks.0.conv0.filters"):
        assert key in table
