"""Names of the files and folders in a workdir. Users, tools and earlier runs rely on them: none may change."""

from __future__ import annotations

# Written when the run starts, and compared with the config of every restart.
CONFIG_FILE = "config.json"
CHECKPOINTS_FOLDER = "checkpoints"
SNAPSHOTS_FOLDER = "snapshots"
# Of published weights, which lie beside a config and have no checkpoints.
WEIGHTS_FILE = "model.safetensors"

METRICS_FILE = "metrics.jsonl"
GOODPUT_FILE = "goodput.jsonl"
# What was changed in a run, and from what it was begun.
HISTORY_FILE = "history.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# Process 0 writes this name; the other processes put their index between stem and suffix.
QUARANTINE_FILE = "quarantine.jsonl"
QUARANTINE_PATTERN = "quarantine*.jsonl"

HEALTH_REPORT_FILE = "health_report.json"
REPORT_FILE = "report.html"

# A run holds both while it trains: the record lock, and a counter that shows that its process is alive.
LOCK_FILE = "run.lock"
HEARTBEAT_FILE = "run.alive"

# The user creates PROFILE_TRIGGER_FILE to request a profile; the traces go to PROFILES_FOLDER.
PROFILE_TRIGGER_FILE = "profile"
PROFILES_FOLDER = "profiles"

DRY_RUN_FILE = "dry_run.json"

# The default; --compilation_cache and JAX_COMPILATION_CACHE_DIR can name another folder.
COMPILATION_CACHE_FOLDER = "compilation_cache"
