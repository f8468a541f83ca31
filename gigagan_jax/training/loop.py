"""The training loop: data in, steps, metrics, checkpoints, and the callers' hooks at snapshots and at the end."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gigagan_jax.checkpoint import consistency
from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.checkpoint.run_lock import alone
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import Config
from gigagan_jax.core.errors import Unreachable
from gigagan_jax.data import pipeline
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import communication, sharding, watchdog
from gigagan_jax.parallel.signals import Interrupted, _Signals
from gigagan_jax.telemetry.console import Progress
from gigagan_jax.telemetry.goodput import Goodput
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.telemetry.profiler import Profiler
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.health.recovery import Guard
from gigagan_jax.training.input_pipeline import make_pipeline
from gigagan_jax.training.state import GanState, Networks
from gigagan_jax.training.step import TrainStep
from gigagan_jax.training.throughput import Speed, facts

_log = logging.getLogger(__name__)

# Called with (state, thousands of images, logger).
Hook = Callable[[GanState, float, MetricLogger], None]


class Run:
    """One training run in a workdir.

    Args:
      config: of the run.
      workdir: where everything is written, and what a run goes on from.
      snapshot: hook, called every `snapshot_kimg`.
      finish: hooks, called once at the end.
      mesh: devices to train on; None for the config's mesh over all of them.

    Attributes:
      began: when this process was started, in seconds since the epoch; what is lost before training counts from there.
      profile_steps: (first, last) steps to take a trace of, last not included.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        *,
        snapshot: Hook | None = None,
        finish: Sequence[Hook] = (),
        mesh: Any = None,
    ):
        self.config, self.workdir, self.snapshot, self.finish = config, workdir, snapshot, finish
        self.mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
        sharding.check_batch(config.batch_size, config.micro_batches, self.mesh, config.rules)
        self.networks = Networks(config)
        self.step = CompiledStep(TrainStep(self.networks), self.mesh)
        image = self.step.batch_shardings["image"]
        self.rows = sharding.local_rows(image, (config.batch_size, config.resolution, config.resolution, 3))
        self._signals = _Signals()
        self.began = time.time()
        self.profile_steps: tuple[int, int] | None = None

    @functools.cached_property
    def frozen(self) -> tuple[Params, dict[str, str]]:
        """The frozen networks' parameters, loaded once, and their identities."""
        names = ", ".join(f"{t.role} ({t.path})" for t in self.networks.frozen.towers.values())
        if names:
            _log.info("loading the frozen networks: %s", names)
        return self.networks.frozen.load(self.mesh)

    def train(self) -> GanState:
        """Trains to `total_kimg`, from the newest checkpoint if there is one, and returns the final state.

        Raises:
          UserError: bad data, a workdir of another run, a damaged checkpoint, a run that went wrong (docs/health.md).
          Interrupted: SIGTERM or SIGINT came; a checkpoint was written.
        """
        first = jax.process_index() == 0
        about = facts(self.config, self.networks, self.mesh)
        with contextlib.ExitStack() as stack:
            if first:
                stack.enter_context(alone(self.workdir))
                open_workdir(self.workdir, self.config)
            else:
                with contextlib.suppress(OSError):  # process 0 says what is wrong with it
                    self.workdir.mkdir(parents=True, exist_ok=True)
            return self._watched(first, about)

    def _watched(self, first: bool, about: dict[str, Any]) -> GanState:
        with (
            Goodput(self.workdir, about, enabled=first, began=self.began, stops=(Interrupted,)) as goodput,
            Profiler(self.workdir, self.profile_steps, lambda: goodput("profile")) as profiler,
            self._signals,
        ):
            state = self._train(goodput, profiler)
        if first:
            _log.info("wall time:\n%s", goodput.account.table())
        return state

    def _train(self, goodput: Goodput, profiler: Profiler) -> GanState:
        config = self.config
        _log.info("data: %s %s", config.data.source, config.data.path)
        with make_pipeline(config, self.workdir, self.rows) as data:
            goodput.about({"data": data.about()})
            consistency.check(config, data.state()["source"], self.workdir)
            checkpoints = Checkpoints(self.workdir, config)
            try:
                weights, identities = self.frozen
                if data.embeddings is not None:
                    identities = identities | data.embeddings.identities
                guard = Guard(config, self.step.step.probe, self.workdir, data)
                state, step = self._start(checkpoints, data, identities, guard)
                goodput.resumed(step)
                resumed = step if step else None
                with MetricLogger(self.workdir, enabled=jax.process_index() == 0, resume_step=resumed) as logger:
                    with self._signals.held(), goodput("step"):
                        state = self._loop(
                            state, step, data, checkpoints, logger, weights, identities, guard, goodput, profiler
                        )
                    watchdog.report(None)
                    with goodput("checkpoint"):
                        checkpoints.wait()
                    kimg = int(state.images) / 1000
                    for hook in self.finish:
                        with goodput("evaluation"):
                            hook(state, kimg, logger)
            finally:
                self.step.cancel_compiling()
                checkpoints.close()
        return state

    def _start(
        self, checkpoints: Checkpoints, data: pipeline.Pipeline, identities: dict[str, str], guard: Guard
    ) -> tuple[GanState, int]:
        latest = checkpoints.newest()
        if latest is None:
            _log.info("start: initialising G and D")
            return self.networks.init(self.mesh), 0
        _log.info("resume: restoring checkpoint %d", latest)
        checkpoints.check_frozen(latest, identities)
        before = checkpoints.config(latest)
        for name, o in (("g", self.config.g_optimizer), ("d", self.config.d_optimizer), ("v", self.config.v_optimizer)):
            if o.decay_kimg and before.total_kimg < self.config.total_kimg:
                _log.warning(
                    "total_kimg was %g and is now %g: the learning rate of %s, which decays over the last %g kimg, may rise",
                    before.total_kimg,
                    self.config.total_kimg,
                    name.upper(),
                    o.decay_kimg,
                )
        state, position = checkpoints.restore(latest, self._abstract())
        data.restore(position)
        guard.monitor.restore(position.get("health"))
        return state, latest

    def _abstract(self) -> GanState:
        return with_shardings(self.networks.abstract(), self.step.state_shardings)

    def _loop(
        self,
        state: GanState,
        step: int,
        data: pipeline.Pipeline,
        checkpoints: Checkpoints,
        logger: MetricLogger,
        weights: Params,
        identities: dict[str, str],
        guard: Guard,
        goodput: Goodput,
        profiler: Profiler,
    ) -> GanState:
        config = self.config
        images = int(state.images)
        total = math.ceil(round(config.total_kimg * 1000) / config.batch_size) * config.batch_size
        if images >= total:
            _log.info("nothing to do: the run is at %.1f of %.1f kimg", images / 1000, config.total_kimg)
            return state
        progress = Progress(config.total_kimg, images)
        key, scale = self.step.key(), self.step.scalar(guard.monitor.lr_scale)
        speed = Speed(config, self.mesh.devices.reshape(-1).tolist(), goodput)
        latest: dict[str, Any] = {}
        pending: list[tuple[int, int, dict[str, jax.Array], jax.Array | None]] = []  # (step, images, metrics, asked)
        agreement = communication.Agreement(self.mesh) if jax.process_count() > 1 else None
        seen: set[bool] = set()
        compiling = False
        names: set[str] = set()  # of all metrics so far

        # Durations are in images: something is due when a multiple of its period was crossed in this step.
        def due(kimg: float) -> bool:
            period = kimg * 1000
            return images // period > (images - config.batch_size) // period

        def look(stop: int) -> int:
            """Judges the oldest pending step, waiting for it -> the signal to stop by, agreed on by all processes in it."""
            done, so_far, metrics, asked = pending.pop(0)
            before = guard.monitor.skipped
            guard.look(done, so_far, metrics)
            if guard.monitor.skipped > before:
                goodput.skipped(guard.monitor.skipped - before)
            return stop if asked is None else max(stop, int(asked))

        while images < total:
            with_r1 = step % config.loss.r1_interval == 0
            first_time = with_r1 not in seen and not self.step.is_compiled(with_r1=with_r1)
            seen.add(with_r1)
            began = time.monotonic()
            if first_time:
                _log.info("compiling the train step %s R1 (once)", "with" if with_r1 else "without")
                watchdog.report(None)  # however long it takes, it is no step that hangs
            last = pending[-1][2]["health"] if pending else None
            with goodput("data", behind=last):
                batch = self._next(data)
            if not compiling:
                self.step.compile_ahead(state, batch, key, weights, scale)
                compiling = True
            with profiler(step, compiles=first_time, done=last), goodput("compile" if first_time else "step"):
                state, metrics = self.step(state, batch, key, weights, scale, with_r1=with_r1)
                if first_time:
                    jax.block_until_ready(metrics)
            step += 1
            goodput.step = step
            images += config.batch_size
            watchdog.report(step, data.state()["examples_seen"])
            latest |= {k: v for k, v in metrics.items() if k != "health"}
            metrics["health"].copy_to_host_async()
            pending.append((step, images, metrics, agreement.ask(self._signals.number) if agreement else None))
            if first_time:
                _log.info("compiled in %.0f s", time.monotonic() - began)
                progress.restart(images, goodput.training_seconds)
                speed.learn()
            # Two steps may be in flight: the host prepares the next one, and no queue grows.
            stop = 0 if agreement else self._signals.number
            if len(pending) > 2:
                stop = look(stop)
            # What is saved or logged is judged before: a checkpoint holds the judgement of its own step.
            while pending and (due(config.log_kimg) or due(config.checkpoint_kimg) or images >= total or stop):
                stop = look(stop)
            if guard.rollback is not None:
                init = functools.partial(self.networks.init, self.mesh)
                with goodput("skipped"):
                    state, step = guard.go_back(state, checkpoints, logger, self._abstract(), init)
                goodput.resumed(step)
                images, scale = int(state.images), self.step.scalar(guard.monitor.lr_scale)
                pending.clear()
                latest.clear()
                continue
            save = due(config.checkpoint_kimg) or images >= total or bool(stop)
            if due(config.log_kimg) or save:
                values = {k: float(v) for k, v in jax.device_get(latest).items()} | guard.values()
                # By the clock of training, which stands still while something else is done.
                progress.advance(images, goodput.training_seconds)
                values |= speed.figures(progress.rate)
                if goodput.share is not None:
                    values["goodput"] = goodput.share
                line = progress.line(values)
                bad = data.quarantine.causes
                if bad:
                    values["data/bad"] = sum(bad.values())
                logger.scalars(step, images / 1000, values)
                if jax.process_index() == 0:
                    print(line, flush=True)
                # The penalty's metrics come with its first step; a run that is to stop is saved whatever was asked for.
                names |= values.keys()
                if jax.process_index() == 0 and not stop and True in seen:
                    checkpoints.check_metrics(names)
            checkpoints.poll()
            if save:
                with goodput("checkpoint"):
                    checkpoints.save(step, state, guard.position(), config, identities, images=images, metrics=values)
            if self.snapshot is not None and (due(config.snapshot_kimg) or images >= total):
                with goodput("evaluation"):
                    self.snapshot(state, images / 1000, logger)
            if stop:
                _log.info("stopping at step %d: writing the checkpoint", step)
                with goodput("checkpoint"):
                    checkpoints.wait()
                raise Interrupted(stop, agreed=True)
        _log.info("traced %d programs: %s", len(self.step.traces), self.step.traces)
        return state

    def _next(self, data: Iterator[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        try:
            batch, length = next(data), self.config.batch_size
        except Unreachable:
            if self._signals.number:  # a worker that was started just then was told to end, too
                raise Interrupted(self._signals.number, agreed=False) from None
            raise
        return {
            k: sharding.from_rows(batch[k], self.rows, where, length) for k, where in self.step.batch_shardings.items()
        }
