"""Whole runs: on other numbers of devices, two traces, signals and notices, and what a run leaves behind."""

import http.server
import json
import shutil
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import pytest

from gigagan_jax.checkpoint.manager import states_equal
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import MeshConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import sharding
from gigagan_jax.training.loop import Run
from tests.runs import child, finished, log, read, small


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A finished run on 8 devices (4 x 2, data x fsdp), stopped half-way and resumed once in the same process."""
    workdir = tmp_path_factory.mktemp("run") / "eight"
    config = small(mesh__fsdp=2, total_kimg=0.16)
    run = Run(config, workdir)
    state = run.train()
    return workdir, config, jax.device_get(state), run


def test_every_program_is_traced_once_in_a_run(eight):
    step = eight[3].step
    assert sorted(step.traces) == sorted(step.programs(with_r1=True))


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


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_mesh_change_on_resume(eight, devices, tmp_path):
    """Written on 8 devices, restored on fewer: the same numbers, and training goes on."""
    workdir, config, state, _ = eight
    restored, _ = read(workdir, config, devices)
    assert states_equal(state, restored)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    more = small(total_kimg=0.192)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    after = jax.device_get(Run(more, copy, mesh=mesh).train())
    assert int(after.step) == 12
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.g_ema))
    assert not states_equal(after.g.params, state.g.params)


def test_workdir_of_another_config(eight):
    workdir, *_ = eight
    other = small(mesh__fsdp=2, generator__z_dim=16, ema__half_life_kimg=1.0)
    with pytest.raises(UserError, match=r"ema\.half_life_kimg: [\d.]+ -> 1\.0; generator\.z_dim: 8 -> 16"):
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


class _Notice(http.server.BaseHTTPRequestHandler):
    """Answers like Google's metadata server on a machine that is to be preempted, once `due` is set."""

    due = False

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        known = {"/instance/preempted": b"TRUE" if self.due else b"FALSE", "/instance/maintenance-event": b"NONE"}
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        self.wfile.write(known.get(self.path, b""))

    def log_message(self, *args):
        pass


def test_notices_and_signals_save_and_the_next_start_compiles_nothing(tmp_path):
    """A notice of preemption, then SIGTERM: code 75, a checkpoint of the step it came in; the same command goes on."""
    workdir = tmp_path / "term"
    metrics = workdir / "metrics.jsonl"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Notice)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"--maintenance_url=http://127.0.0.1:{server.server_address[1]}/instance"
    own_cache = {"JAX_COMPILATION_CACHE_DIR": None}

    def until(steps):
        limit = time.monotonic() + 300
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= steps):
            assert process.poll() is None, log(workdir)
            assert time.monotonic() < limit, log(workdir)
            time.sleep(0.01)

    def programs():
        parts = ("jit__critic_gradients-", "jit__add_r1-", "jit__update_critics-", "jit__update_generator-")
        return {p.name for p in (workdir / "compilation_cache").iterdir() if p.name.startswith(parts)}

    long = ("--config.total_kimg=64", "--config.checkpoint_kimg=100")
    process = child(workdir, *long, url, **own_cache)
    until(20)
    _Notice.due = True
    assert process.wait(120) == 75, log(workdir)
    server.shutdown()
    server.server_close()
    assert "preempted is TRUE" in log(workdir)
    first = finished(workdir / "checkpoints")
    compiled = programs()
    assert 20 <= first < 4000
    assert len(compiled) == 4
    process = child(workdir, *long, **own_cache)
    until(first + 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, log(workdir)
    second = finished(workdir / "checkpoints")
    assert second >= first + 20
    assert programs() == compiled
    total = f"--config.total_kimg={(second + 2) * 0.016}"
    assert child(workdir, total, "--config.checkpoint_kimg=100", **own_cache).wait(300) == 0
    assert finished(workdir / "checkpoints") == second + 2


def test_sigterm_before_the_first_step(tmp_path):
    """Nothing to save: the run ends at once, for a launcher to start it again."""
    # On a loaded machine this process may see the line only after the first step: then it tries again.
    for attempt in range(3):
        workdir = tmp_path / f"early{attempt}"
        process = child(workdir)
        limit = time.monotonic() + 300
        while "data: digits" not in log(workdir):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log(workdir)
        assert "Traceback" not in log(workdir)
        if finished(workdir / "checkpoints") == 0:
            break
    assert finished(workdir / "checkpoints") == 0
