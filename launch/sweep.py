"""Runs a sweep and gathers it: python launch/sweep.py --config=FILE --workdir=DIR

The config file has, beside get_config(), a generator sweep() of (factor, level, seed, changes):
what each run changes of the config, dotted key by dotted key. A run is trained and evaluated in a
folder of its own, DIR/FACTOR/LEVEL/SEED; runs with equal settings are one. The same command goes on
where it stopped: what is done is skipped, what was interrupted resumes. At the end, and with
--gather at any time, DIR gets sweep.json, table.md and sweep.png: means over seeds with 95 %
intervals, and each level's difference from the first of its factor. --known=sweep.json takes over
what was done on another machine. Runs are processes here, with --backend=slurm elements of a job
array, or with --backend=tpu take turns on --jobs Cloud TPUs (launch/README.md); --status says how
far they are, at any time.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
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
from eqst.processes import EXIT_INTERRUPTED
from eqst.stopping import Interrupted
from eqst.sweeps import (
    bucket,
    clone,
    deletion,
    gcloud,
    local,
    members,
    orders,
    outcomes,
    pool,
    progress,
    queued,
    single,
    slurm,
)
from eqst.train import explained

LOOK_SECONDS = 10.0  # between two looks at Slurm's queue, which is everybody's
ROOT = pathlib.Path(__file__).resolve().parents[1]


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file with sweep(); --config.key=value.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; the same folder goes on.")
    flags.DEFINE_string("data", "", "Folder of held-out recordings; default: the runs' own split.")
    flags.DEFINE_string("manifest", "", "CSV with path and split for --data.")
    flags.DEFINE_enum("backend", "local", ["local", "slurm", "tpu"], "Where runs run.")
    flags.DEFINE_integer(
        "jobs", 1, "Runs at a time, a GPU for each; slurm: no limit.", lower_bound=1
    )
    flags.DEFINE_integer(
        "replicas", 1, "So many runs that differ in numbers alone as one program.", lower_bound=1
    )
    flags.DEFINE_float("minutes", 0.0, "Stop, saved, after so long; 0: never.", lower_bound=0.0)
    flags.DEFINE_string("only", "", "Runs whose name has this regular expression in it.")
    flags.DEFINE_string("known", "", "A sweep.json from elsewhere: its runs count as done.")
    flags.DEFINE_bool("dry_run", False, "Name the runs and what they change, and do nothing.")
    flags.DEFINE_bool("gather", False, "Only gather what is done.")
    flags.DEFINE_bool("status", False, "Only say how far each run is.")
    flags.DEFINE_string("member", "", "Run this one alone, or A,B as one program: a child.")
    flags.DEFINE_string("settings", "", "A child: what its runs' settings were when submitted.")
    flags.DEFINE_string(
        "sbatch", "", "slurm: more words for sbatch: '--gres=gpu:1 --time=4:00:00'."
    )
    flags.DEFINE_string("srun", "", "slurm: more words for srun.")
    flags.DEFINE_bool("wait", False, "slurm: follow the jobs to their end, and gather.")
    flags.DEFINE_bool("retry", False, "slurm: submit what has failed too often as well.")
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
    flags.DEFINE_bool("cancel", False, "slurm, tpu: end what belongs to this workdir, no more.")
    flags.mark_flags_as_required(["config", "workdir"])


def _config_path() -> str:
    """What was given for --config: a file, perhaps with ":ARGUMENT"."""
    flag: Any = flags.FLAGS["config"]
    return flag.config_filename


def given_words() -> list[str]:
    """What this command was given, as its children are."""
    dry_run = re.compile(r"--?(no)?dry_run(=.*)?")  # as absl takes it
    return [word for word in sys.argv[1:] if not dry_run.fullmatch(word)]


class Work(NamedTuple):
    """What there is to run.

    Attributes:
      units: runs that are started together, by the name of the first.
      is_run_done: whether a run has left all that it should.
    """

    units: dict[str, list[members.Member]]
    is_run_done: Callable[[members.Member], bool]

    def is_done(self, first: members.Member) -> bool:
        """Whether all of a unit is, which is named by its first run."""
        return all(map(self.is_run_done, self.units[first.name]))

    def first(self) -> list[members.Member]:
        """The first run of each unit, which stands for it."""
        return [unit[0] for unit in self.units.values()]

    def words(self, name: str) -> list[str]:
        """What this command is given for the unit of a name."""
        return _words(self.units[name])


def _words(unit: list[members.Member]) -> list[str]:
    """What this command is given to run a unit."""
    return [*given_words(), f"--member={','.join(member.name for member in unit)}"]


def _child(unit: list[members.Member]) -> list[str]:
    """The words of the command that runs a unit on this machine."""
    return [sys.executable, "-u", __file__, *_words(unit)]


def _dry_lines(work: Work, base: config.Config) -> Iterator[str]:
    """What each run changes of the config, and the command that would run it."""
    for unit in work.units.values():
        for member in unit:
            yield f"{member.name}: {members.changes(member, base)}"
        if flags.FLAGS.backend == "local":
            yield f"  {shlex.join(_child(unit))}"


def _run_unit(workdir: epath.Path, unit: list[members.Member]) -> None:
    """The body of a child: one unit, of which this may be one of several processes."""
    options = flags.FLAGS
    processes.join()
    local.leave_with_parent()
    attempt = os.environ.get("EQST_ATTEMPT", "")
    with explained(options.workdir):
        single.run_unit(workdir, unit, options.data, options.manifest, attempt)


def _run_here(work: Work) -> list[str]:
    """Runs units as processes of this machine; the names of those of which some run failed."""
    options = flags.FLAGS
    if "://" in options.workdir:
        raise ValueError(f"--workdir={options.workdir}: --backend=local needs a folder")
    single.prepare(work.first(), options.data, options.manifest)
    failed = local.run_all(
        pathlib.Path(options.workdir),
        list(work.units.values()),
        work.is_run_done,
        _child,
        jobs=options.jobs,
        minutes=options.minutes,
    )
    return [name for name, unit in work.units.items() if any(x.name in failed for x in unit)]


# --- Slurm


def _slurm_workdir() -> pathlib.Path:
    options = flags.FLAGS
    if "://" in options.workdir:
        raise ValueError(
            f"--workdir={options.workdir}: --backend=slurm needs a folder that all nodes share"
        )
    return pathlib.Path(options.workdir).absolute()


def _slurm_sweep(every: list[members.Member]) -> slurm.Sweep:
    """What is submitted, by the flags."""
    options = flags.FLAGS
    return slurm.Sweep(
        _slurm_workdir(),
        [sys.executable, "-u", __file__, *given_words()],
        (pathlib.Path(__file__).parent / "slurm_member.sh").read_text(encoding="utf-8"),
        slurm.options("sbatch", options.sbatch),
        slurm.options("srun", options.srun),
        options.jobs if options["jobs"].present else None,
        {member.name: members.settings_hash(member) for member in every},
    )


def _run_on_slurm(work: Work) -> list[str]:
    """Submits runs; with --wait follows them to their end. The names of those that failed."""
    todo, is_done = work.first(), work.is_done
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    array = slurm.Array(
        _slurm_sweep(todo),
        todo,
        is_done,
        lambda fresh: single.prepare(fresh, options.data, options.manifest),
        say,
        retry=options.retry,
        replicas=options.replicas,
    )
    failed = array.submit()
    if not options.wait:
        return failed
    stop, said = local.Interruption(options.minutes), ""
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
            if why := stop.why():
                raise Interrupted(f"{why}: the jobs go on; the same command follows them again")
            time.sleep(0.2)


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


def _tpu_plan(work: Work, folder: pathlib.Path) -> orders.Plan:
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
    return orders.Plan(workdir, name, shipped, options.setup, work.units, words, work.is_done)


def _tpu_time() -> pool.Clock:
    """A clock that ends the sweep at SIGTERM, SIGINT or the end of --minutes, each once."""
    stop = local.Interruption(flags.FLAGS.minutes)

    def stopped() -> None:
        if why := stop.why():
            stop.forget()
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
    names = deletion.cancel(cloud, flags.FLAGS.workdir, clock)
    print(f"deleted: {', '.join(names) or 'nothing, there was none'}")


# --- the command


def _rows(
    workdir: epath.Path, chosen: list[members.Member], *, alone: bool = False
) -> list[progress.Progress]:
    """How far each run is, by its folder and (but with `alone`) by what the backend says."""
    options = flags.FLAGS
    rows = [progress.read(workdir, x, options.data, options.manifest) for x in chosen]
    if options.backend == "slurm" and not alone:
        rows = progress.told(rows, slurm.words(_slurm_workdir()))
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
    workdir: epath.Path,
    every: list[members.Member],
    known: dict[str, outcomes.Outcome],
    here: list[members.Member],
) -> None:
    """Writes and prints what is done."""
    content = outcomes.gather(
        every,
        {**known, **{x.name: outcomes.outcome(workdir, x) for x in here}},
        flags.FLAGS.data,
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
    """Runs to do, in units of --replicas; on Slurm each by itself, until they are submitted."""
    together = 1 if flags.FLAGS.backend == "slurm" else flags.FLAGS.replicas
    return Work(members.units(todo, together), is_done)


def main() -> None:
    """The command."""
    options = flags.FLAGS
    workdir = epath.Path(options.workdir)
    every = members.expand(_config_path(), options.config)
    chosen = members.chosen(every, options.only)
    if options.member:
        chosen = members.named(every, options.member)
        if options.settings not in ("", ",".join(map(members.settings_hash, chosen))):
            raise ValueError(
                f"--member={options.member}: {_config_path()} has changed what this run is since "
                "it was submitted: take that back, or --cancel, and start the sweep again"
            )
    is_done = functools.partial(members.done, workdir, data=options.data, manifest=options.manifest)
    on_tpus, on_slurm = options.backend == "tpu", options.backend == "slurm"
    if on_tpus:
        bucket.require(options.workdir)
    if options.dry_run:
        work = _work([x for x in chosen if not on_slurm or not is_done(x)], is_done)
        print("\n".join(_dry_lines(work, config.validate(options.config))))
        if on_tpus:
            with tempfile.TemporaryDirectory() as folder:
                plan = _tpu_plan(work, pathlib.Path(folder))
                print("\n".join(orders.dry_lines(_tpu_site(), plan, work.first())))
        if on_slurm:
            units = members.units(work.first(), options.replicas).values()
            print(
                slurm.dry_text(
                    _slurm_sweep(work.first()), [slurm.unit_name(unit) for unit in units]
                )
            )
        return
    if options.status:
        _status(workdir, chosen)
        return
    if on_slurm and options.cancel:
        jobs = slurm.cancel(slurm.submissions(_slurm_workdir()))
        print(f"cancelled: {', '.join(jobs) or 'nothing, there was none'}")
        return
    if on_tpus and options.cancel:
        _cancel()
        return
    try:
        if options.member:
            _run_unit(workdir, chosen)
            return
        known = {}
        if options.known:
            content = outcomes.read_known(options.known)
            known = outcomes.known_outcomes(content, every)
            print(outcomes.known_line(content, len(known), every), flush=True)
        failed, todo = [], []
        if not options.gather:
            if on_tpus:
                bucket.probe(options.workdir)
            run = {"local": _run_here, "slurm": _run_on_slurm, "tpu": _run_on_tpus}[options.backend]
            todo = [x for x in chosen if x.name not in known and not is_done(x)]
            print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them done", flush=True)
            work = _work(todo, is_done)
            failed = [x.name for name in run(work) for x in work.units[name] if not is_done(x)]
    except Interrupted as event:
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if not on_slurm or options.wait or options.gather or not todo:  # else they have only begun
        try:
            _gather(workdir, every, known, [member for member in every if is_done(member)])
        except (ValueError, OSError) as error:
            if not failed:
                raise
            print(f"nothing is gathered: {command.said(error)}", flush=True)
    if failed:
        text = f"{len(failed)} of {len(chosen)} runs failed: {', '.join(failed)}"
        way_out = "; --retry submits them again" if on_slurm else ""
        sys.exit(f"launch/sweep.py: {text}{way_out}")


if __name__ == "__main__":
    command.start("launch/sweep.py", define_flags, main)
