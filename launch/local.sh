#!/usr/bin/env bash
# One machine: trains, and starts again after an interruption (exit code 75) until the run is done. SIGTERM or Ctrl-C to
# this script save and stop.
#   launch/local.sh [--dry-run] --config=configs/digits.py --workdir=DIR [--config.key=value ...]
# DIR is a folder, gs://BUCKET/PATH (the package's extra gcs) or s3://BUCKET/PATH (extra s3). PYTHON names the
# interpreter. All flags but a leading --dry-run go to the trainer as they are.
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
child='' stopped='' missed='' # signals that came while there was no trainer are told to the next one
forward() {
  stopped=yes
  if [ -n "$child" ]; then kill "-$1" "$child" 2>/dev/null || true; else missed=$1; fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT
set -m # the trainer in a group of its own: what a terminal sends reaches it once, by the above
while :; do
  "${command[@]}" &
  child=$!
  [ -z "$missed" ] || forward "$missed"
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends the wait, not the trainer
  code=0
  wait "$child" || code=$? # said again
  child='' missed=''
  [ -z "$stopped" ] && [ "$code" -eq 75 ] || exit "$code"
  echo "stopped with its state saved; going on" >&2
done
