"""Captions in JSON objects: the `.json` members of tars. Finds the key that holds them, and reads it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gigagan_jax.core.errors import UserError
from gigagan_jax.data.example import BadExample

# In lower case, in the order of preference.
USUAL_KEYS = ("caption", "captions", "text", "texts", "prompt", "prompts", "description", "title", "alt", "alt_text")
# Parts of names such as caption_blip2 and long_prompt, which come after the usual ones.
_PARTS, _NEGATIVE = ("caption", "prompt"), "negative"


def read_captions(data: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Reads captions from some keys of a JSON object; values are texts or lists of texts.

    Args:
      data: the JSON, in UTF-8, UTF-16 or UTF-32.
      keys: names of keys; "a.b" is also the key b of the object a.

    Raises:
      BadExample: cause `caption_undecodable`; it is no JSON.
    """
    # json finds the encoding by itself, a byte order mark included.
    values = parse_json(data)
    captions = [text for key in keys for text in _texts_of(_look_up(values, key))]
    return tuple(t.strip() for t in captions)


def parse_json(data: bytes) -> Any:
    """Parses JSON. Raises BadExample with cause `caption_undecodable`."""
    try:
        return json.loads(data)
    # Deeply nested JSON raises RecursionError.
    except (ValueError, RecursionError) as e:
        raise BadExample("caption_undecodable", f"not JSON: {e}") from None


def find_caption_keys(objects: Sequence[Any]) -> list[str]:
    """Lists the keys that hold captions in some objects, the best first: usual names, then those like them.

    An inner object is looked into, one level deep ("meta.caption"), where the objects themselves have no such key.
    """
    keys = list_text_keys(objects)
    # The outer level first: inner objects are often records of the program that made the image.
    return _usual([k for k in keys if "." not in k]) or _usual(keys)


def list_text_keys(objects: Iterable[Any]) -> list[str]:
    """Lists the keys of some objects that hold text, those of inner objects as "outer.inner"."""
    # A dictionary keeps the order in which the objects have their keys.
    found: dict[str, None] = {}
    for value in objects:
        for key, inner in value.items() if isinstance(value, dict) else ():
            if _texts_of(inner):
                found[key] = None
            elif isinstance(inner, dict):
                found |= {f"{key}.{k}": None for k, v in inner.items() if _texts_of(v)}
    return list(found)


def check_caption_keys(objects: Sequence[Any], keys: Sequence[str], where: str) -> None:
    """Raises UserError if none of the keys occurs in any of the objects, and names the keys that there are."""
    # A key whose value is null occurs: the examples that were looked at may lack a caption.
    if not objects or any(_has_key(value, key) for value in objects for key in keys):
        return
    advice = _advice(list_text_keys(objects), "leave config.data.caption_keys empty")
    raise UserError(f"config.data.caption_keys={','.join(keys)}: {where} have no such key; {advice}")


def describe_choice(keys: Sequence[str], where: str) -> str:
    """One line: the key that was taken, and the flag for the others."""
    # Three names are enough to see what else there is.
    others = f" ({', '.join(keys[1:4])} hold text too: config.data.caption_keys={keys[1]} takes it)" if keys[1:] else ""
    return f"captions: key {keys[0]!r} of {where}{others}"


def refuse_unknown_keys(objects: Sequence[Any], where: str) -> UserError:
    """The error for objects without a key of a usual name."""
    advice = _advice(list_text_keys(objects), "put each caption into the tar, as the .txt member beside its image")
    return UserError(
        f"{where} have no key of a usual name for captions ({', '.join(USUAL_KEYS)}); "
        f"{advice}, or accept images without captions with config.data.captions=optional"
    )


def _advice(keys: list[str], without_text: str) -> str:
    """Which key to name; `without_text` says what to do where none holds text."""
    # Numbers alone: a class, or the settings of a program.
    if not keys:
        return f"no key of them holds text: {without_text}"
    shown = ", ".join(keys[:10]) + (", ..." if keys[10:] else "")
    best = (_usual(keys) or keys)[0]
    return f"their keys with text are {shown}: set config.data.caption_keys={best}"


def _usual(keys: Sequence[str]) -> list[str]:
    # Of "meta.caption", the inner name counts.
    last = {key: key.rpartition(".")[2].lower() for key in keys}
    named = sorted((k for k in keys if last[k] in USUAL_KEYS), key=lambda k: USUAL_KEYS.index(last[k]))
    similar = [k for k in keys if k not in named and any(p in last[k] for p in _PARTS) and _NEGATIVE not in last[k]]
    return named + similar


def _has_key(value: Any, key: str) -> bool:
    if not isinstance(value, dict):
        return False
    # Both readings of a name with a dot.
    outer, _, inner = key.partition(".")
    return key in value or (isinstance(value.get(outer), dict) and inner in value[outer])


def _look_up(value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        return None
    outer, _, inner = key.partition(".")
    # A key that itself holds a dot comes first.
    if key not in value and isinstance(value.get(outer), dict):
        return value[outer].get(inner)
    return value.get(key)


def _texts_of(value: Any) -> list[str]:
    # Other JSON values, such as numbers and null, are no captions.
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v.strip()]
