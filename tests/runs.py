"""Runs of configs/digits.py:tiny, in this process and as children, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from configs.digits import get_config
from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.parallel import sharding
from gigagan_jax.training.state import Networks
from tests.quick import FLAGS

ROOT = Path(__file__).parents[1]


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
    step = checkpoints.latest_valid_step()
    try:
        return checkpoints.restore(step, with_shardings(networks.abstract(), networks.shardings(mesh)))
    finally:
        checkpoints.close()


def child(workdir: Path, *extra: str, **more) -> subprocess.Popen:
    """The same as a child process, for 40 steps with a checkpoint every 2; `more` goes into its environment."""
    command = [sys.executable, "-m", "gigagan_jax.train", "--config=configs/digits.py:tiny", f"--workdir={workdir}"]
    fields = ["--config.total_kimg=0.64", "--config.checkpoint_kimg=0.032", "--config.snapshot_kimg=10", *extra]
    # Compiled once, by the first child: what is tested here is the state, not the compiler.
    environment = {k: v for k, v in (os.environ | {"XLA_FLAGS": FLAGS} | more).items() if v is not None}
    with open(workdir.parent / f"{workdir.name}.log", "a") as out:
        return subprocess.Popen(command + fields, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def log(workdir: Path) -> str:
    return (workdir.parent / f"{workdir.name}.log").read_text()


def finished(folder: Path) -> int:
    return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)


def saving(folder: Path) -> bool:
    return any(".orbax-checkpoint-tmp" in p.name for p in folder.glob("*"))
