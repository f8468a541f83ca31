"""Compares a converted checkpoint with its original: outputs where both networks fit into memory, else every tensor."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.config.parameter_renames import nest
from gigagan_jax.core.errors import UserError
from gigagan_jax.interop.checkpoint_arrays import Original, state_networks
from gigagan_jax.interop.pytorch import TRAINING_FOLDER, W_AVG, torch_config
from gigagan_jax.interop.torch_table import from_torch
from gigagan_jax.models.network import Network, Params
from gigagan_jax.models.pretrained.text_encoder import text_spec
from gigagan_jax.models.pretrained.weights import Weights

# Largest difference of an output, of the largest value.
TOLERANCE = 1e-4
# Both copies of a network's parameters, and room for activations.
_COPIES = 3


class Check:
    """Compares what `write_folder` wrote.

    Args:
      original: what was converted.
      choices: that were converted.
      memory: bytes that a comparison of outputs may take.

    Attributes:
      verdict: of the last call.
    """

    def __init__(self, original: Original, choices: Sequence[str], memory: float):
        self._arrays, self._config = original.arrays, original.config
        self._choices, self._memory, self.verdict = choices, memory, ""

    def __call__(self, folder: Path) -> str:
        """The verdict. Raises UserError where they differ."""
        said = []
        networks = state_networks(self._config)
        if "average" in self._choices:
            said.append(self._compare(folder, "model.safetensors", networks["g"], "g", "average"))
        for name, network in networks.items() if "training" in self._choices else ():
            said.append(self._compare(folder / TRAINING_FOLDER, f"{network.name}.safetensors", network, name, "params"))
        self.verdict = "; ".join(said) or "nothing was compared: moments have no output"
        return self.verdict

    def _compare(self, folder: Path, file: str, network: Network, name: str, part: str) -> str:
        if importlib.util.find_spec("torch") is None or 4 * _COPIES * network.count() > self._memory:
            return self._compare_tensors(folder, file, network, name, part)
        worst = max(self._differences(folder, file, network, name, part))
        # Not a number is no agreement either.
        if not worst <= TOLERANCE:
            raise UserError(
                f"{network.name}: the outputs of both sides differ by {worst:.1e} of the largest value, more than "
                f"{TOLERANCE:.0e}; nothing was written"
            )
        return f"outputs of the {network.name} agree to {worst:.1e}"

    def _compare_tensors(self, folder: Path, file: str, network: Network, name: str, part: str) -> str:
        weights = Weights(folder, single=file)
        keys = {key: weights.shape_of(key) for key in sorted(weights.keys()) if key != W_AVG}
        back = from_torch(network, self._config, keys, weights.read_tensor, str(folder / file))
        for (path, found), (_, wanted) in zip(back, self._arrays.read(network, name, part), strict=True):
            if not np.array_equal(found, wanted, equal_nan=True):
                raise UserError(f"{network.name}: {path} is not what the checkpoint has; nothing was written")
        return f"all tensors of the {network.name} are equal (too large for --memory, or torch is not here)"

    def _differences(self, folder: Path, file: str, network: Network, name: str, part: str) -> Iterator[float]:
        params = nest(dict(self._arrays.read(network, name, part)))
        run = {"g": _run_generator, "d": _run_discriminator, "v": _run_vision_aided}[name]
        # Whatever the run computed in: bfloat16 would hide what is wrong.
        config = dataclasses.replace(self._config, dtype="float32")
        yield from run(config, state_networks(config)[name], params, Weights(folder, single=file))


def _difference(ours: Any, theirs: Any) -> float:
    a, b = np.asarray(ours), theirs.detach().numpy()
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))


def _load(module: Any, weights: Weights) -> Any:
    import torch

    state = {key: torch.from_numpy(weights.read_tensor(key)) for key in sorted(weights.keys())}
    # The tensors become the parameters: no second copy.
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def _conditions(config: Config, count: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A fixed caption or class for each of `count` examples: keyword arguments here and in torch."""
    import torch

    rng = np.random.default_rng(0)
    ours: dict[str, np.ndarray] = {}
    if config.condition == "class":
        ours["labels"] = rng.integers(0, config.num_classes, count).astype(np.int32)
    elif config.condition == "text":
        spec = text_spec(config.text)
        tokens = np.zeros((count, config.text.length), np.int32)
        for i, row in enumerate(tokens):
            # Lengths from the empty caption to half a row.
            length = i * max(1, (config.text.length - 2) // (2 * count))
            row[: length + 2] = (1, *rng.integers(3, min(spec.vocab_size, 1000), length), spec.end_id)
        ours["tokens"] = tokens
        if not config.text.is_trained:
            ours["features"] = rng.standard_normal((*tokens.shape, spec.width)).astype(np.float32)
    as_torch = lambda x: torch.from_numpy(x) if x.dtype == np.float32 else torch.from_numpy(x).long()
    return ours, {name: as_torch(x) for name, x in ours.items()}


def _run_generator(config: Config, network: Network, params: Params, weights: Weights) -> Iterator[float]:
    import torch

    from gigagan_jax.interop import torch_gigagan

    ours, theirs = _conditions(config, 2)
    z = np.random.default_rng(1).standard_normal((2, config.generator.z_dim)).astype(np.float32)
    images, _ = jax.jit(lambda p: network.bind(p)(z, **{"tokens": None, **ours}))(params)
    module = _load(torch_gigagan.Generator(torch_config(config)), weights)
    for a, b in zip(images, module(torch.from_numpy(z), **theirs), strict=True):
        yield _difference(np.moveaxis(np.asarray(a), -1, 1), b)


def _run_discriminator(config: Config, network: Network, params: Params, weights: Weights) -> Iterator[float]:
    import torch

    from gigagan_jax.interop import torch_gigagan

    count = max(2, config.discriminator.minibatch_std)
    ours, theirs = _conditions(config, count)
    rng = np.random.default_rng(2)
    sides = config.resolutions[::-1] if config.discriminator.multi_scale_input else config.resolutions[-1:]
    pyramid = [rng.standard_normal((count, side, side, 3)).astype(np.float32) for side in sides]

    def run(params: Params) -> Any:
        disc = network.bind(params)
        return disc({"real": pyramid}, disc.condition(**{"tokens": None, **ours}))["real"].own

    logits = jax.jit(run)(params)
    module = _load(torch_gigagan.Discriminator(torch_config(config)), weights)
    images = [torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in pyramid]
    for a, b in zip(logits, module(images, module.condition(**theirs)).values(), strict=True):
        yield _difference(a, b)


def _run_vision_aided(config: Config, network: Network, params: Params, weights: Weights) -> Iterator[float]:
    import torch

    from gigagan_jax.interop import torch_gigagan

    ours, theirs = _conditions(config, 2)
    rng, v = np.random.default_rng(3), config.vision_aided
    features = [rng.standard_normal((2, 4, 4, v.projection)).astype(np.float32) for _ in v.layers]

    def run(params: Params) -> Any:
        module = network.bind(params)
        return module(features, module.condition(**{"tokens": None, "labels": None, **ours}))

    logits = jax.jit(run)(params)
    module = _load(torch_gigagan.VisionAided(torch_config(config)), weights)
    maps = [torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for x in features]
    for a, b in zip(logits, module(maps, module.condition(**theirs)), strict=True):
        yield _difference(a, b)
