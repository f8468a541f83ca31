"""Converts between `Config` and plain dicts: only here does a ConfigDict become a `Config`."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gigagan_jax.config.config import Config
from gigagan_jax.config.unconditional import without_condition
from gigagan_jax.config.validation import validate
from gigagan_jax.core.errors import UserError


def default() -> ConfigDict:
    """A ConfigDict of all fields with their defaults, for a config file to change."""
    return ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> Any:
    """Nested plain dicts for JSON; `from_dict` is the inverse."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return dict(config)
    return config


def from_dict(values: Any) -> Config:
    """The frozen and validated config of a ConfigDict or plain dict.

    Raises:
      UserError: an unknown key (the message names the nearest known one), a value of another type, or settings that
        contradict each other.
    """
    config = without_condition(parse_fields(values))
    validate(config)
    return config


def parse_fields(values: Any) -> Config:
    """The config of a ConfigDict or plain dict as it is written, not yet validated.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    return _resolve_auto(_parse_value(Config, values, "config"))


def _resolve_auto(config: Config) -> Config:
    """Replaces text.encoder="auto" by the encoder it stands for, so that a stored config says what was run."""
    if config.text.encoder != "auto":
        return config
    path, encoder = config.text.path, "bytes"
    if path:
        try:
            values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
            kind = str(values.get("model_type", ""))
        except (OSError, ValueError, AttributeError):
            # A hub id such as google/t5-v1_1-base, or a folder that the loader reports later.
            kind = path.lower()
        encoder = "t5" if "t5" in kind else "clip"
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder=encoder))
    # "auto" also switches off the losses of models whose weights are not given.
    disabled: dict[str, Any] = {} if config.clip_path else {"clip": (0.0, 0.0)}
    disabled |= {} if config.vision_path else {"vision_aided": 0.0}
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, **disabled))


def _parse_value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a group of settings, got {value!r}")
        hints = typing.get_type_hints(kind)
        # Keys first: the message about a misspelt key is the most useful one.
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(key, hints, 1)
                hint = f"; did you mean {where}.{near[0]}?" if near else f"; known: {', '.join(sorted(hints))}"
                raise UserError(f"unknown config key {where}.{key}{hint}")
        return kind(**{k: _parse_value(hints[k], v, f"{where}.{k}") for k, v in value.items()})  # type: ignore[operator]
    origin = typing.get_origin(kind)
    if origin is tuple:
        args = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a tuple like {_example_tuple(args)}, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_parse_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_parse_value(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a group of settings, got {value!r}")
        return {str(k): _parse_value(str, v, f"{where}.{k}") for k, v in value.items()}
    # An error of this package and not of the user: a field of Config has a type that nothing here checks.
    if isinstance(origin, types.UnionType):
        raise TypeError(f"{where}: unions are not supported in configs")
    # bool is a subclass of int in Python: True must be neither 1.0 nor 1.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {kind.__name__}, got {type(value).__name__} {value!r}")
    return value


def _example_tuple(args: tuple) -> str:
    return {int: "(1, 2)", float: "(0.5, 1.0)", str: "('a', 'b')"}.get(args[0], "(...)")


def field_type(name: str) -> Any:
    """The type of a setting by its name, "snapshot.prompts"; None for a name that is none."""
    kind: Any = Config
    for part in name.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def with_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """The config with these fields replaced, {"loss.clip": ...}."""
    if not fields:
        return config
    values = to_dict(config)
    for name, value in fields.items():
        group: Any = values
        *groups, key = name.split(".")
        for g in groups:
            group = group[g]
        group[key] = value
    # Validates again: the new values may contradict other settings.
    return from_dict(values)
