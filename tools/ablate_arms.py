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
      table: title of the table that it belongs to.
      title: its row in the table.
      config: as for `--config`.
      flags: further flags of the training command.
      checkout: commit whose code trains it; empty: this one.
      results_of: an arm with the same settings, in another table, whose runs count for this one; empty: its own.
    """

    name: str
    table: str
    title: str
    config: str
    flags: tuple[str, ...]
    checkout: str
    results_of: str = ""

    @property
    def trained(self) -> str:
        """Name of the arm whose runs are this one's."""
        return self.results_of or self.name


def read_arms(path: Path = ARMS) -> tuple[list[Arm], tuple[int, ...]]:
    """(arms, seeds). Raises UserError where the file is no list of arms."""
    try:
        content = tomllib.loads(path.read_text())
        tables = content["tables"]
        arms = [
            Arm(
                name=arm["name"],
                table=tables[arm["table"]]["title"],
                title=arm["title"],
                config=tables[arm["table"]]["config"],
                flags=(*tables[arm["table"]]["flags"], *arm.get("flags", ())),
                checkout=arm.get("checkout", ""),
                results_of=arm.get("results_of", ""),
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
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        if arm.results_of:
            other = by_name.get(arm.results_of)
            if other is None or other.results_of or settings_of(other) != settings_of(arm):
                raise UserError(f"{path}: results_of of {arm.name} must name an arm with the same settings")
        if not all(flag.startswith("--config.") for flag in arm.flags):
            raise UserError(f"{path}: flags of {arm.name} must be a list of --config.key=value")
    return arms, seeds


def settings_of(arm: Arm) -> tuple[str, tuple[str, ...], str]:
    """What an arm trains, without its place in the tables."""
    return arm.config, arm.flags, arm.checkout
