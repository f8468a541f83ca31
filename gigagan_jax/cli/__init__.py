"""What the verbs share: flags, configs from files, and errors of one line."""

from gigagan_jax.cli.config_file import config_overrides, load_config, override, read_config_file
from gigagan_jax.cli.entry_point import INTERRUPTED, RESTART, Parser, local_folder, main, writable

__all__ = [
    "INTERRUPTED",
    "RESTART",
    "Parser",
    "config_overrides",
    "load_config",
    "local_folder",
    "main",
    "override",
    "read_config_file",
    "writable",
]
