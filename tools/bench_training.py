"""The last job of a bench: a small model trains for what is left of the budget."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from bench_inputs import discs, endless
from bench_measure import compile_split, peak_bytes, with_memory

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel import sharding
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.state import Networks
from gigagan_jax.training.step import TrainStep

BATCHES = 64  # of different images; they are seen again and again
LOG_SECONDS = 10.0
LOSSES = ("loss/d", "loss/g", "loss/r1", "logits/real", "logits/fake")
_AHEAD = 2  # steps that may be under way


def check(config: Config) -> None:
    """Raises UserError for a config that cannot be trained on captions without a download."""
    if config.condition != "text" or not config.text.is_trained or max(config.loss.clip) or config.loss.vision_aided:
        raise UserError(
            f"--train={config.name}: the job that trains needs a config with text.encoder bytes or words and without a CLIP"
        )
    sharding.check_batch(config.batch_size, config.micro_batches, sharding.make_mesh(config.mesh), config.rules)


def train(
    config: Config,
    seconds: Callable[[], float],
    write: Callable[[dict[str, Any]], None],
    log_seconds: float = LOG_SECONDS,
) -> dict[str, Any]:
    """Trains on coloured discs until the seconds are spent; where memory runs out, once more with half of the batch.

    Args:
      config: whose text encoder is trained.
      seconds: that are left for it, asked before each step.
      write: called with a line of losses every `log_seconds`.
      log_seconds: between lines.
    """
    mesh = sharding.make_mesh(config.mesh)
    least = sharding.batch_shards(mesh, config.rules) * config.micro_batches

    def attempt(batch: int) -> dict[str, Any]:
        return _train(dataclasses.replace(config, batch_size=batch), mesh, seconds, write, log_seconds)

    done = with_memory(attempt, config.batch_size, least, lambda: None)
    notes: dict[str, Any] = {"notes": list(done.notes)} if done.notes else {}
    return ({"out_of_memory": True} if done.result is None else done.result) | notes


def _train(
    config: Config, mesh: Any, left: Callable[[], float], write: Callable[[dict[str, Any]], None], log_seconds: float
) -> dict[str, Any]:
    networks = Networks(config)
    step = CompiledStep(TrainStep(networks), mesh)
    compile_seconds = {}
    for name, with_r1 in (("step_with_r1", True), ("step", False)):
        compile_seconds[name] = compile_split(lambda r1=with_r1: step.compile(with_r1=r1))[1]  # type: ignore[misc]
    state, key, one = networks.init(mesh), step.key(), step.scalar(1.0)
    data = endless(discs(config, BATCHES), step.batch_shardings)
    under_way: collections.deque[Any] = collections.deque()
    rows: list[dict[str, float]] = []
    seen: dict[str, Any] = {}

    def log(steps: int, spent: float) -> None:
        values = {k: float(v) for k, v in seen.items()}
        rows.append({"step": steps, "seconds": spent, "images_per_second": steps * config.batch_size / spent, **values})
        write({"job": "training/progress", **rows[-1]})

    start = logged = time.perf_counter()
    steps = 0
    while steps == 0 or left() > 0:
        with_r1 = steps % config.loss.r1_interval == 0
        state, metrics = step(state, next(data), key, {}, one, with_r1=with_r1)
        steps += 1
        seen |= {k: metrics[k] for k in LOSSES if k in metrics}
        under_way.append(metrics["loss/g"])
        if len(under_way) > _AHEAD:
            jax.block_until_ready(under_way.popleft())
        if steps == 1 or time.perf_counter() - logged >= log_seconds:
            jax.block_until_ready(metrics)
            logged = time.perf_counter()
            log(steps, logged - start)
    jax.block_until_ready(state)
    spent = time.perf_counter() - start
    log(steps, spent)
    return {
        "config": config.name,
        "parameters": [networks.g.count(), networks.d.count()],
        "batch": config.batch_size,
        "dtype": config.dtype,
        "compile_seconds": compile_seconds,
        "steps": steps,
        "seconds": spent,
        "images": steps * config.batch_size,
        "images_per_second": steps * config.batch_size / spent,
        "first": rows[0],
        "last": rows[-1],
        "finite": all(math.isfinite(v) for row in rows for v in row.values()),
        "device_bytes": peak_bytes(),
    }
