"""A folder of `model_folder.py` back as the arrays of a train state, whoever trained it meanwhile."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import Config, from_dict
from gigagan_jax.config.migrations import upgrade_config
from gigagan_jax.config.parameter_renames import nest
from gigagan_jax.core.errors import UserError
from gigagan_jax.interop.checkpoint_arrays import state_networks
from gigagan_jax.interop.model_folder import CONFIG_FILE, TRAINING_FILE, TRAINING_FOLDER, W_AVG
from gigagan_jax.interop.tensor_names import TENSOR_NAMES, TensorNames
from gigagan_jax.interop.weights import with_path, without_sizes
from gigagan_jax.models.network import Network, Params
from gigagan_jax.models.pretrained.hub import INDEX, SINGLE, read_json
from gigagan_jax.models.pretrained.weights import Weights

# Largest step and number of images that a state holds.
_MOST = {"step": 2**31 - 1, "images": 2**32 - 1}


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a folder holds. Networks and moments have the names of the state: "g", "d", "v".

    Attributes:
      config: of the run.
      params: parameters of the networks that are there.
      average: of G.
      w_avg: float32 [w_dim].
      moments: {network: {"mu" or "nu": tree}}, where they are there.
      counts: {network: steps of its optimizer}.
      step, images: of the run; 0 where the folder does not say.
      data: position in the data; empty where the folder does not say.
      frozen: {role: SHA-256} of frozen networks.
    """

    config: Config
    params: dict[str, Params]
    average: Params
    w_avg: np.ndarray
    moments: dict[str, dict[str, Params]]
    counts: dict[str, int]
    step: int
    images: int
    data: dict[str, Any]
    frozen: dict[str, str]


def read_folder(folder: Path, form: str, paths: Mapping[str, str] | None = None) -> Imported:
    """Reads all of a folder.

    Args:
      folder: that was converted.
      form: of TENSOR_NAMES.
      paths: {group of the config: folder or hub id} of frozen networks whose place the folder does not know: "text", "clip",
        "vision_aided".

    Raises:
      UserError: a file is missing or damaged, or the tensors are not those of the config.
    """
    names = TENSOR_NAMES[form]
    config = read_config(folder, paths or {})
    networks = state_networks(config)
    training = folder / TRAINING_FOLDER
    counted = _read_counts(training / TRAINING_FILE)
    params, moments = {}, {}
    for name, network in networks.items():
        if (found := _weights(training, f"{network.name}.safetensors")) is not None:
            params[name] = _read_network(found, network, config, training, names)
        if (found := _weights(training, f"{network.name}_optimizer.safetensors")) is not None:
            moments[name] = _read_moments(found, network, config, training, names, name)
    _check_complete(training, networks, set(params), set(moments))
    source = _weights(folder, SINGLE)
    if source is None and "g" not in params:
        raise UserError(f"{folder} holds no {SINGLE}: is it a folder of tools/convert_checkpoint.py --to={form}?")
    average = params["g"] if source is None else _read_network(source, networks["g"], config, folder, names)
    holder = source or _weights(training, f"{networks['g'].name}.safetensors")
    assert holder is not None
    return Imported(
        config,
        params,
        average,
        _read_w_avg(holder, config, folder),
        moments,
        {name: int(counted["optimizer_steps"].get(network.name, 0)) for name, network in networks.items()},
        int(counted["step"]),
        int(counted["images"]),
        dict(counted["data"]),
        dict(counted["frozen"]),
    )


def _check_complete(training: Path, networks: Mapping[str, Network], params: set[str], moments: set[str]) -> None:
    """Raises UserError where a part of the networks of training, or of their moments, is missing."""
    for found, ending in ((params, ""), (moments, "_optimizer")):
        missing = [network.name for name, network in networks.items() if name not in found]
        if found and missing:
            raise UserError(f"{training} has no {missing[0]}{ending}.safetensors: copy it again, whole")
    if moments and not params:
        raise UserError(f"{training} has moments and no networks: convert with --what=optimizer, which writes both")
    if moments and not (training / TRAINING_FILE).exists():
        raise UserError(
            f"{training} has moments and no {TRAINING_FILE}, which counts their steps: copy it again, whole"
        )


def read_config(folder: Path, paths: Mapping[str, str]) -> Config:
    """The config of a folder. Raises UserError where it is missing, damaged, or of a later version."""
    file = folder / CONFIG_FILE
    values = upgrade_config(without_sizes(read_json(file)), str(file))[0]
    for group, path in paths.items():
        values = with_path(values, group, path)
    return from_dict(values)


def _weights(folder: Path, name: str) -> Weights | None:
    index = INDEX if name == SINGLE else f"{name}.index.json"
    if not (folder / name).exists() and not (folder / index).exists():
        _refuse_pickle(folder, name)
        return None
    return Weights(folder, single=name)


def _refuse_pickle(folder: Path, name: str) -> None:
    stem = name.removesuffix(".safetensors")
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        if (folder / f"{stem}{suffix}").exists():
            raise UserError(
                f"{folder / stem}{suffix} is a pickle, which can run code: save it with safetensors.torch.save_file as {name}"
            )


def _shapes(weights: Weights, prefix: str = "") -> dict[str, tuple[int, ...]]:
    keys = (key for key in sorted(weights.keys()) if key.startswith(prefix) and key != W_AVG)
    return {key.removeprefix(prefix): weights.shape_of(key) for key in keys}


def _read_network(weights: Weights, network: Network, config: Config, folder: Path, names: TensorNames) -> Params:
    where = f"{folder} ({network.name})"
    read = _finite(weights.read_tensor, where)
    return nest(dict(names.read(network, config, _shapes(weights), read, where)))


def _finite(read: Callable[[str], np.ndarray], where: str, prefix: str = "") -> Callable[[str], np.ndarray]:
    """`read` of keys behind a prefix, which raises UserError for a tensor that is not finite."""

    def checked(key: str) -> np.ndarray:
        tensor = read(prefix + key)
        if not np.isfinite(tensor).all():
            raise UserError(f"{where}: {key} has values that are not finite: has the training diverged?")
        return tensor

    return checked


def _read_moments(
    weights: Weights, network: Network, config: Config, folder: Path, names: TensorNames, name: str
) -> dict[str, Params]:
    moments = {}
    for ours, theirs in names.moments_of(config, name).items():
        where = f"{folder} ({theirs}.* of the {network.name})"
        read = _finite(weights.read_tensor, where, f"{theirs}.")
        moments[ours] = nest(dict(names.read(network, config, _shapes(weights, f"{theirs}."), read, where)))
    return moments


def _read_w_avg(weights: Weights, config: Config, folder: Path) -> np.ndarray:
    stored = weights.keys()
    if W_AVG not in stored:
        raise UserError(f"{folder} has no {W_AVG}, the mean of w: add it to the generator's tensors")
    w_avg = np.asarray(weights.read_tensor(W_AVG), np.float32)
    if w_avg.shape != (config.generator.w_dim,):
        raise UserError(f"{folder}: {W_AVG} is {list(w_avg.shape)}, not [{config.generator.w_dim}]")
    return w_avg


def _read_counts(file: Path) -> dict[str, Any]:
    counts = {"step": 0, "images": 0, "optimizer_steps": {}, "data": {}, "frozen": {}}
    if not file.exists():
        return counts
    try:
        found = json.loads(file.read_text())
        numbers = {"step": [found["step"], *found["optimizer_steps"].values()], "images": [found["images"]]}
        for name, most in _MOST.items():
            if not all(type(n) is int and 0 <= n <= most for n in numbers[name]):
                raise ValueError(f"counts must be whole numbers up to {most}")
        counts |= found
        if not isinstance(counts["data"], dict) or not isinstance(counts["frozen"], dict):
            raise ValueError("data and frozen must be objects")
        if not all(isinstance(x, str) for x in counts["frozen"].values()):
            raise ValueError("frozen must name SHA-256 sums")
        return counts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): convert again, or remove it to start counting anew"
        ) from error
