#!/usr/bin/env bash
# Sets up a virtual environment with the test extra, lints, type-checks and tests.
#
#   bash tools/test.sh             the default tier
#   bash tools/test.sh --slow      what is long by its nature: many kills, mutated files, every mesh of every config
#   bash tools/test.sh --newest    README's commands and the tests of tests/newest.txt on the newest other Python here
#
# Further arguments go to pytest. PYTHON, VENV and WORKERS (2) may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
venv=${VENV:-.venv-test}
workers=${WORKERS:-2}

set_up() {
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
}

# The newest Python past 3.11 that is installed, on the PATH or by pyenv; nothing where there is none.
newest() {
  local found
  for minor in 14 13 12; do
    for found in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
      if "$found" -c 'import ensurepip, ssl' 2>/dev/null; then
        echo "$found"
        return
      fi
    done
  done
}

test_newest() {
  local other run python_newest=.venv-newest/bin/python
  other=$(newest)
  if [ -z "$other" ]; then
    echo "no Python past 3.11 is installed: nothing is tested on another one"
    return
  fi
  echo "newest Python: $("$other" --version)"
  [ -x "$python_newest" ] || "$other" -m venv .venv-newest
  # The project as a user installs it, with what pip picks today, and what the chosen tests need.
  "$python_newest" -m pip install --quiet --disable-pip-version-check -e . pytest pytest-xdist scikit-image
  "$python_newest" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(jax|flax|orbax-checkpoint|grain|optax) '
  run=$(mktemp -d)
  # Bound now: the trap runs when this function's names are gone.
  trap "rm -rf '$run'" EXIT
  # A run begins on one Python, goes on on the other, and is sampled on the first.
  train() { "$1" -m gigagan_jax.train --config=configs/digits.py:tiny --workdir="$run/digits" --config.total_kimg="$2" >"$run/log" 2>&1 || { cat "$run/log"; exit 1; }; }
  sample() { "$1" -m gigagan_jax.sample --workdir="$run/digits" --prompt="a handwritten seven" --out="$run/$2" >"$run/log" 2>&1 || { cat "$run/log"; exit 1; }; }
  train "$venv/bin/python" 0.16
  train "$python_newest" 0.24
  grep -q "restoring checkpoint 10" "$run/log"
  sample "$python_newest" newest.png
  train "$venv/bin/python" 0.32
  grep -q "restoring checkpoint 15" "$run/log"
  sample "$venv/bin/python" first.png
  [ -s "$run/newest.png" ] && [ -s "$run/first.png" ]
  echo "a run went from one Python to the other and back"
  mapfile -t files < <(grep -v '^#' tests/newest.txt)
  "$python_newest" -m pytest -n "$workers" --dist loadfile -m "not slow" "${files[@]}" "$@"
}

case "${1:-}" in
  --slow)
    shift
    set_up
    exec "$venv/bin/python" -m pytest -n "$workers" --dist loadfile -m slow "$@"
    ;;
  --newest)
    shift
    set_up
    test_newest "$@"
    ;;
  *)
    set_up
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    exec "$venv/bin/python" -m pytest -n "$workers" --dist loadfile -m "not slow" "$@"
    ;;
esac
