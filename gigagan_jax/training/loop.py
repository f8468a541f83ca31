"""The training loop: data in, steps, metrics, checkpoints, and hooks at snapshots and at the end."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gigagan_jax.checkpoint import consistency
from gigagan_jax.checkpoint.disk_space import DiskSpace
from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.checkpoint.workdir import open_workdir
from gigagan_jax.config import Config
from gigagan_jax.core.errors import Unreachable
from gigagan_jax.data.pipeline import Pipeline
from gigagan_jax.models.network import Params
from gigagan_jax.parallel import communication, sharding, watchdog
from gigagan_jax.parallel.signals import Interrupted, StopSignals
from gigagan_jax.telemetry.console import TrainingProgress
from gigagan_jax.telemetry.goodput import Goodput
from gigagan_jax.telemetry.memory import HOST, WORKERS, memory_metrics
from gigagan_jax.telemetry.metrics import MetricLogger
from gigagan_jax.telemetry.profiler import Profiler
from gigagan_jax.training.compiled_step import CompiledStep
from gigagan_jax.training.data_check import warn_of_data
from gigagan_jax.training.data_settings import with_data_settings
from gigagan_jax.training.fine_tuning import InitFrom, start_from
from gigagan_jax.training.health.recovery import HealthGuard
from gigagan_jax.training.input_pipeline import build_shared_index, make_pipeline
from gigagan_jax.training.resume import resume
from gigagan_jax.training.saving import CheckpointSaver
from gigagan_jax.training.state import GanState, Networks
from gigagan_jax.training.step import TrainStep
from gigagan_jax.training.throughput import ThroughputMeter, run_info

_log = logging.getLogger(__name__)

# Called with (state, thousands of images, logger).
Hook = Callable[[GanState, float, MetricLogger], None]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run calls from outside of training.

    Attributes:
      snapshot: called every `snapshot_kimg`, and at the last step.
      finish: called once at the end.
    """

    snapshot: Hook | None = None
    finish: Sequence[Hook] = ()


class Run:
    """One training run in a workdir.

    Args:
      config: of the run.
      workdir: folder or address where everything is written, and what a run goes on from.
      hooks: makes the hooks, which may need the run's mesh and frozen networks.
      mesh: devices to train on; None for the config's mesh over all of them.
      began: when this process was started, in seconds since the epoch: time lost before training counts from there.
      profile_steps: (first, last) steps to take a trace of, last not included.
      accept: of `config.ACCEPTED`: what may have changed since the run was begun in this workdir.
      init_from: weights that the run starts from; None for initial values. A run with a checkpoint goes on from that.

    Raises:
      UserError: a mesh that the config does not fit, or classes that the data does not have.
    """

    def __init__(
        self,
        config: Config,
        workdir: Place,
        *,
        hooks: Callable[["Run"], Hooks] = lambda run: Hooks(),
        mesh: Any = None,
        began: float | None = None,
        profile_steps: tuple[int, int] | None = None,
        accept: Collection[str] = (),
        init_from: InitFrom | None = None,
    ):
        self.place, self.accept = RunFolder.open(workdir), frozenset(accept)
        config, self.source = with_data_settings(config, self.place)
        self.config = config
        self.init_from = init_from
        self.began = time.time() if began is None else began
        self.profile_steps = profile_steps
        self.mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
        sharding.check_batch(config.batch_size, config.micro_batches, self.mesh, config.rules)
        self.networks = Networks(config)
        self.step = CompiledStep(TrainStep(self.networks), self.mesh)
        # Every entry of a batch is cut like the images: by examples.
        image = self.step.batch_shardings["image"]
        self.rows = sharding.local_rows(image, (config.batch_size, config.resolution, config.resolution, 3))
        self.signals = StopSignals()
        # Last: hooks take the mesh and the frozen networks from the run.
        self.hooks = hooks(self)

    @property
    def workdir(self) -> Path:
        """The folder of this machine for the small files of the run."""
        return self.place.folder

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
          Interrupted: SIGTERM or SIGINT came; where it is `agreed`, the state is saved.
        """
        is_main = jax.process_index() == 0
        info = run_info(self.config, self.networks, self.mesh)
        with contextlib.ExitStack() as stack:
            self.place.check_usable()
            if is_main:
                # Before anything is written: two runs in one workdir would destroy each other's checkpoints.
                stack.enter_context(self.place.hold_lock())
                stack.enter_context(self.place.synchronize())
                open_workdir(self.place, self.config, self.accept)
            else:
                with contextlib.suppress(OSError):  # process 0 reports what is wrong with the folder
                    self.workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self.place.synchronize())
            goodput = stack.enter_context(
                Goodput(self.workdir, info, enabled=is_main, began=self.began, stops=(Interrupted,))
            )
            profiler = stack.enter_context(Profiler(self.workdir, self.profile_steps, lambda: goodput("profile")))
            stack.enter_context(self.signals)
            state = self._train_on_data(goodput, profiler)
        if is_main:
            _log.info("wall time:\n%s", goodput.account.format_table())
        return state

    def abstract_state(self) -> GanState:
        """The state as ShapeDtypeStructs with shardings, to restore into."""
        return with_shardings(self.networks.abstract(), self.step.state_shardings)

    def init_state(self) -> GanState:
        """The state that the run begins with, where there is no checkpoint."""
        if self.init_from is not None:
            _, identities = self.frozen
            return start_from(self.init_from, self.config, self.networks, self.mesh, self.workdir, identities)
        _log.info("start: initialising G and D")
        return self.networks.init(self.mesh)

    def next_batch(self, data: Pipeline) -> dict[str, jax.Array]:
        """The next global batch, on the devices; this process reads the rows that its own devices hold."""
        try:
            batch = next(data)
        except Unreachable:
            # The signal may have ended a worker that was just starting: its loss is no error of its own.
            if self.signals.number:
                raise Interrupted(self.signals.number, agreed=False) from None
            raise
        return {
            k: sharding.array_from_rows(batch[k], self.rows, where, self.config.batch_size)
            for k, where in self.step.batch_shardings.items()
        }

    def _train_on_data(self, goodput: Goodput, profiler: Profiler) -> GanState:
        config = self.config
        build_shared_index(config, self.place)
        with make_pipeline(config, self.workdir, self.rows, self.source) as data:
            facts = data.describe_source()
            # The report of each path came before: how many examples it has is known now.
            _log.info("data: %s, %d examples", config.data.title, facts["examples"])
            goodput.record_facts({"data": facts})
            # Processes with other settings would compute other programs and wait for each other for ever.
            consistency.assert_same_on_all_processes(config, data.state()["source"], self.place)
            warn_of_data(config, data.source)
            checkpoints = Checkpoints(self.place, config)
            try:
                _, identities = self.frozen
                if data.embeddings is not None:
                    # Stored embeddings stand for encoders that are not loaded: their identities come from the files.
                    identities = identities | data.embeddings.identities
                guard = HealthGuard(config, self.step.step.health_vector, self.workdir, data)
                resumed = resume(self, checkpoints, data, identities, guard)
                state, step = (self.init_state(), 0) if resumed is None else resumed
                goodput.record_resume(step)
                resume_step = step if step else None
                with MetricLogger(self.workdir, enabled=jax.process_index() == 0, resume_step=resume_step) as logger:
                    with self.signals.hold_signals(), goodput("step"):
                        loop = _Loop(self, state, step, data, checkpoints, identities, guard, logger, goodput, profiler)
                        state = loop.train()
                    watchdog.report_progress(None)
                    for hook in self.hooks.finish:
                        with goodput("evaluation"):
                            hook(state, int(state.images) / 1000, logger)
            finally:
                # An error must not wait for programs that nobody will run.
                self.step.cancel_compiling()
                checkpoints.close()
        return state


class _Pending(NamedTuple):
    """A step that the device works on.

    stop_signal: the largest signal that any process has met, on the device; None for a process alone
    """

    step: int
    images: int
    metrics: dict[str, jax.Array]
    stop_signal: jax.Array | None


# Steps in flight: while the device works on one the host prepares the next, and no queue grows.
_STEPS_IN_FLIGHT = 2


class _Loop:
    """The steps of a run from a state to `total_kimg`.

    Durations are in images: something is due when a multiple of its period was crossed in the last step.
    """

    def __init__(
        self,
        run: Run,
        state: GanState,
        step: int,
        data: Pipeline,
        checkpoints: Checkpoints,
        identities: dict[str, str],
        guard: HealthGuard,
        logger: MetricLogger,
        goodput: Goodput,
        profiler: Profiler,
    ):
        self.run, self.config, self.step = run, run.config, run.step
        self.state, self.steps_done, self.images = state, step, int(state.images)
        self.data, self.checkpoints, self.identities = data, checkpoints, identities
        self.guard, self.logger, self.goodput, self.profiler = guard, logger, goodput, profiler
        c = self.config
        # The last batch is whole: a run ends at the first multiple of the batch past its length.
        self.total_images = math.ceil(round(c.total_kimg * 1000) / c.batch_size) * c.batch_size
        self.frozen, _ = run.frozen
        self.key, self.lr_scale = self.step.key(), self.step.scalar(guard.monitor.lr_scale)
        self.progress = TrainingProgress(c.total_kimg, self.images)
        self.speed = ThroughputMeter(c, run.mesh.devices.reshape(-1).tolist(), goodput)
        self.agreement = communication.Agreement(run.mesh) if jax.process_count() > 1 else None
        space = DiskSpace(run.place, c, run.abstract_state())
        space.check_start(len(checkpoints.all_steps()), (self.total_images - self.images) / 1000)
        self.saver = CheckpointSaver(checkpoints, space, c.checkpoint.full_disk_seconds, self._is_told_to_stop)
        self.saved_metrics: dict[str, float] = {}
        self.pending: list[_Pending] = []
        self.latest_metrics: dict[str, jax.Array] = {}
        self.metric_names: set[str] = set()
        self.kinds_of_step: set[bool] = set()  # with R1, without, as far as they were met
        self.compile_requested = False

    def train(self) -> GanState:
        """Trains to the end.

        Raises:
          Interrupted: a signal came; the checkpoint of the last step is on disk.
        """
        c = self.config
        if self.images >= self.total_images:
            _log.info("nothing to do: the run is at %.1f of %.1f kimg", self.images / 1000, c.total_kimg)
            return self.state
        while self.images < self.total_images:
            # The step is only started here: the host runs ahead of the devices.
            self._take_step()
            # A save that failed in the background ends the run at the next step, or is made again there, and not later.
            failed = self.saver.has_failed()
            signal = self._observe_pending_steps(saving=failed)
            if self.guard.rollback is not None:
                self._roll_back()
                continue
            is_last = self.images >= self.total_images
            save = self._is_due(c.checkpoint_kimg) or is_last or bool(signal) or failed
            values = self._log_metrics(stopping=bool(signal)) if save or self._is_due(c.log_kimg) else {}
            if save:
                self._save_checkpoint(values)
            if self.run.hooks.snapshot is not None and (self._is_due(c.snapshot_kimg) or is_last):
                with self.goodput("evaluation"):
                    self.run.hooks.snapshot(self.state, self.images / 1000, self.logger)
            if signal:
                self._stop(signal)
        with self.goodput("checkpoint"):
            self.saver.finish(self._start_save)
        _log.info("traced %d programs: %s", len(self.step.traces), self.step.traces)
        return self.state

    def _is_due(self, kimg: float) -> bool:
        period = kimg * 1000
        return self.images // period > (self.images - self.config.batch_size) // period

    def _take_step(self) -> None:
        """Starts one step on the devices; waits only for a program that is compiled."""
        c = self.config
        with_r1 = self.steps_done % c.loss.r1_interval == 0
        first_time = with_r1 not in self.kinds_of_step and not self.step.is_compiled(with_r1=with_r1)
        self.kinds_of_step.add(with_r1)
        began = time.monotonic()
        if first_time:
            _log.info("compiling the train step %s R1 (once)", "with" if with_r1 else "without")
            # Compiling may take longer than any step: it must not look like one that hangs.
            watchdog.report_progress(None)
        last = self.pending[-1].metrics["health"] if self.pending else None
        with self.goodput("data", behind=last):
            batch = self.run.next_batch(self.data)
        if not self.compile_requested:
            self.step.compile_ahead(self.state, batch, self.key, self.frozen, self.lr_scale)
            self.compile_requested = True
        profiled = self.profiler(self.steps_done, compiles=first_time, done=last)
        with profiled, self.goodput("compile" if first_time else "step"):
            self.state, metrics = self.step(self.state, batch, self.key, self.frozen, self.lr_scale, with_r1=with_r1)
            if first_time:
                jax.block_until_ready(metrics)
        self.steps_done += 1
        self.images += c.batch_size
        # Time that is lost from here on is counted against this step.
        self.goodput.step = self.steps_done
        watchdog.report_progress(self.steps_done, self.data.state()["examples_seen"])
        self.latest_metrics |= {k: v for k, v in metrics.items() if k != "health"}
        # Copied while later steps run: it is read when this step is two steps old.
        metrics["health"].copy_to_host_async()
        signal = self.agreement.all_max(self.run.signals.number) if self.agreement else None
        self.pending.append(_Pending(self.steps_done, self.images, metrics, signal))
        if first_time:
            _log.info("compiled in %.0f s", time.monotonic() - began)
            self.progress.restart_rate(self.images, self.goodput.training_seconds)
            self.speed.learn_model_flops()

    def _observe_pending_steps(self, *, saving: bool) -> int:
        """Judges steps that are done -> the signal to stop by, 0 for none; all processes find the same one.

        What is saved or logged is judged before: a checkpoint holds the judgement of its own step.

        Args:
          saving: a checkpoint is written although none is due.
        """
        c = self.config
        # A process alone stops at once; several stop at the step in which all of them know of it.
        signal = 0 if self.agreement else self.run.signals.number
        if len(self.pending) > _STEPS_IN_FLIGHT:
            signal = self._observe_oldest(signal)
        now = saving or self._is_due(c.log_kimg) or self._is_due(c.checkpoint_kimg) or self.images >= self.total_images
        while self.pending and (now or signal):
            signal = self._observe_oldest(signal)
        return signal

    def _observe_oldest(self, signal: int) -> int:
        """Waits for the oldest pending step and judges it -> the larger of `signal` and the one agreed on in that step."""
        step, images, metrics, agreed = self.pending.pop(0)
        before = self.guard.monitor.skipped
        self.guard.observe(step, images, metrics)
        if self.guard.monitor.skipped > before:
            self.goodput.record_skipped(self.guard.monitor.skipped - before)
        return signal if agreed is None else max(signal, int(agreed))

    def _roll_back(self) -> None:
        """To the last good checkpoint, with what the guard has decided: another order of the data, lower learning rates."""
        with self.goodput("skipped"):
            self.state, self.steps_done = self.guard.roll_back(
                self.state, self.checkpoints, self.logger, self.run.abstract_state(), self.run.init_state
            )
        self.goodput.record_resume(self.steps_done)
        self.images = int(self.state.images)
        self.lr_scale = self.step.scalar(self.guard.monitor.lr_scale)
        # Steps behind the checkpoint are void, with their metrics.
        self.pending.clear()
        self.latest_metrics.clear()

    def _log_metrics(self, *, stopping: bool) -> dict[str, float]:
        """Writes a line of metrics and prints the progress line -> the metrics."""
        is_main = jax.process_index() == 0
        values = {k: float(v) for k, v in jax.device_get(self.latest_metrics).items()} | self.guard.log_values()
        # By the clock of training, which stands still while something else is done.
        self.progress.advance(self.images, self.goodput.training_seconds)
        # Images a second, of a chip, and MFU where the peak is known.
        values |= self.speed.metrics_of_rate(self.progress.rate)
        if self.goodput.share is not None:
            values["goodput"] = self.goodput.share
        # Of this process: each looks at its own, and the first one's is logged.
        memory = memory_metrics(jax.local_devices())
        host = memory.get(HOST, 0.0) + memory.get(WORKERS, 0.0)
        self.guard.observe_memory(self.steps_done, self.images, host, time.monotonic())
        values |= memory
        line = self.progress.format_line(values)
        bad = self.data.quarantine.causes
        if bad:
            values["data/bad"] = sum(bad.values())
        self.logger.log_scalars(self.steps_done, self.images / 1000, values)
        if is_main:
            print(line, flush=True)
        # R1's metrics come with its first step: before it a name may be missing that is right. A run that stops is saved
        # whatever metric it was to keep the best checkpoints by.
        self.metric_names |= values.keys()
        if is_main and not stopping and True in self.kinds_of_step:
            self.checkpoints.check_metrics(self.metric_names)
        return values

    def _save_checkpoint(self, metrics: dict[str, float]) -> None:
        self.saved_metrics = metrics
        with self.goodput("checkpoint"):
            self.saver.save(self._start_save)

    def _start_save(self) -> None:
        self.checkpoints.save(
            self.steps_done,
            self.state,
            self.guard.checkpoint_position(),
            self.config,
            self.identities,
            images=self.images,
            metrics=self.saved_metrics,
        )

    def _is_told_to_stop(self) -> bool:
        # The same answer on all processes: they wait together.
        number = self.run.signals.number
        return bool(number if self.agreement is None else int(self.agreement.all_max(number)))

    def _stop(self, signal: int) -> None:
        _log.info("stopping at step %d: writing the checkpoint", self.steps_done)
        with self.goodput("checkpoint"):
            self.saver.finish(self._start_save)
        raise Interrupted(signal, agreed=True)
