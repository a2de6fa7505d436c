"""Runs a sweep and gathers it: python launch/sweep.py --config=FILE --workdir=DIR

The config file has, beside get_config(), a generator sweep() of (factor, level, seed, changes):
what each run changes of the config, dotted key by dotted key. A run is trained and evaluated in a
folder of its own, DIR/FACTOR/LEVEL/SEED; runs with equal settings are one. The same command goes on
where it stopped: what is done is skipped, what was interrupted resumes. At the end, and with
--gather at any time, DIR gets sweep.json, table.md and sweep.png: means over seeds with 95 %
intervals, and each level's difference from the first of its factor. --known=sweep.json takes over
what was done on another machine. Runs are processes here, or with --backend=slurm elements of a
job array (launch/README.md); --status says how far they are, at any time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from eqst import charts, command, comparison, config, files, mesh
from eqst.sweeps import local, members, outcomes, progress, single, slurm, turn
from eqst.train import EXIT_INTERRUPTED, Interrupted

LOOK_SECONDS = 10.0  # between two looks at Slurm's queue, which is everybody's


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file with sweep(); --config.key=value.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; the same folder goes on.")
    flags.DEFINE_string("data", "", "Folder of held-out recordings; default: the runs' own split.")
    flags.DEFINE_string("manifest", "", "CSV with path and split for --data.")
    flags.DEFINE_enum("backend", "local", ["local", "slurm"], "Where runs run.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time; slurm: no limit by default.", lower_bound=1)
    flags.DEFINE_float("minutes", 0.0, "Stop, saved, after so long; 0: never.", lower_bound=0.0)
    flags.DEFINE_string("only", "", "Runs whose name has this regular expression in it.")
    flags.DEFINE_string("known", "", "A sweep.json from elsewhere: its runs count as done.")
    flags.DEFINE_bool("dry_run", False, "Name the runs and what they change, and do nothing.")
    flags.DEFINE_bool("gather", False, "Only gather what is done.")
    flags.DEFINE_bool("status", False, "Only say how far each run is.")
    flags.DEFINE_string("member", "", "Run this one alone (what the command starts itself).")
    flags.DEFINE_string(
        "sbatch", "", "slurm: more words for sbatch: '--gres=gpu:1 --time=4:00:00'."
    )
    flags.DEFINE_string("srun", "", "slurm: more words for srun.")
    flags.DEFINE_bool("wait", False, "slurm: follow the jobs to their end, and gather.")
    flags.DEFINE_bool("retry", False, "slurm: submit what has failed too often as well.")
    flags.DEFINE_bool("cancel", False, "slurm: cancel the sweep's jobs, and do no more.")
    flags.mark_flags_as_required(["config", "workdir"])


def _child(name: str) -> list[str]:
    """The words of the command that runs one member: this one's, and its name."""
    words = [word for word in sys.argv[1:] if word != "--dry_run"]
    return [sys.executable, "-u", __file__, *words, f"--member={name}"]


def _dry_lines(chosen: list[members.Member], base: config.Config) -> Iterator[str]:
    """What each run changes of the config, and the command that would run it."""
    for member in chosen:
        yield f"{member.name}: {members.changes(member, base)}"
        if flags.FLAGS.backend == "local":
            yield f"  {shlex.join(_child(member.name))}"


def _config_path() -> str:
    """What was given for --config: a file, perhaps with ":ARGUMENT"."""
    flag: Any = flags.FLAGS["config"]
    return flag.config_filename


def _run_member(workdir: epath.Path, every: list[members.Member]) -> None:
    """The body of a child: one run, of which this may be one of several processes."""
    options = flags.FLAGS
    own = [member for member in every if member.name == options.member]
    if not own:
        raise ValueError(f"--member={options.member}: the sweep has no such run")
    mesh.join()
    local.leave_with_parent()
    folder = pathlib.Path(workdir / options.member)
    alone = jax.process_index() == 0 and "://" not in options.workdir
    attempt = os.environ.get("EQST_ATTEMPT", "")
    try:
        with turn.taken(folder, attempt) if alone else contextlib.nullcontext():
            single.run_member(workdir, own[0], options.data, options.manifest)
    except Interrupted:
        raise
    except BaseException:
        mesh.part()
        raise


def _run_here(todo: list[members.Member], is_done: Callable[[members.Member], bool]) -> list[str]:
    """Runs members as processes of this machine; the names of those that failed."""
    options = flags.FLAGS
    single.prepare(todo, options.data, options.manifest)
    workdir = pathlib.Path(options.workdir)
    return local.run_all(workdir, todo, is_done, _child, jobs=options.jobs, minutes=options.minutes)


# --- Slurm


def _slurm_sweep() -> slurm.Sweep:
    """What is submitted, by the flags."""
    options = flags.FLAGS
    if "://" in options.workdir:
        raise ValueError(
            f"--workdir={options.workdir}: --backend=slurm needs a folder that all nodes share"
        )
    return slurm.Sweep(
        pathlib.Path(options.workdir).absolute(),
        _child("")[:-1],
        (pathlib.Path(__file__).parent / "slurm_member.sh").read_text(encoding="utf-8"),
        slurm.options("sbatch", options.sbatch),
        slurm.options("srun", options.srun),
        options.jobs if options["jobs"].present else None,
    )


def _run_on_slurm(
    todo: list[members.Member], is_done: Callable[[members.Member], bool]
) -> list[str]:
    """Submits members; with --wait follows them to their end. The names of those that failed."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    array = slurm.Array(
        _slurm_sweep(),
        todo,
        is_done,
        lambda fresh: single.prepare(fresh, options.data, options.manifest),
        say,
        retry=options.retry,
    )
    failed = array.submit()
    if not options.wait:
        return failed
    stop, began, said = local.Interruption(), time.monotonic(), ""
    while True:
        try:
            if not array.goes_on():
                return [member.name for member in todo if not is_done(member)]
            text = progress.summary(_rows(epath.Path(options.workdir), todo))
        except slurm.Silent as error:  # it may be back soon
            text = str(error)
        if text != said:
            say(text)
        said = text
        look = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < look:
            late = options.minutes > 0 and time.monotonic() - began > 60 * options.minutes
            if stop.name or late:
                why = stop.name or f"the {options.minutes:g} minutes are over"
                raise Interrupted(f"{why}: the jobs go on; the same command follows them again")
            time.sleep(0.2)


# --- the command


def _rows(
    workdir: epath.Path, chosen: list[members.Member], *, alone: bool = False
) -> list[progress.Progress]:
    """How far each run is, by its folder and (but with `alone`) by what the backend says."""
    options = flags.FLAGS
    rows = [progress.read(workdir, x, options.data, options.manifest) for x in chosen]
    if options.backend == "slurm" and not alone:
        rows = progress.told(rows, slurm.words(_slurm_sweep().workdir))
    return rows


def _status(workdir: epath.Path, chosen: list[members.Member]) -> None:
    """Prints how far each run is; reads only."""
    try:
        rows = _rows(workdir, chosen)
    except slurm.Silent as error:
        print(f"note: by the folders alone; {error}")
        rows = _rows(workdir, chosen, alone=True)
    print(progress.table(rows))


def _gather(
    workdir: pathlib.Path,
    every: list[members.Member],
    known: dict[str, outcomes.Outcome],
    here: list[members.Member],
) -> None:
    """Writes and prints what is done."""
    content = outcomes.gather(
        every, {**known, **{x.name: outcomes.outcome(workdir, x) for x in here}}
    )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "sweep.json", content)
    text = comparison.table_text(content["tables"], content["columns"])
    files.write_text(workdir / "table.md", outcomes.heading(content, _config_path()) + text)
    print("\n" + text)
    try:
        charts.sweep(content, workdir / "sweep.png")
    except ImportError as error:
        print(f"note: no picture, {error}")
    print(f"gathered: {workdir}/sweep.json, table.md")


def main() -> None:
    """The command."""
    options = flags.FLAGS
    workdir = epath.Path(options.workdir)
    every = members.expand(_config_path(), options.config)
    chosen = members.chosen(every, options.only)
    is_done = functools.partial(members.done, workdir, data=options.data, manifest=options.manifest)
    on_slurm = options.backend == "slurm"
    if options.dry_run:
        print("\n".join(_dry_lines(chosen, config.validate(options.config))))
        if on_slurm:
            print(slurm.dry_text(_slurm_sweep(), [x.name for x in chosen if not is_done(x)]))
        return
    if options.status:
        _status(workdir, chosen)
        return
    if options.cancel and on_slurm:
        jobs = slurm.cancel(slurm.submissions(_slurm_sweep().workdir))
        print(f"cancelled: {', '.join(jobs) or 'nothing, there was none'}")
        return
    try:
        if options.member:
            _run_member(workdir, every)
            return
        known = {}
        if options.known:
            content = outcomes.read_known(options.known)
            known = outcomes.known_outcomes(content, every)
            print(outcomes.known_line(content, len(known), every), flush=True)
        failed, todo = [], []
        if not options.gather:
            run = {"local": _run_here, "slurm": _run_on_slurm}[options.backend]
            todo = [x for x in chosen if x.name not in known and not is_done(x)]
            print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them done", flush=True)
            failed = run(todo, is_done)
    except Interrupted as event:
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    here = [member for member in every if is_done(member)]
    if not on_slurm or options.wait or options.gather or not todo:  # else they have only begun
        _gather(pathlib.Path(workdir), every, known, here)
    if failed:
        text = f"{len(failed)} of {len(chosen)} runs failed: {', '.join(failed)}"
        way_out = "; --retry submits them again" if on_slurm else ""
        sys.exit(f"launch/sweep.py: {text}{way_out}")


if __name__ == "__main__":
    command.start("launch/sweep.py", define_flags, main)
