"""Source of TFDS data sets that are stored as ArrayRecord. TFDS provides the metadata; this module reads the files."""

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
from gigagan_jax.data.sources import array_record_format, tf_example
from gigagan_jax.data.storage import is_local, local_path

# In the order of preference. Features of nested structures are called a/b.
CAPTION_KEYS = ("caption", "captions", "text", "captions/text")
_FORMAT = "array_record"
_INFO = "dataset_info.json"


class TfdsSource(Source):
    """A prepared data set of TFDS, by name or by folder. It downloads nothing and needs no TensorFlow.

    Args:
      name: "coco_captions/2017:1.0.0" as for `tfds.builder`, or a local folder with a `dataset_info.json`.
      split: "train", or any split expression of TFDS: "train[:10%]", "train+validation".
      image_key: feature with the image, `a/b` if it is nested. Empty: the only image feature.
      caption_keys: features with captions: texts, or sequences of texts ("captions/text"). Empty: the first of
        CAPTION_KEYS that is present.
      label_key: feature with the class.
      caption_required: if True, an example without a caption is a bad example.
      data_dir: folder of the data sets of TFDS; None: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Attributes:
      classes: names of the classes in the order of the labels, if TFDS knows them.

    Raises:
      UserError: the data set is missing, not prepared or not ArrayRecord; a split or feature does not exist; files are
        missing or damaged.
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
        # Only plain values are kept: a source is pickled into worker processes, which then need no TFDS.
        info = _open_builder(name, data_dir).info
        self._full_name, self._split = f"{info.full_name}", split
        self._short_name = f"{info.name}/{split}"
        self._caption_required = caption_required
        leaves = dict(_iter_leaves(info.features))
        where = f"the data set {name}"
        self._image_key = _choose_image_key(leaves, image_key, where)
        self._caption_keys = _choose_caption_keys(leaves, tuple(caption_keys), caption_required, where)
        self._label_key, self.classes = _choose_label(leaves, label_key, where)
        self._records = array_record_format.ShardedRecords(_split_slices(info, split, name))
        if not len(self):
            raise UserError(f"{where} has no example in its split {split!r}")

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def has_labels(self) -> bool:
        """Whether any of up to 16 sampled examples has a label."""
        # The feature alone does not tell: test splits often have label -1 everywhere.
        return bool(self._label_key) and any(
            (label := tf_example.first_value(values, self._label_key, int)) is not None and label >= 0
            for values in array_record_format.sample_features(self._records)
        )

    def read(self, i: int) -> Record:
        """Reads example i; its image stays encoded, as TFDS stores it.

        Raises BadExample with cause `record_corrupt`, `record_undecodable`, `image_missing`, `caption_undecodable`,
        `caption_missing` or `caption_empty`.
        """
        values = tf_example.parse_example(self._records.read(i))
        image = tf_example.first_value(values, self._image_key, bytes)
        if image is None:
            raise BadExample("image_missing", f"no {self._image_key} in it")
        label = tf_example.first_value(values, self._label_key, int) if self._label_key else None
        return Record(image, self._extract_captions(values), tf_example.label_of(label), self.name(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return self._extract_captions(tf_example.parse_example(self._records.read(i)))

    def _extract_captions(self, values: dict[str, tf_example.Values]) -> tuple[str, ...]:
        stored = tf_example.decode_texts(values, self._caption_keys)
        # Blank texts are no captions, so an example with nothing else counts as empty.
        captions = tuple(c.strip() for c in stored if c.strip())
        if self._caption_required and not captions:
            raise BadExample("caption_empty" if stored else "caption_missing", ", ".join(self._caption_keys))
        return captions

    def name(self, i: int) -> str:
        """Returns data set, split and index: "coco_captions/train/12"."""
        return f"{self._short_name}/{i}"

    def identity(self) -> str:
        # The full name holds config and version; the length tells apart data sets that were built anew.
        return identity_of("tfds", (self._full_name, self._split, str(len(self))))


def _open_builder(name: str, data_dir: str | None) -> Any:
    """Opens the builder of a data set that is stored as ArrayRecord. Raises UserError."""
    for place in (name, data_dir or ""):
        if not is_local(place):
            raise UserError(
                f"{place}: data sets of TFDS are read from local disks only; copy it, or use tars in the bucket"
            )
    folder = Path(local_path(name))
    try:
        with warnings.catch_warnings():
            # TFDS uses deprecated functions of protobuf, and protobuf those of Python 3.12.
            warnings.simplefilter("ignore", DeprecationWarning)
            if (folder / _INFO).is_file():
                import tensorflow_datasets as tfds

                return _require_array_record(name, tfds.builder_from_directory(folder))
            _refuse_other_paths(name, folder)
            return _builder_by_name(name, data_dir)
    except UserError:
        raise
    # TFDS has no exception of its own for damaged metadata.
    except Exception as e:
        why = (str(e).splitlines() or [""])[0]
        raise UserError(f"{name} cannot be opened as a data set of TFDS: {type(e).__name__}: {why}") from None


def _refuse_other_paths(name: str, folder: Path) -> None:
    """Raises UserError if `name` is neither a data set's folder nor a possible name."""
    # NAME/CONFIG/...:VERSION. A folder of such a name may exist in the current directory by chance.
    looks_like_name = re.fullmatch(r"[a-zA-Z]\w*(/[\w.-]+){0,2}(:[\d.*]+)?", name, re.ASCII)
    if folder.is_dir():
        # Users often name the folder above: TFDS nests NAME/CONFIG/VERSION.
        below = sorted(p.parent for pattern in ("*", "*/*", "*/*/*") for p in folder.glob(f"{pattern}/{_INFO}"))
        if below:
            raise UserError(f"{name} holds data sets but is none: name one of them, such as {below[-1]}")
        if not looks_like_name:
            raise UserError(f"{name} holds no data set of TFDS: there is no {_INFO} in it")
    elif not looks_like_name:
        raise UserError(f"{name!r} is neither a folder that is there nor a name of a data set of TFDS")


def _builder_by_name(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    places = [local_path(data_dir)] if data_dir else [str(p) for p in file_utils.list_data_dirs()]
    try:
        # tfds.builder would ask the network about data sets that are not prepared.
        builder = read_only_builder.builder_from_files(name, **({"data_dir": places[0]} if data_dir else {}))
    except tfds.core.DatasetNotFoundError:
        # Community data sets need a request.
        known = tfds.list_builders(with_community_datasets=False)
        base_name = re.split(r"[/:]", name)[0]
        # The name without config and version, because list_builders lists names only.
        close = difflib.get_close_matches(base_name, known, 1)
        # Another config or version of the data set may be prepared.
        prepared = sorted(p.parent for place in places for p in Path(place, base_name).glob(f"**/{_INFO}"))
        if prepared:
            hint = f"there is {' and '.join(map(str, prepared[:5]))}"
        elif base_name not in known:
            hint = f"TFDS knows none of this name; {f'did you mean {close[0]}?' if close else 'check config.data.path'}"
        else:
            hint = (
                f"run `tfds build {name} --file_format={_FORMAT}` on a machine with TensorFlow, and copy its folder here "
                "or name it as config.data.path"
            )
        raise UserError(f"the data set {name} is not prepared in {' or '.join(places)}: {hint}") from None
    return _require_array_record(name, builder)


def _require_array_record(name: str, builder: Any) -> Any:
    """Returns the builder if its data is stored as ArrayRecord, among other formats. Raises UserError."""
    info = builder.info
    if _FORMAT in [f.value for f in (info.file_format, *info.alternative_file_formats) if f is not None]:
        return builder
    kind = info.file_format.value if info.file_format is not None else "an unknown format"
    raise UserError(
        f"the data set {name} is stored as {kind}, and only {_FORMAT} can be read by random access: on a machine with "
        f"TensorFlow run `tfds build {info.name} --file_format={_FORMAT}`, or "
        f"`tfds convert_format --dataset_version_dir={os.fspath(builder.data_dir)} --out_file_format={_FORMAT}`"
    )


def _split_slices(info: Any, split: str, name: str) -> list[array_record_format.FileSlice]:
    """Lists the slices of files that make up a split. Raises UserError if a file has another number of records."""
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as e:
        # The last line of TFDS's message says what is wrong.
        available = ", ".join(info.splits) or "none"
        why = (str(e).splitlines() or [""])[-1]
        raise UserError(f"the data set {name} has no split {split!r} (it has: {available}): {why}") from None
    paths = [os.fspath(x.filename) for x in instructions]
    # ArrayRecord may be an alternative format, while TFDS names the files of the first one.
    if info.file_format.value != _FORMAT:
        paths = [
            f"{folder}/{file.replace(f'.{info.file_format.value}', f'.{_FORMAT}')}"
            for folder, file in map(os.path.split, paths)
        ]
    for x, path, n in zip(instructions, paths, array_record_format.count_all_records(paths), strict=True):
        # An incomplete copy would shift every later example.
        if n != x.examples_in_shard:
            raise UserError(
                f"{path} holds {n} examples, and {_INFO} beside it says {x.examples_in_shard}: copy the data set again"
            )
    return [array_record_format.FileSlice(path, x.skip, x.take) for x, path in zip(instructions, paths, strict=True)]


def _iter_leaves(feature: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, tuple[Any, int]]]:
    """Yields (name `a/b`, (feature, number of sequences around it)) of all features."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for key, inner in feature.items():
            yield from _iter_leaves(inner, f"{path}/{key}" if path else key, depth)
    # Dataset is a subclass of Sequence, but a nested data set is no list of values.
    elif isinstance(feature, tfds.features.Sequence) and not isinstance(feature, tfds.features.Dataset):
        yield from _iter_leaves(feature.feature, path, depth + 1)
    else:
        yield path, (feature, depth)


def _is_text(feature: Any) -> bool:
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Text):
        return True
    # Strings are stored as objects (O), bytes (S) or unicode (U).
    return isinstance(feature, tfds.features.Tensor) and np.dtype(feature.np_dtype).kind in "OSU"


def _is_image(feature: Any) -> bool:
    """Returns whether a feature is a photograph. Segmentation maps and depth maps are none."""
    import numpy as np
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.Image) or isinstance(feature, tfds.features.LabeledImage):
        return False
    # Photographs have unsigned integers; depth maps are floats.
    return np.dtype(feature.np_dtype).kind == "u"


Leaves = dict[str, tuple[Any, int]]


def _join_names(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _choose_image_key(leaves: Leaves, key: str, where: str) -> str:
    images = [k for k, (feature, depth) in leaves.items() if not depth and _is_image(feature)]
    if key:
        # A text feature may hold the bytes of an image file: data sets made from tars have this.
        # A config's own choice may not be inside a sequence: an example has one image.
        if key in images or (key in leaves and not leaves[key][1] and _is_text(leaves[key][0])):
            return key
        what = f"its feature {key!r} is no image" if key in leaves else f"it has no feature {key!r}"
        raise UserError(
            f"config.data.image_key: {where}: {what}; images: {_join_names(images)}; all: {_join_names(list(leaves))}"
        )
    # Several images, such as a photograph and its mask, leave the choice to the user.
    if len(images) == 1:
        return images[0]
    what = (
        f"several images ({_join_names(images)})"
        if images
        else f"no image among its features ({_join_names(list(leaves))})"
    )
    raise UserError(f"{where} has {what}: set config.data.image_key")


def _choose_caption_keys(leaves: Leaves, keys: tuple[str, ...], required: bool, where: str) -> tuple[str, ...]:
    texts = [k for k, (feature, _) in leaves.items() if _is_text(feature)]
    wrong = [k for k in keys if k not in texts]
    if wrong:
        what = f"its feature {wrong[0]!r} is no text" if wrong[0] in leaves else f"it has no feature {wrong[0]!r}"
        raise UserError(f"config.data.caption_keys: {where}: {what}; texts: {_join_names(texts)}")
    keys = keys or tuple(k for k in CAPTION_KEYS if k in texts)[:1]
    if required and not keys:
        raise UserError(
            f"{where} has none of {', '.join(CAPTION_KEYS)} as captions: set config.data.caption_keys (its texts: "
            f"{_join_names(texts)}), or config.data.captions=optional"
        )
    return keys


def _choose_label(leaves: Leaves, key: str, where: str) -> tuple[str, tuple[str, ...]]:
    """Returns (feature with the label or "", names of the classes if known). Raises UserError."""
    import numpy as np
    import tensorflow_datasets as tfds

    # A class is a scalar integer outside any sequence.
    def is_label(feature: Any, depth: int) -> bool:
        if depth or not isinstance(feature, tfds.features.Tensor) or feature.shape:
            return False
        return np.dtype(feature.np_dtype).kind in "iu"

    feature, depth = leaves.get(key, (None, 0))
    if not is_label(feature, depth):
        # "label" is the default, so a data set without it has no labels. Any other name was chosen by the user.
        if key in ("", "label"):
            return "", ()
        what = f"its feature {key!r} is no class number" if feature else f"it has no feature {key!r}"
        numbers = [k for k, leaf in leaves.items() if is_label(*leaf)]
        raise UserError(f"config.data.label_key: {where}: {what}; class numbers: {_join_names(numbers)}")
    # A plain integer feature is a label without names.
    if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes:
        return key, tuple(feature.names)
    return key, ()
