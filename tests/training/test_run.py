"""Whole runs: resume after kill -9 bit for bit, on other numbers of devices, two traces, and what a run leaves behind."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.digits import get_config
from gigagan_jax import sharding
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.errors import UserError
from gigagan_jax.training.checkpoint import Checkpoints, open_workdir, same, with_shardings
from gigagan_jax.training.loop import Run
from gigagan_jax.training.state import Networks

ROOT = Path(__file__).parents[2]
# For child processes: one device, compiled fast.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


def small(**fields):
    c = get_config("tiny")
    c.total_kimg, c.checkpoint_kimg, c.snapshot_kimg = 0.32, 0.064, 10.0
    for name, value in fields.items():
        group, _, key = name.rpartition("__")
        setattr(c[group] if group else c, key, value)
    return from_dict(c)


def read(workdir: Path, config, devices=1):
    """(state, data position) of the newest checkpoint, on the first `devices` devices."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    networks = Networks(config)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest()
    try:
        return checkpoints.restore(step, with_shardings(networks.abstract(), networks.shardings(mesh)))
    finally:
        checkpoints.close()


def child(workdir: Path, *extra: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "gigagan_jax.train", "--config=configs/digits.py:tiny", f"--workdir={workdir}"]
    fields = ["--config.total_kimg=0.64", "--config.checkpoint_kimg=0.032", "--config.snapshot_kimg=10", *extra]
    # Compiled once, by the first child: what is tested here is the state, not the compiler.
    environment = os.environ | {"XLA_FLAGS": QUICK}
    with open(workdir.parent / f"{workdir.name}.log", "a") as out:
        return subprocess.Popen(command + fields, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def log(workdir: Path) -> str:
    return (workdir.parent / f"{workdir.name}.log").read_text()


def test_resume_after_kill_is_bit_exact(tmp_path):
    """Killed in the middle of saves and between them; parameters, both optimizers, EMA, w_avg and data position."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert child(whole).wait(600) == 0, log(whole)
    rng = random.Random(0)
    killed_while_saving = 0
    for attempt in range(4):
        process = child(cut)
        folder = cut / "checkpoints"
        before = _finished(folder)
        limit = time.monotonic() + 300
        while time.monotonic() < limit and process.poll() is None:
            if attempt % 2 == 0 and _finished(folder) > before and (_saving(folder) or time.monotonic() > limit - 1):
                break
            if attempt % 2 == 1 and _finished(folder) > before:
                time.sleep(rng.uniform(0.0, 0.05))
                break
            time.sleep(0.0005)
        killed_while_saving += _saving(folder)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert process.returncode in (-signal.SIGKILL, 0), log(cut)
    assert killed_while_saving >= 1
    assert child(cut).wait(600) == 0, log(cut)
    config = small()
    (a, data_a), (b, data_b) = read(whole, config), read(cut, config)
    assert int(a.step) == int(b.step) == 40
    assert same(a, b)
    assert {k: data_a[k] for k in ("examples_seen", "seed", "source")} == {
        k: data_b[k] for k in ("examples_seen", "seed", "source")
    }
    # The metrics file shows each step once, with the numbers of the uninterrupted run.
    losses = [
        {m["step"]: m["loss/g"] for m in map(json.loads, (w / "metrics.jsonl").read_text().splitlines())}
        for w in (whole, cut)
    ]
    assert losses[0] == losses[1]
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == len(losses[1]) == 40


def _finished(folder: Path) -> int:
    return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)


def _saving(folder: Path) -> bool:
    return any(".orbax-checkpoint-tmp" in p.name for p in folder.glob("*"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A finished run on 8 devices (4 x 2, data x fsdp), stopped half-way and resumed once in the same process."""
    workdir = tmp_path_factory.mktemp("run") / "eight"
    config = small(mesh__fsdp=2, total_kimg=0.16)
    run = Run(config, workdir)
    state = run.train()
    return workdir, config, jax.device_get(state), run


def test_two_traces_over_a_run(eight):
    assert eight[3].step.traces == [True, False]


def test_everything_a_run_leaves(eight):
    workdir, _, state, _ = eight
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == list(range(1, 11))
    for name in (
        "loss/d",
        "loss/g",
        "loss/d_gan",
        "loss/d_match",
        "grad_norm/d",
        "grad_norm/g",
        "loss/r1",
    ):
        assert all(np.isfinite(m[name]) for m in lines), name
    assert json.loads((workdir / "config.json").read_text())["name"] == "digits"
    assert list((workdir / "tensorboard").iterdir())
    assert int(state.images) == 160


@pytest.mark.parametrize("devices", [1, 4])
def test_mesh_change_on_resume(eight, devices, tmp_path):
    """Written on 8 devices, restored on fewer: the same numbers, and training goes on."""
    workdir, config, state, _ = eight
    restored, _ = read(workdir, config, devices)
    assert same(state, restored)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    more = small(total_kimg=0.192)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    after = jax.device_get(Run(more, copy, mesh=mesh).train())
    assert int(after.step) == 12
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.g_ema))
    assert not same(after.g.params, state.g.params)


def test_workdir_of_another_config(eight):
    workdir, *_ = eight
    other = small(mesh__fsdp=2, generator__z_dim=16, ema__half_life_kimg=1.0)
    with pytest.raises(UserError, match=r"ema\.half_life_kimg: 10\.0 -> 1\.0; generator\.z_dim: 8 -> 16"):
        Run(other, workdir).train()


def test_a_workdir_whose_config_was_removed_is_compared_with_its_checkpoint(eight, tmp_path):
    workdir, *_ = eight
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"generator\.z_dim: 8 -> 16"):
        open_workdir(copy, small(mesh__fsdp=2, generator__z_dim=16))
    open_workdir(copy, small(mesh__fsdp=2))
    assert (copy / "config.json").exists()


def test_workdirs_that_cannot_hold_checkpoints(tmp_path, refused):
    refused(lambda: open_workdir(tmp_path / "run [x]", small()), "[ or ]")
    (tmp_path / "checkpoints").write_text("a file")
    refused(lambda: open_workdir(tmp_path, small()), tmp_path / "checkpoints", "no folder that can be written")


@pytest.mark.parametrize("victim", ["state/manifest.ocdbt", "_CHECKPOINT_METADATA", "state/d"])
def test_incomplete_checkpoint(eight, tmp_path, victim):
    """A part missing, or its arrays cut short: one line, exit code 2, nothing removed. In a process of its own."""
    workdir, *_ = eight
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    broken = copy / "checkpoints" / "10" / victim
    if broken.is_dir():
        files = sorted(p for p in broken.rglob("*") if p.is_file())
        assert files
        for f in files:
            f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    else:
        broken.unlink()
    assert child(copy, "--config.total_kimg=0.192").wait(300) == 2
    (line,) = [line for line in log(copy).splitlines() if line.startswith("error: ")]
    assert re.search(r"checkpoint .*10 is incomplete .*remove that folder to go on from step 8", line)
    assert "Traceback" not in log(copy)
    assert (copy / "checkpoints" / "10").is_dir()


def test_sigterm_saves_and_resumes(tmp_path):
    """SIGTERM: exit code 75, a checkpoint of the step it came in, and the same command goes on."""
    workdir = tmp_path / "term"
    process = child(workdir, "--config.total_kimg=6.4", "--config.checkpoint_kimg=100")
    limit = time.monotonic() + 300
    metrics = workdir / "metrics.jsonl"
    while time.monotonic() < limit and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, log(workdir)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, log(workdir)
    step = _finished(workdir / "checkpoints")
    assert 3 < step < 400
    assert child(workdir, f"--config.total_kimg={(step + 2) * 0.016}", "--config.checkpoint_kimg=100").wait(300) == 0
    assert _finished(workdir / "checkpoints") == step + 2
