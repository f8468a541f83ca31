"""The command lines: what works, and one clear line with exit code 2 for what a user can get wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigagan_jax import cli, sample, train
from gigagan_jax.inference.image_encoding import read_metadata
from tests.quick import FLAGS

ROOT = Path(__file__).parents[2]
TINY = "--config=configs/digits.py:tiny"


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def call_verb(verb, capsys, *args):
    """(exit code, stdout, stderr) of a verb."""
    # cli.main always exits.
    with pytest.raises(SystemExit) as leave:
        cli.main(verb, [str(a) for a in args])
    out = capsys.readouterr()
    return leave.value.code, out.out, out.err


def input_error(verb, capsys, *args):
    """The one line of an input error."""
    code, _, err = call_verb(verb, capsys, *args)
    # Log lines may come before it.
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A finished tiny run, by the command line in a process of its own with one device."""
    workdir = tmp_path_factory.mktemp("verbs") / "run"
    # Without the eight devices of the tests: one device, as on a user's machine.
    environment = os.environ | {"XLA_FLAGS": FLAGS}
    # Warnings are errors: a user should see none.
    command = [sys.executable, "-W", "error", "-m", "gigagan_jax.train", TINY, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_train_prints_progress_and_draws(trained_run):
    workdir, done = trained_run
    last = [line for line in done.stdout.splitlines() if line.startswith("kimg")][-1]
    for part in ("kimg 0.3/0.3", "100.0 %", "images/s", "ETA", "D real", "gnorm"):
        assert part in last
    assert "Traceback" not in done.stderr
    snapshots = sorted((workdir / "snapshots").glob("*.png"))
    assert len(snapshots) == 2
    with Image.open(snapshots[-1]) as picture:
        # A grid of prompts and truncations, not one image of 8 pixels.
        assert picture.width > 100


def test_sample_grid_and_folder(trained_run, capsys, tmp_path):
    workdir, _ = trained_run
    code, out, err = call_verb(
        sample.verb, capsys, f"--workdir={workdir}", "--prompt=a handwritten seven", "--out", tmp_path / "grid.png"
    )
    assert code == 0
    assert "read only" not in err
    assert "grid.png" in out
    assert read_metadata(tmp_path / "grid.png")["prompt"] == "a handwritten seven"
    code, _, _ = call_verb(
        sample.verb,
        capsys,
        f"--workdir={workdir}",
        "--prompt=the digit 3",
        # Not Latin, and outside of the basic plane: file names and metadata must take it.
        "--prompt=שבע 🎉",
        "--num=2",
        "--seed=5",
        "--out",
        tmp_path / "d",
    )
    assert code == 0
    files = sorted((tmp_path / "d").glob("*.png"))
    assert len(files) == 4
    about = [read_metadata(f) for f in files]
    assert [(a["prompt"], a["seed"]) for a in about] == [
        ("the digit 3", "5"),
        ("the digit 3", "6"),
        ("שבע 🎉", "5"),
        ("שבע 🎉", "6"),
    ]
    assert read_pixels(files[0]).shape == (8, 8, 3)


def test_a_seed_is_the_same_image_in_any_batch(trained_run, capsys, tmp_path):
    """Eight devices here; one image by itself, and among twenty."""
    workdir, _ = trained_run
    one, many = tmp_path / "one", tmp_path / "many"
    assert (
        call_verb(
            sample.verb, capsys, f"--workdir={workdir}", "--prompt=the digit 3", "--num=1", "--seed=9", "--out", one
        )[0]
        == 0
    )
    assert (
        call_verb(
            sample.verb,
            capsys,
            f"--workdir={workdir}",
            "--prompt=zero",
            "--prompt=the digit 3",
            "--num=10",
            "--out",
            many,
        )[0]
        == 0
    )
    # The same bits: another batch size must not change the sums of an image.
    (alone,) = one.glob("*.png")
    (among,) = [
        f for f in many.glob("*.png") if read_metadata(f)["prompt"] == "the digit 3" and read_metadata(f)["seed"] == "9"
    ]
    assert np.array_equal(read_pixels(alone), read_pixels(among))


@pytest.mark.slow
def test_a_seed_is_the_same_image_on_any_mesh(trained_run, capsys, tmp_path):
    """One device in a child process, eight here."""
    workdir, _ = trained_run
    args = [f"--workdir={workdir}", "--prompt=the digit 3", "--num=5", "--truncation=0.7"]
    assert call_verb(sample.verb, capsys, *args, "--out", tmp_path / "eight")[0] == 0
    command = [sys.executable, "-m", "gigagan_jax.sample", *args, "--out", str(tmp_path / "one")]
    environment = os.environ | {"XLA_FLAGS": FLAGS}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    for a, b in zip(sorted((tmp_path / "eight").glob("*.png")), sorted((tmp_path / "one").glob("*.png")), strict=True):
        assert a.name == b.name
        assert np.array_equal(read_pixels(a), read_pixels(b))


def test_dry_run(capsys, tmp_path):
    # 64 devices are planned for on a machine without any.
    code, out, _ = call_verb(
        train.verb, capsys, "--config=configs/laion.py:paper", "--dry_run", "--devices=64", f"--workdir={tmp_path}"
    )
    assert code == 0
    # A parameter with its shape, totals, and memory by kind.
    for part in ("generator/levels/1/entry/conv0/filters", "1x3x3x1600x1600", "M parameters", "activations", "GiB"):
        assert part in out
    assert re.search(r"fits a graphics card of \d+ GB, of which JAX takes [\d.]+ GiB", out)
    data = json.loads((tmp_path / "dry_run.json").read_text())
    # Table A2 of the paper.
    assert abs(data["parameters"]["generator"] / 652.5e6 - 1) < 0.015
    assert abs(data["parameters"]["discriminator"] / 381.4e6 - 1) < 0.015
    assert data["bytes_per_device"]["total"] > 0
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["--config.generater.z_dim=3"], "unknown config key config.generater; did you mean config.generator?"),
        (["--config.generator.zdim=3"], "did you mean config.generator.z_dim?"),
        (["--config.resolution=48"], "config.resolution=48: must be a power of two"),
        (["--config.mesh.data=3"], "needs 3 devices, there are"),
        (["--config.mesh.fsdp=3"], "does not divide the 8 devices"),
        (["--config.batch_size=12"], "does not divide over 8 devices"),
        (["--config.micro_batches=3"], "does not divide into config.micro_batches=3"),
        (["--config.batch_size=many"], "config.batch_size: expected int"),
        (["--config.generator.bank=(1,2,3)"], "config.generator.bank has 3 entries"),
        (["--config.text.encoder=clip"], "text.encoder='clip' needs the folder or hub id"),
        (["--config.rules.conv_in=datum"], "config.rules.conv_in='datum': 'datum' is not a mesh axis"),
        (["--config.rules.convin=fsdp"], "unknown config key config.rules.convin"),
        (["--config.snapshot.truncations=2"], "config.snapshot.truncations=(2.0,): each must be 0 to 1"),
        (["--config.data.source=bogus"], "config.data.source='bogus': must be one of 'auto', 'tar', 'folder'"),
        (["--confg.x=1"], "unknown argument --confg.x=1"),
        (["--config.seed"], "write --config.seed=VALUE"),
    ],
)
def test_bad_settings(capsys, tmp_path, overrides, expected):
    assert expected in input_error(train.verb, capsys, TINY, f"--workdir={tmp_path / 'w'}", *overrides)
    # A refused run leaves nothing to resume from.
    assert not (tmp_path / "w" / "checkpoints").exists()


@pytest.mark.parametrize(
    "text, value", [("true", True), ("1", True), ("yes", True), ("false", False), ("False", False), ("0", False)]
)
def test_a_flag_is_true_or_false_as_it_says(text, value):
    config = cli.load_config("configs/digits.py:tiny", [f"--config.data.flip={text}", f"--config.remat={text}"])
    assert (config.data.flip, config.remat) == (value, value)


def test_bad_config_file(capsys, tmp_path):
    assert "there is no file" in input_error(train.verb, capsys, "--config=configs/nope.py", f"--workdir={tmp_path}")
    assert "no variant 'huge'" in input_error(
        train.verb, capsys, "--config=configs/digits.py:huge", f"--workdir={tmp_path}"
    )
    broken = tmp_path / "broken.py"
    # Python's own error reaches the user in one line.
    broken.write_text("def get_config(:\n")
    assert "SyntaxError" in input_error(train.verb, capsys, f"--config={broken}", f"--workdir={tmp_path}")
    assert "--workdir=DIR is needed" in input_error(train.verb, capsys, TINY)


def folder_run(path, *more):
    fields = ["--config.data.source=folder", f"--config.data.path={path}", *more]
    return [TINY, *fields]


def test_bad_data_folders(capsys, tmp_path):
    missing = tmp_path / "missing"
    assert str(missing) in input_error(train.verb, capsys, *folder_run(missing), f"--workdir={tmp_path / 'a'}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in input_error(train.verb, capsys, *folder_run(empty), f"--workdir={tmp_path / 'b'}")
    bare = tmp_path / "bare"
    bare.mkdir()
    # An image without a caption.
    Image.new("RGB", (8, 8)).save(bare / "x.png")
    assert "x.png" in input_error(train.verb, capsys, *folder_run(bare), f"--workdir={tmp_path / 'c'}")


def test_unusable_workdir(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in input_error(train.verb, capsys, TINY, f"--workdir={tmp_path / 'file' / 'w'}")


def test_truncated_image_is_skipped_and_named(tmp_path):
    """A run over a folder with a cut PNG goes on, counts it and names it."""
    data, workdir = tmp_path / "data", tmp_path / "w"
    data.mkdir()
    # Noise does not compress, so half of the file lacks half of the pixels.
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), np.uint8)).save(data / f"{i:02d}.png")
        (data / f"{i:02d}.txt").write_text(f"picture number {i}")
    whole = (data / "07.png").read_bytes()
    # A valid header with half of the pixels.
    (data / "07.png").write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-m", "gigagan_jax.train", *folder_run(data, "--config.total_kimg=0.064")]
    environment = os.environ | {"XLA_FLAGS": FLAGS}
    done = subprocess.run([*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "07.png" in done.stderr
    assert "07.png" in (workdir / "quarantine.jsonl").read_text()
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["data/bad"] >= 1


def test_bad_sampling(trained_run, capsys, tmp_path):
    workdir, _ = trained_run
    ok = [f"--workdir={workdir}", "--prompt=x", "--out", tmp_path / "x.png"]
    assert "has no checkpoints" in input_error(sample.verb, capsys, f"--workdir={tmp_path / 'no'}", *ok[1:])
    assert "--num=0" in input_error(sample.verb, capsys, *ok, "--num=0")
    assert "--seed=-1" in input_error(sample.verb, capsys, *ok, "--seed=-1")
    assert "--truncation 2.5" in input_error(sample.verb, capsys, *ok, "--truncation=2.5")
    assert "--truncation" in input_error(sample.verb, capsys, *ok, "--truncation=x")
    (tmp_path / "f.txt").write_text("")
    assert "f.txt" in input_error(
        sample.verb, capsys, f"--workdir={workdir}", "--prompt=x", "--out", tmp_path / "f.txt"
    )
    code, _, _ = call_verb(
        sample.verb,
        capsys,
        f"--workdir={workdir}",
        "--prompt=",
        "--prompt",
        # A prompt beyond the text length is cut, not refused.
        "x" * 10_000,
        "--num=1",
        "--out",
        tmp_path / "l.png",
    )
    assert code == 0
