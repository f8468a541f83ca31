"""From prompts to images by a trained model: load once, call many times.

model = TextToImage.from_pretrained("docs/weights/digits")     # or from_workdir("runs/digits")
images = model("a handwritten seven", seed=3)     # uint8 [1, R, R, 3]
images = model(["dog", "207"])                    # of a model of classes: names or numbers
images = model(16)                                # of a model without a condition
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gigagan_jax.checkpoint.consistency import check_same_frozen
from gigagan_jax.checkpoint.manager import Checkpoints
from gigagan_jax.checkpoint.run_folder import Place, RunFolder
from gigagan_jax.config import Config, MeshConfig, needs_prompts, with_fields
from gigagan_jax.core.errors import UserError
from gigagan_jax.inference.sampler import Sampler
from gigagan_jax.interop import weights
from gigagan_jax.models.network import Params
from gigagan_jax.models.pretrained import hub
from gigagan_jax.parallel import sharding


class TextToImage:
    """A generator with its weights.

    Args:
      sampler: runs the generator.
      params: of G, usually its moving average.
      w_avg: [w_dim], moving average of w, for truncation.
      step: of the checkpoint that the weights come from.

    Attributes:
      config: of the run.
    """

    def __init__(self, sampler: Sampler, params: Params, w_avg: jax.Array, step: int):
        self.sampler, self.params, self.w_avg, self.step = sampler, params, w_avg, step

    @property
    def config(self) -> Config:
        return self.sampler.config

    @classmethod
    def from_workdir(
        cls,
        workdir: Place,
        *,
        step: int | None = None,
        text_path: str | None = None,
        device_batch: int = 8,
        check: Callable[[Config], object] | None = None,
    ) -> "TextToImage":
        """A checkpoint of a training run, or published weights (interop/weights.py), on all devices here.

        Args:
          workdir: of the run, on a disk, at gs:// or s3://, or a folder with model.safetensors and config.json.
          step: of the checkpoint; None for the newest intact one.
          text_path: folder or hub id of the frozen text encoder, where it moved since training.
          device_batch: images a device makes at once.
          check: called with the config before the weights are read; it may raise.

        Raises:
          UserError: no finished checkpoint, none of this step, a damaged one, or another text encoder than the model was
            trained with.
        """

        # Devices share the images, whatever mesh the model was trained on.
        def make_sampler(config: Config) -> Sampler:
            # The sampler refuses an upsampler, whatever its prompts.
            if check is not None and not config.is_upsampler:
                check(config)
            config = config if text_path is None else with_fields(config, {"text.path": text_path})
            return Sampler(config, sharding.make_mesh(MeshConfig()), device_batch=device_batch)

        place = RunFolder.open(workdir)
        place.download_settings()
        folder = place.folder
        if weights.has_weights(folder):
            sampler = make_sampler(weights.read_config(folder, text_path))
            read = weights.read_weights(folder, sampler.module, sampler.shardings, sampler.abstract_w_avg())
            check_same_frozen(read.identities, sampler.identities, str(place))
            if step not in (None, read.step):
                raise UserError(
                    f"{place} holds published weights of step {read.step}: steps are of the workdir of a training run; leave "
                    "the step out"
                )
            return cls(sampler, read.params, read.w_avg, read.step)
        checkpoints = Checkpoints(place)
        step = checkpoints.require_valid_step() if step is None else checkpoints.require_step(step)
        sampler = make_sampler(checkpoints.read_config(step))
        checkpoints.check_frozen(step, sampler.identities)
        # Of the state only what sampling needs: not D, nor the optimizers.
        wanted = {"g_ema": sampler.abstract_params(), "w_avg": sampler.abstract_w_avg()}
        state = checkpoints.restore_partial(step, wanted)
        return cls(sampler, state["g_ema"], state["w_avg"], step)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, text_path: str | None = None, device_batch: int = 8) -> "TextToImage":
        """Published weights (interop/weights.py) in a folder or on the Hugging Face hub.

        Args:
          path: folder with model.safetensors and config.json, or a hub id, `org/name` or `org/name@revision`.
          text_path, device_batch: as `from_workdir` takes them.

        Raises:
          UserError: there is no such folder and no such model, or its weights are damaged.
        """
        folder = hub.find_folder(str(path), hub.Requirement("from_pretrained"))
        return cls.from_workdir(folder, text_path=text_path, device_batch=device_batch)

    def save_pretrained(self, folder: str | Path, *, dtype: Any = np.float16) -> None:
        """Writes model.safetensors and config.json, which `from_pretrained` reads.

        Args:
          folder: made where it is missing.
          dtype: of the tensors.

        Raises:
          UserError: the folder holds something else or cannot be written, or a value does not fit the dtype.
        """
        weights.save_weights(
            Path(folder),
            self.config,
            self.params,
            self.w_avg,
            step=self.step,
            identities=self.sampler.identities,
            dtype=dtype,
        )

    def __call__(
        self,
        prompts: str | Sequence[str] | int,
        seeds: Sequence[int] | None = None,
        *,
        seed: int = 0,
        truncation: float = 1.0,
        global_truncation: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Images of prompts.

        Args:
          prompts: one an image, or one for one image; names or numbers of classes for a class-conditional model. A model
            without a condition takes the number of images.
          seeds: one an image, 0 to 2^32 - 1; None for seed, seed + 1, ...
          seed: of the first image, without `seeds`.
          truncation: 0 (the mean w of a prompt) to 1 (all variety), and up to 2, which exaggerates.
          global_truncation: the same from the mean w of all prompts; the paper's psi is both.
          progress: called with (images done, images in all).

        Returns:
          uint8 [N, R, R, 3]

        Raises:
          UserError: a seed or truncation out of range, a prompt that is no class of a class-conditional model, a number of
            images where prompts are needed.
        """
        if isinstance(prompts, int):
            if needs_prompts(self.config):
                raise UserError(f"{prompts} images of what? {self.config.name} takes prompts: give one an image")
            # A model without a condition does not read them.
            prompts = [""] * prompts
        prompts = [prompts] if isinstance(prompts, str) else prompts
        seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
        return self.sampler(
            self.params,
            self.w_avg,
            prompts,
            seeds,
            truncation=truncation,
            global_truncation=global_truncation,
            progress=progress,
        )

    def batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        truncation: float = 1.0,
        global_truncation: float = 1.0,
        full: bool = False,
    ) -> Iterator[np.ndarray]:
        """Images of many prompts, a batch at a time: see `Sampler.batches`.

        Yields:
          uint8 [n, R, R, 3]
        """
        return self.sampler.batches(
            self.params,
            self.w_avg,
            prompts,
            seeds,
            truncation=truncation,
            global_truncation=global_truncation,
            full=full,
        )
