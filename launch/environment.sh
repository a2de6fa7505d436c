# shellcheck shell=bash
# Sourced by local.sh and test.sh, after `cd` to the repository's root: makes .venv and says where
# its Python is. Needs bash and a Python of 3.11 to 3.13, nothing else.
#
# .venv holds .venv/eqst-making from its first moment (so that a half-made one is known as ours and
# made anew) and .venv/eqst-stamp once complete: the hash of what it was made from, then its extras.
# EQST_PYTHON names the Python to use, EQST_VENV another folder for the environment.

venv=${EQST_VENV:-.venv}
python=$venv/bin/python
constraints=launch/constraints.txt

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

heading() {
  printf '\n== %s\n' "$*"
}

# Prints the first Python that is of a right version and can make environments.
find_python() {
  local candidate without_venv=""
  for candidate in "${EQST_PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
    without_venv=$candidate
  done
  if [ -n "$without_venv" ]; then
    fail "$without_venv cannot make environments (no ensurepip): on Debian and Ubuntu install it" \
      "with 'apt-get install python3-venv', elsewhere name another Python with EQST_PYTHON"
  fi
  fail "no Python from 3.11 to 3.13 on the PATH: install one, or name it with EQST_PYTHON"
}

# What an environment depends on, as a hash: the two files, this folder (an editable install and
# an environment both hold absolute paths).
fingerprint() {
  "$1" - pyproject.toml "$constraints" <<'PYTHON'
import hashlib, os, sys

total = hashlib.sha256(os.getcwd().encode())
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        total.update(file.read())
print(total.hexdigest())
PYTHON
}

# make_environment EXTRA..: an environment with these extras, and those it has already.
make_environment() {
  local base hash extra wanted="" installed=""
  base=$(find_python) || exit 1
  hash=$(fingerprint "$base")
  if [ -f "$venv/eqst-stamp" ] && [ "$(sed -n 1p "$venv/eqst-stamp")" = "$hash" ] &&
    "$python" -c '' 2>/dev/null; then
    installed=$(sed -n 2p "$venv/eqst-stamp")
  elif [ -f "$venv/eqst-stamp" ] || [ -f "$venv/eqst-making" ]; then
    echo "$venv is unfinished or of another version: making it anew"
    rm -rf "$venv"
  elif [ -e "$venv" ]; then
    fail "$venv was not made by this script: move it away, or set EQST_VENV to another folder"
  fi
  for extra in "$@"; do
    case ",$installed," in
      *",$extra,"*) ;;
      *) wanted=yes ;;
    esac
  done
  if [ -z "$wanted" ]; then
    echo "$venv is up to date"
    return
  fi
  # The extras it had and the new ones, each once.
  installed=$(printf '%s\n' "$installed" "$@" | tr , '\n' | sed '/^$/d' | sort -u | paste -sd, -)
  mkdir -p "$venv"
  : >"$venv/eqst-making"
  rm -f "$venv/eqst-stamp"
  echo "making $venv with $("$base" --version) and [$installed] (some 90 packages, a few minutes)"
  [ -x "$python" ] || "$base" -m venv "$venv"
  if ! "$python" -m pip install --disable-pip-version-check --constraint "$constraints" \
    --editable ".[$installed]" 2>&1 | tee "$venv/install.log" |
    awk '/^ *(Collecting|Processing) / { if (++n % 10 == 0) print "  " n " packages found" }
         /^ *Installing collected/ { print "  installing them" } { fflush() }'; then
    tail -n 15 "$venv/install.log" >&2
    fail "the installation failed (its last lines are above, all of them in $venv/install.log)"
  fi
  printf '%s\n%s\n' "$hash" "$installed" >"$venv/eqst-stamp"
  rm -f "$venv/eqst-making"
}

# newest_constraints FILE EXTRA..: writes the newest versions of everything that pyproject.toml
# allows today, in the form of launch/constraints.txt, and prints those that differ from it. Asks
# the registry and installs nothing; the environment must have been made with these extras.
newest_constraints() {
  local file=$1 report=$1.json
  shift
  if ! "$python" -m pip install --disable-pip-version-check --quiet --dry-run --report "$report" \
    --upgrade --upgrade-strategy eager --editable ".[$(printf '%s\n' "$@" | paste -sd, -)]" \
    >"$file.log" 2>&1; then
    tail -n 5 "$file.log" >&2
    return 1
  fi
  "$python" - "$constraints" "$report" "$file" <<'PYTHON'
import json, re, sys

def key(name):
    return re.sub("[-_.]+", "-", name).lower()

pinned_file, report_file, newest_file = sys.argv[1:]
with open(pinned_file) as file:
    lines = [line.strip() for line in file if "==" in line and not line.startswith("#")]
pinned = {key(name): version for name, version in (line.split("==") for line in lines)}
with open(report_file) as file:
    found = [item["metadata"] for item in json.load(file)["install"]]
newer = {key(x["name"]): x["version"] for x in found if key(x["name"]) != "eqst"}
for name, version in sorted(newer.items()):
    print(f"  {name} {pinned[name] if name in pinned else '(none)'} -> {version}")
with open(newest_file, "w") as file:
    file.writelines(f"{name}=={version}\n" for name, version in sorted({**pinned, **newer}.items()))
PYTHON
}
