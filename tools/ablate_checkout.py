"""Trains an arm of tools/ablate.py with the code of an earlier commit, and judges it with the present code.

The earlier code knows neither drawn shapes nor newer settings: it gets the scenes as tars, and the settings that it has.
"""

from __future__ import annotations

import fcntl
import io
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ablate_arms import Arm
from PIL import Image

from gigagan_jax.config import Config, ShapesConfig, flatten_fields, to_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.shapes import ShapesSource
from gigagan_jax.data.sources.shapes_drawing import draw_scene
from gigagan_jax.evaluation.hooks import FIRST_FRESH_SEED
from gigagan_jax.evaluation.shapes import ShapesJudge
from gigagan_jax.inference.text_to_image import TextToImage

# Scenes of the tars: a run of 60 kimg sees each of them once.
_SCENES = 60_000
_SHARD = 10_000
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
    tars = folder / f"shapes-{ShapesSource(config.data.shapes).identity()[:8]}"
    # Runs of several seeds may start at once.
    with (folder / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _check_out(arm, worktree, root)
        write_tars(tars, config.data.shapes, _SCENES)
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


def write_tars(folder: Path, settings: ShapesConfig, scenes: int) -> None:
    """Writes scenes of ShapesSource as PNG with their captions, in tars as webdataset has them."""
    source = ShapesSource(settings)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, scenes, _SHARD):
        path = folder / f"{first // _SHARD:05d}.tar"
        if path.exists():
            continue
        half = path.with_suffix(".part")
        with tarfile.open(half, "w") as tar:
            for i in range(first, min(first + _SHARD, scenes)):
                scene = source.scene(i)
                png = io.BytesIO()
                Image.fromarray(draw_scene(scene, settings.side)).save(png, "PNG")
                for suffix, data in (("png", png.getvalue()), ("txt", "\n".join(scene.captions()).encode())):
                    member = tarfile.TarInfo(f"{i:07d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        half.rename(path)


def judge(workdir: Path, max_objects: int) -> dict[str, float]:
    """The figures of gigagan_jax.evaluation.shapes for the newest checkpoint of a run, with the names of metrics.jsonl."""
    model = TextToImage.from_workdir(workdir, device_batch=100)
    judge = ShapesJudge(max_objects)
    seeds: Sequence[int] = range(len(judge.captions))
    first, second = (
        model(judge.captions, [start + i for i in seeds]) for start in (FIRST_FRESH_SEED, 2 * FIRST_FRESH_SEED)
    )
    report = judge.judge_images(first, again=second)
    return {f"shapes/{name}": round(value, 5) for name, value in report.to_dict().items()}
