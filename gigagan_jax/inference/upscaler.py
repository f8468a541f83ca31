"""From a small image to a large one by a trained upsampler: load once, call many times.

upscaler = Upscaler.from_pretrained("docs/weights/photos")     # a folder, a workdir, or a hub id
image = upscaler(image, scale=4)                               # a PIL image of any size
"""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from gigagan_jax.checkpoint.consistency import check_same_frozen
from gigagan_jax.checkpoint.manager import Checkpoints, with_shardings
from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.config import Config, MeshConfig, class_label, with_fields
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.workdir_files import CHECKPOINTS_FOLDER
from gigagan_jax.data.tokenizers import Tokenizer, make_tokenizer
from gigagan_jax.inference.image_reader import read_picture
from gigagan_jax.inference.latents import z_of_seed
from gigagan_jax.inference.tiling import Tiling
from gigagan_jax.inference.upscale_job import MAX_SCALE, Settings, upscale_array
from gigagan_jax.interop import weights
from gigagan_jax.models.build import build_generator
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained import hub
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options
from gigagan_jax.models.upsampler import context_radius, grid_of
from gigagan_jax.parallel import sharding


class Upscaler:
    """An upsampler with its weights.

    Args:
      config: of the run.
      mesh: devices to run on; tiles are shared between them, or the rows of one image.
      text_path: folder or hub id of the frozen text encoder, where it moved since training.

    Attributes:
      params: of G, usually its moving average.
      step: of the checkpoint that the weights come from.
      identities: of the frozen networks that were loaded.

    Raises:
      UserError: the config is of a base model, or its frozen text encoder is missing or damaged.
    """

    def __init__(self, config: Config, mesh: Any = None, *, text_path: str | None = None):
        if not config.is_upsampler:
            raise UserError(
                f"{config.name} is a base model, which makes images from prompts: use python -m gigagan_jax.sample; an "
                "upsampler has config.upsampler.input_resolution"
            )
        self.config = config if text_path is None else with_fields(config, {"text.path": text_path})
        self.mesh = sharding.make_mesh(MeshConfig()) if mesh is None else mesh
        self.module = build_generator(self.config)
        self.frozen = FrozenNetworks(self.config, roles=("text",))
        self._frozen, self.identities = self.frozen.load(self.mesh)
        self.shardings = self.module.shardings(self.mesh, self.config.rules)
        self.params: Params = {}
        self.step = 0
        self._prepare = jax.jit(self._map_latent)
        # Tiles are rows of a batch; of one image alone the rows of pixels are shared between the devices.
        self._tiles = jax.jit(self._synthesize)
        whole = dict(self.config.rules) | {"height": self.config.rules["batch"], "batch": ""}
        self._whole = jax.jit(lambda *args: self._synthesize(*args, rules=whole))

    @classmethod
    def from_workdir(cls, workdir: Place, *, text_path: str | None = None, mesh: Any = None) -> "Upscaler":
        """The newest intact checkpoint of a training run, or published weights (interop/weights.py).

        Args:
          workdir: of the run, on a disk, at gs:// or s3://, or a folder with model.safetensors and config.json.
          text_path, mesh: as the class takes them.

        Raises:
          UserError: no finished checkpoint, a damaged one, or one of a base model.
        """
        place = RunFolder.open(workdir)
        place.download_settings()
        folder = place.folder
        if weights.has_weights(folder):
            self = cls(weights.read_config(folder, text_path), mesh, text_path=text_path)
            read = weights.read_weights(folder, self.module, self.shardings, self._abstract_w_avg())
            check_same_frozen(read.identities, self.identities, str(place))
            self.params, self.step = read.params, read.step
            return self
        checkpoints = Checkpoints(place)
        step = checkpoints.require_valid_step()
        self = cls(checkpoints.read_config(step), mesh, text_path=text_path)
        checkpoints.check_frozen(step, self.identities)
        wanted = {"g_ema": with_shardings(self.module.abstract(), self.shardings)}
        self.params, self.step = checkpoints.restore_partial(step, wanted)["g_ema"], step
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, text_path: str | None = None, mesh: Any = None, flag: str = "from_pretrained"
    ) -> "Upscaler":
        """A workdir, a folder of published weights, or a model on the Hugging Face hub.

        Args:
          path: folder, or a hub id, `org/name` or `org/name@revision`.
          text_path, mesh: as the class takes them.
          flag: what errors call `path`.

        Raises:
          UserError: there is no such folder and no such model, or its weights are damaged.
        """
        # A run has no weights of its own: its checkpoints are read.
        is_workdir = "://" in str(path) or (Path(path) / CHECKPOINTS_FOLDER).is_dir()
        folder = path if is_workdir else hub.find_folder(str(path), hub.Requirement(flag))
        return cls.from_workdir(folder, text_path=text_path, mesh=mesh)

    def save_pretrained(self, folder: str | Path, *, dtype: Any = np.float16) -> None:
        """Writes model.safetensors and config.json, which `from_pretrained` reads.

        Raises:
          UserError: the folder holds something else or cannot be written, or a value does not fit the dtype.
        """
        w_avg = np.zeros(self.config.generator.w_dim, np.float32)
        weights.save_weights(
            Path(folder), self.config, self.params, w_avg, step=self.step, identities=self.identities, dtype=dtype
        )

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        # Once, and not for each image: that of a frozen encoder is read from its files.
        text = self.config.used_text
        return make_tokenizer(text.encoder, text.length, **tokenizer_options(text))

    @property
    def factor(self) -> int:
        """Output pixels per input pixel of one pass."""
        return self.config.resolution // self.config.upsampler.input_resolution

    def check_noise(self, noise: float) -> None:
        """Raises UserError where a level of noise augmentation is none that the model was trained for."""
        if not isinstance(noise, numbers.Real) or not 0 <= noise <= 1:
            raise UserError(f"noise {noise}: must be 0 (none) to 1 (nothing but noise)")
        if noise > self.config.upsampler.noise:
            raise UserError(f"noise {noise}: this model was trained with noise up to {self.config.upsampler.noise:g}")

    def tile_model(
        self, *, prompt: str = "", label: int | str | None = None, seed: int = 0, noise: float = 0.0
    ) -> "NetworkTiles":
        """The network for one image: one z, prompt and noise level for all its tiles.

        Args:
          prompt: for a text-conditional model.
          label: number of the class, or its name or number as text, for a class-conditional model.
          seed: 0 to 2^32 - 1, of z and of the noise.
          noise: level of noise augmentation, 0 to 1; what the network was trained for is config.upsampler.noise.

        Raises:
          UserError: a value out of range, or a prompt or class that the model does not take.
        """
        c = self.config
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
            raise UserError(f"seed {seed}: must be 0 to {2**32 - 1}")
        self.check_noise(noise)
        if prompt and c.condition != "text":
            raise UserError(f"a prompt was given, and {c.name} was trained without captions: leave it out")
        if label is not None and c.condition != "class":
            raise UserError(f"a class was given, and {c.name} was trained without classes: leave it out")
        if isinstance(label, str):
            label = class_label(c, label)
        if c.condition == "class" and (label is None or not 0 <= label < c.class_count):
            raise UserError(f"class {label}: {c.name} is class-conditional, give a number 0 to {c.class_count - 1}")
        inputs = {
            "tokens": np.asarray(self._tokenizer([prompt])),
            "label": np.asarray([-1 if label is None else label], np.int32),
            "seed": np.asarray([seed], np.uint32),
            "noise": np.asarray([noise], np.float32),
        }
        return NetworkTiles(self, self._prepare(self.params, self._frozen, inputs), noise, seed)

    def __call__(
        self,
        image: Any,
        scale: float | None = None,
        *,
        prompt: str = "",
        label: int | str | None = None,
        seed: int = 0,
        noise: float = 0.0,
        tile: int | str = 0,
        wrap: bool = False,
        color_match: bool = False,
    ) -> Any:
        """A larger image.

        Args:
          image: a PIL image of any mode with 8 or 16 bits a channel, or an array of uint8 or uint16
            [H, W, C] with 1 to 4 channels, the last of 2 or 4 being alpha.
          scale: output pixels per input pixel on each axis; None for the network's factor.
          prompt, label, seed, noise: as `tile_model` takes them.
          tile: input pixels a tile; 0 or "auto" chooses.
          wrap: the image is a texture that repeats in both directions.
          color_match: give the result the input's mean and deviation per channel.

        Returns:
          an array of the input's dtype and channels; or a PIL image of mode L, LA, RGB, RGBA or I;16, upright, with the
          colour profile where the colours were not converted.

        Raises:
          UserError: no image, a value out of range, or too little memory on the device.
        """
        if scale is not None and (not isinstance(scale, numbers.Real) or not 1 <= scale <= MAX_SCALE):
            raise UserError(f"scale {scale}: must be a number, 1 to {MAX_SCALE:g}")
        tile = 0 if tile == "auto" else tile
        if not isinstance(tile, numbers.Integral) or tile < 0:
            raise UserError(f"tile {tile}: must be 'auto', 0 or a number of pixels")
        picture = read_picture(image) if isinstance(image, Image.Image) else None
        pixels = _check_pixels(image) if picture is None else picture.pixels
        tiling = Tiling(self.tile_model(prompt=prompt, label=label, seed=seed, noise=noise), int(tile), wrap)
        try:
            large = upscale_array(tiling, pixels, Settings(None if scale is None else float(scale), color_match))
        except FloatingPointError as error:
            raise UserError(f"the model's image is broken ({error}): has its training diverged?") from None
        except MemoryError:
            raise UserError(f"this machine has no memory for {list(pixels.shape)} at scale {scale}") from None
        if picture is not None:
            return _make_picture(large, picture.icc)
        return large.reshape(*large.shape[:2], *image.shape[2:]).astype(image.dtype, copy=False)

    def enlarge(
        self, images: np.ndarray, prompts: Sequence[str], seeds: Sequence[int], noise: float = 0.0
    ) -> np.ndarray:
        """The second stage of text to image: each image alone, by its own prompt and seed.

        Args:
          images: uint8 [N, R, R, 3].
          prompts: one an image, as the base model had them; names or numbers of classes for a class-conditional
            upsampler. One without a condition does not read them.
          seeds: one an image.
          noise: level of noise augmentation; moderate noise hides what a base model's images have and real ones have not.

        Returns:
          uint8 [N, R * factor, R * factor, 3]
        """
        condition, large = self.config.condition, []
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            said: dict[str, Any] = {"prompt": prompt} if condition == "text" else {}
            if condition == "class":
                said = {"label": prompt}
            large.append(self(image, seed=seed, noise=noise, **said))
        return np.stack(large)

    def _map_latent(self, params: Params, frozen: Params, inputs: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        """(w [1, w_dim], condition) of a prompt and a seed"""
        with sharding.use_mesh(self.mesh, dict(self.config.rules) | {"batch": ""}):
            network = self.module.bind(params)
            said = self.frozen.encode_captions(frozen, inputs["tokens"]) if self.frozen.towers else {}
            condition = network.condition(inputs["tokens"], inputs["label"], said.get("features"))
            z = z_of_seed(inputs["seed"], self.config.generator.z_dim)
            return network.map(z, condition, inputs["noise"]), condition

    def _synthesize(self, params: Params, latent: Any, low: jax.Array, *, rules: Any = None) -> jax.Array:
        """low float32 [N, h, w, 3] -> float32 [N, h * factor, w * factor, 3]"""
        with sharding.use_mesh(self.mesh, rules or self.config.rules):
            low = sharding.constrain(low, "batch", "height", None, None)
            # One w for all tiles of an image: kernels are mixed once.
            w, condition = latent
            condition = jax.tree.map(lambda x: jnp.broadcast_to(x, (low.shape[0], *x.shape[1:])), condition)
            image = self.module.bind(params).synthesize(w, condition, low)[-1]
            return sharding.constrain(image, "batch", "height", None, None)

    def _abstract_w_avg(self) -> jax.ShapeDtypeStruct:
        where = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((self.config.generator.w_dim,), jnp.float32, sharding=where)


@dataclasses.dataclass
class NetworkTiles:
    """An upsampler that is ready for the tiles of one image (tiling.TileModel).

    Attributes:
      upscaler: the network and its weights.
      latent: (w, condition) of the image.
      noise: level of noise augmentation.
      seed: of the noise.
    """

    upscaler: Upscaler
    latent: Any
    noise: float
    seed: int

    @property
    def factor(self) -> int:
        """Output pixels per input pixel."""
        return self.upscaler.factor

    @property
    def multiple(self) -> int:
        """Tile origins and sizes are multiples of so many input pixels."""
        c = self.upscaler.config
        return grid_of(c.upsampler, c.generator)

    @property
    def blends(self) -> bool:
        """Attention over whole maps: tiles see different surroundings, and are cross-faded."""
        g = self.upscaler.config.generator
        return any(g.attention_depth) and not g.attention.window

    @property
    def halo(self) -> int:
        """Input pixels around a pixel that its output depends on; of whole-map attention, the overlap."""
        c = self.upscaler.config
        return max(16, c.upsampler.input_resolution // 4) if self.blends else context_radius(c.upsampler, c.generator)

    @property
    def batch(self) -> int:
        """Tiles that are run at once."""
        return sharding.batch_shards(self.upscaler.mesh, self.upscaler.config.rules)

    def __call__(self, low: np.ndarray) -> np.ndarray:
        """float32 [N, h, w, 3] in [-1, 1] -> float32 [N, h * factor, w * factor, 3]"""
        u = self.upscaler
        # One image alone is cut into strips of whole strides, where its height allows.
        alone = low.shape[0] == 1 and self.batch > 1 and low.shape[1] % (self.batch * self.multiple) == 0
        run = u._whole if alone else u._tiles
        if not alone and low.shape[0] % self.batch:
            rows = np.concatenate([low, np.repeat(low[-1:], -low.shape[0] % self.batch, axis=0)])
            return np.asarray(run(u.params, self.latent, rows))[: low.shape[0]]
        return np.asarray(run(u.params, self.latent, low))


def _check_pixels(image: Any) -> np.ndarray:
    """uint8 or uint16 [H, W, C] in the byte order of this machine. Raises UserError for anything else."""
    if not isinstance(image, np.ndarray):
        raise UserError(f"{type(image).__name__} is no image: give a PIL image or a NumPy array")
    pixels = image[:, :, None] if image.ndim == 2 else image
    dtype = pixels.dtype.newbyteorder("=")
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or dtype not in (np.uint8, np.uint16):
        raise UserError(f"an image of {pixels.dtype} {list(pixels.shape)}: must be uint8 or uint16 [H, W, C], C 1 to 4")
    if not pixels.size:
        raise UserError(f"an image of {list(pixels.shape)} has no pixels")
    return pixels.astype(dtype, copy=False)


def _make_picture(pixels: np.ndarray, icc: bytes | None) -> Image.Image:
    """A PIL image of uint8 or uint16 [H, W, C]."""
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        # Pillow has 16 bits for grey alone.
        pixels = np.rint(pixels / 257).astype(np.uint8)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if icc:
        picture.info["icc_profile"] = icc
    return picture
