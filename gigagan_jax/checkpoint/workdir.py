"""The folder of a run: made, or found to hold this run; and the settings it was begun with."""

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.checkpoint.manager import FOLDER
from gigagan_jax.config import Config, differences, flatten, is_fixed, to_dict, with_fields
from gigagan_jax.config.migrations import numbered, upgrade
from gigagan_jax.core.errors import UserError

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the workdir of a run, or checks that it belongs to this one; on process 0, as the others wait for its answers.

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
        lacked: dict[str, Any] = {}
        if stored is not None:
            values, lacked = upgrade(stored, str(file))
            changed = differences(values, config)
            if changed:
                more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
                raise UserError(
                    f"{workdir} holds a run of another config ({'; '.join(changed[:8])}{more}): "
                    "use another --workdir, or the settings it was started with"
                )
        text = json.dumps(numbered(to_dict(config), lacked), indent=1)
        if not (file.exists() and file.read_text() == text):
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, file)
    except OSError as e:
        raise UserError(
            f"--workdir={workdir} cannot be used: {e.strerror or e}; choose a folder you may write to"
        ) from None
    except ValueError as e:
        raise UserError(
            f"{file} is not readable JSON ({e}); remove it: the checkpoints hold the settings too"
        ) from None


def as_begun(workdir: Path, config: Config) -> Config:
    """The config with what a run in this workdir was begun with before there was a field for it; said in the log.

    A run goes on as it was begun, whatever the default of a field is that came later.
    """
    folder = workdir / FOLDER
    try:
        steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())
        stored = _stored(workdir / CONFIG_FILE, folder, steps)
    except (OSError, ValueError):
        return config  # what is wrong with it is said where it is opened
    if stored is None:
        return config
    _, lacked = upgrade(stored, str(workdir / CONFIG_FILE))
    now = flatten(to_dict(config))
    kept = {k: v for k, v in lacked.items() if is_fixed(k) and now[k] != (list(v) if isinstance(v, tuple) else v)}
    for name, value in kept.items():
        _log.info(
            "config.%s stays %r: this run was begun before there was such a setting (asked for: %r)",
            name,
            value,
            now[name],
        )
    return with_fields(config, kept)


def _stored(file: Path, folder: Path, steps: Sequence[int]) -> Any:
    """The config of the run in a workdir: of its file, or where that was removed of the newest checkpoint; None without a run."""
    if not steps:
        return None
    if file.exists():
        return json.loads(file.read_text())
    for step in reversed(steps):
        with contextlib.suppress(OSError, ValueError):  # damaged: the one before says the same
            return json.loads((folder / str(step) / "config" / "metadata").read_text())
    return None
