"""Finds the files of a frozen network in the layouts that people have on their disks.

Besides the folders of transformers (hub.py): a pipeline of diffusers, a variant such as model.fp16.safetensors, open_clip's
names, and a single safetensors file. A path that can mean two networks is an error that names both.
"""

import dataclasses
import re
from pathlib import Path

from gigagan_jax.core.errors import UserError
from gigagan_jax.models.pretrained import hub
from gigagan_jax.models.pretrained.hub import CONFIG, INDEX, OPEN_CLIP_CONFIG, OPEN_CLIP_SINGLE, SINGLE, Requirement

# model.fp16.safetensors, or the index of its shards as diffusers names it.
_VARIANT = re.compile(r"model\.(?:\w+\.safetensors|safetensors\.index\.\w+\.json)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# model_type of config.json -> the kind of network
_KINDS = {"clip": "clip", "clip_text_model": "clip", "t5": "t5", "mt5": "t5", "umt5": "t5"}
# Tokens of OpenAI's CLIP; OpenCLIP's models have the same.
_CLIP_VOCABULARY = 49408
_CLIP_TOKENIZERS = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16")


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """The files of one network.

    folder: holds the weights
    weights: a safetensors file, or the index of its shards
    config: config.json or open_clip_config.json; None where the sizes follow from the weights alone
    """

    folder: Path
    weights: Path
    config: Path | None


def find_network(path: str, need: Requirement, kind: str) -> NetworkFiles:
    """The files of a network.

    Args:
      path: folder, safetensors file or hub id.
      need: use of the network, for the error message.
      kind: "clip", "t5" or "dino": of a pipeline's encoders, and whether a network may lack its config.json.

    Raises:
      UserError: there is no such network, no safetensors file of it, or more than one.
    """
    place, local = hub.locate(path, need)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise hub.file_error(path, place, need)
        # The file decides: other networks may lie beside it, as in the folders of ComfyUI.
        folder, weights = place.parent, place
    else:
        folder = _encoder_of_pipeline(path, place, need, kind)
        found = _find_weights(path, folder, need)
        if found is None:
            raise hub.weights_error(path, folder, need, local)
        weights = found
    config = _find_config(folder)
    # Sizes follow from the shapes of a CLIP's tensors alone.
    if config is None and (kind != "clip" or weights.suffix == ".json"):
        raise hub.config_error(path, folder, need, local)
    return NetworkFiles(folder, weights, config)


def _encoder_of_pipeline(path: str, folder: Path, need: Requirement, kind: str) -> Path:
    """The text encoder in a pipeline of diffusers; the folder itself where it is none."""
    encoders = sorted(f.parent for f in folder.glob(f"text_encoder*/{CONFIG}"))
    # Weights at the top are what a folder is about, whatever lies below.
    if not encoders or (folder / SINGLE).exists() or (folder / INDEX).exists():
        return folder
    # The config.json of each tells its kind; pipelines differ in their order.
    kinds = {f: _KINDS.get(str(hub.read_json(f / CONFIG).get("model_type"))) for f in encoders}
    fitting = [f for f in encoders if kinds[f] == kind]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(f.name for f in (fitting or encoders))
    if fitting:
        raise UserError(f"{need.field}={path} is a pipeline with {names}: give one of them, as {fitting[0]}")
    raise UserError(f"{need.field}={path} is a pipeline, and none of its {names} is a network of the kind {kind!r}")


def _find_weights(path: str, folder: Path, need: Requirement) -> Path | None:
    for name in (SINGLE, INDEX):
        if (folder / name).exists():
            return folder / name
    variants = sorted(f for f in folder.iterdir() if _VARIANT.fullmatch(f.name))
    # open_clip's file comes before others, as transformers' do.
    others = [folder / OPEN_CLIP_SINGLE] if (folder / OPEN_CLIP_SINGLE).exists() else []
    found = variants or others or sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and not _SHARD.search(found[0].name):
        return found[0]
    if not found:
        return None
    names = ", ".join(f.name for f in found[:4]) + ", ..." * (len(found) > 4)
    if all(_SHARD.search(f.name) for f in found):
        raise UserError(f"{need.field}={path}: {names} are shards without their index {INDEX}; fetch it")
    raise UserError(f"{need.field}={path} holds {names}: give the file that is meant, as {found[0]}")


def _find_config(folder: Path) -> Path | None:
    config, open_clip = folder / CONFIG, folder / OPEN_CLIP_CONFIG
    # Folders of open_clip may hold a config.json that only counts downloads.
    if config.exists() and not (open_clip.exists() and "model_type" not in hub.read_json(config)):
        return config
    return open_clip if open_clip.exists() else None


def find_tokenizer(files: NetworkFiles, vocab_size: int, kind: str) -> Path:
    """The folder with the tokenizer's files of a network; the network's own where there are none.

    Beside the weights, in tokenizer/ there, in tokenizer*/ beside text_encoder*/, in a folder with the name of a single file, or,
    for CLIP's usual vocabulary, in the hub's cache.
    """
    folder = files.folder
    places = [folder, folder / "tokenizer", folder / files.weights.stem]
    # text_encoder_2 of a pipeline reads the tokens of tokenizer_2.
    if folder.name.startswith("text_encoder"):
        places.insert(0, folder.with_name(folder.name.replace("text_encoder", "tokenizer")))
    for place in places:
        if any((place / name).exists() for name in _TOKENIZER_FILES):
            return place
    if kind == "clip" and vocab_size == _CLIP_VOCABULARY:
        for name in _CLIP_TOKENIZERS:
            cached = hub.find_cached_tokenizer(name)
            if cached is not None:
                return cached
    return folder
