#!/usr/bin/env bash
# Every check of the project: format, lint, types, tests.
#
#   bash launch/test.sh                     the quick run: all but the tests marked `long`
#   bash launch/test.sh --all               everything
#   bash launch/test.sh [--all] tests/test_mesh.py -k batch      any arguments of pytest
#
# The last line is pytest's own; the exit status is 0 only if every check passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

selection=(-m "not long")
if [ "${1:-}" = --all ]; then
  selection=()
  shift
fi

make_environment data report dev

failed=()
check() {
  heading "$*"
  "$python" -m "$@" || failed+=("$*")
}

check ruff format --check .
check ruff check .
check mypy

heading "pytest ${selection[*]-} $*"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Whole files go to workers, so that a file's costly fixtures are made once.
workers=(-n auto --maxprocesses=4 --dist=loadfile)
"$python" -m pytest "${workers[@]}" ${selection[@]+"${selection[@]}"} "$@" 2>&1 | tee "$log" || failed+=(pytest)

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\n'
  printf 'FAILED: %s\n' "${failed[@]}"
  tail -n 1 "$log"
  exit 1
fi
