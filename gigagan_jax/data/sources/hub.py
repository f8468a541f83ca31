"""Source of data sets of the Hugging Face hub, by their id. The package `datasets` (extra `hub`) downloads and prepares them."""

import os
import re
from typing import Any

import numpy as np

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.sources.arrow import ArrowSource
from gigagan_jax.data.sources.arrow_files import ArrowFiles, choose_split
from gigagan_jax.data.sources.table import first_line

_PREFIX = "hf://datasets/"
# ORG/NAME, with the configuration behind a colon and the revision behind an @.
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.+-]+))?(?:@([\w./-]+))?")


class HubSource(ArrowSource):
    """A split of a data set of the hub, read from the Arrow files that `datasets` prepares in its cache.

    Args:
      path: "org/name" or "hf://datasets/org/name", then optionally ":CONFIGURATION" and "@REVISION"; or a local folder
        that `datasets.load_dataset` reads.
      split: one of its splits, or a part in the notation of `datasets`: "train[:10%]", "train+test".
      image_key, caption_keys, label_key, caption_required: as for `ArrowSource`.

    Raises:
      UserError: the package is missing, the id is unknown or gated, the hub does not answer and the data set is not in
        the cache, or as `ArrowSource`.
    """

    def __init__(self, path: str, *, split: str = "train", **columns: Any):
        files, rows = _prepare(path, split)
        super().__init__(path, split=split, files=files, rows=rows, **columns)


def _prepare(path: str, split: str) -> tuple[ArrowFiles, np.ndarray | None]:
    """Downloads a data set unless the cache has it, and returns its files and the rows of the split."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: data sets of the hub need the package datasets: pip install -e '.[hub]'; or download it (hf download "
            "--repo-type=dataset) and set config.data.path to the folder"
        ) from None
    name, configuration, revision = _parse_id(path)
    try:
        # All splits: `datasets` prepares them together anyway.
        prepared = datasets.load_dataset(name, configuration, revision=revision)
    # Every layer of the package has exceptions of its own.
    except Exception as error:
        raise _explain_failure(datasets, path, error) from None
    files = {str(s): [entry["filename"] for entry in table.cache_files] for s, table in prepared.items()}
    if not re.search(r"[\[+]", split):
        chosen = choose_split(list(files), split, path)
        return ArrowFiles(tuple(files[chosen]), split=chosen, splits=tuple(files)), None
    # Slices and sums, as percentages or rows.
    lengths = {s: len(prepared[s]) for s in files}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except Exception as error:
        raise UserError(f"config.data.split={split}: {first_line(error)}; {path} has {', '.join(files)}") from None
    # All files of the splits that are named; their rows are counted from the first of each.
    used = list(dict.fromkeys(part.splitname for part in parts))
    starts = dict(zip(used, np.cumsum([0, *(lengths[s] for s in used)]).tolist(), strict=False))
    rows = [starts[part.splitname] + np.arange(part.from_, part.to, dtype=np.int64) for part in parts]
    paths = tuple(file for s in used for file in files[s])
    return ArrowFiles(paths, split=split, splits=tuple(files)), np.concatenate(rows)


def _parse_id(path: str) -> tuple[str, str | None, str | None]:
    """Returns (id or folder, configuration, revision)."""
    # A folder may have an @ or a colon in its name.
    if not path.startswith(_PREFIX) and os.path.isdir(path):
        return path, None, None
    folder, _, configuration = path.rpartition(":")
    if folder and os.path.isdir(folder):
        return folder, configuration, None
    # As addresses in a browser end.
    match = _ID.fullmatch(path.removeprefix(_PREFIX).rstrip("/"))
    if not match:
        raise UserError(f"{path} is no id of the hub: expected org/name, org/name:CONFIGURATION or org/name@REVISION")
    return match[1], match[2], match[3]


def _explain_failure(datasets: Any, path: str, error: Exception) -> UserError:
    """One line for what `load_dataset` raised."""
    import huggingface_hub.errors

    text = first_line(error)
    # The cause of the cause: datasets wraps what the hub answered.
    chain = [error, error.__cause__, error.__context__]
    gated = any(isinstance(e, huggingface_hub.errors.GatedRepoError) for e in chain) or "gated" in text
    if gated:
        return UserError(
            f"{path} is gated: accept its terms on its page of the hub, then log in on this machine with `hf auth login`"
        )
    # Before the next case: offline, a data set that is not in the cache is "not found" too.
    if isinstance(error, ConnectionError) or "OfflineModeIsEnabled" in text or "offline" in text.lower():
        return UserError(
            f"{path} is no folder here, this machine's cache does not hold it as a data set of the hub, and the hub cannot be "
            f"reached ({text}): check config.data.path, the network, HF_HUB_OFFLINE and HF_HOME"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return UserError(
            f"{path} is no folder here, and the hub has no such data set, or a private one (hf auth login): check "
            "config.data.path"
        )
    # Nothing is chosen for the user: configurations may be languages, sizes or versions.
    if "config name is missing" in str(error).lower():
        # "Please pick one among the available configs: ['a', 'b']"
        listed = re.search(r"\[(.*?)\]", str(error))
        names = ", ".join(re.findall(r"'([^']+)'", listed[1] if listed else "")[:10])
        return UserError(f"{path} has several configurations ({names}): set config.data.path={path}:CONFIGURATION")
    return UserError(f"{path} cannot be prepared by the package datasets: {type(error).__name__}: {text}")
