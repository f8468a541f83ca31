"""Times the train step (with and without R1) and sampling of a config on the devices that are here; writes JSON.

    python tools/bench.py --config=configs/digits.py [--config.key=value] [--steps=20] [--json=FILE]
    python tools/bench.py data [--json=FILE]     (reading tars; see tools/bench_data.py)

Each figure is the median over `--repeats` runs of `--steps` steps. FLOPs are those of the traced program (matrix products
and convolutions, recomputation included); the share of the peak is given for bfloat16 on devices whose peak is known.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigagan_jax import cli, sharding
from gigagan_jax.config import Config
from gigagan_jax.errors import UserError
from gigagan_jax.hardware import peak_flops
from gigagan_jax.inference.pipeline import TextToImage
from gigagan_jax.training.batch import abstract_batch
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.logging import configure
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep


def synthetic_batch(config: Config, shardings: dict[str, Any]) -> dict[str, jax.Array]:
    """A batch of noise with captions that all differ, in the shapes of the config."""
    rng = np.random.default_rng(0)
    out: dict[str, jax.Array] = {}
    for name, spec in abstract_batch(config).items():
        if name == "image":
            value = rng.integers(0, 256, spec.shape, np.uint8)
        elif name == "tokens":
            value = rng.integers(3, 259, spec.shape, np.int32)
            value[:, -1] = 2
        elif name == "label":
            # Without classes they are unknown: equal labels would leave no wrong caption that is valid.
            value = rng.integers(0, config.num_classes, spec.shape) if config.num_classes else np.full(spec.shape, -1)
        else:  # features and embeddings that are stored with the data
            value = rng.standard_normal(spec.shape, np.float32)
        value = value.astype(spec.dtype)
        out[name] = jax.device_put(value, shardings[name])
    return out


def seconds(run: Callable[[], Any], steps: int, repeats: int) -> float:
    """Median seconds of one call of `run`, over `repeats` runs of `steps` calls after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(steps):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def figures(flops: int, best: float | None, took: float, images: int, compile_seconds: float) -> dict[str, Any]:
    """One row of the result."""
    return {
        "seconds": took,
        "images_per_second": images / took,
        "compile_seconds": compile_seconds,
        "flops": flops,
        "share_of_peak": flops / took / best if best else None,
    }


def bench(config: Config, steps: int, repeats: int) -> dict[str, Any]:
    """All figures of a config."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh, config.rules)
    networks = Networks(config)
    step = CompiledStep(TrainStep(networks), mesh)
    state = networks.init(mesh)
    weights = networks.frozen.load(mesh)[0]
    batch, key = synthetic_batch(config, step.batch_shardings), step.key()
    rows: dict[str, Any] = {}
    for name, with_r1 in (("step", False), ("step_with_r1", True)):
        print(f"compiling {name} ...", flush=True)

        def run(with_r1: bool = with_r1) -> Any:
            nonlocal state
            state, metrics = step(state, batch, key, weights, with_r1=with_r1)
            return metrics

        start = time.perf_counter()
        jax.block_until_ready(run())
        took = time.perf_counter() - start
        timed = seconds(run, steps, repeats)
        flops = step.flops(with_r1=with_r1)
        best = peak_flops(jax.devices()) if config.dtype == "bfloat16" else None
        rows[name] = figures(flops, best, timed, config.batch_size, took - timed)
    interval = config.loss.r1_interval
    mean = (rows["step"]["seconds"] * (interval - 1) + rows["step_with_r1"]["seconds"]) / interval
    rows["training"] = {"seconds": mean, "images_per_second": config.batch_size / mean}

    sampler = TextToImage(config, mesh)
    prompts, seeds = ["0"] * sampler.batch, list(range(sampler.batch))
    start = time.perf_counter()
    sampler(state.g_ema, state.w_avg, prompts, seeds)
    first = time.perf_counter() - start
    took = seconds(lambda: jnp.asarray(sampler(state.g_ema, state.w_avg, prompts, seeds)), steps, repeats)
    rows["sampling"] = {"seconds": took, "images_per_second": sampler.batch / took, "compile_seconds": first - took}
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "config": config.name,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
        "results": rows,
    }


def verb(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if argv[:1] == ["data"]:
        import bench_data

        return bench_data.verb(argv[1:])
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args, unknown = parser.parse_known_args(argv)
    if args.steps < 1 or args.repeats < 1:
        raise UserError("--steps and --repeats must be at least 1")
    cli.writable(args.json)
    config = cli.load_config(args.config, cli.config_overrides(unknown))
    configure()
    out = bench(config, args.steps, args.repeats)
    print(f"{out['config']}, batch {out['batch_size']}, {out['dtype']}, on {out['devices']} x {out['device']}")
    for name, row in out["results"].items():
        share = f", {row['share_of_peak']:.1%} of peak" if row.get("share_of_peak") else ""
        flops = f", {row['flops'] / 1e9:.2f} GFLOP" if row.get("flops") else ""
        compile_time = f", compiled in {row['compile_seconds']:.0f} s" if "compile_seconds" in row else ""
        rate = f"{row['images_per_second']:8.1f} images/s"
        print(f"  {name:13} {row['seconds'] * 1e3:9.2f} ms {rate}{flops}{share}{compile_time}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))
    return 0


if __name__ == "__main__":
    cli.main(verb)
