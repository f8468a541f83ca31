"""Checkpoints of a run, written by Orbax: asynchronous, atomic and checksummed.

A checkpoint is a folder `checkpoints/<step>/{state,data,config,frozen,measured}` of the workdir, on a disk or in a bucket. It
holds the state, the position in the data, the config, and the identities of the frozen networks (not their weights). A run
verifies the checksums before it resumes from a checkpoint.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gigagan_jax.checkpoint.checksums import CHECKSUMS_FILE
from gigagan_jax.checkpoint.commit import atomicity_options, path_class
from gigagan_jax.checkpoint.consistency import check_same_frozen
from gigagan_jax.checkpoint.orbax_logs import ORBAX_LOGGERS, BackgroundErrors, silence_closed_loop_errors
from gigagan_jax.checkpoint.retention import Retention
from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.checkpoint.stored_paths import translate_paths
from gigagan_jax.checkpoint.write_errors import write_error
from gigagan_jax.config import Config, from_dict, parameter_renames, to_dict
from gigagan_jax.config.migrations import FORMAT_KEY, upgrade_config, with_format
from gigagan_jax.core.errors import Unreachable, UserError, first_line, is_transient
from gigagan_jax.core.processes import leave_threads_behind
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER
from gigagan_jax.parallel import communication

_log = logging.getLogger(__name__)

_ITEMS = ("state", "data", "config", "frozen", "measured")
# Seconds between two looks at a save in progress.
_POLL_SECONDS = 0.05


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: workdir of the run, a folder or an address.
      config: config of the run; None opens the checkpoints for reading only.

    Raises:
      UserError: there is no folder of checkpoints, and no config to write some.
    """

    def __init__(self, workdir: Place, config: Config | None = None):
        self._place = RunFolder.open(workdir)
        self._steps = self._place.steps()
        # For messages: of a bucket the address, and not the folder that a checkpoint passes through.
        self.location = f"{self._place.address.rstrip('/')}/{CHECKPOINTS_FOLDER}"
        self._settings = None if config is None else config.checkpoint
        # Verified once per process: hashing a checkpoint of a large model takes minutes.
        self._verified_steps: set[int] = set()
        # The step whose save is in progress.
        self._saving: int | None = None
        self._save_began = 0.0
        # The newest one that this process knows to be complete in a bucket.
        self._complete: int | None = None
        # After a failed save Orbax must not be waited for.
        self._failed = False
        self._background_errors = BackgroundErrors()
        if config is None:
            if not self._steps.exists():
                raise UserError(
                    f"{workdir} has no checkpoints (no folder {CHECKPOINTS_FOLDER}): is it the --workdir of a training run?"
                )
        else:
            # The run lock is held: no other process is writing these folders.
            if jax.process_index() == 0:
                self._steps.remove_unfinished()
            self._retention = Retention(self._steps, config.checkpoint)
        for name in ORBAX_LOGGERS:
            logging.getLogger(name).addFilter(self._background_errors)
        silence_closed_loop_errors()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, created at first use: a damaged checkpoint is moved aside before it lists the steps."""
        # lightweight_initialize: Orbax would fail on the metadata of a damaged checkpoint; Retention reads them itself.
        common = {
            "temporary_path_class": path_class(self._place, self._steps, self._after_commit),
            "atomicity_options": atomicity_options(self._steps),
            "lightweight_initialize": True,
        }
        if self._settings is None:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False, **common)
        else:
            # In a bucket `_after_commit` deletes: Orbax would ask for rights on the bucket that its objects do not need.
            in_bucket = self._place.store is not None
            # The timeout bounds how long the processes wait for each other at the commit.
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.PreserveAll() if in_bucket else self._retention,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=self._settings.timeout_seconds),
                **common,
            )
        return ocp.CheckpointManager(self._steps.address, options=options, item_names=_ITEMS)

    def _after_commit(self, step: int) -> None:
        """In a bucket: deletes what the rules of retention do not keep. Process 0, while training continues."""
        self._complete = step
        for old in self._retention.steps_to_delete([*self._steps.all_steps(), step]):
            self._steps.delete(old)

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints in ascending order, damaged ones included."""
        # Not from Orbax's manager, which must not exist before damaged checkpoints are moved aside.
        return self._steps.all_steps()

    def latest_valid_step(self) -> int | None:
        """Returns the step of the newest intact checkpoint; None without any checkpoint.

        Every file is compared with its checksum. The log names a damaged checkpoint, and a training run moves it to
        `<step>.damaged`. Process 0 verifies, and all processes get its answer.

        Raises:
          UserError: all checkpoints are damaged; none is moved then.
        """
        # One process: the others would read the same bytes again, and could disagree on a network disk.
        valid_step = self._find_latest_valid() if jax.process_index() == 0 else None
        step: int | None = communication.broadcast_from_main(valid_step)
        if step is not None:
            self._complete = step
            self._verified_steps.add(step)
        return step

    def require_valid_step(self) -> int:
        """`latest_valid_step`. Raises UserError where the run has no finished checkpoint."""
        step = self.latest_valid_step()
        if step is None:
            raise UserError(f"{self._place.address} has no finished checkpoint yet: wait for the run's first one")
        return step

    def require_step(self, step: int) -> int:
        """Verifies the checkpoint of a given step and returns the step.

        Raises:
          UserError: there is no such checkpoint (the message lists those that there are), or it is damaged.
        """
        there = self.all_steps()
        if step not in there:
            known = ", ".join(map(str, there)) or "none yet"
            raise UserError(f"{self._place.address} has no checkpoint of step {step}; there are: {known}")
        damage = None if step in self._verified_steps else self._steps.verify(step)
        if damage is not None:
            raise self._read_error(step, f"damaged: {damage}")
        self._verified_steps.add(step)
        return step

    def _find_latest_valid(self) -> int | None:
        damaged: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            damage = None if step in self._verified_steps else self._steps.verify(step)
            if damage is None:
                # Only now: with no intact checkpoint nothing is moved.
                self._put_aside(damaged, step)
                if self._settings is not None:
                    self._steps.mark(step)
                return step
            damaged[step] = damage
        if damaged:
            damages = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            raise UserError(
                f"every checkpoint in {self.location} is damaged ({damages}): nothing was changed; restore one from a copy, or "
                "use another --workdir to start afresh"
            )
        # A restart must not train from scratch where an earlier start has moved all checkpoints aside.
        if self._settings is not None and self._steps.has_put_aside():
            raise UserError(
                f"{self.location} holds only checkpoints that were put aside as damaged: restore one from a copy, or use another "
                "--workdir to start afresh"
            )
        return None

    def _put_aside(self, damaged: Mapping[int, str], good: int) -> None:
        for step, damage in damaged.items():
            where = self._where(step)
            # A reader may look at a run of somebody else: it changes nothing.
            if self._settings is None:
                _log.warning("checkpoint %s is damaged (%s): using %d, the one before", where, damage, good)
                continue
            aside = self._steps.put_aside(step)
            _log.error(
                "checkpoint %s is DAMAGED (%s): moved to %s; going on from step %d, the one before",
                where,
                damage,
                aside,
                good,
            )

    def _where(self, step: int) -> str:
        return f"{self.location}/{step}"

    def restore_latest_valid(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest intact checkpoint; see `latest_valid_step` and `restore`.

        It may be called during a run, and waits for the save in progress.

        Returns:
          (step, state, data position); None without any checkpoint
        """
        if self._saving is not None:
            self.wait_until_finished()
        step = self.latest_valid_step()
        if step is None:
            return None
        # Orbax caches the list of steps, and some may have just been moved aside.
        if "_manager" in self.__dict__:
            self._manager.reload()
        return (step, *self.restore(step, abstract))

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        config: Config,
        frozen: Mapping[str, str] | None = None,
        *,
        images: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint, and returns when the state is copied to the host.

        Args:
          step: step of the run
          state: train state
          data: position in the data
          config: config of the run
          frozen: identities of the frozen networks by role
          images: number of real images seen, for `checkpoint.keep_every_kimg`
          metrics: metrics of this step, for `checkpoint.best_metric`

        Raises:
          UserError, Unreachable: this save or the one before it failed.
        """
        # Orbax would wait for it without a limit.
        if self._place.store is not None and self._saving is not None:
            self.wait_until_finished()
        # JSON has no NaN.
        numbers = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        measured = {"images": int(images), "metrics": numbers}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(with_format(to_dict(config))),
            frozen=ocp.args.JsonSave(dict(frozen or {})),
            measured=ocp.args.JsonSave(measured),
        )
        self._retention.record_checkpoint(step, measured)
        # `has_checksums` finds it where the checksum file is lost.
        mark = {"checksums": CHECKSUMS_FILE}
        self._run_write(lambda: self._manager.save(step, args=items, force=True, custom_metadata=mark))
        self._saving, self._save_began = step, time.monotonic()
        # With checkpoint.wait a kill costs at most one interval (docs/runs.md).
        if config.checkpoint.wait:
            self.wait_until_finished()

    def check_metrics(self, metrics: Collection[str]) -> None:
        """Raises UserError if `checkpoint.best_metric` is not among the metrics of the run."""
        self._retention.check_metric(metrics)

    def check_for_errors(self) -> None:
        """Raises the error of the save in progress, if it has one; never waits."""
        if self._saving is None:
            return
        self._check_background()
        if not self._manager.is_saving_in_progress():
            self.wait_until_finished()

    def _check_background(self) -> None:
        # With several processes Orbax raises it only when all have ended; the log has it at once.
        if self._background_errors.error is not None:
            raise self._write_error(self._background_errors.error) from self._background_errors.error
        if self._place.store is None or self._settings is None:
            return
        self._run_write(self._place.check_lock)
        # A server that takes bytes one by one ends no request.
        if time.monotonic() - self._save_began > self._settings.timeout_seconds:
            raise self._write_error(TimeoutError(f"not done after {self._settings.timeout_seconds} s"))

    def wait_until_finished(self) -> None:
        """Waits until the save in progress is complete.

        Raises:
          UserError, Unreachable: it failed, or took longer than `checkpoint.timeout_seconds`.
        """
        while self._place.store is not None and self._saving is not None and self._manager.is_saving_in_progress():
            self._check_background()
            time.sleep(_POLL_SECONDS)
        self._run_write(self._manager.wait_until_finished)
        self._saving = None

    def discard_failed_save(self) -> None:
        """Forgets a save that failed on a disk, so that another can be made. Only for a process alone."""
        manager = self.__dict__.pop("_manager", None)
        # It raises the failure of the save again. Its threads must have ended before their files are removed.
        with contextlib.suppress(Exception):
            if manager is not None:
                manager.close()
        self._steps.remove_unfinished()
        self._saving, self._failed, self._background_errors.error = None, False, None

    def _run_write(self, act: Callable[[], object]) -> None:
        try:
            act()
        except UserError as e:
            raise self._write_error(e) from None
        except Exception as e:
            # The clients of object stores have errors of their own; on a disk others are errors of this program.
            if self._place.store is None and not isinstance(e, (OSError, ValueError)):
                raise
            raise self._write_error(e) from e

    def _write_error(self, error: BaseException) -> Exception:
        self._failed = True
        if self._place.store is not None:
            # Orbax's wait five minutes for each other when one has failed, and Python waits for them.
            leave_threads_behind()
        return write_error(self._place, self.location, error, self._complete)

    def close(self) -> None:
        """Waits for the save in progress and closes Orbax's manager. After a failed save it does not wait."""
        try:
            if "_manager" in self.__dict__ and not self._failed:
                self._run_write(self._manager.close)
        finally:
            # After a failed save the filter stays: abandoned tasks log errors when they are collected, at exit.
            for name in () if self._failed else ORBAX_LOGGERS:
                logging.getLogger(name).removeFilter(self._background_errors)

    def _read_error(self, step: int, why: str) -> UserError:
        others = [s for s in self.all_steps() if s < step]
        mend = f"move that folder away to go on from step {max(others)}" if others else "there is none before it"
        return UserError(f"checkpoint {self._where(step)} cannot be read ({why}): {mend}")

    def read_config(self, step: int) -> Config:
        """Returns the config that a checkpoint was written with, upgraded to the current format."""
        values, _ = upgrade_config(self._stored_config(step), self._where(step))
        return from_dict(values)

    def _stored_config(self, step: int) -> dict[str, Any]:
        return self._restore_items(step, config=ocp.args.JsonRestore())["config"]

    def check_frozen(self, step: int, identities: Mapping[str, str]) -> None:
        """Raises UserError if a checkpoint was trained with frozen weights other than those of `identities`."""
        stored = self.frozen_identities(step)
        if stored is not None:
            check_same_frozen(stored, identities, f"checkpoint {self._where(step)}")

    def frozen_identities(self, step: int) -> dict[str, str] | None:
        """{role: SHA-256} of the frozen networks of a checkpoint; None in one of an early version."""
        # Process 0 decides, or a slow network disk could split the processes.
        if not communication.broadcast_from_main(self._steps.has(step, "frozen")):
            return None
        return self._restore_items(step, frozen=ocp.args.JsonRestore())["frozen"]

    def data_position(self, step: int) -> dict[str, Any]:
        """Returns the position in the data that a checkpoint holds."""
        return self._restore_items(step, data=ocp.args.JsonRestore())["data"]

    def delete_step(self, step: int) -> None:
        """Deletes a checkpoint, such as one that a rollback discards."""
        if self._place.store is None:
            self._manager.delete(step)
        else:
            if jax.process_index() == 0:
                self._steps.delete(step)
            # Orbax caches the list of steps: no process may look before the objects are gone.
            communication.broadcast_from_main(True)
            self._manager.reload()
        # The run may write this step again, and must verify it again.
        self._verified_steps.discard(step)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Restores a checkpoint.

        Args:
          step: step of the checkpoint
          abstract: the state as ShapeDtypeStructs with the target shardings, on any mesh

        Returns:
          (state, data position)

        Raises:
          UserError: the checkpoint cannot be read.
          Unreachable: its file system does not answer.
        """
        stored = self._translate_paths(step, abstract)
        # A disabled vision-aided D is an empty entry of the state. Checkpoints older than that network have no such entry.
        lacks_v = getattr(stored, "v", stored) is None and "vision_aided" not in self._stored_config(step)
        item = {k: x for k, x in vars(stored).items() if k != "v"} if lacks_v else stored
        restored = self._restore_items(step, state=ocp.args.StandardRestore(item), data=ocp.args.JsonRestore())
        state = stored.replace(**restored["state"]) if lacks_v else restored["state"]
        return self._translate_paths(step, state, like=abstract), restored["data"]

    def restore_partial(self, step: int, abstract: Any) -> Any:
        """Restores the parts of the state that are in `abstract`, a dict such as {"g_ema": ..., "w_avg": ...}."""
        stored = self._translate_paths(step, abstract)
        return self._translate_paths(step, self.restore_stored(step, stored), like=abstract)

    def restore_stored(self, step: int, stored: Any) -> Any:
        """`restore_partial` of dicts and lists as they are in the file: at the paths of the checkpoint's own format."""
        # Without these arguments Orbax restores the shardings of the training mesh, which a sampler does not have.
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), stored)
        item = ocp.args.PyTreeRestore(stored, restore_args=arguments, partial_restore=True)
        return self._restore_items(step, state=item)["state"]

    def format_of(self, step: int) -> int:
        """The number of the format that a checkpoint was written with."""
        return int(self._stored_config(step).get(FORMAT_KEY, 0))

    def _translate_paths(self, step: int, state: Any, like: Any = None) -> Any:
        return translate_paths(state, self.format_of(step), like) if parameter_renames.RENAMED else state

    def _restore_items(self, step: int, **items: Any) -> Any:
        self._steps.fetch(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # These errors say nothing about the checkpoint.
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:
            if is_transient(e):
                raise Unreachable(
                    f"checkpoint {self._where(step)} cannot be read now ({first_line(e)}): its file system is away"
                ) from e
            # Orbax and TensorStore raise any type of error on damage; the first line names its cause.
            raise self._read_error(step, f"{type(e).__name__}: {first_line(e)[:300]}") from e


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs that carry shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def states_equal(a: Any, b: Any) -> bool:
    """Returns whether two states are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)
