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
from gigagan_jax.interop.artefact import example_conditions
from gigagan_jax.interop.checkpoint_arrays import Original, state_networks
from gigagan_jax.interop.model_folder import TRAINING_FOLDER, W_AVG, torch_config
from gigagan_jax.interop.tensor_names import TENSOR_NAMES
from gigagan_jax.models.discriminator import entry_levels, prediction_pairs
from gigagan_jax.models.network import Network, Params
from gigagan_jax.models.pretrained.weights import Weights

# Largest difference of an output, of the largest value.
TOLERANCE = 1e-4
# Parameters of a comparison: as they were read, in torch, as arguments of the compiled program, scaled within it, and
# activations. 661M parameters took 14.6 GB.
_COPIES = 6


class Check:
    """Compares what `write_folder` wrote.

    Args:
      original: what was converted.
      choices: that were converted.
      form: of TENSOR_NAMES; outputs are compared for "pytorch" alone.
      memory: bytes that a comparison of outputs may take.

    Attributes:
      verdict: of the last call.
    """

    def __init__(self, original: Original, choices: Sequence[str], form: str, memory: float):
        self._form = form
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
        if (
            self._form != "pytorch"
            or importlib.util.find_spec("torch") is None
            or 4 * _COPIES * network.count() > self._memory
        ):
            return self._compare_tensors(folder, file, network, name, part)
        # Python's max would drop what is not a number.
        worst = float(np.max(list(self._differences(folder, file, network, name, part))))
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
        back = TENSOR_NAMES[self._form].read(network, self._config, keys, weights.read_tensor, str(folder / file))
        for (path, found), (_, wanted) in zip(back, self._arrays.read(network, name, part), strict=True):
            if not np.array_equal(found, wanted, equal_nan=True):
                raise UserError(f"{network.name}: {path} is not what the checkpoint has; nothing was written")
        reason = "" if self._form != "pytorch" else " (too large for --memory, or torch is not here)"
        return f"all tensors of the {network.name} are equal{reason}"

    def _differences(self, folder: Path, file: str, network: Network, name: str, part: str) -> Iterator[float]:
        params = nest(dict(self._arrays.read(network, name, part)))
        # Whatever the run computed in: bfloat16 would hide what is wrong.
        config = dataclasses.replace(self._config, dtype="float32")
        count = max(2, config.discriminator.minibatch_std) if name == "d" else 2
        module = _load(make_module(config, name), Weights(folder, single=file))
        for _, ours, theirs in RUN[name](config, state_networks(config)[name], params, module, count):
            yield difference(ours, theirs)


def make_module(config: Config, name: str) -> Any:
    """The torch form of network `name` of the state, at its start."""
    from gigagan_jax.interop import torch_gigagan

    kinds = {"g": torch_gigagan.make_generator, "d": torch_gigagan.Discriminator, "v": torch_gigagan.VisionAided}
    return kinds[name](torch_config(config))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of two arrays, of the largest value."""
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def _load(module: Any, weights: Weights) -> Any:
    import torch

    state = {key: torch.from_numpy(weights.read_tensor(key)) for key in sorted(weights.keys())}
    # The tensors become the parameters: no second copy.
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def dtype_of(module: Any) -> Any:
    """In which a torch module computes."""
    return next(module.parameters()).dtype


def _conditions(config: Config, count: int, dtype: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`example_conditions` as keyword arguments here and in torch."""
    import torch

    ours = example_conditions(config, count)
    as_torch = lambda x: torch.from_numpy(x).to(dtype if x.dtype == np.float32 else torch.long)
    return ours, {name: as_torch(x) for name, x in ours.items()}


# What a comparison gives: (name, ours, theirs), images as [N, C, H, W].
Pairs = Iterator[tuple[str, np.ndarray, np.ndarray]]


def run_generator(
    config: Config, network: Network, params: Params, module: Any, count: int, size: tuple[int, int] | None = None
) -> Pairs:
    """The images of every level, of both sides.

    Args:
      config: of the run, in float32.
      network: G, or an upsampler.
      params: its parameters.
      module: `torch_gigagan.Generator` or `Upsampler` with the same.
      count: examples.
      size: height and width of an upsampler's small images; None for those of training.
    """
    import torch

    ours, theirs = _conditions(config, count, dtype_of(module))
    rng = np.random.default_rng(1)
    z = rng.standard_normal((count, config.generator.z_dim)).astype(np.float32)
    given, given_torch = [z], [torch.from_numpy(z).to(dtype_of(module))]
    if config.is_upsampler:
        sides = size or (config.upsampler.input_resolution,) * 2
        low = rng.uniform(-1, 1, (count, *sides, 3)).astype(np.float32)
        # Other levels than zero, which would hide an error in their embedding.
        noise_level = np.linspace(0.1, 0.9, count, dtype=np.float32)
        given += [low, noise_level]
        given_torch += [_nchw(low, module), torch.from_numpy(noise_level).to(dtype_of(module))]
    images, _ = jax.jit(lambda p: network.bind(p)(*given, **{"tokens": None, **ours}))(params)
    with torch.no_grad():
        for a, b in zip(images, module(*given_torch, **theirs), strict=True):
            yield f"image {a.shape[1]} px", np.moveaxis(np.asarray(a), -1, 1), b.numpy()


def run_discriminator(config: Config, network: Network, params: Params, module: Any, count: int) -> Pairs:
    """Every prediction, of both sides."""
    import torch

    disc, theirs, pyramid = _discriminator_inputs(config, network, module, count)
    logits = jax.jit(disc)(params, pyramid)
    with torch.no_grad():
        predictions = module([_nchw(x, module) for x in pyramid], module.condition(**theirs))
    for pair, a, b in zip(prediction_pairs(config.discriminator), logits, predictions.values(), strict=True):
        yield f"prediction of level {pair.level}, exit {pair.exit}", np.asarray(a), b.numpy()


def run_gradients(config: Config, network: Network, params: Params, module: Any, count: int) -> Pairs:
    """The gradients by the images of D's predictions, summed with random signs: what R1 penalizes.

    Where an activation is next to its kink, rounding decides its slope: gradients differ there.
    """
    import torch

    disc, theirs, pyramid = _discriminator_inputs(config, network, module, count)
    signs = np.random.default_rng(2).choice((-1.0, 1.0), len(prediction_pairs(config.discriminator))).astype(np.float32)
    total = lambda pyramid, params: sum(s * x.sum() for s, x in zip(signs, disc(params, pyramid), strict=True))
    grads = jax.jit(jax.grad(total))(pyramid, params)
    images = [_nchw(x, module).requires_grad_() for x in pyramid]
    predictions = module(images, module.condition(**theirs)).values()
    torch.stack([s * x.sum() for s, x in zip(signs.tolist(), predictions, strict=True)]).sum().backward()
    for a, x in zip(grads, images, strict=True):
        assert x.grad is not None
        yield f"gradient by the image of {x.shape[-1]} px", np.moveaxis(np.asarray(a), -1, 1), x.grad.numpy()


def _discriminator_inputs(
    config: Config, network: Network, module: Any, count: int
) -> tuple[Any, Any, list[np.ndarray]]:
    """((params, pyramid) -> predictions here, conditions in torch, pyramid)"""
    ours, theirs = _conditions(config, count, dtype_of(module))
    rng = np.random.default_rng(2)
    sides = [config.resolution >> level for level in entry_levels(config.discriminator)]

    def run(params: Params, pyramid: list[jax.Array]) -> Any:
        disc = network.bind(params)
        return disc({"real": pyramid}, disc.condition(**{"tokens": None, **ours}))["real"].own

    return run, theirs, [rng.standard_normal((count, side, side, 3)).astype(np.float32) for side in sides]


def _nchw(x: np.ndarray, module: Any) -> Any:
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(dtype_of(module))


def run_vision_aided(config: Config, network: Network, params: Params, module: Any, count: int) -> Pairs:
    """The logits of every head, from random features."""
    import torch

    ours, theirs = _conditions(config, count, dtype_of(module))
    rng, v = np.random.default_rng(3), config.vision_aided
    features = [rng.standard_normal((count, 4, 4, v.projection)).astype(np.float32) for _ in v.layers]

    def run(params: Params) -> Any:
        bound = network.bind(params)
        return bound(features, bound.condition(**{"tokens": None, "labels": None, **ours}))

    maps = [_nchw(x, module) for x in features]
    with torch.no_grad():
        expected = module(maps, module.condition(**theirs))
    for layer, a, b in zip(v.layers, jax.jit(run)(params), expected, strict=True):
        yield f"head of layer {layer}", np.asarray(a), b.numpy()


# {network in the state: what compares its outputs}
RUN = {"g": run_generator, "d": run_discriminator, "v": run_vision_aided}
