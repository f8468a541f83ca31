"""The workdir of a run: opens it, and reads the settings that its run started with."""

import contextlib
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.checkpoint.step_folders import StepFolders
from gigagan_jax.config import (
    Config,
    explain_differences,
    fixed_differences,
    flatten_fields,
    is_fixed,
    to_dict,
    with_fields,
)
from gigagan_jax.config.migrations import upgrade_config, with_format
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER, CONFIG_FILE, WEIGHTS_FILE

_log = logging.getLogger(__name__)


def open_workdir(place: Place, config: Config, accept: Collection[str] = ()) -> None:
    """Creates the workdir of a run, or checks that its run has the same config.

    Only process 0 calls it; the other processes wait for process 0 at their next collective call.

    Args:
      place: of the run.
      config: of the run.
      accept: of `config.ACCEPTED`, what may differ from the stored config all the same.

    Raises:
      UserError: it cannot be written, or its config differs in fields that are fixed during a run.
    """
    place = RunFolder.open(place)
    workdir = place.folder
    file, folder = workdir / CONFIG_FILE, workdir / CHECKPOINTS_FOLDER
    if (workdir / WEIGHTS_FILE).exists():
        raise UserError(f"--workdir={place} holds published weights ({WEIGHTS_FILE}): choose another for a run")
    # Checked here: the first save would fail, after the steps before it are paid for.
    if any(c in str(workdir.resolve() if place.store is None else place) for c in "[]"):
        raise UserError(f"--workdir={place}: Orbax cannot write checkpoints under a path with [ or ]; choose another")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UserError(f"{folder} is no folder that can be written: move it away, or choose another --workdir")
        # None before the first checkpoint: until then another config can spoil nothing.
        stored = _read_stored_config(file, place.steps())
        lacked: dict[str, Any] = {}
        if stored is not None:
            values, lacked = upgrade_config(stored, str(file))
            changed = fixed_differences(values, config, accept)
            if changed:
                own = str(file) if place.store is None and file.exists() else ""
                raise UserError(f"{place} holds a run of another config {explain_differences(changed, own)}")
        text = json.dumps(with_format(to_dict(config), lacked), indent=1)
        # A restart with the same config writes nothing: a full disk must not keep it from resuming.
        if not (file.exists() and file.read_text() == text):
            # Replaced whole: a killed start must not leave half a config behind.
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, file)
        # Before the first step: nobody else begins a run of another config there.
        place.upload()
    except OSError as e:
        raise UserError(
            f"--workdir={place} cannot be used: {e.strerror or e}; choose a folder you may write to"
        ) from None
    except ValueError as e:
        raise UserError(
            f"{place.show(file)} is not readable JSON ({e}); remove it: the checkpoints hold the settings too"
        ) from None


def read_stored_config(place: Place) -> dict[str, Any] | None:
    """The settings that a run in this workdir was started with, with the present fields.

    None where there is no run, or where they cannot be read, which `open_workdir` reports.
    """
    place = RunFolder.open(place)
    file = place.folder / CONFIG_FILE
    try:
        stored = _read_stored_config(file, place.steps())
    except (OSError, ValueError):
        return None
    return None if stored is None else upgrade_config(stored, str(file))[0]


def with_original_settings(place: Place, config: Config, chosen: Collection[str] = ()) -> Config:
    """Returns the config with the values that a run in this workdir started with.

    A field that is younger than the run keeps the behavior of the run, not the default of the field. The log names it.

    Args:
      place: of the run.
      config: that is asked for.
      chosen: names of fields that the user has set and lets change.
    """
    place = RunFolder.open(place)
    workdir = place.folder
    try:
        stored = _read_stored_config(workdir / CONFIG_FILE, place.steps())
    except (OSError, ValueError):
        # `open_workdir` reports the error.
        return config
    if stored is None:
        return config
    _, lacked = upgrade_config(stored, str(workdir / CONFIG_FILE))
    now = flatten_fields(to_dict(config))
    # The config holds lists where the migrations have tuples.
    differs = lambda k, v: now[k] != (list(v) if isinstance(v, tuple) else v)
    kept = {k: v for k, v in lacked.items() if is_fixed(k) and k not in chosen and differs(k, v)}
    for name, value in kept.items():
        _log.info(
            "config.%s stays %r: this run was begun before there was such a setting (asked for: %r)",
            name,
            value,
            now[name],
        )
    return with_fields(config, kept)


def _read_stored_config(file: Path, folders: StepFolders) -> Any:
    """Returns the stored config of a run, from its file or its newest readable checkpoint; None without a run."""
    steps = folders.all_steps()
    if not steps:
        return None
    # A user may have deleted the file, for example because it was damaged.
    if file.exists():
        return json.loads(file.read_text())
    for step in reversed(steps):
        # A damaged checkpoint: the one before it states the same fixed fields.
        with contextlib.suppress(OSError, ValueError):
            return json.loads(folders.read_text(step, "config/metadata"))
    return None
