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
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import config_flags

from eqst import card, charts, command, comparison, config, corpus, evaluate, files, trials
from eqst.record import clock
from eqst.train import EXIT_INTERRUPTED, FREE_KEYS, Interrupted, differing_keys, train

TRIES = 2  # of a run that fails
VALID = "cross-validation"  # the column of errors on held-out train talkers
# A run's own error on held-out train talkers is of the same pairs as another's unless these differ.
OTHER_PAIRS = re.compile(
    r"eq_table|data\.(sources|source_weights|manifest|permissive_only|folds|protocol"
    r"|segment_seconds|context_seconds|synthetic_.*|min_loudness_lufs|sample_rate)"
)


class Place(NamedTuple):
    """What a run stands for: a level of a factor with a seed; `index` is its order in sweep()."""

    factor: str
    level: str
    seed: int
    index: int


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, "factor/level/seed" made safe for a path.
      config: its settings.
      places: everything it stands for.
    """

    name: str
    config: config.Config
    places: tuple[Place, ...]


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
    expanded = module["sweep"](*([argument] if colon else []))
    for index, (factor, level, seed, changes) in enumerate(expanded):
        settings = base.copy_and_resolve_references()
        settings.seed = seed
        try:
            settings.update_from_flattened_dict(changes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise config.ConfigError(f"sweep: {factor}/{level} cannot be set: {error}") from None
        made = config.validate(settings)
        key = json.dumps(config.as_dict(made), sort_keys=True)
        place = Place(factor, level, seed, index)
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


def done(workdir: pathlib.Path, member: Member, data: str = "", manifest: str = "") -> bool:
    """Whether a member has been trained and evaluated, with these settings, on these recordings.

    One of other settings or with a damaged card is not done: training will refuse its folder, or
    mend it, and say why. One that was evaluated on other recordings is evaluated again.
    """
    folder = workdir / member.name
    if not (folder / "heldout" / "errors.csv").is_file():
        return False
    try:
        stored = config.from_card(card.card_of(folder)["config"])
        results = json.loads((folder / "heldout" / "results.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    if "recordings" in results and results["recordings"] != [data, manifest]:
        return False
    return not differing_keys(_result_settings(stored), _result_settings(member.config))


def prepare(members: list[Member], data: str, manifest: str) -> None:
    """Makes the stores of all corpora once, before many processes would each make their own."""
    seen = set()
    for member in members:
        selected, split = evaluate.select(member.config, data, manifest, "dev")
        for chosen, name in ((member.config.data, "train"), (selected, split)):
            key = dataclasses.replace(chosen, folds=0, fold=0)
            if key not in seen:
                seen.add(key)
                corpus.open_corpus(chosen, name, functools.partial(print, flush=True))


def run_member(workdir: pathlib.Path, member: Member, data: str, manifest: str) -> None:
    """Trains and evaluates one member, or what is left of it."""
    say = functools.partial(print, flush=True)
    folder = workdir / member.name
    train(member.config, folder, say)
    run = trials.open_run(folder)
    selected, split = evaluate.select(member.config, data, manifest, "dev")
    held_out = corpus.open_corpus(selected, split, say)
    results, errors = evaluate.evaluate(
        run, held_out, held_out, with_baselines=False, with_audio=False, say=say
    )
    facts = {"commit": run.commit, "step": run.step, "machine": evaluate.machine()}
    results = {**facts, "recordings": [data, manifest], **results}
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
    workdir: pathlib.Path,
    waiting: list[Member],
    is_done: Callable[[Member], bool],
    *,
    jobs: int,
    minutes: float,
) -> list[str]:
    """Runs members, `jobs` processes at a time; the names of those that failed.

    A member is a process of its own: one that fails is tried again at the end and takes no other
    down. SIGTERM, SIGINT or the end of `minutes` (0: none) stop all of them, saved; so does the end
    of this process, whatever it is.

    Raises:
      Interrupted: stopped; the same command goes on.
    """
    running: dict[str, tuple[Member, subprocess.Popen, float]] = {}
    try:
        return _run_all(workdir, list(waiting), running, is_done, jobs, minutes)
    finally:
        _end(running)


def _run_all(
    workdir: pathlib.Path,
    waiting: list[Member],
    running: dict[str, tuple[Member, subprocess.Popen, float]],
    is_done: Callable[[Member], bool],
    jobs: int,
    minutes: float,
) -> list[str]:
    every = len(waiting)
    tries = dict.fromkeys((member.name for member in waiting), 0)
    failed: list[str] = []
    finished, began = 0, time.monotonic()
    stop = Interruption()
    while waiting or running:
        late = minutes > 0 and time.monotonic() - began > 60 * minutes
        if stop.name or late:
            why = stop.name or f"the {minutes:g} minutes are over"
            raise Interrupted(f"{why}: {finished} of {every} done; the same command goes on")
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
            if code == 0 and is_done(member):
                finished += 1
                spent = time.monotonic() - began
                left = spent / finished * (len(waiting) + len(running))
                line = f"{finished}/{every}  {name}  {seconds:.0f} s  left {clock(left)}"
                print(line, flush=True)
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
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--member={member.name}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells its children
        )


def _leave_with_parent() -> None:
    """Has this process told to save and leave when the sweep that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


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


class Outcome(NamedTuple):
    """What is kept of a member that is done, from its folder or from an earlier sweep.json.

    Attributes:
      columns: errors of each pair, by column such as "plain 3 s".
      talkers: whose the pairs are, by column.
      facts: commit, machine, step, and the error on the train talkers held out.
    """

    columns: dict[str, list[float]]
    talkers: dict[str, list[str]]
    facts: dict[str, Any]


def outcome(workdir: pathlib.Path, member: Member) -> Outcome:
    """Reads what a member left in its folder."""
    folder = workdir / member.name / "heldout"
    columns: dict[str, list[float]] = {}
    talkers: dict[str, list[str]] = {}
    with open(folder / "errors.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = f"{row['protocol']} {row['seconds']} s"
            columns.setdefault(name, []).append(round(float(row["shape_rmse_db"]), 3))
            talkers.setdefault(name, []).append(row["talker"])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = card.metrics_of(workdir / member.name)
    # Of the checkpoint that was evaluated: the best one on the train talkers it did not train on.
    valid = [row["valid_shape_db"] for row in rows if "valid_shape_db" in row]
    facts = {name: results[name] for name in ("commit", "machine", "step")}
    return Outcome(
        columns, talkers, {**facts, "cross_validation_db": min(valid) if valid else None}
    )


def known_outcomes(path: str, members: list[Member]) -> dict[str, Outcome]:
    """Members that an earlier sweep.json has, with the settings they have now, by name.

    Raises:
      ValueError: the file is none of a sweep.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        stored = {entry["settings"]: entry for entry in content["members"]}
        talkers, found = content["talkers"], {}
        for member in members:
            key = _settings_hash(member)
            if key in stored:
                errors = {
                    name: [float(word) for word in text.split()]
                    for name, text in stored[key]["errors"].items()
                }
                found[member.name] = Outcome(errors, talkers, stored[key]["facts"])
        return found
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"--known={path} is no sweep.json ({error!r}): name one") from None


def known_line(path: str, known: int, members: list[Member]) -> str:
    """How many runs a sweep.json knows, and what stands in the way if it is none."""
    line = f"known: {known} of the {len(members)} runs, by their settings"
    stored = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if known or "first_settings" not in stored:
        return line
    differing = differing_keys(stored["first_settings"], _result_settings(members[0].config))
    return f"{line}; its first run differs from this one's in {'; '.join(differing) or 'nothing'}"


def _result_settings(settings: config.Config) -> dict[str, Any]:
    """The settings, but for what changes no result."""
    plain = config.as_dict(settings)
    for key in (*FREE_KEYS, "train.checkpoint_every"):
        group, name = key.split(".")
        plain[group].pop(name)
    return plain


def _settings_hash(member: Member) -> str:
    return card.digest(json.dumps(_result_settings(member.config), sort_keys=True))[:16]


def gather(members: list[Member], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Tables of everything that is done.

    Raises:
      ValueError: nothing is done yet, or not everything was judged on the same pairs.
    """
    finished = [member for member in members if member.name in outcomes]
    if not finished:
        raise ValueError("no run of the sweep is done yet")
    talkers = outcomes[finished[0].name].talkers
    if any(outcomes[member.name].talkers != talkers for member in finished):
        raise ValueError("the runs were judged on different pairs: give all the same --data")
    at = {place[:3]: member for member in finished for place in member.places}
    places = sorted((place for member in members for place in member.places), key=lambda x: x.index)
    order = dict.fromkeys((place.factor, place.level) for place in places)
    levels: dict[str, dict[str, dict[str, comparison.Level]]] = {}
    skipped: set[str] = set()  # factors whose first level is missing
    first_pairs: dict[str, str] = {}  # a factor's first level's, by factor
    for factor, level in order:
        seeds = tuple(sorted(place[2] for place in at if place[:2] == (factor, level)))
        if not seeds and factor not in levels:
            skipped.add(factor)
        if not seeds or factor in skipped:
            continue
        own = [at[factor, level, seed] for seed in seeds]
        columns = {
            name: comparison.Level(
                seeds,
                np.array([outcomes[member.name].columns[name] for member in own]),
                np.array(talkers[name]),
                own[0].config.eq_table,  # whose labels the pairs have
                _kind(own[0]),
            )
            for name in talkers
        }
        valid = [outcomes[member.name].facts["cross_validation_db"] for member in own]
        pairs = _pairs_of(own[0])
        if None not in valid and (factor not in first_pairs or first_pairs[factor] == pairs):
            # One number a run: its interval is of the seeds and folds alone.
            columns[VALID] = comparison.Level(
                seeds, np.array(valid)[:, None], np.array(["all"]), pairs, _kind(own[0])
            )
        first_pairs.setdefault(factor, pairs)
        levels.setdefault(factor, {})[level] = columns
    return {
        "command": command.line("launch/sweep.py"),
        "commit": card.commit(),
        "machines": sorted({outcomes[member.name].facts["machine"] for member in finished}),
        "budget": _budget(finished),
        "data": _data(finished),
        "columns": [*talkers, VALID],
        "first_settings": _result_settings(members[0].config),
        "tables": comparison.tables(levels),
        "talkers": talkers,
        "members": [
            {
                "name": member.name,
                "settings": _settings_hash(member),
                "places": [list(place[:3]) for place in member.places],
                "facts": outcomes[member.name].facts,
                "errors": {
                    name: " ".join(f"{x:.3f}" for x in errors)
                    for name, errors in outcomes[member.name].columns.items()
                },
            }
            for member in finished
        ],
    }


def _pairs_of(member: Member) -> str:
    """What decides the pairs of train talkers that a run holds out, but for the fold (a seed's)."""
    own = config.as_dict(member.config)
    own["data"]["segment_seconds"] = own["data"]["segment_seconds"][:1]  # what is held out has this
    lines = differing_keys(config.as_dict(config.Config()), own)
    return "; ".join(line for line in lines if OTHER_PAIRS.match(line.split(":")[0]))


def _kind(member: Member) -> str:
    """Runs that vary alike from seed to seed: those on linear features do so far more."""
    return member.config.features.scale


def _data(finished: list[Member]) -> str:
    """What the first run was trained on, in words."""
    data = finished[0].config.data
    shares = zip(data.sources, data.source_weights, strict=True)
    text = " and ".join(f"{source} ({weight:g})" for source, weight in shares)
    text += ", permissive rows alone" if data.permissive_only else ""
    held = f"a seed holds out one of {data.folds} folds" if data.folds else "no folds"
    return f"{text}, {data.synthetic_talkers} synthetic talkers where there are any; {held}"


def _budget(finished: list[Member]) -> str:
    """What the runs took, in words."""
    first = finished[0].config.train
    pairs = sum(x.config.train.steps * x.config.train.batch_size for x in finished)
    return (
        f"{first.steps:,} steps of {first.batch_size} pairs a run where nothing else is said; "
        f"{len(finished)} runs, {pairs:,} pairs in all"
    )


def _heading(content: dict[str, Any], path: str) -> str:
    """What stands over the tables in their file."""
    title = pathlib.Path(path.partition(":")[0]).stem.replace("_", " ")
    made = f"`{content['command']}` at commit {content['commit'][:7]}"
    return f"""# {title.capitalize()}

Made by {made}. {content["budget"]}. Data: {content["data"]}.

Shape RMSE in dB: mean (95 % interval), then the difference from the factor's first level with its
interval, bold where that excludes 0 and a test against other seeds, adjusted for all comparisons of
its column (Holm), says so too. Behind a level stands its number of seeds; with one, the noise of
seeds is taken from the levels that have several.

"""


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
    flags.DEFINE_string("known", "", "A sweep.json from elsewhere: its runs count as done.")
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
            _leave_with_parent()
            run_member(workdir, own[0], options.data, options.manifest)
            return
        outcomes = known_outcomes(options.known, every) if options.known else {}
        if options.known:
            print(known_line(options.known, len(outcomes), every), flush=True)
        is_done = functools.partial(done, workdir, data=options.data, manifest=options.manifest)
        failed = []
        if not options.gather:
            todo = [x for x in members if x.name not in outcomes and not is_done(x)]
            print(f"{len(members)} runs, {len(members) - len(todo)} of them done", flush=True)
            prepare(todo, options.data, options.manifest)
            failed = run_all(workdir, todo, is_done, jobs=options.jobs, minutes=options.minutes)
    except Interrupted as event:
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    here = [member for member in every if is_done(member)]
    content = gather(every, {**outcomes, **{x.name: outcome(workdir, x) for x in here}})
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "sweep.json", content)
    text = comparison.table_text(content["tables"], content["columns"])
    files.write_text(workdir / "table.md", _heading(content, path) + text)
    print("\n" + text)
    try:
        charts.sweep(content, workdir / "sweep.png")
    except ImportError as error:
        print(f"note: no picture, {error}")
    print(f"gathered: {workdir}/sweep.json, table.md")
    if failed:
        sys.exit(
            f"launch/sweep.py: {len(failed)} of {len(members)} runs failed: {', '.join(failed)}"
        )


if __name__ == "__main__":
    command.start("launch/sweep.py", define_flags, main)
