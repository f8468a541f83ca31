"""A trained generator as two files that sample without its run: `model.safetensors` and `config.json`.

The tensors are the moving average of G under the paths of its parameters, and `w_avg`. Half precision is the default: pictures
of a model that was trained in float32 change by about a grey level.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gigagan_jax.config import Config, from_dict, to_dict
from gigagan_jax.config.migrations import FORMAT_KEY, upgrade_config, with_format
from gigagan_jax.config.parameter_renames import path_at_format
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER, CONFIG_FILE, WEIGHTS_FILE
from gigagan_jax.models.network import Network, Params, path_name
from gigagan_jax.models.pretrained.hub import INDEX, read_json
from gigagan_jax.models.pretrained.weights import Row, Weights, load_params

W_AVG = "w_avg"
# Of config.json, for torch alone (model_folder.py).
_SIZES = ("end_id", "encoder_width")
# Losses whose networks are not needed for sampling.
_WITHOUT_FROZEN = {"clip": [0.0, 0.0], "vision_aided": 0.0, "perceptual": 0.0}
# What else may lie in a folder: a run, or a converted checkpoint with more than the average.
_OTHERS = (CHECKPOINTS_FOLDER, "training", "torch_gigagan.py", INDEX)


@dataclasses.dataclass(frozen=True)
class GeneratorWeights:
    """What `read_weights` returns.

    Attributes:
      params: of G, float32, in their shards.
      w_avg: float32 [w_dim].
      step: of the checkpoint that they come from.
      identities: {role: SHA-256} of the frozen networks that G was trained with.
    """

    params: Params
    w_avg: jax.Array
    step: int
    identities: dict[str, str]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds published weights, and no run."""
    return (
        any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX)) and not (folder / CHECKPOINTS_FOLDER).is_dir()
    )


def save_weights(
    folder: Path,
    config: Config,
    params: Params,
    w_avg: Any,
    *,
    step: int,
    identities: Mapping[str, str] | None = None,
    dtype: Any = np.float16,
) -> None:
    """Writes the two files.

    Args:
      folder: made where it is missing.
      config: of the run; paths of this machine are left out.
      params: of G, usually its moving average.
      w_avg: [w_dim].
      step: of the checkpoint.
      identities: {role: SHA-256} of frozen networks.
      dtype: of the tensors.

    Raises:
      UserError: a value does not fit the dtype, or the folder is a run's or cannot be written.
    """
    import safetensors
    import safetensors.numpy

    # The run's own config.json would be lost.
    others = [name for name in _OTHERS if (folder / name).exists()]
    if (folder / CONFIG_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        others.append(CONFIG_FILE)
    if others:
        raise UserError(f"--out={folder} holds something else ({others[0]}): name a new folder")
    tensors = {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors[W_AVG] = np.asarray(w_avg)
    # What does not fit becomes infinite, and is refused below.
    with np.errstate(over="ignore"):
        stored = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in tensors.items()}
    for name, x in stored.items():
        if not np.isfinite(x).all():
            raise UserError(f"{name} has values that {np.dtype(dtype).name} does not hold: export with --dtype=float32")
    values = without_places(with_format(to_dict(config)))
    # Networks of these losses are not needed for sampling: without them their paths may be empty.
    values["loss"] = values["loss"] | _WITHOUT_FROZEN
    metadata = {"step": str(step), "model": config.name, "frozen": json.dumps(dict(identities or {}))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Both are whole before either gets its name.
        halves = {name: folder / f".{name}.part" for name in (CONFIG_FILE, WEIGHTS_FILE)}
        safetensors.numpy.save_file(stored, str(halves[WEIGHTS_FILE]), metadata=metadata)
        # safetensors makes files that others may not read.
        halves[WEIGHTS_FILE].chmod(0o644)
        halves[CONFIG_FILE].write_text(json.dumps(values, indent=1) + "\n")
        for name, half in halves.items():
            os.replace(half, folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--out={folder} cannot be written: {error}") from error


def without_places(values: dict[str, Any], keep: Callable[[str], bool] = lambda path: False) -> dict[str, Any]:
    """A config's values without places on the machine that trained it: of no use elsewhere, and nobody's business.

    Args:
      values: of `to_dict`.
      keep: predicate of the paths of frozen networks that stay.
    """
    values = {group: dict(x) if isinstance(x, dict) else x for group, x in values.items()}
    values["data"] |= {"path": "", "index": "", "embeddings": "", "mixture": []}
    for group in ("text", "clip", "vision_aided", "perceptual"):
        if not keep(values[group]["path"]):
            values[group]["path"] = ""
    return values


def without_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values without the sizes of a frozen text encoder, which config.json has for torch."""
    values = dict(values)
    if isinstance(values.get("text"), Mapping):
        values["text"] = {key: value for key, value in values["text"].items() if key not in _SIZES}
    return values


def with_path(values: dict[str, Any], group: str, path: str | None) -> dict[str, Any]:
    """A config's values with the path of a frozen network; what is no group is left for `from_dict` to report."""
    if path is None or not isinstance(values.get(group, {}), Mapping):
        return values
    return values | {group: {**values.get(group, {}), "path": path}}


def read_metadata(weights: Weights, folder: Path) -> tuple[int, dict[str, str]]:
    """(step, {role: SHA-256} of frozen networks) of published weights. Raises UserError where they are damaged."""
    metadata = weights.metadata()
    try:
        step, frozen = int(metadata.get("step", 0)), json.loads(metadata.get("frozen", "{}"))
        if step < 0 or not all(isinstance(x, str) for x in (*frozen.keys(), *frozen.values())):
            raise ValueError("no step, or no identities")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: its metadata are damaged ({error}); fetch it again") from None
    return step, frozen


def read_config(folder: Path, text_path: str | None = None) -> Config:
    """The config of published weights.

    Args:
      folder: with the two files.
      text_path: folder or hub id of the frozen text encoder, which is not among them.

    Raises:
      UserError: the config is missing or damaged, or a frozen text encoder has no path.
    """
    file = folder / CONFIG_FILE
    values = upgrade_config(without_sizes(read_json(file)), str(file))[0]
    # Networks of these losses are not needed for sampling: their paths may be empty.
    if isinstance(values.get("loss"), Mapping):
        values["loss"] = {**values["loss"], **_WITHOUT_FROZEN}
    return from_dict(with_path(values, "text", text_path))


def read_weights(folder: Path, module: Network, shardings: Params, w_avg: jax.ShapeDtypeStruct) -> GeneratorWeights:
    """Reads published weights into their shards.

    Args:
      folder: with the two files.
      module: G of `read_config(folder)`.
      shardings: of its parameters.
      w_avg: shape and sharding of w_avg.

    Raises:
      UserError: the file is damaged, or a tensor is missing, too many, or of another shape.
    """
    weights = Weights(folder)
    number = read_json(folder / CONFIG_FILE).get(FORMAT_KEY, 0)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shardings)]
    rows = [Row(path, path_at_format(module.name, path, number)) for path in paths]
    float32 = lambda spec: np.float32
    params, _ = load_params(
        module, rows, weights, shardings=shardings, dtype_of=float32, ignore=lambda key: key == W_AVG
    )
    stored = weights.keys()
    average = weights.read_tensor(W_AVG).astype(np.float32) if W_AVG in stored else np.zeros(0)
    if average.shape != w_avg.shape:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: {W_AVG} is {list(average.shape)}, not {list(w_avg.shape)}; fetch it again"
        )
    in_shards = jax.make_array_from_callback(average.shape, w_avg.sharding, lambda index: average[index])
    return GeneratorWeights(params, in_shards, *read_metadata(weights, folder))
