"""Checkpoints of a run: Orbax, asynchronous, atomic; each holds the state, the position in the data, the config, and the
identities of the frozen networks (not their weights).

A workdir holds `config.json`, `checkpoints/<step>/{state,data,config,frozen,measured}`, metrics and snapshots. Each checkpoint
holds the checksums of its files, and is compared with them before a run goes on from it.
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

from gigagan_jax.checkpoint.checksums import CHECKSUMS, damage, write_checksums
from gigagan_jax.checkpoint.orbax_logs import _LOGGERS, _Heard, _quiet_about_closed_loops
from gigagan_jax.checkpoint.retention import Retention
from gigagan_jax.config import Config, from_dict, parameter_renames, to_dict
from gigagan_jax.config.migrations import FORMAT_KEY, numbered, upgrade
from gigagan_jax.core.errors import Unreachable, UserError, causes, passing
from gigagan_jax.parallel import communication

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_ITEMS = ("state", "data", "config", "frozen", "measured")
# Whatever the file system: a checkpoint is finished when it has its name. Left to itself Orbax takes one without a file
# commit_success.txt, which not every version of it has written, on a bucket as half written.
_ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.ATOMIC_RENAME)


class _Path(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A folder of Orbax that gets its checksums just before it is renamed into place: by process 0, while training goes on."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # the items have folders like this of their own
            await asyncio.to_thread(write_checksums, Path(self.get()))
        await super().finalize()


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: of the run.
      config: of the run; None to read only.
    """

    def __init__(self, workdir: Path, config: Config | None = None):
        self.folder = workdir.resolve() / FOLDER
        self._settings = None if config is None else config.checkpoint
        self._whole: set[int] = set()  # steps that were checked
        self._saving: int | None = None
        self._failed = False
        self._heard = _Heard()
        if config is None:
            if not self.folder.is_dir():
                raise UserError(
                    f"{workdir} has no checkpoints (no folder {FOLDER}): is it the --workdir of a training run?"
                )
        else:
            self._clean()
            self._retention = Retention(self.folder, config.checkpoint)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._heard)
        _quiet_about_closed_loops()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when it is first needed: a damaged checkpoint may be moved away before."""
        # What is known of older checkpoints is read by their retention: Orbax would stop at a damaged one.
        options = ocp.CheckpointManagerOptions(
            read_only=True,
            save_interval_steps=0,
            create=False,
            temporary_path_class=_Path,
            atomicity_options=_ATOMICITY,
            lightweight_initialize=True,
        )
        if self._settings is not None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=self._settings.timeout_seconds),
                temporary_path_class=_Path,
                atomicity_options=_ATOMICITY,
                lightweight_initialize=True,
            )
        return ocp.CheckpointManager(self.folder, options=options, item_names=_ITEMS)

    def _clean(self) -> None:
        """Removes what a killed run had half written: folders that were never renamed into place."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if entry.is_dir() and ".orbax-checkpoint-tmp" in entry.name:
                _log.warning("removing the unfinished checkpoint %s of a run that was stopped while saving", entry.name)
                shutil.rmtree(entry, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, damaged ones too, in rising order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def latest(self) -> int | None:
        """Step of the newest checkpoint, whole or not; None when there is none."""
        return max(self.steps(), default=None)

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is whole; None where there is no checkpoint at all.

        Every file is compared with its checksum. A damaged checkpoint is named in the log, and in a run that trains moved
        aside, to `<step>.damaged`. Process 0 looks, and all processes get its answer.

        Raises:
          UserError: there are checkpoints, and all are damaged; none is moved then.
        """
        found = self._newest() if jax.process_index() == 0 else None
        step: int | None = communication.from_zero(found)
        if step is not None:
            self._whole.add(step)
        return step

    def _newest(self) -> int | None:
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            what = None if step in self._whole else damage(self.folder / str(step))
            if what is None:
                self._put_aside(damaged, step)
                return step
            damaged[step] = what
        if damaged:
            all_of_them = "; ".join(f"{step}: {what}" for step, what in damaged.items())
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({all_of_them}): nothing was changed; restore one from a copy, or "
                "use another --workdir to start afresh"
            )
        if self._settings is not None and self.folder.is_dir() and any(self.folder.glob("*.damaged*")):
            raise UserError(
                f"{self.folder} holds only checkpoints that were put aside as damaged: restore one from a copy, or use another "
                "--workdir to start afresh"
            )
        return None

    def _put_aside(self, damaged: Mapping[int, str], good: int) -> None:
        for step, what in damaged.items():
            here = self.folder / str(step)
            if self._settings is None:
                _log.warning("checkpoint %s is damaged (%s): using %d, the one before", here, what, good)
                continue
            places = (self.folder / f"{step}.damaged{f'.{i}' if i > 1 else ''}" for i in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            here.rename(aside)
            _log.error(
                "checkpoint %s is DAMAGED (%s): moved to %s; going on from step %d, the one before",
                here,
                what,
                aside,
                good,
            )

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, data position) of the newest checkpoint that is whole; None where there is no checkpoint at all.

        May be called in the middle of a run; waits until what is being saved is on disk. See `newest` and `restore`.
        """
        if self._saving is not None:
            self.wait()
        step = self.newest()
        if step is None:
            return None
        if "_manager" in self.__dict__:
            self._manager.reload()  # of steps that were put aside
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
        """Starts to write a checkpoint and returns when the state is copied; an error of the one before is raised here.

        Args:
          images: real images seen, for `checkpoint.keep_every_kimg`
          metrics: of this step, for `checkpoint.best_metric`
        """
        numbers = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
        measured = {"images": int(images), "metrics": numbers}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(numbered(to_dict(config))),
            frozen=ocp.args.JsonSave(dict(frozen or {})),
            measured=ocp.args.JsonSave(measured),
        )
        self._retention.note(step, measured)
        mark = {"checksums": CHECKSUMS}
        self._writing(lambda: self._manager.save(step, args=items, force=True, custom_metadata=mark))
        self._saving = step
        if config.checkpoint.wait:
            self.wait()

    def check_metrics(self, metrics: Collection[str]) -> None:
        """Raises UserError where the metric that the best checkpoints are kept by is not among those of the run."""
        self._retention.check(metrics)

    def poll(self) -> None:
        """Raises what went wrong with a save that was started; returns at once."""
        if self._saving is None:
            return
        if self._heard.error is not None:
            raise self._unwritten(self._heard.error) from self._heard.error
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until everything is on disk."""
        self._writing(self._manager.wait_until_finished)
        self._saving = None

    def _writing(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as e:
            raise self._unwritten(e) from e

    def _unwritten(self, error: BaseException) -> Exception:
        self._failed = True
        # The state could not be had, or the others did not answer, since a process was lost: not the disk's fault.
        if any(isinstance(e, jax.errors.JaxRuntimeError) or "Gloo" in str(e) for e in causes(error)):
            return jax.errors.JaxRuntimeError(_first_line(error))
        # The last is of an old checkpoint that another machine still reads, or of folders that come back while they go.
        if isinstance(error, TimeoutError) or passing(error) or getattr(error, "errno", None) == errno.ENOTEMPTY:
            return Unreachable(
                f"cannot write a checkpoint to {self.folder} now: {_first_line(error)}; the same command goes on"
            )
        # A full disk or a quota; TensorStore reports them as ValueError.
        return UserError(
            f"cannot write a checkpoint to {self.folder}: {_first_line(error)}; free some space or mend the folder, "
            "and run the same command again"
        )

    def close(self) -> None:
        """Waits for a save that is not finished, and lets go. After a save that failed there is nothing to wait for."""
        try:
            if "_manager" in self.__dict__ and not self._failed:
                self._writing(self._manager.close)
        finally:
            # After a failed save tasks that nobody waits for complain when they are collected, at the very end.
            for name in () if self._failed else _LOGGERS:
                logging.getLogger(name).removeFilter(self._heard)

    def _broken(self, step: int, why: str) -> UserError:
        others = [s for s in self.steps() if s < step]
        mend = f"move that folder away to go on from step {max(others)}" if others else "there is none before it"
        return UserError(f"checkpoint {self.folder / str(step)} cannot be read ({why}): {mend}")

    def config(self, step: int) -> Config:
        """The config that a checkpoint was written with."""
        values, _ = upgrade(self._stored_config(step), str(self.folder / str(step)))
        return from_dict(values)

    def _stored_config(self, step: int) -> dict[str, Any]:
        return self._restore(step, config=ocp.args.JsonRestore())["config"]

    def check_frozen(self, step: int, identities: Mapping[str, str]) -> None:
        """Raises UserError where a checkpoint was trained with other frozen weights than those of `identities`."""
        if not communication.from_zero((self.folder / str(step) / "frozen").exists()):
            return  # of a version that had no frozen networks
        stored = self._restore(step, frozen=ocp.args.JsonRestore())["frozen"]
        for role, identity in identities.items():
            if role in stored and stored[role] != identity:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} was trained with other weights of the frozen network {role!r} "
                    f"(SHA-256 {stored[role][:12]}..., now {identity[:12]}...): use the network it was trained with, or a new "
                    "--workdir"
                )

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds as its position in the data."""
        return self._restore(step, data=ocp.args.JsonRestore())["data"]

    def remove(self, step: int) -> None:
        """Deletes a checkpoint that the run goes back behind."""
        self._manager.delete(step)
        self._whole.discard(step)  # it may be written again

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of a checkpoint.

        Args:
          step: of the checkpoint
          abstract: the state as ShapeDtypeStructs with the shardings it shall have; any mesh will do

        Raises:
          UserError: the checkpoint cannot be read.
        """
        then = self._places(step, abstract)
        # A network that is off is an empty entry of the state, and none in checkpoints from before there was such a network.
        earlier = getattr(then, "v", then) is None and "vision_aided" not in self._stored_config(step)
        item = {k: x for k, x in vars(then).items() if k != "v"} if earlier else then
        restored = self._restore(step, state=ocp.args.StandardRestore(item), data=ocp.args.JsonRestore())
        state = then.replace(**restored["state"]) if earlier else restored["state"]
        return self._places(step, state, like=abstract), restored["data"]

    def restore_partial(self, step: int, abstract: Any) -> Any:
        """Only the parts of the state that are in `abstract`, a dict; e.g. {"g_ema": ..., "w_avg": ...}."""
        then = self._places(step, abstract)
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), then)
        item = ocp.args.PyTreeRestore(then, restore_args=arguments, partial_restore=True)
        return self._places(step, self._restore(step, state=item)["state"], like=abstract)

    def _places(self, step: int, state: Any, like: Any = None) -> Any:
        """A state (or a dict of its parts) with its parameters where this checkpoint has them; with `like`, the way back."""
        if not parameter_renames.RENAMED:
            return state
        number = int(self._stored_config(step).get(FORMAT_KEY, 0))
        is_params = lambda x: isinstance(x, dict)

        def moved(network: str, part: Any, example: Any) -> Any:
            one = lambda x: parameter_renames.to_places_at(network, x, number) if is_params(x) else x
            back = lambda x, y: parameter_renames.from_places_at(network, x, y, number) if is_params(x) else x
            if like is None:
                return jax.tree.map(one, part, is_leaf=is_params)
            return jax.tree.map(back, part, example, is_leaf=is_params)

        parts = {k: state[k] for k in state} if isinstance(state, dict) else vars(state)
        examples = like if isinstance(like, dict) else {} if like is None else vars(like)
        networks = {"g": "generator", "g_ema": "generator", "d": "discriminator", "v": "vision_aided"}
        new = {k: moved(networks[k], x, examples.get(k)) for k, x in parts.items() if k in networks and x is not None}
        return state | new if isinstance(state, dict) else state.replace(**new)

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # none of which says anything of the checkpoint
            raise
        except Exception as e:
            if passing(e):
                raise Unreachable(
                    f"checkpoint {self.folder / str(step)} cannot be read now ({_first_line(e)}): its file system is away"
                ) from e
            # Orbax and TensorStore raise whatever the damage leads to; the first line says what they met.
            raise self._broken(step, f"{type(e).__name__}: {_first_line(e)[:300]}") from e


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def same(a: Any, b: Any) -> bool:
    """Are two states equal bit for bit?"""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)
