"""Shared by the verbs: flags, configs from files, and one-line errors."""

from gigagan_jax.cli.config_file import collect_overrides, load_config, override_field, read_config_file
from gigagan_jax.cli.entry_point import INTERRUPTED, RESTART, Parser, check_writable, end_by_sigterm, local_folder, main

__all__ = [
    "INTERRUPTED",
    "RESTART",
    "Parser",
    "check_writable",
    "collect_overrides",
    "end_by_sigterm",
    "load_config",
    "local_folder",
    "main",
    "override_field",
    "read_config_file",
]
