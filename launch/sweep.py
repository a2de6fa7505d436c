"""Runs a sweep and gathers it: python launch/sweep.py --config=FILE --workdir=DIR

The config file has, beside get_config(), a generator sweep() of (factor, level, seed, changes):
what each run changes of the config, dotted key by dotted key. A run is trained and evaluated in a
folder of its own, DIR/FACTOR/LEVEL/SEED; runs with equal settings are one. The same command goes on
where it stopped: what is done is skipped, what was interrupted resumes. At the end, and with
--gather at any time, DIR gets sweep.json, table.md and sweep.png: means over seeds with 95 %
intervals, and each level's difference from the first of its factor. --known=sweep.json takes over
what was done on another machine. Runs are processes here, or with --backend=tpu take turns on
--jobs Cloud TPUs (launch/README.md).
"""

from __future__ import annotations

import functools
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import config_flags

from eqst import card, charts, command, comparison, config, files, lock, processes
from eqst.stopping import EXIT_INTERRUPTED, Interrupted
from eqst.sweeps import bucket, clone, gcloud, local, members, outcomes, pool, queued, single

ROOT = pathlib.Path(__file__).resolve().parents[1]


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file with sweep(); --config.key=value.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; the same folder goes on.")
    flags.DEFINE_string("data", "", "Folder of held-out recordings; default: the runs' own split.")
    flags.DEFINE_string("manifest", "", "CSV with path and split for --data.")
    flags.DEFINE_enum("backend", "local", ["local", "tpu"], "Where runs run.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
    flags.DEFINE_integer(
        "replicas", 1, "So many runs that differ in numbers alone as one program.", lower_bound=1
    )
    flags.DEFINE_float("minutes", 0.0, "Stop, saved, after so long; 0: never.", lower_bound=0.0)
    flags.DEFINE_string("only", "", "Runs whose name has this regular expression in it.")
    flags.DEFINE_string("known", "", "A sweep.json from elsewhere: its runs count as done.")
    flags.DEFINE_bool("dry_run", False, "Name the runs and what they change, and do nothing.")
    flags.DEFINE_bool("gather", False, "Only gather what is done.")
    flags.DEFINE_string("member", "", "Run this one alone, or A,B as one program: a child.")
    flags.DEFINE_string("project", "", "tpu: the cloud project.")
    flags.DEFINE_string("zone", "", "tpu: where, as in us-east5-a.")
    flags.DEFINE_string("accelerator_type", "", "tpu: of what, as in v5p-8.")
    flags.DEFINE_string("runtime_version", "", "tpu: what hosts boot with; default by type.")
    flags.DEFINE_bool("spot", False, "tpu: cheaper, and may be taken back at any time.")
    flags.DEFINE_string("setup", ":", "tpu: a shell line run on each host in the clone, first.")
    flags.DEFINE_string("create", "", "tpu: more words for gcloud .. queued-resources create.")
    flags.DEFINE_string("ssh", "", "tpu: more words for gcloud .. tpu-vm ssh and scp.")
    flags.DEFINE_float("poll_seconds", 30.0, "tpu: between looks.", lower_bound=0.0)
    flags.DEFINE_bool("keep", False, "tpu: leave the TPUs there at the end, paid for.")
    flags.DEFINE_bool("cancel", False, "tpu: delete what belongs to this workdir, and do no more.")
    flags.mark_flags_as_required(["config", "workdir"])


def _config_path() -> str:
    """What was given for --config: a file, perhaps with ":ARGUMENT"."""
    flag: Any = flags.FLAGS["config"]
    return flag.config_filename


class Work(NamedTuple):
    """What there is to run.

    Attributes:
      units: runs that are started together, by the name of the first.
      is_done: whether a unit, named by its first run, has left all that it should.
    """

    units: dict[str, list[members.Member]]
    is_done: Callable[[members.Member], bool]

    def first(self) -> list[members.Member]:
        """The first run of each unit, which stands for it."""
        return [unit[0] for unit in self.units.values()]

    def words(self, name: str) -> list[str]:
        """What is added to this command for the unit of a name."""
        return [*sys.argv[1:], f"--member={','.join(x.name for x in self.units[name])}"]

    def child(self, name: str) -> list[str]:
        """The words of the command that runs a unit on this machine."""
        return [sys.executable, "-u", __file__, *self.words(name)]


def _dry_lines(work: Work, base: config.Config) -> Iterator[str]:
    """What each run changes of the config, and the command that would run it."""
    for name, unit in work.units.items():
        for member in unit:
            yield f"{member.name}: {members.changes(member, base)}"
        if flags.FLAGS.backend == "local":
            yield f"  {shlex.join(work.child(name))}"


def _run_unit(workdir: epath.Path, every: list[members.Member]) -> None:
    """The body of a child: one unit, of which this may be one of several processes."""
    options = flags.FLAGS
    by_name = {member.name: member for member in every}
    names = options.member.split(",")
    strange = [name for name in names if name not in by_name]
    if strange:
        raise ValueError(f"--member={strange[0]}: the sweep has no such run")
    processes.join()
    local.leave_with_parent()
    try:
        unit = [by_name[name] for name in names]
        single.run_unit(workdir, unit, options.data, options.manifest)
    except Interrupted:
        raise
    except BaseException:
        processes.part()
        raise


def _run_here(work: Work) -> list[str]:
    """Runs units as processes of this machine; the names of those that failed."""
    options = flags.FLAGS
    if "://" in options.workdir:
        raise ValueError(f"--workdir={options.workdir}: --backend=local needs a folder")
    single.prepare(work.first(), options.data, options.manifest)
    return local.run_all(
        pathlib.Path(options.workdir),
        work.first(),
        work.is_done,
        work.child,
        jobs=options.jobs,
        minutes=options.minutes,
    )


# --- Cloud TPU


def _tpu_site() -> gcloud.Site:
    """Where and of what, by the flags."""
    options = flags.FLAGS
    missing = [x for x in ("project", "zone", "accelerator_type") if not options[x].value]
    if missing:
        words = " ".join(f"--{name}=.." for name in missing)
        raise ValueError(f"--backend=tpu needs {words}: see launch/README.md")
    kind = options.accelerator_type
    return gcloud.Site(
        options.project,
        options.zone,
        kind,
        options.runtime_version or gcloud.runtime_of(kind),
        options.spot,
        tuple(shlex.split(options.create)),
        tuple(shlex.split(options.ssh)),
    )


def _tpu_plan(work: Work, folder: pathlib.Path) -> pool.Plan:
    """What hosts are to do, with the clone as an archive in `folder`."""
    options = flags.FLAGS
    file = pathlib.Path(_config_path().partition(":")[0])
    if file.is_absolute() or ".." in file.parts or pathlib.Path.cwd() != ROOT:
        raise ValueError(
            f"--config={file}: with --backend=tpu the clone is copied to the hosts: start from its "
            f"root, {ROOT}, and name a file in it"
        )
    archive = folder / gcloud.ARCHIVE
    name = clone.archive(ROOT, archive)
    shipped = [str(archive), str(ROOT / "launch" / gcloud.HOST_SCRIPT)]
    # Another --setup is another clone, as far as hosts are concerned.
    name = card.digest(f"{name} {options.setup}")[:12]
    python = ["env", f"EQST_COMMIT={card.commit()}", ".venv/bin/python", "-u", "launch/sweep.py"]

    def words(name: str) -> list[str]:
        """As `Work.child`, on a host, in the root of the clone there."""
        return [*python, *work.words(name)]

    workdir = options.workdir.rstrip("/")
    return pool.Plan(workdir, name, shipped, options.setup, words, work.is_done)


def _tpu_time() -> pool.Clock:
    """A clock that ends the sweep at SIGTERM, SIGINT or the end of --minutes, each once."""
    stop, began = local.Interruption(), time.monotonic()
    minutes = flags.FLAGS.minutes

    def stopped() -> None:
        nonlocal minutes
        if minutes > 0 and time.monotonic() - began > 60 * minutes:
            stop.name, minutes = f"the {minutes:g} minutes are over", 0.0
        if stop.name:
            why, stop.name = stop.name, ""
            raise Interrupted(f"{why}: the same command goes on")

    return pool.Clock(time.monotonic, gcloud.pause_until(stopped))


def _run_on_tpus(work: Work) -> list[str]:
    """Runs units on Cloud TPUs; the names of those that failed."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    held = files.cache_folder() / "sweeps" / queued.prefix(options.workdir)
    held.mkdir(parents=True, exist_ok=True)
    _held = lock.hold(epath.Path(held))  # of two sweeps each would delete what the other makes
    with tempfile.TemporaryDirectory() as folder:
        clock = _tpu_time()
        plan = _tpu_plan(work, pathlib.Path(folder))
        cloud = gcloud.Cloud(_tpu_site(), gcloud.run, clock.pause, say)
        requests = pool.Pool(
            cloud, plan, work.first(), clock, say, jobs=options.jobs, keep=options.keep
        )
        return pool.run_all(requests, clock, options.poll_seconds)


def _cancel() -> None:
    clock = _tpu_time()
    cloud = gcloud.Cloud(_tpu_site(), gcloud.run, clock.pause, functools.partial(print, flush=True))
    names = pool.cancel(cloud, flags.FLAGS.workdir, clock)
    print(f"deleted: {', '.join(names) or 'nothing, there was none'}")


# --- the command


def _gather(
    workdir: epath.Path,
    every: list[members.Member],
    known: dict[str, outcomes.Outcome],
    here: list[members.Member],
) -> None:
    """Writes and prints what is done."""
    content = outcomes.gather(
        every, {**known, **{x.name: outcomes.outcome(workdir, x) for x in here}}
    )
    workdir.mkdir(parents=True, exist_ok=True)
    card.write_whole(workdir / "sweep.json", files.json_text(content))
    text = comparison.table_text(content["tables"], content["columns"])
    card.write_whole(workdir / "table.md", outcomes.heading(content, _config_path()) + text)
    print("\n" + text)
    try:
        with tempfile.TemporaryDirectory() as folder:
            picture = pathlib.Path(folder) / "sweep.png"
            charts.sweep(content, picture)
            card.write_whole(workdir / "sweep.png", picture.read_bytes())
    except ImportError as error:
        print(f"note: no picture, {error}")
    print(f"gathered: {workdir}/sweep.json, table.md")


def _work(todo: list[members.Member], is_done: Callable[[members.Member], bool]) -> Work:
    """Runs to do, in units of --replicas."""
    units = members.units(todo, flags.FLAGS.replicas)
    return Work(units, lambda member: all(is_done(x) for x in units[member.name]))


def main() -> None:
    """The command."""
    options = flags.FLAGS
    workdir = epath.Path(options.workdir)
    every = members.expand(_config_path(), options.config)
    chosen = members.chosen(every, options.only)
    is_done = functools.partial(members.done, workdir, data=options.data, manifest=options.manifest)
    on_tpus = options.backend == "tpu"
    if on_tpus:
        bucket.require(options.workdir)
    if options.dry_run:
        work = _work(chosen, is_done)
        print("\n".join(_dry_lines(work, config.validate(options.config))))
        if on_tpus:
            with tempfile.TemporaryDirectory() as folder:
                plan = _tpu_plan(work, pathlib.Path(folder))
                print("\n".join(pool.dry_lines(_tpu_site(), plan, work.first())))
        return
    if on_tpus and options.cancel:
        _cancel()
        return
    try:
        if options.member:
            _run_unit(workdir, every)
            return
        known = {}
        if options.known:
            content = outcomes.read_known(options.known)
            known = outcomes.known_outcomes(content, every)
            print(outcomes.known_line(content, len(known), every), flush=True)
        failed = []
        if not options.gather:
            if on_tpus:
                bucket.probe(options.workdir)
            run = {"local": _run_here, "tpu": _run_on_tpus}[options.backend]
            todo = [x for x in chosen if x.name not in known and not is_done(x)]
            print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them done", flush=True)
            work = _work(todo, is_done)
            failed = [x.name for name in run(work) for x in work.units[name] if not is_done(x)]
    except Interrupted as event:
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    _gather(workdir, every, known, [member for member in every if is_done(member)])
    if failed:
        sys.exit(
            f"launch/sweep.py: {len(failed)} of {len(chosen)} runs failed: {', '.join(failed)}"
        )


if __name__ == "__main__":
    command.start("launch/sweep.py", define_flags, main)
