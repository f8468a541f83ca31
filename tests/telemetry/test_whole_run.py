"""What a run leaves to be seen, by real training: goodput over a failure and a resume, a trace, speed, the report."""

import dataclasses
import json
import os
import signal

import jax
import pytest

from configs.digits import get_config
from gigagan_jax.config import MeshConfig, from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import sharding
from gigagan_jax.reporting.run_report import write_report
from gigagan_jax.telemetry.goodput import Account, Goodput, read_events
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.loop import Hooks, Run
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep
from gigagan_jax.training.throughput import ThroughputMeter, model_flops


@dataclasses.dataclass
class Device:
    device_kind: str


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """A run that failed at step 7 after its checkpoint of step 4, and went on from there to step 12."""
    workdir = tmp_path_factory.mktemp("seen") / "run"
    # 8 x 8 pixels: the run compiles in seconds.
    config = get_config("tiny")
    # 12 steps of 16 images, checkpoints every 4, the snapshot at step 7.
    config.total_kimg, config.checkpoint_kimg, config.snapshot_kimg = 0.192, 0.064, 0.112
    config = from_dict(config)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def fail_at_snapshot(state, kimg, logger):
        raise UserError("something went wrong")

    with pytest.raises(UserError, match="something went wrong"):
        Run(config, workdir, mesh=mesh, hooks=lambda run: Hooks(snapshot=fail_at_snapshot)).train()
    # Asked for by the file before there is anything to profile: it comes after what is compiled.
    (workdir / "profile").touch()
    Run(
        config, workdir, mesh=mesh, hooks=lambda run: Hooks(finish=[lambda *_: os.kill(os.getpid(), signal.SIGUSR1)])
    ).train()
    return workdir


def test_the_time_of_a_real_run(resumed_run):
    account = Account(read_events(resumed_run))
    assert [(s.first_step, s.last_step, s.exit) for s in account.sessions] == [(0, 7, "failed"), (4, 12, "done")]
    assert account.sessions[0].message == "something went wrong"
    assert account.sessions[1].about["data"]["examples"] == 1797
    # Steps 5 to 7 were lost in the failure.
    for cause in ("start", "compile", "step", "repeated", "checkpoint"):
        assert account.seconds[cause] > 0, cause
    last = account.sessions[-1].last
    assert sum(account.seconds.values()) == pytest.approx(last - account.sessions[0].began, abs=0.5)
    lines = [json.loads(line) for line in (resumed_run / "metrics.jsonl").read_text().splitlines()]
    # No step is logged twice, though 5 to 7 ran twice.
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(0 <= line["goodput"] < 1 for line in lines)
    assert lines[-1]["images_per_second"] == lines[-1]["images_per_second_per_chip"] > 0
    assert not any("mfu" in line for line in lines)  # nobody knows the peak of a CPU


def test_the_file_had_a_trace_taken_after_compiling(resumed_run):
    (trace,) = (resumed_run / "profiles").iterdir()
    # After the steps that compile, with and without R1.
    assert 5 <= int(trace.name) <= 8
    assert list(trace.glob("plugins/profile/*/*.xplane.pb"))
    assert not (resumed_run / "profile").exists()


def test_the_report_of_a_real_run(resumed_run):
    text = write_report(resumed_run).read_text()
    assert "finished" in text
    assert "Loss of G and D" in text
    assert "restart from step 4" in text


def test_mfu_is_the_models_flops_over_the_peak(tmp_path):
    config = dataclasses.replace(from_dict(get_config("tiny")), dtype="bfloat16", remat=True)
    # A v5p: 459e12 FLOP/s at its peak.
    devices = [Device("TPU v5")] * 4
    with Goodput(tmp_path) as goodput:
        speed = ThroughputMeter(config, devices, goodput)
        assert speed.metrics_of_rate(None) == {}
        assert speed.metrics_of_rate(100.0) == {"images_per_second": 100.0, "images_per_second_per_chip": 25.0}
        speed.learn_model_flops()
        speed.learn_model_flops()
        # FLOPs are counted in a thread, beside training.
        speed._thread.join()
        mfu = speed.metrics_of_rate(100.0)["mfu"]
        assert mfu == pytest.approx(100.0 * speed.flops / (4 * 459e12))
    # what is computed twice does not count, and the next process knows it without counting
    step = CompiledStep(TrainStep(Networks(config)), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    # R1 runs in one step of the interval; its cost is averaged over the interval.
    interval = config.loss.r1_interval
    traced = (step.flops(with_r1=False) * (interval - 1) + step.flops(with_r1=True)) / interval / config.batch_size
    assert 0.5 * traced < speed.flops < traced
    with Goodput(tmp_path) as goodput:
        assert ThroughputMeter(config, devices, goodput).metrics_of_rate(100.0)["mfu"] == mfu
        assert ThroughputMeter(dataclasses.replace(config, seed=1), devices, goodput).flops is None
        assert ThroughputMeter(dataclasses.replace(config, dtype="float32"), devices, goodput).peak is None


def test_model_flops_without_recomputation_are_those_of_the_step():
    config = from_dict(get_config("tiny"))
    step = CompiledStep(TrainStep(Networks(config)), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    interval = config.loss.r1_interval
    traced = (step.flops(with_r1=False) * (interval - 1) + step.flops(with_r1=True)) / interval
    assert model_flops(config) == pytest.approx(traced / config.batch_size)
