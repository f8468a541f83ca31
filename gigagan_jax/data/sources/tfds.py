"""Data sets of TFDS that are stored as ArrayRecord. TFDS says where the files are and what is in them; we read them."""

import difflib
import functools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample, Record
from gigagan_jax.data.source import Source, identity_of
from gigagan_jax.data.sources import array_record_format
from gigagan_jax.data.storage import is_local, local

CAPTION_KEYS = ("caption", "captions", "text", "captions/text")
_FORMAT = "array_record"
_INFO = "dataset_info.json"


class TfdsSource(Source):
    """A prepared data set of TFDS, by name or by folder. Nothing is downloaded, and TensorFlow is not needed.

    Args:
      name: "coco_captions/2017:1.0.0" as for `tfds.builder`, or a folder with a data set's `dataset_info.json`. Local.
      split: "train", or anything TFDS understands: "train[:10%]", "train+validation".
      image_key: feature with the image, `a/b` where it is nested; empty: the only one there is.
      caption_keys: features with captions: texts, or sequences of texts ("captions/text"); empty: the first of CAPTION_KEYS
        that is there.
      label_key: feature with the class.
      caption_required: whether an example without a caption is bad; otherwise it has none.
      data_dir: where TFDS keeps its data sets; None: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Attributes:
      classes: their names in the order of the labels, if TFDS knows them.

    Raises:
      UserError: a data set that is not there, not prepared or not ArrayRecord; a split or feature that it has not; files
        that are missing or damaged.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        label_key: str = "label",
        caption_required: bool = True,
        data_dir: str | None = None,
    ):
        info = _open(name, data_dir).info
        self._full_name, self._split = f"{info.full_name}", split
        self._short_name = f"{info.name}/{split}"
        self._caption_required = caption_required
        leaves = dict(_leaves(info.features))
        where = f"the data set {name}"
        self._image_key = _image_key(leaves, image_key, where)
        self._caption_keys = _caption_keys(leaves, tuple(caption_keys), caption_required, where)
        self._label_key, self.classes = _label(leaves, label_key, where)
        self._records = array_record_format.Records(_parts(info, split, name))
        if not len(self):
            raise UserError(f"{where} has no example in its split {split!r}")

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def has_labels(self) -> bool:
        """Whether examples have labels, judged by some of them: test splits are often without."""
        return bool(self._label_key) and any(
            (label := array_record_format.first(values, self._label_key, int)) is not None and label >= 0
            for values in array_record_format.samples(self._records)
        )

    def read(self, i: int) -> Record:
        """Example i, its image as TFDS stores it, which is encoded.

        Raises BadExample with cause `record_corrupt`, `record_undecodable`, `image_missing`, `caption_undecodable`,
        `caption_missing` or `caption_empty`.
        """
        values = array_record_format.parse(self._records.read(i))
        image = array_record_format.first(values, self._image_key, bytes)
        if image is None:
            raise BadExample("image_missing", f"no {self._image_key} in it")
        label = array_record_format.first(values, self._label_key, int) if self._label_key else None
        return Record(image, self._captions(values), array_record_format.label_of(label), self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return self._captions(array_record_format.parse(self._records.read(i)))

    def _captions(self, values: dict[str, array_record_format.Values]) -> tuple[str, ...]:
        stored = array_record_format.texts(values, self._caption_keys)
        captions = tuple(c.strip() for c in stored if c.strip())
        if self._caption_required and not captions:
            raise BadExample("caption_empty" if stored else "caption_missing", ", ".join(self._caption_keys))
        return captions

    def name(self, i: int) -> str:
        """Data set, split and place in it: "coco_captions/train/12"."""
        return f"{self._short_name}/{i}"

    def identity(self) -> str:
        return identity_of("tfds", (self._full_name, self._split, str(len(self))))


def _open(name: str, data_dir: str | None) -> Any:
    """The builder of a data set that is stored as ArrayRecord."""
    for place in (name, data_dir or ""):
        if not is_local(place):
            raise UserError(
                f"{place}: data sets of TFDS are read from local disks only; copy it, or use tars in the bucket"
            )
    folder = Path(local(name))
    try:
        with warnings.catch_warnings():
            # TFDS calls what protobuf has deprecated, and Python 3.12 in turn deprecates what protobuf calls.
            warnings.simplefilter("ignore", DeprecationWarning)
            if (folder / _INFO).is_file():
                import tensorflow_datasets as tfds

                return _checked(name, tfds.builder_from_directory(folder))
            _refuse_other_paths(name, folder)
            return _by_name(name, data_dir)
    except UserError:
        raise
    except Exception as e:  # TFDS answers damaged metadata with whatever it falls over
        why = (str(e).splitlines() or [""])[0]
        raise UserError(f"{name} cannot be opened as a data set of TFDS: {type(e).__name__}: {why}") from None


def _refuse_other_paths(name: str, folder: Path) -> None:
    """Complains about what can only be meant as a folder."""
    looks_like_name = re.fullmatch(r"[a-zA-Z]\w*(/[\w.-]+){0,2}(:[\d.*]+)?", name, re.ASCII)
    if folder.is_dir():
        below = sorted(p.parent for pattern in ("*", "*/*", "*/*/*") for p in folder.glob(f"{pattern}/{_INFO}"))
        if below:
            raise UserError(f"{name} holds data sets but is none: name one of them, such as {below[-1]}")
        if not looks_like_name:
            raise UserError(f"{name} holds no data set of TFDS: there is no {_INFO} in it")
    elif not looks_like_name:
        raise UserError(f"{name!r} is neither a folder that is there nor a name of a data set of TFDS")


def _by_name(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    places = [local(data_dir)] if data_dir else [str(p) for p in file_utils.list_data_dirs()]
    try:
        # Not tfds.builder: that would ask the network about what is not prepared.
        builder = read_only_builder.builder_from_files(name, **({"data_dir": places[0]} if data_dir else {}))
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        plain = re.split(r"[/:]", name)[0]
        close = difflib.get_close_matches(plain, known, 1)
        there = sorted(p.parent for place in places for p in Path(place, plain).glob(f"**/{_INFO}"))
        if there:
            hint = f"there is {' and '.join(map(str, there[:5]))}"
        elif plain not in known:
            hint = f"TFDS knows none of this name; {f'did you mean {close[0]}?' if close else 'check config.data.path'}"
        else:
            hint = (
                f"run `tfds build {name} --file_format={_FORMAT}` on a machine with TensorFlow, and copy its folder here "
                "or name it as config.data.path"
            )
        raise UserError(f"the data set {name} is not prepared in {' or '.join(places)}: {hint}") from None
    return _checked(name, builder)


def _checked(name: str, builder: Any) -> Any:
    """The builder, if ArrayRecord is among the formats that its data is stored in."""
    info = builder.info
    if _FORMAT in [f.value for f in (info.file_format, *info.alternative_file_formats) if f is not None]:
        return builder
    kind = info.file_format.value if info.file_format is not None else "an unknown format"
    raise UserError(
        f"the data set {name} is stored as {kind}, and only {_FORMAT} can be read by random access: on a machine with "
        f"TensorFlow run `tfds build {info.name} --file_format={_FORMAT}`, or "
        f"`tfds convert_format --dataset_version_dir={os.fspath(builder.data_dir)} --out_file_format={_FORMAT}`"
    )


def _parts(info: Any, split: str, name: str) -> list[array_record_format.Part]:
    """Files of a split, each checked to hold what the data set says."""
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as e:
        there = ", ".join(info.splits) or "none"
        why = (str(e).splitlines() or [""])[-1]
        raise UserError(f"the data set {name} has no split {split!r} (it has: {there}): {why}") from None
    paths = [os.fspath(x.filename) for x in instructions]
    if info.file_format.value != _FORMAT:  # one more format beside it: TFDS itself would open the first only
        paths = [
            f"{folder}/{file.replace(f'.{info.file_format.value}', f'.{_FORMAT}')}"
            for folder, file in map(os.path.split, paths)
        ]
    for x, path, n in zip(instructions, paths, array_record_format.count_all(paths), strict=True):
        if n != x.examples_in_shard:
            raise UserError(
                f"{path} holds {n} examples, and {_INFO} beside it says {x.examples_in_shard}: copy the data set again"
            )
    return [array_record_format.Part(path, x.skip, x.take) for x, path in zip(instructions, paths, strict=True)]


def _leaves(feature: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, tuple[Any, int]]]:
    """(name `a/b`, (feature, in how many sequences it is)) of all features."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            yield from _leaves(inner, f"{path}/{key}" if path else key, depth)
    elif isinstance(feature, tfds.features.Sequence) and not isinstance(feature, tfds.features.Dataset):
        yield from _leaves(feature.feature, path, depth + 1)
    else:
        yield path, (feature, depth)


def _is_text(feature: Any) -> bool:
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Text):
        return True
    return isinstance(feature, tfds.features.Tensor) and np.dtype(feature.np_dtype).kind in "OSU"


def _is_image(feature: Any) -> bool:
    """Whether it is a photograph; segmentation maps and depths are none."""
    import numpy as np
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.Image) or isinstance(feature, tfds.features.LabeledImage):
        return False
    return np.dtype(feature.np_dtype).kind == "u"


Leaves = dict[str, tuple[Any, int]]


def _list(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _image_key(leaves: Leaves, key: str, where: str) -> str:
    images = [k for k, (feature, depth) in leaves.items() if not depth and _is_image(feature)]
    if key:
        # A text may be an image file's bytes, which data sets made from tars have.
        if key in images or (key in leaves and not leaves[key][1] and _is_text(leaves[key][0])):
            return key
        what = f"its feature {key!r} is no image" if key in leaves else f"it has no feature {key!r}"
        raise UserError(f"config.data.image_key: {where}: {what}; images: {_list(images)}; all: {_list(list(leaves))}")
    if len(images) == 1:
        return images[0]
    what = f"several images ({_list(images)})" if images else f"no image among its features ({_list(list(leaves))})"
    raise UserError(f"{where} has {what}: set config.data.image_key")


def _caption_keys(leaves: Leaves, keys: tuple[str, ...], required: bool, where: str) -> tuple[str, ...]:
    found = [k for k, (feature, _) in leaves.items() if _is_text(feature)]
    wrong = [k for k in keys if k not in found]
    if wrong:
        what = f"its feature {wrong[0]!r} is no text" if wrong[0] in leaves else f"it has no feature {wrong[0]!r}"
        raise UserError(f"config.data.caption_keys: {where}: {what}; texts: {_list(found)}")
    keys = keys or tuple(k for k in CAPTION_KEYS if k in found)[:1]
    if required and not keys:
        raise UserError(
            f"{where} has none of {', '.join(CAPTION_KEYS)} as captions: set config.data.caption_keys (its texts: "
            f"{_list(found)}), or config.data.captions=optional"
        )
    return keys


def _label(leaves: Leaves, key: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(feature with the label, or nothing; names of the classes, as far as they are known)."""
    import numpy as np
    import tensorflow_datasets as tfds

    def is_label(feature: Any, depth: int) -> bool:
        if depth or not isinstance(feature, tfds.features.Tensor) or feature.shape:
            return False
        return np.dtype(feature.np_dtype).kind in "iu"

    feature, depth = leaves.get(key, (None, 0))
    if not is_label(feature, depth):
        if key in ("", "label"):
            return "", ()
        what = f"its feature {key!r} is no class number" if feature else f"it has no feature {key!r}"
        numbers = [k for k, leaf in leaves.items() if is_label(*leaf)]
        raise UserError(f"config.data.label_key: {where}: {what}; class numbers: {_list(numbers)}")
    if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes:
        return key, tuple(feature.names)
    return key, ()
