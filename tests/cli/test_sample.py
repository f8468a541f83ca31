"""`sample` by its command line, on published weights: prompts from a file, formats, jobs that are killed, one line for errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigagan_jax import sample
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.image_encoding import read_metadata
from gigagan_jax.inference.text_to_image import TextToImage
from tests.quick import FLAGS

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "docs/weights/digits"
RUN = ROOT / "tests/fixtures/digits"


def call(*args, workdir=WEIGHTS):
    return sample.verb([f"--workdir={workdir}", *map(str, args)])


def wrong(*args, workdir=WEIGHTS):
    with pytest.raises(UserError) as e:
        call(*args, workdir=workdir)
    assert "\n" not in str(e.value)
    return str(e.value)


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_file_of_prompts_beside_a_flag(tmp_path, capsys):
    rows = [{"caption": f"the digit {i}", "id": 100 + i} for i in range(9)] + [
        {"caption": "a handwritten seven", "seed": 5}
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--prompt=zero", f"--prompts={tmp_path}/p.jsonl", "--truncation=1.2"]
    assert call(*flags, f"--out={tmp_path}/out") == 0
    assert capsys.readouterr().out == f"11 images in {tmp_path}/out\n"
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names == [
        "0000_zero_seed0.png",
        "0010_a-handwritten-seven_seed5.png",
        *(f"{100 + i}.png" for i in range(9)),
    ]
    # One image by itself is the same, and no grid: 16 pixels.
    one = tmp_path / "one.jpg"
    assert call("--prompt=a handwritten seven", "--seed=5", "--num=1", "--truncation=1.2", f"--out={one}") == 0
    assert np.abs(read_pixels(one) - read_pixels(tmp_path / "out" / names[1])).max() <= 40
    assert read_metadata(one)["prompt"] == "a handwritten seven"
    # The same command again makes nothing, and another one is refused.
    assert call(*flags, f"--out={tmp_path}/out") == 0
    assert "truncation 1.2, and not 1" in wrong(*flags[:2], f"--out={tmp_path}/out")


def test_what_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImage, "from_workdir", None)
    (tmp_path / "p.txt").write_text("\n")
    out = f"--out={tmp_path}/x.png"
    for args, says in (
        (["--prompt=x", f"--out={tmp_path}/x.gif"], ".gif cannot be written"),
        (["--prompt=x", "--out=gs://bucket/x"], "only a place on a disk"),
        (["--prompt=x", out, "--quality=90"], "PNG is lossless"),
        (["--prompt=x", f"--out={tmp_path}/x.jpg", "--quality=0"], "--quality=0: must be 1 to 100"),
        (["--prompt=x", out, "--seed=-1"], "--seed=-1: must be 0 to"),
        (["--prompt=x", out, "--truncation=-0.5"], "--truncation -0.5: must be 0"),
        (["--prompt=x", out, "--global_truncation=nan"], "--global_truncation nan: must be 0"),
        ([f"--prompts={tmp_path}/p.txt", out], "there are no prompts in it"),
        ([f"--prompts={tmp_path}/none.txt", out], "a prompt itself is --prompt"),
    ):
        assert says in wrong(*args)


def test_what_is_refused_by_the_config(tmp_path):
    out = f"--out={tmp_path}/x.png"
    assert "give --prompt=TEXT, or --prompts=FILE" in wrong(out)
    assert "a grid of 40000 images" in wrong(out, "--prompt=x", "--num=40000")
    assert "published weights of step" in wrong(out, "--prompt=x", "--step=7")


def test_an_earlier_checkpoint():
    step = int(next((RUN / "checkpoints").glob("[0-9]*")).name)
    assert sample._split_step(f"{RUN}/checkpoints/{step}", None) == (str(RUN), step)
    assert sample._split_step(f"{RUN}/checkpoints/", step) == (str(RUN), step)
    assert sample._split_step("gs://b/run/checkpoints/12/", 12) == ("gs://b/run", 12)
    assert sample._split_step(str(RUN), None) == (str(RUN), None)
    with pytest.raises(UserError, match=f"write --workdir={RUN} --step=3"):
        sample._split_step(f"{RUN}/checkpoints/{step}", 3)
    assert TextToImage.from_workdir(RUN, step=step).step == step
    with pytest.raises(UserError, match=f"no checkpoint of step 7; there are: {step}"):
        TextToImage.from_workdir(RUN, step=7)


@pytest.mark.slow
def test_a_job_goes_on_after_kill_9_and_sigterm(tmp_path):
    """Into tars, and a folder: the images are those of a job that nobody has stopped."""
    (tmp_path / "p.txt").write_text("".join(f"the digit {i % 10}, number {i}\n" for i in range(1500)))
    command = [sys.executable, "-m", "gigagan_jax.sample", f"--workdir={WEIGHTS}", f"--prompts={tmp_path}/p.txt"]
    environment = os.environ | {"XLA_FLAGS": FLAGS}
    folder = tmp_path / "out"
    for number, images in ((signal.SIGKILL, 40), (signal.SIGTERM, 300)):
        child = subprocess.Popen(
            [*command, f"--out={folder}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        while child.poll() is None and len(list(folder.glob("*.png"))) < images:
            time.sleep(0.01)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
        assert "Traceback" not in err
        # It has stopped in the middle.
        assert child.returncode == (-9 if number == signal.SIGKILL else 143), err
        assert images <= len(list(folder.glob("*.png"))) < 1500
    assert "the same command goes on" in err
    # The SIGTERM has left no half of a file.
    assert not list(folder.glob(".*.tmp"))
    assert call(f"--prompts={tmp_path}/p.txt", f"--out={folder}") == 0
    names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert names == sorted(p.name for p in folder.glob("*.png"))
    assert len(names) == 1500
    about = [read_metadata(folder / names[i]) for i in (3, 700, 1499)]
    alone = TextToImage.from_workdir(WEIGHTS)([a["prompt"] for a in about], [int(a["seed"]) for a in about])
    for a, image in zip((3, 700, 1499), alone, strict=True):
        assert np.abs(read_pixels(folder / names[a]) - image).max() <= 1
