#!/usr/bin/env bash
# Every check of the project: format, lint, types, tests.
#
#   bash launch/test.sh                     the quick run: all but the tests marked `long`
#   bash launch/test.sh --all               everything, the wheel in an environment of its own too
#   bash launch/test.sh --no-skips          a test that is skipped fails, but for those it must be
#   bash launch/test.sh --newest            the quick tests once more, with the newest versions of
#                                           the dependencies in place of launch/constraints.txt
#   bash launch/test.sh [--all ..] tests/test_mesh.py -k batch      then any arguments of pytest
#
# The last lines name what failed; the exit status is 0 only if every check passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

quick=(-m "not long")
selection=("${quick[@]}")
newest=""
while [ $# -gt 0 ]; do
  case "$1" in
    --all) selection=() ;;
    --no-skips) export EQST_NO_SKIPS=1 ;; # read by tests/skips.py
    --newest) newest=yes ;;
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' launch/test.sh
      exit 0
      ;;
    *) break ;;
  esac
  shift
done

extras=(data report dev)
make_environment "${extras[@]}"

failed=()

# install WHAT LOG PACKAGE..: with --all, where root may do so, on Debian and its kin. Elsewhere the
# tests that need it are skipped with their reason.
install() {
  local what=$1 log=$venv/$2.log
  shift 2
  heading "$what"
  if ! (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    "$@") >"$log" 2>&1; then
    tail -n 3 "$log" >&2
    failed+=("$what: apt-get could not install $* (all of it in $log)")
  fi
}
if [ "${#selection[@]}" -eq 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  command -v chromium chromium-browser google-chrome >/dev/null ||
    install "a browser for the tests of the page" browser chromium
  { command -v sbatch && command -v slurmctld && command -v munged; } >/dev/null ||
    install "Slurm for the tests of sweeps" slurm slurm-wlm munge
fi

check() {
  heading "$*"
  "$python" -m "$@" || failed+=("$*")
}

check ruff format --check .
check ruff check .
check mypy

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# run_pytest NAME ARGUMENT..: whole files go to workers, so that a file's costly fixtures are made
# once, the slowest first (tests/conftest.py). NAME is what a failure is listed as, with pytest's
# own last line.
run_pytest() {
  local name=$1
  shift
  heading "$name $*"
  "$python" -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@" 2>&1 | tee "$log" ||
    failed+=("$name: $(tail -n 1 "$log" | sed 's/^=* *//; s/ *=*$//')")
}

run_pytest pytest ${selection[@]+"${selection[@]}"} "$@"

if [ -n "$newest" ]; then
  heading "newest versions of the dependencies"
  if ! differences=$(newest_constraints "$venv/newest.txt" "${extras[@]}"); then
    failed+=("newest versions: they could not be found (above)")
  elif [ -z "$differences" ]; then
    echo "they are those of launch/constraints.txt: nothing more to test"
  else
    printf 'newer than launch/constraints.txt:\n%s\n' "$differences"
    constraints=$venv/newest.txt
    venv=$venv-newest
    python=$venv/bin/python
    if (make_environment "${extras[@]}"); then
      run_pytest "pytest with the newest versions" "${quick[@]}" "$@"
    else
      failed+=("newest versions: they could not be installed (above)")
    fi
  fi
fi

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\n'
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
