"""What is converted: a checkpoint or published weights, whose arrays are read a few at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.config import Config
from gigagan_jax.config.migrations import FORMAT_KEY
from gigagan_jax.config.parameter_renames import nest, path_at_format
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CONFIG_FILE
from gigagan_jax.interop.safetensors_stream import cut_by_size
from gigagan_jax.interop.torch_table import check_tensors
from gigagan_jax.interop.weights import W_AVG, has_weights, read_config, read_metadata
from gigagan_jax.models.build import build_discriminator, build_generator, build_vision_aided
from gigagan_jax.models.network import Network, path_name
from gigagan_jax.models.pretrained.hub import read_json
from gigagan_jax.models.pretrained.weights import Weights

# Bytes that are read at once: a call of Orbax takes a third of a second, whatever it reads.
_AT_ONCE = 256 * 2**20
# Where the arrays of a network lie in a state: its parameters, their average, and the moments of its optimizer.
PARTS = ("params", "average", "mu", "nu")


class Arrays(Protocol):
    """Where the arrays of a model come from."""

    def read(self, network: Network, name: str, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """(path, float32 array) of each parameter of a network, in the order of its specs."""
        ...

    def read_array(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """One array at the top of the state, such as "w_avg"."""
        ...


@dataclasses.dataclass(frozen=True)
class Original:
    """What is converted.

    Attributes:
      config: of the run.
      step: of the checkpoint.
      arrays: of its state.
      frozen: {role: SHA-256} of frozen networks.
      read_counts: reads the step, the images, how often each optimizer has stepped, the position in the data and the
        identities of frozen networks; None for published weights, which have an average of G and nothing else.
    """

    config: Config
    step: int
    arrays: Arrays
    frozen: dict[str, str]
    read_counts: Callable[[], dict[str, Any]] | None


def state_networks(config: Config) -> dict[str, Network]:
    """{name in the state: network} of a run."""
    networks = {"g": build_generator(config), "d": build_discriminator(config)}
    return networks | ({"v": build_vision_aided(config)} if config.loss.vision_aided else {})


def open_original(workdir: Place, text_path: str | None = None) -> Original:
    """The newest intact checkpoint of a run, or published weights (weights.py).

    Args:
      workdir: of the run, on a disk, at gs:// or s3://, or a folder with model.safetensors and config.json.
      text_path: folder or hub id of the frozen text encoder of published weights.

    Raises:
      UserError: there is none, or it is damaged.
    """
    place = RunFolder.open(workdir)
    place.download_settings()
    folder = place.folder
    if has_weights(folder):
        weights = Weights(folder)
        config, (step, frozen) = read_config(folder, text_path), read_metadata(weights, folder)
        return Original(config, step, PublishedArrays(folder, weights, config), frozen, None)
    checkpoints = Checkpoints(place)
    step = checkpoints.require_valid_step()
    config, arrays = checkpoints.read_config(step), CheckpointArrays(checkpoints, step)
    read_counts = lambda: {
        "step": int(arrays.read_array("step", (), np.int32)),
        "images": int(arrays.read_array("images", (), np.uint32)),
        "optimizer_steps": {network.name: arrays.read_count(name) for name, network in state_networks(config).items()},
        "data": checkpoints.data_position(step),
        "frozen": checkpoints.frozen_identities(step) or {},
    }
    return Original(config, step, arrays, checkpoints.frozen_identities(step) or {}, read_counts)


class PublishedArrays:
    """The average of G in published weights.

    Args:
      folder: with model.safetensors and config.json.
      weights: its tensors.
      config: of the folder.

    Raises:
      UserError: a tensor is missing, too many, or of another shape.
    """

    def __init__(self, folder: Path, weights: Weights, config: Config):
        self._weights, self._format = weights, int(read_json(folder / CONFIG_FILE).get(FORMAT_KEY, 0))
        network = build_generator(config)
        specs = network.specs_by_path().items()
        wanted = {path_at_format(network.name, path, self._format): tuple(spec.shape) for path, spec in specs}
        wanted[W_AVG] = (config.generator.w_dim,)
        check_tensors(wanted, {key: weights.shape_of(key) for key in sorted(weights.keys())}, str(folder))

    def read(self, network: Network, name: str, part: str) -> Iterator[tuple[str, np.ndarray]]:
        if (name, part) != ("g", "average"):
            raise UserError("published weights hold the average of G alone: --what=average")
        for path in network.specs_by_path():
            stored = path_at_format(network.name, path, self._format)
            yield path, self._weights.read_tensor(stored).astype(np.float32)

    def read_array(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        return self._weights.read_tensor(name).astype(dtype)


class CheckpointArrays:
    """The arrays of one checkpoint.

    Args:
      checkpoints: of the workdir.
      step: of the checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, step: int):
        self._checkpoints, self.step = checkpoints, step
        self._format = checkpoints.format_of(step)
        self._where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(self, network: Network, name: str, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """(path, float32 array) of each parameter of a network, in the order of its specs.

        Args:
          network: G, D or V.
          name: of the state: "g", "d" or "v".
          part: of PARTS.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        shapes = {path: spec.shape for path, spec in network.specs_by_path().items()}
        for group in cut_by_size(shapes, lambda path: 4 * math.prod(shapes[path]), _AT_ONCE):
            wanted = {path: self._leaf(shapes[path]) for path in group}
            found = self.restore(network, name, part, wanted)
            yield from ((path, np.asarray(x)) for path, x in found.items())

    def restore(
        self, network: Network, name: str, part: str, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Some arrays of a network, in the order of `wanted`, in its shards.

        Args:
          network, name, part: as of `read`.
          wanted: {path of the parameter: shape, dtype and sharding}.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        # An earlier format has them at other places.
        stored = {path: path_at_format(network.name, path, self._format) for path in wanted}
        tree = _wrap_part(nest({stored[path]: x for path, x in wanted.items()}), name, part)
        found = _open_part(self._checkpoints.restore_stored(self.step, tree), name, part)
        # By names: Orbax may order the entries of a dict in another way.
        values = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(found)}
        return {path: values[stored[path]] for path in wanted}

    def read_array(self, name: str, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """One array at the top of the state, such as "w_avg"."""
        return np.asarray(self._checkpoints.restore_stored(self.step, {name: self._leaf(shape, dtype)})[name])

    def read_count(self, name: str) -> int:
        """The steps that an optimizer has taken, by its own count."""
        return int(self.restore_count(name, self._leaf((), np.int32)))

    def restore_count(self, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        """`read_count` in its shards."""
        tree = {name: {"opt": [{"count": wanted}, {}]}}
        return self._checkpoints.restore_stored(self.step, tree)[name]["opt"][0]["count"]

    def _leaf(self, shape: Sequence[int], dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._where)


def _wrap_part(tree: dict[str, Any], name: str, part: str) -> dict[str, Any]:
    """The part of a state that holds a tree: of network `name`, `part` of PARTS."""
    if part == "average":
        return {f"{name}_ema": tree}
    # The second element of the optimizer's chain, weight decay, has no state.
    return {name: {"params": tree} if part == "params" else {"opt": [{part: tree}, {}]}}


def _open_part(state: dict[str, Any], name: str, part: str) -> Any:
    """The inverse of `_wrap_part`."""
    if part == "average":
        return state[f"{name}_ema"]
    return state[name]["params"] if part == "params" else state[name]["opt"][0][part]
