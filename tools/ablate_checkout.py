"""Trains an arm of tools/ablate.py with the code of an earlier commit, and judges it with the present code.

The earlier code knows neither drawn shapes nor newer settings: it gets the scenes as tars, and the settings that it has.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

from ablate_arms import Arm

from gigagan_jax.config import Config, flatten_fields, to_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.processes import hold_file_lock
from gigagan_jax.data.sources.shapes import ShapesSource
from gigagan_jax.evaluation.judges import make_judge
from gigagan_jax.inference.text_to_image import TextToImage
from gigagan_jax.preparation.convert import convert_source
from gigagan_jax.preparation.output import Output

# Scenes of the tars: a run of 60 kimg sees each of them once.
_SCENES = 60_000
# Executed by the earlier code: sets what it has.
_CONFIG = '''"""The settings of {config}, as far as this code has them."""

from gigagan_jax import config as settings

VALUES = {values!r}


def get_config():
    c = settings.default()
    for name, value in VALUES.items():
        *groups, key = name.split(".")
        group = c
        for part in groups:
            group = group.get(part) if group is not None and part in group else None
        if group is not None and key in group:
            group[key] = value
    return c
'''


def prepare(arm: Arm, config: Config, folder: Path, root: Path) -> tuple[Path, Path]:
    """Makes the worktree, the tars and the config file of an arm, where they are not there yet.

    Args:
      arm: the arm; its `checkout` is a commit.
      config: the arm's settings.
      folder: for all of it.
      root: of the present checkout.

    Returns:
      (root of the worktree, config file)

    Raises:
      UserError: git does not know the commit.
    """
    worktree = folder / f"checkout-{arm.checkout}"
    # By all settings of the scenes: arms with other ones must not share tars.
    source = ShapesSource(dataclasses.replace(config.data.shapes, examples=_SCENES))
    tars = folder / f"shapes-{source.identity()[:8]}"
    # Runs of several seeds may start at once: the second waits.
    with hold_file_lock(folder / "prepare.lock", lambda: None):
        _check_out(arm, worktree, root)
        convert_source(source, Output(str(tars)), "tar")
    values = flatten_fields(to_dict(config))
    values |= {"data.source": "tar", "data.path": f"{tars}/*.tar", "evaluators": ()}
    file = folder / f"config-{arm.name}.py"
    file.write_text(_CONFIG.format(config=arm.config, values=values))
    return worktree, file


def _check_out(arm: Arm, worktree: Path, root: Path) -> None:
    done = worktree.with_suffix(".done")
    if done.exists() and worktree.exists():
        return
    # A killed start may have left half of it.
    shutil.rmtree(worktree, ignore_errors=True)
    try:
        for command in (["prune"], ["add", "--force", "--detach", str(worktree), arm.checkout]):
            subprocess.run(["git", "worktree", *command], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        raise UserError(f"arm {arm.name}: git cannot check out {arm.checkout} here ({str(why).strip()})") from error
    done.touch()


def judge(workdir: Path, config: Config) -> dict[str, float]:
    """The figures of the judge of shapes for the newest checkpoint of a run, with the names of metrics.jsonl."""
    judge = make_judge("shapes", config)
    figures = judge.evaluate(TextToImage.from_workdir(workdir, device_batch=100))
    return {f"shapes/{name}": round(value, 5) for name, value in figures.items()}
