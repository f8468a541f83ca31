"""Reads configs from files and applies `--config.key=value` overrides."""

import ast
import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gigagan_jax.config.config import DEFAULT_RULES, Config
from gigagan_jax.config.migrations import upgrade_config
from gigagan_jax.config.serialization import field_type, from_dict, parse_fields
from gigagan_jax.config.unconditional import switched_off
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel.sharding import check_rules


def load_config(path: str, overrides: Sequence[str], notes: list[str] | None = None) -> Config:
    """The config of `FILE.py[:arg]` with `--config.key=value` overrides.

    Args:
      path: of the file, with its variant.
      overrides: "--config.key=value", ...
      notes: gets lines about what the config does without, for the log.

    Raises:
      UserError: the file is missing or fails, a key is unknown, or a value has another type than its field.
    """
    values = read_config_file(path)
    before, names = values.get("condition"), set()
    for text in overrides:
        name, separator, value = text.removeprefix("--config.").partition("=")
        if not separator:
            raise UserError(f"{text}: write --config.{name}=VALUE")
        override_field(values, name, value)
        names.add(name)
    # The file's captions are no classes: the data's take their place.
    if values.get("condition") == "class" != before and "snapshot.prompts" not in names:
        override_field(values, "snapshot.prompts", "()")
    config = from_dict(values)
    off = switched_off(parse_fields(values))
    if off and notes is not None:
        notes.append(f"condition='none': neither captions nor classes are read; off: {'; '.join(off)}")
    check_rules(config.rules, DEFAULT_RULES)
    return config


def read_config_file(spec: str) -> ConfigDict:
    """The ConfigDict of `FILE.py[:arg]`, or of the `config.json` of a run."""
    path, _, arg = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"--config={spec}: there is no file {path}; for example configs/digits.py (from the repository's root)"
        )
    # The config.json of a run.
    if file.suffix == ".json":
        if arg:
            raise UserError(f"--config={spec}: a stored config has no variants; leave :{arg} out")
        try:
            return ConfigDict(upgrade_config(json.loads(file.read_text()), path)[0])
        except (OSError, ValueError) as e:
            raise UserError(f"--config={spec}: {path} is not readable JSON ({e})") from None
    # Not an import by name: config files lie outside of any package, and two may have one name.
    module_spec = importlib.util.spec_from_file_location(f"gigagan_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        with _importable_neighbours(file):
            module_spec.loader.exec_module(module)
            values = module.get_config(arg) if arg else module.get_config()
    # A config file is the user's program. It may raise anything, and the user reads it in one line.
    except (Exception, SystemExit) as e:
        raise UserError(f"--config={spec}: {type(e).__name__}: {e}") from e
    if not isinstance(values, (ConfigDict, dict)):
        raise UserError(f"--config={spec}: get_config() must return a ConfigDict, it returned {type(values).__name__}")
    return values if isinstance(values, ConfigDict) else ConfigDict(values)


@contextlib.contextmanager
def _importable_neighbours(file: Path) -> Iterator[None]:
    """Within it a config file can import what lies beside it, and from its own repository, whatever the working directory is."""
    folder = file.resolve().parent
    marks = ("pyproject.toml", ".git")
    roots = [p for p in folder.parents if any((p / mark).exists() for mark in marks)][:1]
    # The folder above comes first: `from configs import laion` means this file's own configs.
    paths = [str(p) for p in dict.fromkeys((folder.parent, *roots))]
    before = list(sys.path)
    # What lies beside it comes last: a file named as a module of Python's must not take its place.
    sys.path[:] = [*paths, *before, str(folder)]
    try:
        yield
    finally:
        sys.path[:] = before


def override_field(values: ConfigDict, name: str, text: str) -> None:
    """Sets one field of a ConfigDict from text, by its current type. `from_dict` reports unknown names later."""
    *groups, key = name.split(".")
    # ConfigDicts of a config file are locked against new keys; from_dict reports those with a better message.
    with values.unlocked():
        group: Any = values
        for g in groups:
            if g not in group:
                group[g] = ConfigDict()
            group = group[g]
            if not isinstance(group, ConfigDict):
                raise UserError(f"config.{name}: {g!r} is a single value, not a group of settings")
        old = group.get(key)
        if isinstance(old, ConfigDict):
            raise UserError(f"config.{name} is a group of settings: name one of {', '.join(sorted(old))}")
        is_texts = field_type(name) == tuple[str, ...]
        value = _parse_texts(text) if is_texts else _parse_value(name, text, old)
        if old is None:
            group.update({key: value})
        else:
            _replace_value(group, key, value)


def _replace_value(group: ConfigDict, key: str, value: Any) -> None:
    # A ConfigDict refuses another type for a known field, so the field is deleted first. from_dict checks types.
    del group[key]
    group[key] = value


def _parse_texts(text: str) -> tuple[str, ...]:
    """A list of texts as users write one: `a,b`, `0,1,2`, `one`, nothing; or a Python tuple or list, for texts with commas."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    # Numbers are texts as they are written: "007" stays that.
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    parts = [part.strip() for part in inner.split(",")]
    # A tuple of one ends in a comma.
    parts = parts[:-1] if parts[-1] == "" else parts
    return tuple(p[1:-1] if len(p) > 1 and p[0] == p[-1] and p[0] in "'\"" else p for p in parts)


def _parse_value(name: str, text: str, old: Any) -> Any:
    # Text stays as it is: a path or prompt may look like a number.
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise UserError(f"config.{name}={text}: expected true or false")
        return known[text.lower()]
    # Python literals: numbers, tuples, None. Any other text is a string.
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    # A config stored as JSON has lists where a fresh one has tuples.
    sequence = isinstance(old, (tuple, list))
    # One value is a tuple of one: --config.evaluators=digits needs no comma.
    if sequence and isinstance(value, (int, float, str)) and value != text:
        return (value,)
    if sequence and isinstance(value, str):
        return tuple(part.strip() for part in text.split(","))
    return value


def collect_overrides(unknown: Sequence[str]) -> list[str]:
    """The `--config.a.b=v` (or `--config.a.b v`) of the arguments that argparse does not know."""
    overrides: list[str] = []
    remaining = list(unknown)
    while remaining:
        text = remaining.pop(0)
        if not text.startswith("--config."):
            raise UserError(f"unknown argument {text} (see --help)")
        if "=" not in text:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"{text}: write {text}=VALUE")
            text += "=" + remaining.pop(0)
        overrides.append(text)
    return overrides
