"""G as ONNX, from `torch_gigagan.py`: any batch; ONNX Runtime alone runs it. An upsampler's takes images of one size."""

from __future__ import annotations

import functools
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import Config
from gigagan_jax.core.errors import UserError
from gigagan_jax.interop.artefact import artefact_name, example_inputs, input_shapes, write_program
from gigagan_jax.interop.model_folder import torch_config

# Bytes of weights; a file of protocol buffers ends at 2 GiB.
MOST_INSIDE = 1.9e9
PACKAGES = ("torch", "onnxscript", "onnxruntime")
# Of the inputs that are images: channels come first in torch.
_IMAGES = ("low",)


def file_name(config: Config) -> str:
    """Of the graph."""
    return f"{artefact_name(config)}.onnx"


def notes(config: Config, size: tuple[int, int] | None = None) -> str:
    """What README.md says of the format.

    Args:
      config: of the run.
      size: height and width of the small images of an upsampler.
    """
    takes, images, whose = "any batch", "`[n, 3, R, R]`", "sample"
    if size is not None:
        h, w = size
        factor = config.resolution // config.upsampler.input_resolution
        takes = f"any batch of images of {w} x {h} px, and no other size"
        images, whose = f"`[n, 3, {h * factor}, {w * factor}]`", "upscale"
    return f"""`{file_name(config)}` takes {takes}. Images are {images} in about [-1, 1].
The z of a seed is NumPy's, not that of `gigagan_jax.{whose}`."""


def low_shape(size: tuple[int, int] | None) -> tuple[str | int, ...]:
    """Of the small images of an upsampler of one size; of a generator, which has none, whatever."""
    return ("n", 3, *(size or ()))


def check_packages() -> None:
    """Raises UserError where the extra is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format=onnx needs {', '.join(missing)}: pip install 'gigagan-jax[onnx]'")


def export_generator(
    config: Config,
    tensors: Iterator[tuple[str, np.ndarray]],
    w_avg: np.ndarray,
    centers: np.ndarray,
    file: Path,
    *,
    inside: bool = True,
    size: tuple[int, int] | None = None,
) -> None:
    """Writes the artefact.

    Args:
      config: of the run.
      tensors: (key, tensor) of the torch generator (torch_table.py).
      w_avg: float32 [w_dim].
      centers: float32 [K, z_dim], the z whose mean w is that of a prompt.
      file: of the graph.
      inside: the weights are in it; else in FILE.data beside it.
      size: height and width of the small images of an upsampler.
    """
    import torch

    module, names = _make_module(config, tensors, centers), list(input_shapes(config))
    example = _channels_first(example_inputs(config, 2, w_avg, size))
    n = torch.export.Dim("n")
    axes = {name: {0: n} if "n" in shape else None for name, (shape, _) in input_shapes(config).items()}
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(torch.from_numpy(example[name].copy()) for name in names),
            str(file),
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=["images"],
            dynamic_shapes=(tuple(axes.values()),),
            external_data=not inside,
        )


class _quiet:
    """Within it, loggers say errors only."""

    def __init__(self, *names: str):
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)


def _make_module(config: Config, tensors: Iterator[tuple[str, np.ndarray]], centers: np.ndarray) -> Any:
    import torch

    from gigagan_jax.interop import torch_gigagan

    generator = torch_gigagan.make_generator(torch_config(config))
    state = {key: torch.from_numpy(np.array(x)) for key, x in tensors}
    generator.load_state_dict(state | {"w_avg": generator.w_avg}, assign=True)
    for module in generator.modules():
        if isinstance(module, torch_gigagan.AdaptiveConv):
            setattr(module, "forward", functools.partial(_adaptive_conv, module))  # noqa: B010 a method, to mypy
    names = list(input_shapes(config))

    class Artefact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = generator
            self.centers = torch.nn.Buffer(torch.from_numpy(centers))

        def forward(self, *values: Any) -> Any:
            inputs = dict(zip(names, (x if x.is_floating_point() else x.long() for x in values), strict=True))
            g, z = self.generator, inputs["z"]
            t, local, mask = g.conditioner(inputs.get("tokens"), inputs.get("labels"), inputs.get("features"))
            if isinstance(g, torch_gigagan.Upsampler):
                return g.synthesize(g.map(z, t, inputs["noise_level"]), local, mask, inputs["low"])[-1]
            count, k = z.shape[0], self.centers.shape[0]
            # All in one batch: k unrolled copies take a minute to export.
            around = self.centers[:, None].expand(k, count, -1).flatten(0, 1)
            many = None if t is None else t[None].expand(k, *t.shape).flatten(0, 1)
            w, mean = g.map(z, t), g.map(around, many).unflatten(0, (k, count)).mean(0)
            near = inputs["w_avg"] + inputs["global_truncation"] * (w - inputs["w_avg"])
            return g.synthesize(mean + inputs["truncation"] * (near - mean), local, mask)[-1]

    return Artefact().eval().requires_grad_(False)


def _adaptive_conv(module: Any, x: Any, w: Any) -> Any:
    """`AdaptiveConv.forward` as one product a tap: ONNX has no convolution with as many groups as the batch."""
    import torch.nn.functional as F

    from gigagan_jax.interop.torch_gigagan import leaky_relu, upsample

    kernels = module.make_kernels(w)
    if module.up:
        x = upsample(x)
    side, (h, width) = kernels.shape[-1], x.shape[2:]
    x = F.pad(x, (side // 2,) * 4)
    y = sum(
        kernels[:, :, :, i, j] @ x[:, :, i : i + h, j : j + width].flatten(2) for i in range(side) for j in range(side)
    )
    y = y.unflatten(-1, (h, width)) + module.bias[:, None, None]
    return leaky_relu(y) if module.activation else y


def _channels_first(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(np.moveaxis(x, -1, 1)) if name in _IMAGES else x for name, x in inputs.items()}


def run_artefact(file: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Images [N, R, R, 3] of an artefact, from inputs with channels last."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (images,) = session.run(None, _channels_first(inputs))
    return np.moveaxis(images, 1, -1)


def program(config: Config, size: tuple[int, int] | None = None) -> str:
    """run.py of the folder; `size` is that of an upsampler's small images."""
    load = f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file_name(config)}")"""
    z = f"np.random.default_rng(seed).standard_normal((1, {config.generator.z_dim})).astype(np.float32)"
    call = "np.moveaxis(session.run(None, inputs)[0], 1, -1)"
    return write_program(config, load, z, call, "np.ascontiguousarray(np.moveaxis(low, -1, 1))", size)
