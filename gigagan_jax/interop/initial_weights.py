"""Weights that another run starts from: a checkpoint, published weights, or a folder that was converted to PyTorch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.run_folder import RunFolder
from gigagan_jax.config import Config, with_fields
from gigagan_jax.config.migrations import FORMAT_KEY
from gigagan_jax.config.parameter_renames import path_at_format
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER, CONFIG_FILE
from gigagan_jax.interop import model_folder_reader
from gigagan_jax.interop.checkpoint_arrays import CheckpointArrays, state_networks
from gigagan_jax.interop.model_folder import TRAINING_FOLDER
from gigagan_jax.interop.weights import W_AVG, has_weights, read_config, read_metadata
from gigagan_jax.models.network import path_name
from gigagan_jax.models.pretrained import hub
from gigagan_jax.models.pretrained.weights import Weights

# {path: shape, dtype and sharding}
Wanted = Mapping[str, jax.ShapeDtypeStruct]
# Published weights are of this network.
_PUBLISHED = "generator"


class Arrays(Protocol):
    """Arrays by network ("g", "d", "v"), part (of `checkpoint_arrays.PARTS`) and path."""

    def shapes(self, name: str, part: str) -> Mapping[str, tuple[int, ...]]:
        """Shapes by path; empty where there is no such part."""

    def read(self, name: str, part: str, wanted: Wanted) -> dict[str, jax.Array]:
        """Reads arrays into their shards. Raises UserError."""

    def read_top(self, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array | None:
        """ "w_avg" or, as "g/count", the steps of an optimizer; None where it is not there or of another shape."""

    def close(self) -> None:
        """Closes the files."""


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """What a run can start from.

    Attributes:
      place: for messages: "runs/digits, step 120".
      config: of the run that made them.
      step: of their checkpoint.
      frozen: {role: SHA-256} of the frozen networks that they were trained with.
      arrays: what is there.
    """

    place: str
    config: Config
    step: int
    frozen: dict[str, str]
    arrays: Arrays


def open_initial_weights(path: str, config: Config) -> InitialWeights:
    """Opens what `train --init_from` names.

    Args:
      path: a workdir on a disk, at gs:// or s3://; its checkpoint, WORKDIR/checkpoints/STEP; a folder with model.safetensors and
        config.json; or a hub id of one.
      config: of the new run; its frozen text encoder stands for one that has moved.

    Raises:
      UserError: there are no such weights, or they are damaged.
    """
    try:
        return _open(path, config)
    except UserError as error:
        message = str(error)
        raise type(error)(message if message.startswith("--init_from") else f"--init_from={path}: {message}") from None


def _open(path: str, config: Config) -> InitialWeights:
    # A folder of that name would be meant: then this is no hub id.
    if hub.is_hub_id(path):
        return _open_folder(path, hub.find_folder(path, hub.Requirement("--init_from")), config)
    path, step = _split_step(path)
    place = RunFolder.open(path)
    if place.store is None and not place.folder.is_dir():
        raise UserError(f"--init_from={path}: there is no such folder, and it is no hub id (org/name)")
    # Of a bucket: what is on a disk is there.
    place.download_settings()
    if has_weights(place.folder) or (place.folder / TRAINING_FOLDER).is_dir():
        return _open_folder(path, place.folder, config)
    if not place.steps().exists():
        raise UserError(
            f"--init_from={path} holds neither checkpoints nor model.safetensors: name the workdir of a run, or published weights"
        )
    # For reading alone: another process may be training there.
    checkpoints = Checkpoints(place)
    step = checkpoints.require_valid_step() if step is None else checkpoints.require_step(step)
    stored = _with_moved_encoder(checkpoints.read_config(step), config)
    frozen = checkpoints.frozen_identities(step) or {}
    return InitialWeights(f"{path}, step {step}", stored, step, frozen, _CheckpointArrays(checkpoints, step, stored))


def _split_step(path: str) -> tuple[str, int | None]:
    """WORKDIR/checkpoints/STEP is a step of the workdir."""
    # Its folder name is a number; any other folder is a workdir.
    folder, _, name = path.rstrip("/").rpartition("/")
    if name.isdecimal() and folder.rpartition("/")[2] == CHECKPOINTS_FOLDER:
        return folder.rpartition("/")[0] or ".", int(name)
    return path, None


def _with_moved_encoder(stored: Config, config: Config) -> Config:
    # Shapes depend on the sizes of the encoder, which its own folder states.
    moved = config.text.path and not stored.text.is_trained and not os.path.exists(stored.text.path)
    return with_fields(stored, {"text.path": config.text.path}) if moved else stored


def _open_folder(path: str, folder: Path, config: Config) -> InitialWeights:
    weights = Weights(folder) if has_weights(folder) else None
    # Names of torch have dots, ours have slashes.
    of_torch = weights is None or not any("/" in key for key in weights.keys())  # noqa: SIM118  (no mapping)
    if of_torch or (folder / TRAINING_FOLDER).is_dir():
        training = folder / TRAINING_FOLDER / "generator.safetensors"
        form = "pytorch" if of_torch and not _has_own_names(training) else "safetensors"
        paths = {"text": config.text.path} if config.text.path else {}
        read = model_folder_reader.read_folder(folder, form, paths)
        return InitialWeights(path, read.config, read.step, read.frozen, _NumpyArrays(read))
    assert weights is not None
    # Only the sizes of the levels are read of this config: its text encoder is not opened, and need not be here.
    there = read_config(folder, config.text.path or "not known here")
    step, identities = read_metadata(weights, folder)
    number = int(hub.read_json(folder / CONFIG_FILE).get(FORMAT_KEY, 0))
    return InitialWeights(path, there, step, identities, _PublishedArrays(weights, number))


def _has_own_names(file: Path) -> bool:
    return file.exists() and any("/" in key for key in Weights(file.parent, single=file.name).keys())  # noqa: SIM118


class _CheckpointArrays:
    """`Arrays` of a checkpoint: each process reads what its own devices hold."""

    def __init__(self, checkpoints: Checkpoints, step: int, config: Config):
        self._checkpoints, self._step, self._config = checkpoints, step, config
        self._networks, self._arrays = state_networks(config), CheckpointArrays(checkpoints, step)

    def shapes(self, name: str, part: str) -> Mapping[str, tuple[int, ...]]:
        # A run without the vision-aided loss has no V, and D has no average.
        if name not in self._networks or (part == "average" and name != "g"):
            return {}
        # Without beta1 the first moment is not stored.
        if part == "mu" and not getattr(self._config, f"{name}_optimizer").beta1:
            return {}
        return {path: tuple(spec.shape) for path, spec in self._networks[name].specs_by_path().items()}

    def read(self, name: str, part: str, wanted: Wanted) -> dict[str, jax.Array]:
        return self._arrays.restore(self._networks[name], name, part, wanted)

    def read_top(self, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array | None:
        if name == W_AVG:
            # Orbax would cut or pad it.
            if wanted.shape != (self._config.generator.w_dim,):
                return None
            return self._checkpoints.restore_stored(self._step, {name: wanted})[name]
        return self._arrays.restore_count(name.partition("/")[0], wanted)

    def close(self) -> None:
        self._checkpoints.close()


class _PublishedArrays:
    """`Arrays` of published weights: the average of G alone."""

    def __init__(self, weights: Weights, number: int):
        self._weights, self._format = weights, number
        self._keys = weights.keys()

    def shapes(self, name: str, part: str) -> Mapping[str, tuple[int, ...]]:
        return _ByPath(self._weights, self._keys, self._format) if (name, part) == ("g", "average") else {}

    def read(self, name: str, part: str, wanted: Wanted) -> dict[str, jax.Array]:
        key_of = lambda path: path_at_format(_PUBLISHED, path, self._format)
        return {path: _placed(self._weights.read_tensor(key_of(path)), x) for path, x in wanted.items()}

    def read_top(self, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array | None:
        if name not in self._keys or self._weights.shape_of(name) != wanted.shape:
            return None
        return _placed(self._weights.read_tensor(name), wanted)

    def close(self) -> None:
        pass


class _ByPath(Mapping):
    """Shapes by present paths of tensors that have the names of an earlier format."""

    def __init__(self, weights: Weights, keys: set[str], number: int):
        self._weights, self._keys, self._format = weights, keys - {W_AVG}, number

    def __getitem__(self, path):
        key = path_at_format(_PUBLISHED, path, self._format)
        if key not in self._keys:
            raise KeyError(path)
        return self._weights.shape_of(key)

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _NumpyArrays:
    """`Arrays` of a converted folder, read whole."""

    def __init__(self, read: model_folder_reader.Imported):
        # By the keys of `shapes` and `read`.
        trees = {(name, "params"): tree for name, tree in read.params.items()} | {("g", "average"): read.average}
        trees |= {(name, part): tree for name, moments in read.moments.items() for part, tree in moments.items()}
        self._arrays = {key: _by_path(tree) for key, tree in trees.items()}
        self._top = {W_AVG: read.w_avg} | {f"{name}/count": np.asarray(n, np.int32) for name, n in read.counts.items()}

    def shapes(self, name: str, part: str) -> Mapping[str, tuple[int, ...]]:
        return {path: x.shape for path, x in self._arrays.get((name, part), {}).items()}

    def read(self, name: str, part: str, wanted: Wanted) -> dict[str, jax.Array]:
        return {path: _placed(self._arrays[name, part][path], x) for path, x in wanted.items()}

    def read_top(self, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array | None:
        value = self._top.get(name)
        return None if value is None or value.shape != wanted.shape else _placed(value, wanted)

    def close(self) -> None:
        pass


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _placed(value: np.ndarray, where: jax.ShapeDtypeStruct) -> jax.Array:
    value = np.asarray(value, where.dtype)
    # Each process places only the shards of its own devices.
    return jax.make_array_from_callback(where.shape, where.sharding, lambda index: value[index])


def path_in(stored: Config, config: Config, name: str, path: str) -> str | None:
    """Where the parameter at `path` of a network of `config` lies in that of `stored`: levels are found by their resolution.

    Args:
      stored, config: of the weights that are there, and of the new run.
      name: "g", "d" or "v".
      path: "levels/3/to_rgb/bias".

    Returns:
      None where `stored` has no level of that resolution
    """
    for prefix, now, before in _levels(stored, config, name):
        if path.startswith(prefix):
            number, _, rest = path.removeprefix(prefix).partition("/")
            side = now[int(number)]
            return f"{prefix}{before.index(side)}/{rest}" if side in before else None
    return path


def _levels(stored: Config, config: Config, name: str) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    """(start of the path, sides of the levels now, sides there) of what is numbered by resolution."""
    if name == "d":
        # From the output image down.
        return [("levels/", config.resolutions[::-1], stored.resolutions[::-1])]
    if name != "g":
        return []
    down = lambda c: [c.upsampler.input_resolution >> i for i in range(c.upsampler.input_resolution.bit_length())]
    return [
        ("levels/", config.generator_resolutions, stored.generator_resolutions),
        ("encoder/stages/", down(config), down(stored)),
    ]
