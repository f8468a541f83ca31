#!/usr/bin/env bash
# One machine: trains, and starts again after an interruption (exit code 75) until the run is done.
#   launch/local.sh [--dry-run] --config=configs/digits.py --workdir=DIR [--config.key=value ...]
# PYTHON names the interpreter. All flags but a leading --dry-run go to the trainer as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
if [ "${1:-}" = "--dry-run" ]; then
  dry_run=yes
  shift
fi
command=("${PYTHON:-python}" -m gigagan_jax.train "$@")
unset "${!MEGASCALE_@}" # of a multi-slice job that ended: they would have this one wait for slices that never come
if [ -n "$dry_run" ]; then
  run "${command[@]}"
  exit 0
fi
while :; do
  code=0
  "${command[@]}" || code=$?
  [ "$code" -eq 75 ] || exit "$code"
  echo "stopped with its state saved; going on" >&2
done
