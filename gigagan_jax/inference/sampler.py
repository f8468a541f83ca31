"""Runs a generator on prompts and seeds, whatever weights it is given."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gigagan_jax.checkpoint.manager import with_shardings
from gigagan_jax.config import Config, class_labels
from gigagan_jax.core.errors import UserError
from gigagan_jax.data.tokenizers import make_tokenizer
from gigagan_jax.inference.images import to_uint8
from gigagan_jax.inference.latents import MAX_TRUNCATION, truncate_w, z_of_seed
from gigagan_jax.models.build import build_generator
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained.frozen import FrozenNetworks
from gigagan_jax.models.pretrained.text_encoder import tokenizer_options
from gigagan_jax.parallel import sharding


class Sampler:
    """Images of prompts by a generator, whose weights are given with each call.

    There are two programs: of one image a device, for requests that it suffices for, and of `device_batch`. Short requests
    are filled up, so that within a program a prompt and a seed give the same image in any request. The images of the two
    programs may differ by rounding, by one level of 255.

    Args:
      config: the run's config.
      mesh: devices to sample on.
      device_batch: images a device makes at once.
      frozen: gives the parameters of networks that are loaded elsewhere, called when they are first needed; where the text
        encoder is not among them, it is loaded then. See models/pretrained/frozen.py.

    Attributes:
      identities: of the frozen networks that were loaded here.

    Raises:
      UserError: the config is of an upsampler, or the frozen text encoder is missing or damaged.
    """

    def __init__(self, config: Config, mesh: Any, *, device_batch: int = 8, frozen: Callable[[], Params] | None = None):
        if config.is_upsampler:
            raise UserError(
                f"{config.name} is an upsampler: it enlarges images, by python -m gigagan_jax.upscale or as --upsampler of a "
                "base model's samples"
            )
        self.config, self.mesh = config, mesh
        self.module = build_generator(config)
        # Images of the two programs, on all devices together; each is compiled once.
        self.fewest = sharding.batch_shards(mesh, config.rules)
        self.batch = device_batch * self.fewest
        text = config.used_text
        self.tokenizer = make_tokenizer(text.encoder, text.length, **tokenizer_options(text))
        self.frozen = FrozenNetworks(config, roles=("text",))
        self.identities: dict[str, str] = {}
        self._loaded = frozen
        if frozen is None:
            self._frozen, self.identities = self.frozen.load(mesh)
        self.shardings = self.module.shardings(mesh, config.rules)
        rules = config.rules
        row = lambda *shape: NamedSharding(
            mesh, sharding.partition_spec(("batch", *(None,) * len(shape)), (self.batch, *shape), mesh, rules, "prompt")
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        # Rows of a batch are shared between devices; weights lie as in training.
        self._inputs = {"tokens": row(config.text.length), "label": row(), "seed": row()}
        self._run = jax.jit(
            self._generate,
            in_shardings=(self.shardings, everywhere, self._inputs, everywhere, self.frozen.shardings(mesh)),
            out_shardings=row(config.resolution, config.resolution, 3),
        )

    @functools.cached_property
    def _frozen(self) -> Params:
        loaded = self._loaded() if self._loaded is not None else {}
        # A run has loaded the text encoder already: it is not loaded twice.
        mine = {k: params for k, params in loaded.items() if k in self.frozen.towers}
        return mine if mine.keys() == self.frozen.towers.keys() else self.frozen.load(self.mesh)[0]

    def _generate(
        self, params: Params, w_avg: jax.Array, batch: dict[str, jax.Array], truncations: jax.Array, frozen: Params
    ) -> jax.Array:
        with sharding.use_mesh(self.mesh, self.config.rules):
            generator = self.module.bind(params)
            z_dim = self.config.generator.z_dim
            said = self.frozen.encode_captions(frozen, batch["tokens"]) if self.frozen.towers else {}
            condition = generator.condition(batch["tokens"], batch["label"], said.get("features"))
            w = generator.map(z_of_seed(batch["seed"], z_dim), condition)
            w = truncate_w(generator, w, condition, w_avg, truncations[0], truncations[1], z_dim)
            return generator.synthesize(w, condition)[-1]

    def __call__(
        self,
        params: Params,
        w_avg: jax.Array,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        truncation: float = 1.0,
        global_truncation: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Images of prompts.

        Args:
          params: of G, e.g. the moving average of a checkpoint.
          w_avg: [w_dim] of the same checkpoint.
          prompts: one an image; names or numbers of classes for a class-conditional model; not read by an unconditional one.
          seeds: one an image, 0 to 2^32 - 1.
          truncation: 0 (the mean w of a prompt) to 1 (all variety), and up to `MAX_TRUNCATION`, which exaggerates.
          global_truncation: the same from the mean w of all prompts; the paper's psi is both.
          progress: called with (images done, images in all).

        Returns:
          uint8 [N, R, R, 3]

        Raises:
          UserError: a seed or truncation out of range, a prompt that is no class of a class-conditional model.
        """
        images, done = [], 0
        for part in self.batches(
            params, w_avg, prompts, seeds, truncation=truncation, global_truncation=global_truncation
        ):
            images.append(part)
            done += len(part)
            if progress is not None:
                progress(done, len(prompts))
        return np.concatenate(images) if images else np.zeros((0, *(self.config.resolution,) * 2, 3), np.uint8)

    def batches(
        self,
        params: Params,
        w_avg: jax.Array,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        truncation: float = 1.0,
        global_truncation: float = 1.0,
        full: bool = False,
    ) -> Iterator[np.ndarray]:
        """The images of a call, a batch at a time. While one batch is used, the devices make the next one.

        Args:
          params, w_avg, prompts, seeds, truncation, global_truncation: as a call takes them. Sequences may be lazy.
          full: use the program of full batches also for few images, which are then the same as among many.

        Yields:
          uint8 [n, R, R, 3], in the order of the prompts

        Raises:
          UserError: as a call does, before the first batch but for broken images.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
        # Here, and not in the generator below, which runs when the first batch is asked for.
        check_truncation("truncation", truncation)
        check_truncation("global_truncation", global_truncation)
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"seed {seed}: must be 0 to {2**32 - 1}")
        truncations = np.array([truncation, global_truncation], np.float32)
        # Given with each call: the weights of a run change.
        params = jax.device_put(params, self.shardings)  # a running average may be cut further than its parameters
        size = self.fewest if len(prompts) <= self.fewest and not full else self.batch
        # All of them at once: a wrong class among many costs no images.
        labels = self.labels(prompts)

        # Tokens are made a batch at a time: those of 30,000 prompts would fill the memory of a small machine.
        def start_batch(start: int) -> tuple[jax.Array, int]:
            count = min(size, len(prompts) - start)
            # The last batch is filled up with its last row, and the surplus dropped.
            rows = [start + min(i, count - 1) for i in range(size)]
            columns = {
                "tokens": self.tokenizer([prompts[row] for row in rows]),
                "label": labels[rows],
                "seed": np.asarray([seeds[row] for row in rows], np.uint32),
            }
            put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
            batch = {k: put(x, self._inputs[k]) for k, x in columns.items()}
            return self._run(params, w_avg, batch, truncations, self._frozen), count

        def run_all() -> Iterator[np.ndarray]:
            # One batch is under way while the one before it is taken from the devices and used.
            running = None
            for start in range(0, len(prompts), size):
                started = start_batch(start)
                if running is not None:
                    yield _take_images(*running)
                running = started
            if running is not None:
                yield _take_images(*running)

        return run_all()

    def labels(self, prompts: Sequence[str]) -> np.ndarray:
        """Class labels, int32 [N]; -1 for a model without classes. Raises UserError for a prompt that is no class."""
        if self.config.condition != "class":
            return np.full(len(prompts), -1, np.int32)
        return np.asarray(class_labels(self.config, prompts), np.int32)

    def abstract_params(self) -> Params:
        """ShapeDtypeStructs with shardings, to restore weights into."""
        return with_shardings(self.module.abstract(), self.shardings)

    def abstract_w_avg(self) -> jax.ShapeDtypeStruct:
        """The same for w_avg."""
        where = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((self.config.generator.w_dim,), jnp.float32, sharding=where)


def _take_images(x: jax.Array, count: int) -> np.ndarray:
    """The first images of a batch, uint8."""
    try:
        # Values that are not finite raise here: they come of a diverged training, not of the prompt.
        return to_uint8(gather_images(x))[:count]
    except ValueError as e:
        raise UserError(f"the model's images are broken ({e}): has its training diverged?") from None


def check_truncation(name: str, value: float) -> None:
    """Raises UserError for a truncation that is out of range or no number; `name` is what the message calls it."""
    if not 0.0 <= value <= MAX_TRUNCATION:
        raise UserError(
            f"{name} {value:g}: must be 0 (one mean image) to 1 (all variety), or up to {MAX_TRUNCATION:g} to exaggerate"
        )


def gather_images(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def prompts_and_seeds(prompts: Sequence[str], num: int, seed: int) -> tuple[list[str], list[int]]:
    """`num` images of each prompt, with seeds seed, seed + 1, ... the same for every prompt."""
    return [p for p in prompts for _ in range(num)], [(seed + i) % 2**32 for _ in prompts for i in range(num)]
