"""Checkpoints of a run, written by Orbax: asynchronous, atomic and checksummed.

A checkpoint is a folder `checkpoints/<step>/{state,data,config,frozen,measured}` of the workdir. It holds the state, the
position in the data, the config, and the identities of the frozen networks (not their weights). A run verifies the
checksums before it resumes from a checkpoint.
"""

import asyncio
import errno
import functools
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gigagan_jax.checkpoint.checksums import CHECKSUMS_FILE, verify_checksums, write_checksums
from gigagan_jax.checkpoint.consistency import check_same_frozen
from gigagan_jax.checkpoint.orbax_logs import ORBAX_LOGGERS, BackgroundErrors, silence_closed_loop_errors
from gigagan_jax.checkpoint.retention import Retention
from gigagan_jax.config import Config, from_dict, parameter_renames, to_dict
from gigagan_jax.config.migrations import FORMAT_KEY, upgrade_config, with_format
from gigagan_jax.core.errors import Unreachable, UserError, error_chain, is_transient
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER
from gigagan_jax.parallel import communication

_log = logging.getLogger(__name__)

_ITEMS = ("state", "data", "config", "frozen", "measured")
# On every file system a checkpoint is complete when it has its name. By default Orbax rejects a checkpoint on a bucket
# without commit_success.txt, a file that not all of its versions write.
_ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.ATOMIC_RENAME)


class _ChecksummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A temporary folder of Orbax that gets its checksums before it is renamed: on process 0, while training continues."""

    async def finalize(self) -> None:
        # Each item has such a folder of its own; only the checkpoint's name is a number.
        if self.get_final().name.isdecimal():
            # In a thread: hashing gigabytes would block Orbax's event loop.
            await asyncio.to_thread(write_checksums, Path(self.get()))
        await super().finalize()


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: workdir of the run.
      config: config of the run; None opens the checkpoints for reading only.

    Raises:
      UserError: there is no folder of checkpoints, and no config to write some.
    """

    def __init__(self, workdir: Path, config: Config | None = None):
        self.folder = workdir.resolve() / CHECKPOINTS_FOLDER
        self._settings = None if config is None else config.checkpoint
        # Verified once per process: hashing a checkpoint of a large model takes minutes.
        self._verified_steps: set[int] = set()
        # The step whose save is in progress.
        self._saving: int | None = None
        # After a failed save Orbax must not be waited for.
        self._failed = False
        self._background_errors = BackgroundErrors()
        if config is None:
            if not self.folder.is_dir():
                raise UserError(
                    f"{workdir} has no checkpoints (no folder {CHECKPOINTS_FOLDER}): is it the --workdir of a training run?"
                )
        else:
            # The run lock is held: no other process is writing these folders.
            self._remove_unfinished()
            self._retention = Retention(self.folder, config.checkpoint)
        for name in ORBAX_LOGGERS:
            logging.getLogger(name).addFilter(self._background_errors)
        silence_closed_loop_errors()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, created at first use: a damaged checkpoint is moved aside before it lists the steps."""
        # lightweight_initialize: Orbax would fail on the metadata of a damaged checkpoint; Retention reads them itself.
        options = ocp.CheckpointManagerOptions(
            read_only=True,
            save_interval_steps=0,
            create=False,
            temporary_path_class=_ChecksummedPath,
            atomicity_options=_ATOMICITY,
            lightweight_initialize=True,
        )
        if self._settings is not None:
            # The timeout bounds how long the processes wait for each other at the commit.
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=self._settings.timeout_seconds),
                temporary_path_class=_ChecksummedPath,
                atomicity_options=_ATOMICITY,
                lightweight_initialize=True,
            )
        return ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

    def _remove_unfinished(self) -> None:
        """Removes the folders of saves that a killed run never renamed into place."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if entry.is_dir() and ".orbax-checkpoint-tmp" in entry.name:
                _log.warning("removing the unfinished checkpoint %s of a run that was stopped while saving", entry.name)
                # What cannot be deleted costs space only: a name that is no number is no checkpoint.
                shutil.rmtree(entry, ignore_errors=True)

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints in ascending order, damaged ones included."""
        if not self.folder.is_dir():
            return []
        # From the disk: Orbax's manager must not exist before damaged checkpoints are moved aside.
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

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
            self._verified_steps.add(step)
        return step

    def require_valid_step(self) -> int:
        """`latest_valid_step`. Raises UserError where the run has no finished checkpoint."""
        step = self.latest_valid_step()
        if step is None:
            raise UserError(f"{self.folder.parent} has no finished checkpoint yet: wait for the run's first one")
        return step

    def _find_latest_valid(self) -> int | None:
        damaged: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            damage = None if step in self._verified_steps else verify_checksums(self.folder / str(step))
            if damage is None:
                # Only now: with no intact checkpoint nothing is moved.
                self._put_aside(damaged, step)
                return step
            damaged[step] = damage
        if damaged:
            damages = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({damages}): nothing was changed; restore one from a copy, or "
                "use another --workdir to start afresh"
            )
        # A restart must not train from scratch where an earlier start has moved all checkpoints aside.
        if self._settings is not None and self.folder.is_dir() and any(self.folder.glob("*.damaged*")):
            raise UserError(
                f"{self.folder} holds only checkpoints that were put aside as damaged: restore one from a copy, or use another "
                "--workdir to start afresh"
            )
        return None

    def _put_aside(self, damaged: Mapping[int, str], good: int) -> None:
        for step, damage in damaged.items():
            folder = self.folder / str(step)
            # A reader may look at a run of somebody else: it changes nothing.
            if self._settings is None:
                _log.warning("checkpoint %s is damaged (%s): using %d, the one before", folder, damage, good)
                continue
            # The same step can be written and damaged more than once.
            names = (self.folder / f"{step}.damaged{f'.{i}' if i > 1 else ''}" for i in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            folder.rename(aside)
            _log.error(
                "checkpoint %s is DAMAGED (%s): moved to %s; going on from step %d, the one before",
                folder,
                damage,
                aside,
                good,
            )

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
        self._saving = step
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
        # With several processes Orbax raises it only when all have ended; the log has it at once.
        if self._background_errors.error is not None:
            raise self._write_error(self._background_errors.error) from self._background_errors.error
        if not self._manager.is_saving_in_progress():
            self.wait_until_finished()

    def wait_until_finished(self) -> None:
        """Waits until the save in progress is on disk."""
        self._run_write(self._manager.wait_until_finished)
        self._saving = None

    def _run_write(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as e:
            raise self._write_error(e) from e

    def _write_error(self, error: BaseException) -> Exception:
        self._failed = True
        # A lost process: the state could not be copied, or a collective of the save failed. The disk is not the cause.
        if any(isinstance(e, jax.errors.JaxRuntimeError) or "Gloo" in str(e) for e in error_chain(error)):
            return jax.errors.JaxRuntimeError(_first_line(error))
        # ENOTEMPTY: another machine reads the old checkpoint that is being deleted, or its entries reappear meanwhile.
        if isinstance(error, TimeoutError) or is_transient(error) or getattr(error, "errno", None) == errno.ENOTEMPTY:
            return Unreachable(
                f"cannot write a checkpoint to {self.folder} now: {_first_line(error)}; the same command goes on"
            )
        # A full disk or an exceeded quota; TensorStore reports both as ValueError.
        return UserError(
            f"cannot write a checkpoint to {self.folder}: {_first_line(error)}; free some space or mend the folder, "
            "and run the same command again"
        )

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
        return UserError(f"checkpoint {self.folder / str(step)} cannot be read ({why}): {mend}")

    def read_config(self, step: int) -> Config:
        """Returns the config that a checkpoint was written with, upgraded to the current format."""
        values, _ = upgrade_config(self._stored_config(step), str(self.folder / str(step)))
        return from_dict(values)

    def _stored_config(self, step: int) -> dict[str, Any]:
        return self._restore_items(step, config=ocp.args.JsonRestore())["config"]

    def check_frozen(self, step: int, identities: Mapping[str, str]) -> None:
        """Raises UserError if a checkpoint was trained with frozen weights other than those of `identities`."""
        stored = self.frozen_identities(step)
        if stored is not None:
            check_same_frozen(stored, identities, f"checkpoint {self.folder / str(step)}")

    def frozen_identities(self, step: int) -> dict[str, str] | None:
        """{role: SHA-256} of the frozen networks of a checkpoint; None in one of an early version."""
        # Process 0 decides, or a slow network disk could split the processes.
        if not communication.broadcast_from_main((self.folder / str(step) / "frozen").exists()):
            return None
        return self._restore_items(step, frozen=ocp.args.JsonRestore())["frozen"]

    def data_position(self, step: int) -> dict[str, Any]:
        """Returns the position in the data that a checkpoint holds."""
        return self._restore_items(step, data=ocp.args.JsonRestore())["data"]

    def delete_step(self, step: int) -> None:
        """Deletes a checkpoint, such as one that a rollback discards."""
        self._manager.delete(step)
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
        """Moves the parameters of a state, or of a dict of its parts, to the paths of this checkpoint's format.

        Args:
          step: step of the checkpoint
          state: state at the current paths; with `like`, at the paths of the checkpoint
          like: state at the current paths; the direction is reversed with it
        """
        if not parameter_renames.RENAMED:
            return state
        number = self.format_of(step)
        # The moments of the optimizer are dicts of the same paths: the same translation applies to them.
        is_params = lambda x: isinstance(x, dict)

        def translate_network(network: str, part: Any, example: Any) -> Any:
            to_stored = lambda x: parameter_renames.to_paths_at_format(network, x, number) if is_params(x) else x
            to_current = lambda x, y: (
                parameter_renames.from_paths_at_format(network, x, y, number) if is_params(x) else x
            )
            if like is None:
                return jax.tree.map(to_stored, part, is_leaf=is_params)
            return jax.tree.map(to_current, part, example, is_leaf=is_params)

        parts = {k: state[k] for k in state} if isinstance(state, dict) else vars(state)
        examples = like if isinstance(like, dict) else {} if like is None else vars(like)
        networks = {"g": "generator", "g_ema": "generator", "d": "discriminator", "v": "vision_aided"}
        translated = {
            k: translate_network(networks[k], x, examples.get(k))
            for k, x in parts.items()
            if k in networks and x is not None
        }
        return state | translated if isinstance(state, dict) else state.replace(**translated)

    def _restore_items(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # These errors say nothing about the checkpoint.
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:
            if is_transient(e):
                raise Unreachable(
                    f"checkpoint {self.folder / str(step)} cannot be read now ({_first_line(e)}): its file system is away"
                ) from e
            # Orbax and TensorStore raise any type of error on damage; the first line names its cause.
            raise self._read_error(step, f"{type(e).__name__}: {_first_line(e)[:300]}") from e


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs that carry shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def states_equal(a: Any, b: Any) -> bool:
    """Returns whether two states are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)
