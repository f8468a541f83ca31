"""Chooses the columns of Parquet files that hold images, captions and labels, by their names and types."""

import json
import shlex
from typing import Any

from gigagan_jax.core.errors import UserError

# Names in the order of preference, bytes before paths.
IMAGE_KEYS = (
    *("image", "jpg", "png", "webp", "image_bytes", "bytes", "image_path", "path", "file_name"),
    *("img", "jpeg", "picture", "photo", "pixel_values", "image_file_name", "filename", "image_file"),
)
# TEXT is LAION-400M's spelling.
CAPTION_KEYS = (
    *("caption", "captions", "text", "TEXT"),
    *("txt", "prompt", "prompts", "description", "Caption", "Text", "Prompt", "texts", "title"),
)
# Columns with the addresses of pictures, as LAION's metadata have them.
URL_KEYS = ("url", "URL", "image_url", "IMAGE_URL", "img_url", "urls", "Image_URL", "photo_image_url")
# What img2dataset writes about each of its downloads.
_DOWNLOAD_KEYS = {"key", "status", "error_message"}
# Types by Arrow's names. A file whose values are all null may have the type null instead of text.
_BYTES = ("binary", "large_binary", "binary_view")


_TEXT = ("string", "large_string", "string_view")


def _storage_type(kind: Any) -> Any:
    """Unwraps extension and dictionary types."""
    import pyarrow

    # Writers wrap columns: typed ones in extension types, repeated values in dictionaries.
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def column_type(schema: Any, name: str) -> Any:
    """Returns the type of a column, the first one of its name."""
    # `parquet._groups_of` refuses names that occur twice.
    return schema.types[schema.names.index(name)]


def is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = _storage_type(kind)
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return str(_storage_type(kind.value_type) if lists else kind) in (*_TEXT, "null")


def is_label(kind: Any) -> bool:
    from pyarrow import types

    # A file without any label has the type null, and its examples are unknown.
    return types.is_integer(_storage_type(kind)) or types.is_null(kind)


def is_image(kind: Any) -> bool:
    from pyarrow import types

    kind = _storage_type(kind)
    if types.is_struct(kind):
        # A struct needs one of the two fields of Hugging Face datasets.
        fields = {f.name: str(_storage_type(f.type)) for f in kind}
        return fields.get("bytes") in _BYTES or fields.get("path") in _TEXT
    return str(kind) in (*_BYTES, *_TEXT)


def _image_columns(schema: Any) -> tuple[list[str], list[str]]:
    """Columns that may hold images whatever their names are: structs of Hugging Face datasets, and columns of bytes."""
    from pyarrow import types

    structs = [f.name for f in schema if types.is_struct(_storage_type(f.type)) and is_image(f.type)]
    return structs, [f.name for f in schema if str(_storage_type(f.type)) in _BYTES]


def format_columns(schema: Any) -> str:
    text = ", ".join(f"{f.name} ({f.type})" for f in schema) or "none"
    # A name may hold a line break: messages are one line.
    return "".join(c if c.isprintable() else "?" for c in text)


def choose_image_key(schema: Any, key: str, path: str) -> str:
    """Returns the column with the images: the given one, one of a usual name, or the only one that can be.

    Raises:
      UserError: there is none, or several could be it. Tables of addresses are told what fetches the pictures.
    """
    usual = [k for k in IMAGE_KEYS if k in schema.names and is_image(column_type(schema, k))]
    found = key or next(iter(usual), "")
    structs, others = _image_columns(schema)
    # A file name may be there beside the picture itself; bytes of another name may be anything.
    if not key and len(structs) == 1 and (not found or is_text(column_type(schema, found))):
        return structs[0]
    if not found and not structs and len(others) == 1:
        return others[0]
    others = structs or others
    if found and found not in schema.names:
        why = f"has no column {found!r}"
    elif found and not is_image(column_type(schema, found)):
        why = f"holds neither image files nor paths in its column {found!r}"
    elif found:
        return found
    elif others:
        why = f"has several columns of images ({', '.join(others)})"
    else:
        _refuse_addresses(schema, path)
        present = next((k for k in IMAGE_KEYS if k in schema.names), "")
        why = f"has none of {', '.join(IMAGE_KEYS)}"
        why = f"holds neither image files nor paths in its column {present!r}" if present else why
    raise UserError(f"{path} {why}: set config.data.image_key to one of its columns: {format_columns(schema)}")


def _refuse_addresses(schema: Any, path: str) -> None:
    """Raises UserError where a table lists pictures that are elsewhere: in the web, or in tars and folders beside it."""
    folder, _, base = path.rpartition("/")
    # Its tables have the addresses too, but the pictures are here already.
    if _DOWNLOAD_KEYS.issubset(schema.names):
        raise UserError(
            f"{path} is what img2dataset notes about its downloads, not the pictures; they are in the tars or folders "
            f"beside it: set config.data.path={shlex.quote(folder or '.')} and config.data.source=tar or folder"
        )
    url = next((k for k in URL_KEYS if k in schema.names and is_text(column_type(schema, k))), "")
    if not url:
        return
    # The command is complete where the caption has a usual name.
    texts = [k for k in CAPTION_KEYS if k in schema.names and is_text(column_type(schema, k))]
    caption = f" --caption_col={texts[0]}" if texts else ""
    raise UserError(
        f"{path} holds addresses of pictures (column {url}), not the pictures: fetch them first (pip install "
        f"img2dataset; img2dataset --url_list={shlex.quote(folder or base)} --input_format=parquet --url_col={url}{caption} "
        f"--output_format=webdataset --output_folder=pictures --image_size=256), then set config.data.path=pictures"
    )


def choose_caption_keys(schema: Any, keys: tuple[str, ...], required: bool, path: str) -> tuple[str, ...]:
    for key in keys:
        if key not in schema.names or not is_text(column_type(schema, key)):
            what = f"its column {key!r} is no text" if key in schema.names else f"it has no column {key!r}"
            raise UserError(f"config.data.caption_keys: {path}: {what}; columns: {format_columns(schema)}")
    # One usual name is taken; several caption columns are used only if the config names them.
    usual = [k for k in CAPTION_KEYS if k in schema.names and is_text(column_type(schema, k))]
    keys = keys or tuple(usual[:1])
    if required and not keys:
        raise UserError(
            f"{path} has none of {', '.join(CAPTION_KEYS)} as captions: set config.data.caption_keys, or "
            f"config.data.captions=optional; columns: {format_columns(schema)}"
        )
    return keys


def choose_label_key(schema: Any, key: str, path: str) -> str:
    """Returns the column with the label, or ""."""
    if key in schema.names and is_label(column_type(schema, key)):
        return key
    # "label" is the default, so a data set without it has no labels. Any other name was chosen by the user.
    if key in ("", "label"):
        return ""
    what = f"its column {key!r} is no class number" if key in schema.names else f"it has no column {key!r}"
    raise UserError(f"config.data.label_key: {path}: {what}; columns: {format_columns(schema)}")


def read_class_names(schema: Any, key: str) -> tuple[str, ...]:
    """Reads the names of the classes, which Hugging Face datasets store as JSON in the schema's metadata."""
    try:
        return class_names_of(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"], key)
    # The names are optional, so unexpected metadata is no error.
    except (KeyError, TypeError, ValueError):
        return ()


def class_names_of(features: Any, key: str) -> tuple[str, ...]:
    """Names of the classes of a column, by the features of a Hugging Face data set; empty where there are none."""
    try:
        return tuple(str(name) for name in features[key]["names"])
    except (KeyError, TypeError):
        return ()
