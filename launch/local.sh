#!/usr/bin/env bash
# From a fresh clone to a trained model, its figures and one matched pair of files, on this machine.
#
#   bash launch/local.sh                         synthetic talkers: nothing is downloaded but packages
#   bash launch/local.sh --data=FOLDER           a folder of audio files, one subfolder per talker
#   bash launch/local.sh --workdir=DIR           where everything goes (default: under runs/)
#
# Run it again to go on where it stopped; what is done and unchanged is not done again.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

data=""
workdir=""
for argument in "$@"; do
  case "$argument" in
    --data=*) data=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
    -h | --help)
      sed -n '2,8s/^# \{0,1\}//p' launch/local.sh
      exit 0
      ;;
    *) fail "unknown argument $argument: use --data=FOLDER, --workdir=DIR or --help" ;;
  esac
done

# Folders are meant from where the command was given.
absolute() {
  case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$called_from/$1" ;;
  esac
}

if [ -n "$data" ]; then
  data=$(absolute "$data")
  [ -d "$data" ] || fail "there is no folder $data: give --data a folder of audio files"
  data=$(cd "$data" && pwd)
fi
if [ -n "$workdir" ]; then
  workdir=$(absolute "$workdir")
else
  workdir=$PWD/runs/local${data:+-$(basename "$data")}
fi
results=$workdir/results
pair=$workdir/pair

heading "1/4 environment"
make_environment report

# The commands, each with what it is made from. Everything this script runs stands here.

train() {
  local settings=()
  if [ -n "$data" ]; then
    settings+=("--config.data.sources=$(tuple "folder:$data" synthetic)")
    settings+=("--config.data.source_weights=(1.0, 1.0)")
    [ ! -f "$data/manifest.csv" ] || settings+=("--config.data.manifest=$data/manifest.csv")
  fi
  run -m eqst.train --config=configs/smoke.py --workdir="$workdir" ${settings[@]+"${settings[@]}"}
}

evaluate() {
  # With recordings: on those of them that training held out, and not on synthetic talkers too.
  run -m eqst.evaluate --workdir="$workdir" --output="$results" --overwrite ${data:+"--data=$data"}
}

match() {
  make_pair
  run -m eqst.match --workdir="$workdir" --input="$pair/input.wav" \
    --reference="$pair/reference.wav" --output="$pair/matched.wav" \
    --settings="$pair/settings.json" --picture="$pair/picture.png" --overwrite
}

# Two recordings to try the model on: of the given folder, else of two synthetic talkers.
make_pair() {
  "$python" - "$pair" "$data" <<'PYTHON'
import pathlib
import sys

import soundfile

from eqst import synthetic

pair, data = pathlib.Path(sys.argv[1]), sys.argv[2]
pair.mkdir(parents=True, exist_ok=True)
endings = {f".{name.lower()}" for name in soundfile.available_formats()}
files = pathlib.Path(data).rglob("*") if data else ()
found = sorted(path for path in files if path.suffix.lower() in endings)
names = ("input", "reference")
if len(found) > 1:
    for name, path in zip(names, (found[0], found[-1]), strict=True):
        samples, rate = soundfile.read(path, always_2d=True)
        soundfile.write(pair / f"{name}.wav", samples[: 20 * rate], rate)
        print(f"{name}: {path}")
else:
    for talker, name in enumerate(names):
        soundfile.write(pair / f"{name}.wav", synthetic.synthesise(2**31, talker, 10.0), 44100)
        print(f"{name}: a synthetic talker")
PYTHON
}

run() {
  printf '$ %s' "$python"
  printf ' %q' "$@"
  printf '\n'
  "$python" "$@"
}

# tuple WORD..: a Python tuple of strings, whatever characters they hold.
tuple() {
  "$python" -c 'import sys; print(tuple(sys.argv[1:]))' "$@"
}

# stage NAME OUTPUT INPUT..: runs NAME unless OUTPUT is there and was made from these inputs.
# Files, and all files in folders, count by name, size and date.
stage() {
  local name=$1 output=$2 hash
  shift 2
  hash=$("$python" - "$data" "$@" <<'PYTHON'
import hashlib
import pathlib
import sys

total = hashlib.sha256(sys.argv[1].encode())
for name in sys.argv[2:]:
    path = pathlib.Path(name)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and "__pycache__" not in file.parts:
            facts = file.stat()
            total.update(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode())
print(total.hexdigest())
PYTHON
)
  if [ -e "$output" ] && [ "$hash" = "$(cat "$workdir/.$name-done" 2>/dev/null)" ]; then
    echo "done already, from the same inputs"
    return
  fi
  rm -f "$workdir/.$name-done"
  "$name"
  printf '%s\n' "$hash" >"$workdir/.$name-done"
}

heading "2/4 training (a finished one is recognised)"
train
trained=("$workdir/config.json" "$workdir/checkpoints/best" eqst launch/local.sh)

heading "3/4 held-out figures"
stage evaluate "$results/results.json" "${trained[@]}" ${data:+"$data"}

heading "4/4 one pair of files"
stage match "$pair/settings.json" "${trained[@]}" ${data:+"$data"}

heading "everything lies in $workdir"
cat <<END
  figures     $results/table.txt, results.json, error_seconds.png
  one pair    $pair/: input.wav, reference.wav, matched.wav, settings.json, picture.png
  the model   $workdir/config.json and checkpoints/

Match two files of your own:
  $python -m eqst.match --workdir=$(printf %q "$workdir") --input=A.wav --reference=B.wav --output=C.wav
END
