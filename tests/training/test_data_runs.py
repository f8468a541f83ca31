"""A whole run on tars in a bucket, with bad examples among them and a server that is killed on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.data import pipeline
from gigagan_jax.data.sources.tar import TarSource
from gigagan_jax.data.tokenizers import ByteTokenizer
from tests import quick
from tests.bad_files import expected, write_bad_tars
from tests.img2dataset import write_tars
from tests.object_server import Server

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 8, 8
COMMAND = (
    *("-m", "gigagan_jax.train", "--config=configs/laion.py:tiny", f"--config.batch_size={BATCH}"),
    *("--config.resolution=8", "--config.generator.blocks=(1,1)", "--config.generator.bank=(1,2)"),
    *("--config.generator.attention_depth=(0,1)", "--config.discriminator.blocks=(1,1)"),
    *("--config.discriminator.attention_depth=(0,0)", "--config.dtype=float32", "--config.remat=false"),
    *(f"--config.total_kimg={STEPS * BATCH / 1000}", f"--config.log_kimg={BATCH / 1000}", "--config.snapshot.seeds=1"),
    *("--config.data.max_bad_fraction=0.5", "--config.data.workers=1", "--config.data.threads=2"),
)
PATTERN = "{good/00000,good/00001,good/00002,bad/00000,bad/00001}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    write_tars(folder / "good")
    write_bad_tars(folder / "bad")
    return folder


@pytest.mark.slow
def test_a_run_on_a_bucket_whose_server_is_killed(folder, tmp_path):
    """The server goes while the step is compiled and comes back only when the reader has asked in vain."""
    workdir = tmp_path / "run"
    command = [sys.executable, *COMMAND, f"--workdir={workdir}", f"--config.data.path=s3://bucket/{PATTERN}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines, killed, back = [], False, False
    with (
        Server(folder) as server,
        subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": quick.FLAGS}, **pipes) as run,
    ):
        for line in run.stdout:
            lines.append(line)
            if not killed and "compiling the train step" in line:
                server.kill()
                killed = True
            elif killed and not back and "asking again" in line:
                server.start()
                back = True
        assert run.wait() == 0, "".join(lines)
    assert back
    assert any("answers again" in line for line in lines)

    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == STEPS
    assert all(np.isfinite(value) for m in metrics for key, value in m.items() if key.startswith("loss/"))
    bad = {f"bad/{name}": cause for name, cause in expected().items()}
    found = [json.loads(line) for line in (workdir / "quarantine.jsonl").read_text().splitlines()]
    assert {line["name"]: line["cause"] for line in found} == bad

    # Nothing lost, nothing twice: what was asked for, and what of it was bad, is what the local files give.
    checkpoints = Checkpoints(workdir)
    config = checkpoints.read_config(STEPS)
    position = json.loads((workdir / "checkpoints" / str(STEPS) / "data" / "metadata").read_text())
    checkpoints.close()
    source = TarSource(str(folder / PATTERN), index=str(tmp_path / "index"))
    with pipeline.build_pipeline(
        source, resolution=8, batch_size=BATCH, seed=config.seed, tokenizer=ByteTokenizer(8), max_bad_fraction=0.5
    ) as data:
        for _ in range(STEPS):
            next(data)
        position.pop("health")  # what the monitor remembers
        assert position == data.state()
