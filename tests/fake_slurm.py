"""Slurm's commands as a test wants them: each call is recorded, answers lie in files.

In the folder $FAKE_SLURM: NAME.out and NAME.err, what the command NAME prints; NAME.code, its exit
code; NAME.run, what it does. `sbatch` counts jobs up from 100; with --test-only it goes by the name
test-only.
"""

import stat
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
SEPARATOR = "\x1f"  # between the words of a call
SCRIPT = r"""#!/bin/bash
name=${0##*/}
[ "$name $1" != "sbatch --test-only" ] || name=test-only
cd "$FAKE_SLURM" || exit 1
printf '%s\x1f' "$name" "$@" >>calls
echo >>calls
[ ! -e "$name.err" ] || cat "$name.err" >&2
code=0
[ ! -e "$name.code" ] || code=$(cat "$name.code")
if [ "$name" = sbatch ] && [ "$code" = 0 ]; then
  echo $((99 + $(grep -c ^sbatch calls)))
elif [ -e "$name.out" ]; then
  cat "$name.out"
fi
if [ -e "$name.run" ]; then
  bash "$name.run"
  code=$?
fi
exit "$code"
"""


def install(folder: Path) -> Path:
    """Makes the commands in folder/bin; gives that."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in COMMANDS:
        path = programs / name
        path.write_text(SCRIPT)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return programs


def calls(folder: Path, name: str) -> list[list[str]]:
    """The calls of one command, each its words."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    every = [line.rstrip(SEPARATOR).split(SEPARATOR) for line in lines]
    return [words for words in every if words[0] == name]
