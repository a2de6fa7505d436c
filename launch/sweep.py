"""Runs a sweep on this machine and gathers it: python launch/sweep.py --config=FILE --workdir=DIR

The config file has, beside get_config(), a generator sweep() of (factor, level, seed, changes):
what each run changes of the config, dotted key by dotted key. A run is trained and evaluated in a
folder of its own, DIR/FACTOR/LEVEL/SEED; runs with equal settings are one. The same command goes on
where it stopped: what is done is skipped, what was interrupted resumes. At the end, and with
--gather at any time, DIR gets sweep.json, table.md and sweep.png: means over seeds with 95 %
intervals, and each level's difference from the first of its factor. --known=sweep.json takes over
what was done on another machine.
"""

from __future__ import annotations

import functools
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags

from eqst import charts, command, comparison, config, files
from eqst.stopping import EXIT_INTERRUPTED, Interrupted
from eqst.sweeps import local, members, outcomes, single


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file with sweep(); --config.key=value.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; the same folder goes on.")
    flags.DEFINE_string("data", "", "Folder of held-out recordings; default: the runs' own split.")
    flags.DEFINE_string("manifest", "", "CSV with path and split for --data.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
    flags.DEFINE_float("minutes", 0.0, "Stop, saved, after so long; 0: never.", lower_bound=0.0)
    flags.DEFINE_string("only", "", "Runs whose name has this regular expression in it.")
    flags.DEFINE_string("known", "", "A sweep.json from elsewhere: its runs count as done.")
    flags.DEFINE_bool("dry_run", False, "Name the runs and what they change, and do nothing.")
    flags.DEFINE_bool("gather", False, "Only gather what is done.")
    flags.DEFINE_string("member", "", "Run this one alone (what the command starts itself).")
    flags.mark_flags_as_required(["config", "workdir"])


def _child(name: str) -> list[str]:
    """The words of the command that runs one member: this one's, and its name."""
    return [sys.executable, "-u", __file__, *sys.argv[1:], f"--member={name}"]


def _dry_lines(chosen: list[members.Member], base: config.Config) -> Iterator[str]:
    """What each run changes of the config, and the command that would run it."""
    for member in chosen:
        yield f"{member.name}: {members.changes(member, base)}"
        yield f"  {shlex.join(_child(member.name))}"


def main() -> None:
    """The command."""
    options = flags.FLAGS
    workdir = pathlib.Path(options.workdir)
    config_flag: Any = options["config"]
    path = config_flag.config_filename
    every = members.expand(path, options.config)
    chosen = members.chosen(every, options.only)
    if options.dry_run:
        print("\n".join(_dry_lines(chosen, config.validate(options.config))))
        return
    try:
        if options.member:
            own = [member for member in every if member.name == options.member]
            if not own:
                raise ValueError(f"--member={options.member}: the sweep has no such run")
            local.leave_with_parent()
            single.run_member(workdir, own[0], options.data, options.manifest)
            return
        known = {}
        if options.known:
            content = outcomes.read_known(options.known)
            known = outcomes.known_outcomes(content, every)
            print(outcomes.known_line(content, len(known), every), flush=True)
        is_done = functools.partial(
            members.done, workdir, data=options.data, manifest=options.manifest
        )
        failed = []
        if not options.gather:
            todo = [x for x in chosen if x.name not in known and not is_done(x)]
            print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them done", flush=True)
            single.prepare(todo, options.data, options.manifest)
            failed = local.run_all(
                workdir, todo, is_done, _child, jobs=options.jobs, minutes=options.minutes
            )
    except Interrupted as event:
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    here = [member for member in every if is_done(member)]
    content = outcomes.gather(
        every, {**known, **{x.name: outcomes.outcome(workdir, x) for x in here}}
    )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "sweep.json", content)
    text = comparison.table_text(content["tables"], content["columns"])
    files.write_text(workdir / "table.md", outcomes.heading(content, path) + text)
    print("\n" + text)
    try:
        charts.sweep(content, workdir / "sweep.png")
    except ImportError as error:
        print(f"note: no picture, {error}")
    print(f"gathered: {workdir}/sweep.json, table.md")
    if failed:
        sys.exit(
            f"launch/sweep.py: {len(failed)} of {len(chosen)} runs failed: {', '.join(failed)}"
        )


if __name__ == "__main__":
    command.start("launch/sweep.py", define_flags, main)
