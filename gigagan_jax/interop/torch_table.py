"""The key table between this project's parameters and those of `torch_gigagan.py`, complete on both sides.

A stacked parameter (`ScannedLayers`) is one row a layer: torch has a module for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gigagan_jax.config import Config, GeneratorConfig
from gigagan_jax.core.errors import UserError
from gigagan_jax.models.generator import spread_attention
from gigagan_jax.models.network import Network, Params, Spec, path_name

# kind: (axes of the torch tensor in terms of ours). The inverse permutation leads back.
LAYOUTS = {
    "as it is": None,
    "linear": (1, 0),  # [in, out] -> [out, in]
    "convolution": (3, 2, 0, 1),  # [kh, kw, in, out] -> [out, in, kh, kw]
    "bank": (0, 4, 3, 1, 2),  # [bank, kh, kw, in, out] -> [bank, out, in, kh, kw]
    "constant": (2, 0, 1),  # [h, w, C] -> [C, h, w]
}


class Row(NamedTuple):
    """One tensor of the torch module.

    Attributes:
      path: of the parameter here.
      layer: its place in the stack; () where the parameter is not stacked.
      key: in the torch module's state.
      layout: of LAYOUTS.
    """

    path: str
    layer: tuple[int, ...]
    key: str
    layout: str

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """One layer of our parameter -> the torch tensor, contiguous."""
        axes = LAYOUTS[self.layout]
        return np.ascontiguousarray(x[self.layer] if axes is None else x[self.layer].transpose(axes))

    def from_torch(self, x: np.ndarray) -> np.ndarray:
        """The torch tensor -> one layer of our parameter."""
        axes = LAYOUTS[self.layout]
        return x if axes is None else x.transpose(np.argsort(axes))


def torch_rows(network: Network, config: Config) -> list[Row]:
    """The table of a network: every parameter, every layer.

    Args:
      network: "generator", which an upsampler is too, "discriminator" or "vision_aided".
      config: of the run.
    """
    rows = []
    for name, spec in network.specs_by_path().items():
        for index in itertools.product(*map(range, spec.shape[: name.split("/").count("layer")])):
            key = _torch_key(name.split("/"), iter(index), network.name, config.generator)
            rows.append(Row(name, index, key, _layout(name, spec, len(index))))
    return rows


def _torch_key(parts: list[str], index: Iterator[int], network: str, g: GeneratorConfig) -> str:
    match parts:
        case ["mapping", "first", *rest]:
            start, rest = ["mapping", "layers", "0"], rest
        case ["mapping", "rest", k, *rest]:
            start = ["mapping", "layers", str(int(k) + 1)]
        case ["levels", i, "entry", *rest] if network == "generator":
            start = ["levels", i, "blocks", "0"]
        case ["levels", i, "blocks", "layer", *rest] if network == "generator":
            # The first block of a level is no part of the stack.
            start = ["levels", i, "blocks", str(next(index) + 1)]
        case ["levels", i, "attention", "layer", *rest] if network == "generator":
            block, place = _attention_place(g, int(i), next(index))
            start = ["levels", i, "blocks", str(block), "attention", str(place)]
        case _:
            start, rest = [], parts
    # Stacks that are left, and the norm that may be of several kinds here.
    names = [str(next(index)) if part == "layer" else part for part in rest if part != "rms"]
    return ".".join(start + names)


def _attention_place(g: GeneratorConfig, level: int, k: int) -> tuple[int, int]:
    """(block, which of its attention layers) of the k-th attention layer of a level."""
    blocks, depth = g.blocks[level], g.attention_depth[level]
    if g.attention_placement == "last":
        return blocks - 1, k
    places = spread_attention(blocks, depth)
    return places[k] - 1, places[:k].count(places[k])


def _layout(name: str, spec: Spec, stacked: int) -> str:
    dims = len(spec.shape) - stacked
    last = name.rpartition("/")[2]
    if last == "constant":
        return "constant"
    if last == "filters":
        return "bank"
    return {2: "linear", 4: "convolution"}[dims] if last == "weight" else "as it is"


def torch_shapes(network: Network, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(key, shape) of the torch module, in the order of `to_torch`."""
    specs = network.specs_by_path()
    for row in torch_rows(network, config):
        own, axes = specs[row.path].shape[len(row.layer) :], LAYOUTS[row.layout]
        yield row.key, own if axes is None else tuple(own[axis] for axis in axes)


def to_torch(network: Network, config: Config, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(key, tensor) of the torch module, of parameters that NumPy reads."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return to_torch_stream(network, config, ((path_name(path), x) for path, x in leaves))


def to_torch_stream(
    network: Network, config: Config, params: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The same of (path, parameter) in the order of the network's specs; one parameter is in memory at a time."""
    groups = itertools.groupby(torch_rows(network, config), key=lambda row: row.path)
    for (wanted, rows), (path, array) in zip(groups, params, strict=True):
        if path != wanted:
            raise ValueError(f"{wanted} was to come, {path} came")
        array = np.asarray(array)
        for row in rows:
            yield row.key, row.to_torch(array)


def from_torch(
    network: Network, config: Config, keys: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, parameter) of the network, one at a time.

    Args:
      keys: {key: shape} of all tensors that there are.
      read: key -> tensor.
      where: what the tensors come from, for messages.

    Raises:
      UserError: a tensor is missing, too many, or of another shape.
    """
    specs = network.specs_by_path()
    wanted = dict(torch_shapes(network, config))
    check_tensors(wanted, keys, where)
    for path, group in itertools.groupby(torch_rows(network, config), key=lambda row: row.path):
        out = np.empty(specs[path].shape, np.float32)
        for row in group:
            out[row.layer] = row.from_torch(np.asarray(read(row.key), np.float32))
        yield path, out


def check_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError where tensors, {key: shape}, are not those that are wanted."""
    for names, problem in ((wanted.keys() - found.keys(), "has no"), (found.keys() - wanted.keys(), "has an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where} {problem} {min(names)}{more}: the weights are of another model, or damaged")
    for key, shape in wanted.items():
        if tuple(found[key]) != shape:
            raise UserError(
                f"{where}: {key} is {list(found[key])}, the config asks for {list(shape)}: the weights are of another model"
            )
