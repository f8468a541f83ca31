"""Grids of an upsampler during training: fixed examples made small, enlarged, and as they were."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.config import Config
from gigagan_jax.core.workdir_files import SNAPSHOTS_FOLDER
from gigagan_jax.inference.images import draw_grid, save_png, to_uint8
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import sharding
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.training.batch import Batch, abstract_batch
from gigagan_jax.training.input_pipeline import make_pipeline
from gigagan_jax.training.loop import Hook, Run
from gigagan_jax.training.state import GanState
from gigagan_jax.training.upsampler_objective import UpsamplerObjective

_log = logging.getLogger(__name__)

ROWS = ("small", "enlarged", "real")


def first_examples(config: Config, count: int, workdir: Path) -> dict[str, np.ndarray]:
    """The first examples of a config's data: on every process the same rows of a batch."""
    few = dataclasses.replace(config, batch_size=count)
    # One reader in this process: a hand-full of examples starts no workers.
    few = dataclasses.replace(few, data=dataclasses.replace(few.data, workers=0, threads=0))
    with make_pipeline(few, workdir, range(count)) as data:
        batch = next(data)
    return {name: np.asarray(batch[name]) for name in abstract_batch(few)}


def make_snapshot_hook(run: Run) -> Hook:
    """Returns a hook that draws a grid: examples are columns, small, enlarged and real are rows."""
    config, objective = run.config, UpsamplerObjective(run.networks)
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    examples: dict[str, np.ndarray] = {}

    def enlarge(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        # Few images and any number of devices: each makes them all, by rules that cut no batch.
        with sharding.use_mesh(run.mesh, dict(config.rules) | {"batch": ""}):
            key = jax.random.key(0)
            batch = objective.encode_captions(batch, frozen)
            low, level = objective.make_low(batch, key)
            z = jax.random.normal(key, (low.shape[0], config.generator.z_dim))
            network = run.networks.g.bind(params)
            images, _ = network(z, low, level, batch.get("tokens"), batch["label"], batch.get("features"))
            factor = config.resolution // config.upsampler.input_resolution
            return jnp.repeat(jnp.repeat(low, factor, axis=1), factor, axis=2), images[-1]

    program: Any = jax.jit(enlarge, out_shardings=(everywhere, everywhere))

    def draw_snapshot(state: GanState, kimg: float, logger: MetricLogger) -> None:
        if not examples:
            examples.update(first_examples(config, config.snapshot.seeds, run.workdir))
        put = lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])
        small, large = program(state.g_ema, run.frozen[0], {k: put(x) for k, x in examples.items()})
        if jax.process_index() != 0:
            return
        rows = np.stack([to_uint8(np.asarray(small)), to_uint8(np.asarray(large)), examples["image"]])
        picture = draw_grid(rows, ROWS)
        path = run.workdir / SNAPSHOTS_FOLDER / f"{kimg:010.3f}kimg.png"
        save_png(path, picture, {"kimg": f"{kimg:.3f}", "config": config.name})
        logger.log_image("samples", int(state.step), np.asarray(picture.convert("RGB")))
        _log.info("samples: %s", run.place.show(path))

    return draw_snapshot
