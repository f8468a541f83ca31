"""The arms of tools/ablate.py: settings that are trained with several seeds, from a TOML file."""

import dataclasses
import tomllib
from pathlib import Path

from gigagan_jax.core.errors import UserError

ARMS = Path(__file__).with_name("ablations.toml")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: settings that are trained with several seeds.

    Attributes:
      name: in the results, and of its workdirs.
      table: that it belongs to.
      title: its row in the table.
      config: as for `--config`.
      flags: further flags of the training command.
      checkout: commit whose code trains it; empty: this one.
    """

    name: str
    table: str
    title: str
    config: str
    flags: tuple[str, ...]
    checkout: str


def read_arms(path: Path = ARMS) -> tuple[list[Arm], tuple[int, ...]]:
    """(arms, seeds). Raises UserError where the file is no list of arms."""
    try:
        content = tomllib.loads(path.read_text())
        tables = content["tables"]
        arms = [
            Arm(
                name=arm["name"],
                table=arm["table"],
                title=arm["title"],
                config=tables[arm["table"]]["config"],
                flags=(*tables[arm["table"]]["flags"], *arm.get("flags", ())),
                checkout=arm.get("checkout", ""),
            )
            for arm in content["arms"]
        ]
        seeds = tuple(content["seeds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no file of arms: {type(error).__name__}: {error}; see tools/ablations.toml"
        ) from error
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two arms are called {name}; their results would be mixed")
    for arm in arms:
        if not all(flag.startswith("--config.") for flag in arm.flags):
            raise UserError(f"{path}: flags of {arm.name} must be a list of --config.key=value")
    return arms, seeds
