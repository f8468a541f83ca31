"""Whole runs on a frozen CLIP, in processes of their own: all losses, resume, samples, stored embeddings, bad weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest

from gigagan_jax.checkpoint.manager import Checkpoints, states_equal, with_shardings
from gigagan_jax.config import MeshConfig
from gigagan_jax.data.sources.digits import DigitsSource
from gigagan_jax.parallel import sharding
from gigagan_jax.train import verb
from gigagan_jax.training.state import Networks
from tests.quick import FLAGS

ROOT = Path(__file__).parents[2]


def command(program, *arguments, cwd=ROOT):
    environment = os.environ | {"XLA_FLAGS": FLAGS, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, *program, *arguments]
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


TRAIN = ("-m", "gigagan_jax.train")
SMALL = (
    "--config=configs/laion.py:tiny",
    "--config.resolution=8",
    "--config.generator.blocks=(1,1)",
    "--config.generator.bank=(1,2)",
    "--config.generator.attention_depth=(0,1)",
    "--config.discriminator.blocks=(1,1)",
    "--config.discriminator.attention_depth=(0,0)",
    "--config.dtype=float32",
    "--config.remat=false",
    "--config.batch_size=8",
    "--config.checkpoint_kimg=0.016",
    "--config.log_kimg=0.008",
    "--config.snapshot_kimg=1",
    "--config.snapshot.seeds=1",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images with captions: long, empty words, emoji, right to left, several a file, 10,000 characters."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    source = DigitsSource()
    odd = ["the seven " * 40, "😀🎉 zero", "رقم سبعة", "שבע", "x" * 10_000, "<|endoftext|> nine", "one\ntwo\nthree"]
    for i in range(24):
        Image.fromarray(source[i].image).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(odd[i] if i < len(odd) else source[i].captions[0], encoding="utf-8")
    return folder


def arguments(workdir, pictures, clip, total):
    where = (f"--workdir={workdir}", f"--config.data.path={pictures}", f"--config.text.path={clip}")
    return [*SMALL, *where, f"--config.total_kimg={total}"]


def train(workdir, pictures, clip, total, *extra):
    return command(TRAIN, *arguments(workdir, pictures, clip, total), *extra)


def state_of(workdir):
    config = Checkpoints(workdir)
    step = config.latest_valid_step()
    networks = Networks(config.read_config(step))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state, _ = config.restore(step, with_shardings(networks.abstract(), networks.shardings(mesh)))
    config.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pictures, clip_folder):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = train(workdir, pictures, clip_folder, 0.048)
    assert done.returncode == 0, done.stderr + done.stdout
    return workdir, done


def test_a_run_with_all_losses(whole):
    workdir, done = whole
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for name in ("loss/clip", "loss/v", "loss/g_v", "loss/g", "loss/d", "grad_norm/v", "health/v_gap"):
        assert all(np.isfinite(m[name]) for m in lines), name
    assert (done.stdout + done.stderr).count("further cuts are not reported") == 1
    # No frozen weight in the checkpoint: heads and projections would be there under these names.
    kept = "".join(p.name for p in (workdir / "checkpoints").rglob("*"))
    assert "vision_model" not in kept
    assert state_of(workdir).v is not None


def test_resume_with_all_losses_is_bit_exact(whole, tmp_path, pictures, clip_folder):
    """Stopped after two of six steps; parameters, three optimizers and averages as in the uninterrupted run."""
    workdir = tmp_path / "cut"
    # The ramps depend on total_kimg, so the first part is the same run with its later checkpoints removed.
    shutil.copytree(whole[0], workdir)
    for later in ("4", "6"):
        shutil.rmtree(workdir / "checkpoints" / later)
    done = train(workdir, pictures, clip_folder, 0.048)
    assert done.returncode == 0, done.stderr
    assert "restoring checkpoint 2" in done.stdout + done.stderr
    a, b = state_of(whole[0]), state_of(workdir)
    assert int(a.step) == int(b.step) == 6
    assert states_equal(a, b)


@pytest.mark.slow
def test_samples_from_prompts(whole, tmp_path, clip_folder):
    """Ordinary, empty, emoji, right to left, longer than 77 tokens, 10,000 characters; the encoder moved since training."""
    moved = shutil.copytree(clip_folder, tmp_path / "moved")
    prompts = ["the digit 3", "", "😀🎉", "رقم سبعة", "many words " * 60, "y" * 10_000]
    flags = [f"--prompt={p}" for p in prompts]
    where = (f"--workdir={whole[0]}", f"--text_path={moved}", f"--out={tmp_path / 'out'}")
    done = command(("-m", "gigagan_jax.sample"), *where, *flags, "--num=1")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == len(prompts)
    assert (done.stdout + done.stderr).count("2 of 6 prompts are longer than the text encoder reads") == 1


def test_resume_with_other_weights_is_refused(whole, tmp_path, pictures, make_clip):
    other = make_clip(tmp_path / "other", seed=5)
    done = train(whole[0], pictures, other, 0.064)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "other weights of the frozen network 'text'" in line
    done = command(
        ("-m", "gigagan_jax.sample"), f"--workdir={whole[0]}", "--prompt=x", "--num=1", f"--out={tmp_path}/x.png"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_stored_embeddings_train_the_same(whole, tmp_path, pictures, clip_folder):
    """`prepare_data.py embed`, then the same run without a text encoder in the step: the same parameters to rounding."""
    out, where = tmp_path / "embeddings", (f"--config.data.path={pictures}", f"--config.text.path={clip_folder}")
    done = command(("tools/prepare_data.py", "embed"), *SMALL, *where, f"--out={out}")
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "stored"
    done = train(workdir, pictures, clip_folder, 0.048, f"--config.data.embeddings={out}")
    assert done.returncode == 0, done.stderr
    a, b = state_of(whole[0]), state_of(workdir)
    # Adam makes a sign of a rounding where a gradient is nearly zero: nearly all parameters agree closely, none is far.
    for x, y in zip(jax.tree.leaves(a.g.params), jax.tree.leaves(b.g.params), strict=True):
        assert np.abs(x - y).max() < 6 * 2 * 0.0025
        assert np.median(np.abs(x - y)) < 1e-5
    first = [json.loads((w / "metrics.jsonl").read_text().splitlines()[0]) for w in (whole[0], workdir)]
    assert first[0]["loss/clip"] == pytest.approx(first[1]["loss/clip"], rel=1e-5)
    # They are of one encoder and one data set.
    done = train(
        tmp_path / "x", pictures, clip_folder, 0.048, f"--config.data.embeddings={out}", "--config.text.length=20"
    )
    assert done.returncode == 2
    assert "does not fit this run (length: 48 there, 20 here)" in done.stderr
    (out / "index.json").unlink()
    done = train(tmp_path / "y", pictures, clip_folder, 0.048, f"--config.data.embeddings={out}")
    assert done.returncode == 2
    assert "unfinished?" in done.stderr


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", ["model.safetensors", "hf download openai/clip-vit-large-patch14", "text.encoder=bytes"]),
        ("truncated", ["model.safetensors", "damaged or cut short"]),
        ("other", ["another architecture"]),
        ("tokenizer", ["added tokens", "rows"]),
        ("pickle", ["is a pickle", "save_pretrained"]),
    ],
)
def test_bad_weights_are_one_line(damage, words, tmp_path, pictures, clip_folder, monkeypatch, refused):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    path = str(folder)
    if damage == "missing":
        path = "openai/clip-vit-large-patch14"
    elif damage == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "other":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 4
        (folder / "config.json").write_text(json.dumps(config))
    elif damage == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        extra = {"id": 516, "content": "<more>", "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append(extra | {"normalized": False, "special": True})
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: verb(arguments(tmp_path / "run", pictures, path, 0.016)), *words)
