"""Runs a sweep on this machine and gathers it: python launch/sweep.py --config=FILE --workdir=DIR

The config file has, beside get_config(), a generator sweep() of (factor, level, seed, changes):
what each run changes of the config, dotted key by dotted key. A run is trained and evaluated in a folder
of its own, DIR/FACTOR/LEVEL/SEED; runs with equal settings are one. The same command goes on where
it stopped: what is done is skipped, what was interrupted resumes. At the end, and with --gather at
any time, DIR gets sweep.json, table.txt and sweep.png: means over seeds with 95 % intervals, and
each level's difference from the first of its factor.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import config_flags

from eqst import card, charts, command, comparison, config, corpus, evaluate, files, record, trials
from eqst.record import clock
from eqst.train import EXIT_INTERRUPTED, Interrupted, differing_keys, train

TRIES = 2  # of a run that fails
# A run's own error on held-out train talkers is of the same pairs as another's unless these differ.
OTHER_PAIRS = re.compile(
    r"eq_table|data\.(sources|source_weights|manifest|permissive_only|folds|fold|protocol"
    r"|segment_seconds|context_seconds|synthetic_.*|min_loudness_lufs|sample_rate)"
)


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, "factor/level/seed" made safe for a path.
      config: its settings.
      places: every (factor, level, seed) it stands for.
    """

    name: str
    config: config.Config
    places: tuple[tuple[str, str, int], ...]


def expand(path: str, base: Any) -> list[Member]:
    """The members of a config file's sweep(), runs with equal settings as one.

    Args:
      path: of the config file, perhaps with ":ARGUMENT", which get_config and sweep are given.
      base: the ConfigDict of get_config(), with --config.key=value applied.

    Raises:
      ConfigError: no sweep() there, or it changes what is no setting.
    """
    file, colon, argument = path.partition(":")
    module = runpy.run_path(file)
    if "sweep" not in module:
        raise config.ConfigError(
            f"--config={file} has no generator sweep(): see configs/ablation.py"
        )
    members: dict[str, Member] = {}
    for factor, level, seed, changes in module["sweep"](*([argument] if colon else [])):
        settings = base.copy_and_resolve_references()
        settings.seed = seed
        try:
            settings.update_from_flattened_dict(changes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise config.ConfigError(f"sweep: {factor}/{level} cannot be set: {error}") from None
        made = config.validate(settings)
        key = json.dumps(config.as_dict(made), sort_keys=True)
        place = (factor, level, seed)
        name = "/".join(_safe(part) for part in (factor, level, str(seed)))
        if key in members:
            known = members[key]
            members[key] = known._replace(places=(*known.places, place))
        else:
            members[key] = Member(name, made, (place,))
    return list(members.values())


def _safe(text: str) -> str:
    """A part of a path that any file system and shell takes."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"


def done(workdir: pathlib.Path, member: Member) -> bool:
    """Whether a member has been trained and evaluated."""
    return (workdir / member.name / "heldout" / "errors.csv").is_file()


def run_member(workdir: pathlib.Path, member: Member, data: str, manifest: str) -> None:
    """Trains and evaluates one member, or what is left of it."""
    say = functools.partial(print, flush=True)
    folder = workdir / member.name
    train(member.config, folder, say)
    run = trials.open_run(folder)
    selected, split = evaluate.select(run, data, manifest, "dev")
    held_out = corpus.open_corpus(selected, split, say)
    results, errors = evaluate.evaluate(
        run, held_out, held_out, with_baselines=False, with_audio=False, say=say
    )
    results = {"commit": run.commit, "step": run.step, "machine": evaluate.machine(), **results}
    with files.result_folder(folder / "heldout", overwrite=True) as output:
        files.write_json(output / "results.json", results)
        # Last: it is what makes the member count as done.
        files.write_text(output / "errors.csv", evaluate.errors_text(errors))


# --- the local backend ---------------------------------------------------------------------------


class Interruption:
    """Remembers that the sweep was told to stop."""

    def __init__(self) -> None:
        """From here on SIGTERM and SIGINT are remembered."""
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self.name = signal.Signals(number).name


def run_all(
    workdir: pathlib.Path, members: list[Member], *, jobs: int, minutes: float
) -> list[str]:
    """Runs what is not done, `jobs` processes at a time; the names of those that failed.

    A member is a process of its own: one that fails is tried again at the end and takes no other
    down. SIGTERM, SIGINT or the end of `minutes` (0: none) stop all of them, saved.

    Raises:
      Interrupted: stopped; the same command goes on.
    """
    waiting = [member for member in members if not done(workdir, member)]
    skipped = len(members) - len(waiting)
    print(f"{len(members)} runs, {skipped} of them done", flush=True)
    tries = dict.fromkeys((member.name for member in members), 0)
    running: dict[str, tuple[Member, subprocess.Popen, float]] = {}
    failed: list[str] = []
    finished, began = 0, time.monotonic()
    stop = Interruption()
    while waiting or running:
        late = minutes > 0 and time.monotonic() - began > 60 * minutes
        if stop.name or late:
            _end(running)
            why = stop.name or f"the {minutes:g} minutes are over"
            raise Interrupted(f"{why}: {skipped + finished} runs done; the same command goes on")
        while waiting and len(running) < jobs:
            member = waiting.pop(0)
            tries[member.name] += 1
            running[member.name] = (member, _start(workdir, member, jobs), time.monotonic())
        for name, (member, process, since) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[name]
            seconds = time.monotonic() - since
            if code == 0 and done(workdir, member):
                finished += 1
                spent = time.monotonic() - began
                left = spent / finished * (len(waiting) + len(running))
                total = skipped + finished
                print(
                    f"{total}/{len(members)}  {name}  {seconds:.0f} s  left {clock(left)}",
                    flush=True,
                )
            elif tries[name] < TRIES:
                print(
                    f"{name}: failed ({_last_line(workdir, member)}); once more later", flush=True
                )
                waiting.append(member)
            else:
                print(f"{name}: FAILED ({_last_line(workdir, member)})", flush=True)
                failed.append(name)
        time.sleep(0.2)
    return failed


def _start(workdir: pathlib.Path, member: Member, jobs: int) -> subprocess.Popen:
    folder = workdir / member.name
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if jobs > 1:  # several processes share an accelerator's memory
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    words = [word for word in sys.argv[1:] if not word.startswith("--overwrite")]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, *words, f"--member={member.name}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells its children
        )


def _end(running: dict[str, tuple[Member, subprocess.Popen, float]]) -> None:
    """Tells every run to save and leave, and waits for them."""
    for _, process, _ in running.values():
        process.terminate()
    deadline = time.monotonic() + 60
    for _, process, _ in running.values():
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(workdir: pathlib.Path, member: Member) -> str:
    """What a failed run said last."""
    text = (workdir / member.name / "log.txt").read_text(errors="replace").strip()
    return text.splitlines()[-1][:200] if text else "no word"


# --- gathering -----------------------------------------------------------------------------------


def _errors(path: pathlib.Path) -> dict[str, tuple[list[str], list[float]]]:
    """{column: (talkers, errors)} of the model from an errors.csv, such as "plain 3 s"."""
    columns: dict[str, tuple[list[str], list[float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = f"{row['protocol']} {row['seconds']} s"
            talkers, errors = columns.setdefault(name, ([], []))
            talkers.append(row["talker"])
            errors.append(float(row["shape_rmse_db"]))
    return columns


def _valid(workdir: pathlib.Path, member: Member) -> float:
    """Its error on the train talkers it did not train on, of the checkpoint that was evaluated."""
    rows, _ = record.read_metrics(workdir / member.name / record.METRICS_NAME)
    return min(row["valid_shape_db"] for row in rows if "valid_shape_db" in row)


def gather(workdir: pathlib.Path, members: list[Member]) -> dict[str, Any]:
    """Tables of everything that is done.

    Raises:
      ValueError: nothing is done yet.
    """
    finished = [member for member in members if done(workdir, member)]
    if not finished:
        raise ValueError(f"{workdir}: no run of the sweep is done yet")
    at = {place: member for member in finished for place in member.places}
    order = dict.fromkeys((place[0], place[1]) for member in members for place in member.places)
    bases: dict[str, str] = {}
    levels: dict[str, dict[str, dict[str, comparison.Level]]] = {}
    read = {
        member.name: _errors(workdir / member.name / "heldout/errors.csv") for member in finished
    }
    for factor, level in order:
        bases.setdefault(factor, level)
        seeds = [place[2] for place in at if place[:2] == (factor, level)]
        if not seeds:
            continue
        seeds.sort()
        own = [at[factor, level, seed] for seed in seeds]
        columns = {}
        for column in read[own[0].name]:
            rows = [read[member.name][column] for member in own]
            columns[column] = comparison.Level(
                tuple(seeds), np.array([row[1] for row in rows]), np.array(rows[0][0])
            )
        base = (factor, bases[factor], seeds[0])
        if base in at and _same_pairs(at[base], own[0]):
            valid_S1 = np.array([[_valid(workdir, member)] for member in own])
            columns["cross-validation"] = comparison.Level(
                tuple(seeds), valid_S1, np.array(["all"])
            )
        levels.setdefault(factor, {})[level] = columns
    levels = {factor: rows for factor, rows in levels.items() if bases[factor] in rows}
    columns = list(dict.fromkeys(c for rows in levels.values() for x in rows.values() for c in x))
    machines = sorted({_results(workdir, member)["machine"] for member in finished})
    return {
        "command": command.line("launch/sweep.py").replace("-m ", ""),
        "commit": card.read_card(workdir / finished[0].name)["commit"],
        "machine": machines,
        "budget": _budget(workdir, finished),
        "data": _data(finished),
        "runs": len(finished),
        "columns": columns,
        "tables": comparison.tables(levels),
        "members": [_facts(workdir, member, read[member.name]) for member in finished],
    }


def _results(workdir: pathlib.Path, member: Member) -> dict[str, Any]:
    return json.loads((workdir / member.name / "heldout/results.json").read_text(encoding="utf-8"))


def _same_pairs(a: Member, b: Member) -> bool:
    changed = differing_keys(config.as_dict(a.config), config.as_dict(b.config))
    return not any(OTHER_PAIRS.match(line.split(":")[0]) for line in changed)


def _data(finished: list[Member]) -> dict[str, Any]:
    data = dataclasses.asdict(finished[0].config.data)
    keys = ("sources", "source_weights", "permissive_only", "synthetic_talkers", "folds")
    return {key: data[key] for key in keys}


def _budget(workdir: pathlib.Path, finished: list[Member]) -> dict[str, Any]:
    train_config = finished[0].config.train
    pairs = sum(m.config.train.steps * m.config.train.batch_size for m in finished)
    return {
        "steps": train_config.steps,
        "batch_size": train_config.batch_size,
        "runs": len(finished),
        "pairs_of_all_runs": pairs,
    }


def _facts(workdir: pathlib.Path, member: Member, errors: dict) -> dict[str, Any]:
    """One member for the record: where it stands, its errors and those of each talker."""
    talkers, values = next(iter(errors.values()))
    means: dict[str, list[float]] = {}
    for talker, value in zip(talkers, values, strict=True):
        means.setdefault(talker, []).append(value)
    return {
        "name": member.name,
        "places": [list(place) for place in member.places],
        "step": _results(workdir, member)["step"],
        "cross_validation_db": round(_valid(workdir, member), 4),
        "mean_db": {c: round(float(np.mean(x[1])), 4) for c, x in errors.items()},
        "talker_mean_db": {t: round(float(np.mean(x)), 3) for t, x in sorted(means.items())},
    }


# --- the command ---------------------------------------------------------------------------------


def define_flags() -> None:
    """The command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file with sweep(); --config.key=value.")
    flags.DEFINE_string("workdir", None, "Folder of the sweep; the same folder goes on.")
    flags.DEFINE_string("data", "", "Folder of held-out recordings; default: the runs' own split.")
    flags.DEFINE_string("manifest", "", "CSV with path and split for --data.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
    flags.DEFINE_float("minutes", 0.0, "Stop, saved, after so long; 0: never.", lower_bound=0.0)
    flags.DEFINE_string("only", "", "Runs whose name has this regular expression in it.")
    flags.DEFINE_bool("dry_run", False, "Name the runs and what they change, and do nothing.")
    flags.DEFINE_bool("gather", False, "Only gather what is done.")
    flags.DEFINE_string("member", "", "Run this one alone (what the command starts itself).")
    flags.mark_flags_as_required(["config", "workdir"])


def _chosen(members: list[Member], pattern: str) -> list[Member]:
    try:
        chosen = [member for member in members if re.search(pattern, member.name)]
    except re.error as error:
        raise ValueError(f"--only={pattern} is no regular expression ({error})") from None
    if not chosen:
        raise ValueError(f"--only={pattern} fits none of the {len(members)} runs: see --dry_run")
    return chosen


def _dry_lines(members: list[Member], base: config.Config) -> Iterator[str]:
    plain = config.as_dict(base)
    for member in members:
        yield f"{member.name}: {'; '.join(differing_keys(plain, config.as_dict(member.config)))}"


def main() -> None:
    """The command."""
    options = flags.FLAGS
    workdir = pathlib.Path(options.workdir)
    path = options["config"].config_filename
    every = expand(path, options.config)
    members = _chosen(every, options.only)
    if options.dry_run:
        print("\n".join(_dry_lines(members, config.validate(options.config))))
        return
    try:
        if options.member:
            own = [member for member in every if member.name == options.member]
            if not own:
                raise ValueError(f"--member={options.member}: the sweep has no such run")
            run_member(workdir, own[0], options.data, options.manifest)
            return
        failed = []
        if not options.gather:
            failed = run_all(workdir, members, jobs=options.jobs, minutes=options.minutes)
    except Interrupted as event:
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    content = gather(workdir, members)
    files.write_json(workdir / "sweep.json", content)
    text = comparison.table_text(content["tables"], content["columns"])
    files.write_text(workdir / "table.txt", text)
    print("\n" + text)
    try:
        charts.sweep(content, workdir / "sweep.png")
    except ImportError as error:
        print(f"note: no picture, {error}")
    print(f"gathered: {workdir}/sweep.json, table.txt")
    if failed:
        sys.exit(
            f"launch/sweep.py: {len(failed)} of {len(members)} runs failed: {', '.join(failed)}"
        )


if __name__ == "__main__":
    command.start("launch/sweep.py", define_flags, main)
