"""A checkpoint as a folder of safetensors with config.json and a model card; for PyTorch, with the torch files too."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigagan_jax.config import Config, to_dict
from gigagan_jax.config.migrations import with_format
from gigagan_jax.core.errors import UserError
from gigagan_jax.core.files import new_folder
from gigagan_jax.interop import model_card
from gigagan_jax.interop.checkpoint_arrays import Arrays, Original, state_networks
from gigagan_jax.interop.safetensors_stream import SHARD_BYTES, Tensor, write_tensors
from gigagan_jax.interop.tensor_names import TENSOR_NAMES, TensorNames
from gigagan_jax.interop.weights import without_places
from gigagan_jax.models.network import Network
from gigagan_jax.models.pretrained.hub import is_hub_id
from gigagan_jax.models.pretrained.text_encoder import text_spec

TORCH_FILES = tuple(Path(__file__).with_name(name) for name in ("torch_gigagan.py", "torch_training.py"))
CONFIG_FILE, TRAINING_FOLDER, TRAINING_FILE = "config.json", "training", "training.json"
# What can be converted: the average of G, which samples; the networks of training; the moments of their optimizers.
CHOICES = ("average", "training", "optimizer")
W_AVG = "w_avg"


@dataclasses.dataclass(frozen=True)
class File:
    """One file of the folder, or its shards.

    Attributes:
      name: under the folder.
      tensors: what it holds, in their order.
      read: gives them.
    """

    name: str
    tensors: list[Tensor]
    read: Callable[[], Iterator[tuple[str, np.ndarray]]]


def plan_files(original: Original, choices: Sequence[str], names: TensorNames) -> list[File]:
    """The files of a converted checkpoint.

    Args:
      original: what is converted.
      choices: of CHOICES.
      names: of the tensors.
    """
    arrays, config = original.arrays, original.config
    networks = state_networks(config)
    files = []
    if "average" in choices:
        files.append(_network_file("model.safetensors", arrays, config, networks["g"], "g", "average", names))
    for name, network in networks.items():
        if "training" in choices:
            file = f"{TRAINING_FOLDER}/{network.name}.safetensors"
            files.append(_network_file(file, arrays, config, network, name, "params", names))
        if "optimizer" in choices:
            files.append(_optimizer_file(arrays, config, network, name, names))
    return files


def _network_file(
    file: str, arrays: Arrays, config: Config, network: Network, name: str, part: str, names: TensorNames
) -> File:
    tensors = [Tensor(key, shape) for key, shape in names.shapes(network, config)]
    read = lambda: names.write(network, config, arrays.read(network, name, part))
    if name != "g":
        return File(file, tensors, read)
    width = (config.generator.w_dim,)

    def with_w_avg() -> Iterator[tuple[str, np.ndarray]]:
        yield W_AVG, arrays.read_array(W_AVG, width)
        yield from read()

    return File(file, [Tensor(W_AVG, width), *tensors], with_w_avg)


def _optimizer_file(arrays: Arrays, config: Config, network: Network, name: str, names: TensorNames) -> File:
    kinds = names.moments_of(config, name)
    shapes = list(names.shapes(network, config))
    tensors = [Tensor(f"{kind}.{key}", shape) for kind in kinds.values() for key, shape in shapes]

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for part, kind in kinds.items():
            for key, array in names.write(network, config, arrays.read(network, name, part)):
                yield f"{kind}.{key}", array

    return File(f"{TRAINING_FOLDER}/{network.name}_optimizer.safetensors", tensors, read)


def torch_config(config: Config) -> dict[str, Any]:
    """config.json of the folder: the run's config without places of its machine, and the sizes of a frozen text encoder.

    A frozen network that has a hub id keeps it.

    Raises:
      UserError: the text encoder's config is not to be found.
    """
    values = without_places(with_format(to_dict(config)), keep=is_hub_id)
    if config.condition == "text" and not config.text.is_trained:
        spec = text_spec(config.text)
        values["text"] = values["text"] | {"end_id": spec.end_id, "encoder_width": spec.width}
    # Tuples are lists in JSON: what is written is what a reader gets.
    return json.loads(json.dumps(values))


def write_folder(
    out: Path,
    original: Original,
    choices: Sequence[str],
    form: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Path], str] | None = None,
) -> list[str]:
    """Converts a checkpoint; the folder gets its name when all of it is written and checked.

    Args:
      out: folder that is not there yet.
      original: what is converted.
      choices: of CHOICES.
      form: of TENSOR_NAMES.
      shard_bytes: most of one file.
      progress: called with (bytes done, bytes in all).
      check: called with the folder before it gets its name; its text is part of the model card.

    Returns:
      names of the files that were written

    Raises:
      UserError: the folder exists or cannot be written, or the checkpoint cannot be read.
    """
    if original.read_counts is None and list(choices) != ["average"]:
        raise UserError(f"--what={choices[-1]}: published weights hold the average of G alone")
    config, step = original.config, original.step
    with new_folder(out) as part:
        files = plan_files(original, choices, TENSOR_NAMES[form])
        total, done = sum(t.size for file in files for t in file.tensors), 0
        for file in files:
            place = part / file.name
            place.parent.mkdir(exist_ok=True)
            metadata = {"format": "pt", "step": str(step), "model": config.name, "frozen": json.dumps(original.frozen)}
            written = write_tensors(
                place.parent, file.tensors, file.read(), name=place.name, metadata=metadata, shard_bytes=shard_bytes
            )
            for size in written:
                done += size
                if progress is not None:
                    progress(done, total)
        (part / CONFIG_FILE).write_text(json.dumps(torch_config(config), indent=1) + "\n")
        if original.read_counts is not None and {"training", "optimizer"} & set(choices):
            (part / TRAINING_FOLDER / TRAINING_FILE).write_text(json.dumps(original.read_counts(), indent=1) + "\n")
        for source in TORCH_FILES if form == "pytorch" else ():
            shutil.copyfile(source, part / source.name)
        verdict = "" if check is None else check(part)
        shards = not (part / "model.safetensors").exists()
        (part / "README.md").write_text(model_card.write(config, step, choices, form, verdict, shards))
    return sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
