"""Checkpoints of a run: Orbax, asynchronous, atomic; each holds the state, the position in the data, the config, and the
identities of the frozen networks (not their weights).

A workdir holds `config.json`, `checkpoints/<step>/{state,data,config,frozen}`, metrics and snapshots.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gigagan_jax.config import Config, differences, from_dict, to_dict
from gigagan_jax.errors import UserError

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"
CONFIG_FILE = "config.json"
# What a finished checkpoint has at least; Orbax renames a folder into place only when all of it is written.
_PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "data/metadata", "config/metadata")


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the workdir of a run, or checks that it belongs to this one.

    Raises:
      UserError: it cannot be written, or was made with a config that differs in more than what may change in a run.
    """
    file, folder = workdir / CONFIG_FILE, workdir / FOLDER
    if any(c in str(workdir.resolve()) for c in "[]"):
        raise UserError(f"--workdir={workdir}: Orbax cannot write checkpoints under a path with [ or ]; choose another")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Before its first checkpoint a workdir holds nothing that another config could spoil.
        if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UserError(f"{folder} is no folder that can be written: move it away, or choose another --workdir")
        steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())
        stored = _stored(file, folder, steps)
        if stored is not None:
            if not isinstance(stored, dict):
                raise UserError(f"{file} holds no config; remove it: the checkpoints hold the settings too")
            changed = differences(stored, config)
            if changed:
                more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
                raise UserError(
                    f"{workdir} holds a run of another config ({'; '.join(changed[:8])}{more}): "
                    "use another --workdir, or the settings it was started with"
                )
        if jax.process_index() == 0:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(to_dict(config), indent=1))
            os.replace(temporary, file)
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be used: {e.strerror or e}; choose a folder you may write to"
        ) from None
    except ValueError as e:
        raise UserError(
            f"{file} is not readable JSON ({e}); remove it: the checkpoints hold the settings too"
        ) from None


def _stored(file: Path, folder: Path, steps: Sequence[int]) -> Any:
    """The config of the run in a workdir: of its file, or where that was removed of the newest checkpoint; None without a run."""
    if not steps:
        return None
    if file.exists():
        return json.loads(file.read_text())
    newest = folder / str(steps[-1]) / "config" / "metadata"
    return json.loads(newest.read_text()) if newest.exists() else None


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: of the run.
      config: of the run; None to read only.
    """

    def __init__(self, workdir: Path, config: Config | None = None):
        self.folder = workdir.resolve() / FOLDER
        if config is None and not self.folder.is_dir():
            raise UserError(
                f"{workdir} has no checkpoints (no folder {FOLDER}): is it the --workdir of a training run?"
            )
        options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        if config is not None:
            self._clean()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep,
                enable_async_checkpointing=True,
            )
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "data", "config", "frozen")
        )

    def _clean(self) -> None:
        """Removes what a killed run had half written: folders that were never renamed into place."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if entry.is_dir() and ".orbax-checkpoint-tmp" in entry.name:
                _log.warning("removing the unfinished checkpoint %s of a run that was stopped while saving", entry.name)
                shutil.rmtree(entry, ignore_errors=True)

    def latest(self) -> int | None:
        """Step of the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, data: Mapping[str, Any], config: Config, frozen: Mapping[str, str] | None = None
    ) -> None:
        """Starts to write a checkpoint and returns when the state is copied; an error of the one before is raised here."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(to_dict(config)),
            frozen=ocp.args.JsonSave(dict(frozen or {})),
        )
        self._writing(lambda: self._manager.save(step, args=items, force=True))

    def wait(self) -> None:
        """Until everything is on disk."""
        self._writing(self._manager.wait_until_finished)

    def _writing(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as e:
            # A full disk or a quota; TensorStore reports them as ValueError.
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {_first_line(e)}; free some space or mend the folder, "
                "and run the same command again"
            ) from e

    def close(self) -> None:
        """Waits and lets go."""
        self._manager.close()

    def _check(self, step: int) -> None:
        here = self.folder / str(step)
        missing = [p for p in _PARTS if not (here / p).exists()]
        if missing:
            raise self._broken(step, f"{', '.join(missing)} missing")

    def _broken(self, step: int, why: str) -> UserError:
        others = [s for s in self._manager.all_steps() if s != step]
        mend = (
            f"remove that folder to go on from step {max(others)}" if others else "there is no other one; start afresh"
        )
        return UserError(f"checkpoint {self.folder / str(step)} is incomplete ({why}): {mend}")

    def config(self, step: int) -> Config:
        """The config that a checkpoint was written with."""
        self._check(step)
        restored = self._restore(step, config=ocp.args.JsonRestore())
        return from_dict(restored["config"])

    def check_frozen(self, step: int, identities: Mapping[str, str]) -> None:
        """Raises UserError where a checkpoint was trained with other frozen weights than those of `identities`."""
        if not (self.folder / str(step) / "frozen").exists():
            return  # of a version that had no frozen networks
        stored = self._restore(step, frozen=ocp.args.JsonRestore())["frozen"]
        for role, identity in identities.items():
            if role in stored and stored[role] != identity:
                raise UserError(
                    f"checkpoint {self.folder / str(step)} was trained with other weights of the frozen network {role!r} "
                    f"(SHA-256 {stored[role][:12]}..., now {identity[:12]}...): use the network it was trained with, or a new "
                    "--workdir"
                )

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds as its position in the data."""
        self._check(step)
        return self._restore(step, data=ocp.args.JsonRestore())["data"]

    def remove(self, step: int) -> None:
        """Deletes a checkpoint that the run goes back behind."""
        self._manager.delete(step)

    def restore_newest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, data position) of the newest checkpoint; None when there is none."""
        step = self.latest()
        return None if step is None else (step, *self.restore(step, abstract))

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of a checkpoint.

        Args:
          step: of the checkpoint
          abstract: the state as ShapeDtypeStructs with the shardings it shall have; any mesh will do

        Raises:
          UserError: the checkpoint is incomplete or damaged.
        """
        self._check(step)
        restored = self._restore(step, state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        return restored["state"], restored["data"]

    def restore_partial(self, step: int, abstract: Any) -> Any:
        """Only the parts of the state that are in `abstract`, a dict; e.g. {"g_ema": ..., "w_avg": ...}."""
        self._check(step)
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), abstract)
        item = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        return self._restore(step, state=item)["state"]

    def _restore(self, step: int, **items: Any) -> Any:
        # One array that cannot be read ends the restore while others are still being read; each of those then complains,
        # in a thread, that nobody listens any more. The one line below is what there is to say.
        report = sys.unraisablehook

        def quiet(problem: Any) -> None:
            if "Event loop is closed" not in str(problem.exc_value):
                report(problem)

        sys.unraisablehook = quiet
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except UserError:
            raise
        except Exception as e:
            # Orbax and TensorStore raise whatever the damage leads to; the first line says what they met.
            raise self._broken(step, f"{type(e).__name__}: {_first_line(e)[:300]}") from e


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def same(a: Any, b: Any) -> bool:
    """Are two states equal bit for bit?"""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)
