#!/usr/bin/env bash
# One machine: trains, and starts again after an interruption (exit code 75) until the run is done.
#   launch/local.sh [--dry-run] --config=configs/digits.py --workdir=DIR [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ "${1:-}" = "--dry-run" ]; then
  shift
  printf '%q ' "$python" -m gigagan_jax.train "$@"
  echo
  exit 0
fi
while :; do
  code=0
  "$python" -m gigagan_jax.train "$@" || code=$?
  [ "$code" -eq 75 ] || exit "$code"
  echo "stopped with its state saved; going on" >&2
done
