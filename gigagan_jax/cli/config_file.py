"""Configs from files, and `--config.key=value` overrides."""

import ast
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gigagan_jax.config.config import DEFAULT_RULES, Config
from gigagan_jax.config.migrations import upgrade
from gigagan_jax.config.serialization import from_dict
from gigagan_jax.core.errors import UserError
from gigagan_jax.parallel.sharding import check_rules


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """The config of `FILE.py[:arg]` with `--config.key=value` overrides.

    Raises:
      UserError: no such file, a file that fails, an unknown key, a value that is not of the field's type.
    """
    values = read_config_file(path)
    for text in overrides:
        name, separator, value = text.removeprefix("--config.").partition("=")
        if not separator:
            raise UserError(f"{text}: write --config.{name}=VALUE")
        override(values, name, value)
    config = from_dict(values)
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
    if file.suffix == ".json":  # config.json of a run
        if arg:
            raise UserError(f"--config={spec}: a stored config has no variants; leave :{arg} out")
        try:
            return ConfigDict(upgrade(json.loads(file.read_text()), path)[0])
        except (OSError, ValueError) as e:
            raise UserError(f"--config={spec}: {path} is not readable JSON ({e})") from None
    module_spec = importlib.util.spec_from_file_location(f"gigagan_config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        values = module.get_config(arg) if arg else module.get_config()
    except (Exception, SystemExit) as e:
        # A config is the user's program: whatever it raises is theirs to read, in one line.
        raise UserError(f"--config={spec}: {type(e).__name__}: {e}") from e
    if not isinstance(values, (ConfigDict, dict)):
        raise UserError(f"--config={spec}: get_config() must return a ConfigDict, it returned {type(values).__name__}")
    return values if isinstance(values, ConfigDict) else ConfigDict(values)


def override(values: ConfigDict, name: str, text: str) -> None:
    """Sets one field of a ConfigDict from text, by the type it has. Unknown names are left to `from_dict` to explain."""
    *groups, key = name.split(".")
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
        group.update({key: _parse(name, text, old)}) if old is None else _replace(group, key, _parse(name, text, old))


def _replace(group: ConfigDict, key: str, value: Any) -> None:
    del group[key]
    group[key] = value


def _parse(name: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise UserError(f"config.{name}={text}: expected true or false")
        return known[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    sequence = isinstance(old, (tuple, list))  # a stored config has lists
    if sequence and isinstance(value, (int, float, str)) and value != text:
        return (value,)
    if sequence and isinstance(value, str):
        return tuple(part.strip() for part in text.split(","))
    return value


def config_overrides(unknown: Sequence[str]) -> list[str]:
    """`--config.a.b=v` (or `--config.a.b v`) among the arguments that argparse did not know."""
    out: list[str] = []
    rest = list(unknown)
    while rest:
        text = rest.pop(0)
        if not text.startswith("--config."):
            raise UserError(f"unknown argument {text} (see --help)")
        if "=" not in text:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{text}: write {text}=VALUE")
            text += "=" + rest.pop(0)
        out.append(text)
    return out
