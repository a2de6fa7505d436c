"""The open benchmark of EQ matching: fixed pairs with known curves, one command to score anything.

python -m eqst.benchmark --predictor=packaged,baselines --output=DIR [--data=FOLDER]
python -m eqst.benchmark --program='CMD {input} {reference} {output}.json' --output=DIR

--predictor takes "packaged", folders of runs, names of baselines, or "baselines" for all of them.
A program is given two WAV files and writes settings (JSON) or the equalised input (.wav). Scores
are added to DIR/leaderboard.json; what is scored already is skipped, so the same command goes on.
"""

from __future__ import annotations

import difflib
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from eqst import baselines, card, command, contestants, corpus, eq, files, leaderboard, pairs, tasks
from eqst.contestants import BASELINES, UNTUNED, Answer, AnswerError, Listener
from eqst.evaluate import machine
from eqst.evidence import Evidence, stack
from eqst.tasks import STORED_PAIRS, Manifest, Pair, Task, TasksError

Say = Callable[[str], None]
GIVE_UP_AFTER = 3  # pairs, all of which a program failed on
TOLD_EVERY_S = 20.0


class Source:
    """A manifest with its recordings, opened when they are first asked for."""

    def __init__(self, manifest: Manifest, folder: str, workers: int, say: Say):
        self.manifest, self.workers = manifest, workers
        self._folder, self._say = folder, say
        self._open: dict[str, corpus.Corpus] = {}
        self._tuned: dict[tuple[float, str, bool], baselines.Fitted] = {}

    def recordings(self, split: str) -> corpus.Corpus:
        """The split's recordings; raises TasksError as `tasks.open_recordings`."""
        if split not in self._open:
            self._open[split] = tasks.open_recordings(
                self.manifest, split, folder=self._folder, workers=self.workers, say=self._say
            )
        return self._open[split]

    def tuned(self, task: Task) -> baselines.Fitted:
        """The baselines for this task; tasks of the same kind share them."""
        key = task.seconds, task.protocol, task.different
        if key not in self._tuned:
            self._say(f"{task.name}: tuning the baselines")
            self._tuned[key] = contestants.tune(
                task, self.recordings("train"), workers=self.workers
            )
        return self._tuned[key]

    def pairs(self, task: Task, count: int) -> Iterable[Pair]:
        """The first pairs of a task, with a line from time to time."""
        told = time.monotonic()
        made = tasks.make_pairs(task, self.recordings("dev"), count, workers=self.workers)
        for done, pair in enumerate(made):
            if time.monotonic() - told > TOLD_EVERY_S:
                self._say(f"{task.name}: {done} of {count} pairs")
                told = time.monotonic()
            yield pair

    def differing(self, task: Task, hashes: list[str]) -> int:
        """How many of the first pairs have another hash than the manifest says."""
        stored = self.manifest.hashes[task.name]
        different = [a[: tasks.HASH_DIGITS] != b for a, b in zip(hashes, stored, strict=False)]
        if any(different):
            self._say(
                f"note: {task.name}: {sum(different)} of {len(hashes)} pairs are not the published "
                "ones (another version of a library, or processor?); their scores are marked"
            )
        return sum(different)


class Asked(NamedTuple):
    """What came of asking n pairs one by one.

    Attributes:
      pairs: (hash, talker) of each pair.
      unit_nKP: the true settings.
      answers, seconds, failures: of each listener, by name.
      input, reference: what baselines hear, or None where none is asked; `listening` seconds.
    """

    pairs: list[tuple[str, str]]
    unit_nKP: np.ndarray
    answers: dict[str, list[Answer | None]]
    seconds: dict[str, float]
    failures: dict[str, list[str]]
    input: Evidence | None
    reference: Evidence | None
    listening: float


def ask(task: Task, made: Iterable[Pair], listeners: list[Listener], *, hear: bool) -> Asked:
    """Asks every listener about every pair.

    Args:
      task: whose pairs they are.
      made: the pairs.
      listeners: models and programs.
      hear: whether to take the baselines' evidence.

    Raises:
      TasksError: a listener failed on each of the first three pairs.
    """
    found, units = [], []
    answers: dict[str, list[Answer | None]] = {one.name: [] for one in listeners}
    seconds = {one.name: 0.0 for one in listeners}
    failures: dict[str, list[str]] = {one.name: [] for one in listeners}
    heard: tuple[list[Evidence], list[Evidence]] = ([], [])
    listening = 0.0
    for pair in made:
        found.append((pair.sha256, pair.talker))
        units.append(pair.unit_KP)
        for one in listeners:
            answer = None
            try:
                if one.kind == "model" and pair.number == 0:
                    one.answer(pair, task)  # compiles
                began = time.perf_counter()
                answer = one.answer(pair, task)
            except AnswerError as error:
                failures[one.name].append(f"pair {pair.number}: {error}")
                if len(failures[one.name]) == pair.number + 1 == GIVE_UP_AFTER:
                    raise TasksError(
                        f"{one.name} answered none of the first {GIVE_UP_AFTER} pairs of "
                        f"{task.name}; {failures[one.name][0]}"
                    ) from None
            seconds[one.name] += time.perf_counter() - began
            answers[one.name].append(answer)
        if hear:
            began = time.perf_counter()
            heard[0].append(contestants.listen(pair.input_T))
            heard[1].append(contestants.listen(pair.reference_T))
            listening += time.perf_counter() - began
    input_n, reference_n = (stack(mine) if mine else None for mine in heard)
    unit_nKP = np.stack(units)
    return Asked(found, unit_nKP, answers, seconds, failures, input_n, reference_n, listening)


def score_task(
    source: Source,
    task: Task,
    listeners: list[Listener],
    names: list[str],
    count: int,
    keep: Callable[[str, str, list[tuple[str, str]], dict[str, Any]], None],
    say: Say,
) -> None:
    """Scores models, programs and baselines on one task; `keep` takes each score when it is there.

    Baselines that cannot be tuned (too few train talkers) are left out with a line.
    """
    asked = ask(task, source.pairs(task, count), listeners, hear=bool(names))
    hashes = [sha for sha, _ in asked.pairs]
    talker_n = [talker for _, talker in asked.pairs]
    common = {"differing_pairs": source.differing(task, hashes)}

    def scored(name: str, kind: str, answer: Any, lines: list[str], cost: float) -> None:
        entry = leaderboard.score(
            answer, asked.unit_nKP, talker_n, failures=lines, seconds_per_pair=cost / count
        )
        keep(name, kind, asked.pairs, entry | common)
        shape = entry["figures"]["shape_rmse_db"]
        failed = f", {len(lines)} pairs without an answer ({lines[0]})" if lines else ""
        say(
            f"{task.name}: {name} {shape['mean']:.2f} dB ({shape['low']:.2f}-{shape['high']:.2f}), "
            f"{cost / count:.3g} s a pair{failed}"
        )

    for one in listeners:
        answer = contestants.gather(asked.answers[one.name])
        scored(one.name, one.kind, answer, asked.failures[one.name], asked.seconds[one.name])
    if not names:
        return
    assert asked.input is not None and asked.reference is not None
    true = eq.from_unit(tasks.TABLE, asked.unit_nKP.astype(np.float64))
    fitted = None
    if any(name not in UNTUNED for name in names):
        try:
            fitted = source.tuned(task)
        except (pairs.PairsError, TasksError, ValueError) as error:
            say(f"{task.name}: no tuned baselines, {error}")
            names = [name for name in names if name in UNTUNED]
    for name in names:
        heard = asked.input, asked.reference
        if not name.startswith("bayes"):  # compiled beforehand; of Bayes it is no cost to speak of
            first_in, first_ref = (Evidence(*(x[:1] for x in side)) for side in heard)
            first = eq.EqParams(*(x[:1] for x in true))
            contestants.ask_baseline(name, fitted, first_in, first_ref, first)
        began = time.perf_counter()
        answer = contestants.ask_baseline(name, fitted, *heard, true)
        cost = time.perf_counter() - began + (asked.listening if name not in UNTUNED else 0.0)
        scored(name, "oracle" if name in contestants.ORACLES else "baseline", answer, [], cost)


# ---- the command


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_string("output", "", "Folder of leaderboard.json and .txt; rows are added.")
    flags.DEFINE_list("predictor", [], "packaged, run folders, names of baselines, baselines.")
    flags.DEFINE_string("program", "", "Command with {input} {reference} {output}.json or .wav.")
    flags.DEFINE_string("name", "", "Row of the program or run; default: program, run's folder.")
    flags.DEFINE_float("timeout", 60.0, "Seconds a program has for a pair.", 0.01)
    flags.DEFINE_list("tasks", [], "Names, or their beginnings (speech, speech-3s).")
    flags.DEFINE_integer("pairs", STORED_PAIRS, "Of each task, from the first.", 2, STORED_PAIRS)
    flags.DEFINE_string("data", "", "Folder the files of a manifest lie in; without: synthetic.")
    flags.DEFINE_string("manifest", "", "Manifest (JSON) in place of speech and music.")
    flags.DEFINE_string("new_manifest", "", "Write this manifest of --list's files, and end.")
    flags.DEFINE_string("list", "", "CSV for it: path, speaker, split (dev, train).")
    flags.DEFINE_string("export", "", "Folder for the pairs as WAV files and truth.json.")
    flags.DEFINE_bool("check", False, "Make the pairs and compare their hashes; score nothing.")
    flags.DEFINE_list("merge", [], "leaderboard.json files whose scores to take into --output.")
    flags.DEFINE_list("compare", [], "Two methods of --output: their difference, pair by pair.")
    flags.DEFINE_integer("workers", 0, "Processes and threads that make pairs; 0: cores.", 0, 1024)
    flags.DEFINE_bool("overwrite", False, "Score again what is scored; take merged scores.")


def main() -> None:
    """The command."""
    options = flags.FLAGS
    say: Say = lambda line: print(line, flush=True)  # noqa: E731
    workers = options.workers or os.cpu_count() or 1
    if options.new_manifest:
        _new_manifest(options, workers, say)
        return
    scoring = bool(options.predictor or options.program)
    if not (scoring or options.merge or options.compare or options.export or options.check):
        raise ValueError("nothing to do: give --predictor, --program, --export or --check (--help)")
    if (scoring or options.merge or options.compare) and not options.output:
        raise ValueError("--output missing: give --output=.., the folder of the leaderboard")
    if len(options.compare) not in (0, 2):
        raise ValueError(f"--compare={','.join(options.compare)}: name two methods")
    if options.merge or options.compare:
        _merge_and_compare(options, say)
    if scoring or options.export or options.check:
        chosen = choose(sources(options, workers, say), options.tasks, options.pairs)
        if options.export:
            _export(options, chosen, say)
        if options.check:
            _check(options, chosen, say)
        if scoring:
            listeners, names = who(options)
            with files.result_folder(options.output, overwrite=True) as folder:
                _score(folder, options, chosen, listeners, names, say)


def sources(options: Any, workers: int, say: Say) -> list[Source]:
    """Where the pairs come from, by the options."""
    if options.manifest:
        manifests = [tasks.load_manifest(options.manifest)]
    else:
        names = ("speech", "music", "synthetic") if options.data else ("synthetic",)
        manifests = [tasks.standard(name) for name in names]
    return [Source(manifest, options.data, workers, say) for manifest in manifests]


def choose(found: list[Source], words: list[str], count: int) -> list[tuple[Source, Task]]:
    """The tasks of these sources that the words name (all without words), `count` pairs each.

    Raises:
      TasksError: a word names none; a manifest has hashes of fewer pairs.
    """
    known = [(source, task) for source in found for task in tasks.of_manifest(source.manifest)]
    names = [task.name for _, task in known]

    def meant(word: str) -> list[str]:
        """A task by its name; else those whose names begin so."""
        return [word] if word in names else [x for x in names if x.startswith(f"{word}-")]

    for word in words:
        if not meant(word):
            near = difflib.get_close_matches(word, names, n=3, cutoff=0.0)
            needs = "" if len(found) > 1 else " (--data=FOLDER brings speech and music)"
            raise TasksError(f"--tasks: none is {word!r}: the nearest are {', '.join(near)}{needs}")
    for source, task in known:
        stored = len(source.manifest.hashes[task.name])
        if stored < count:
            raise TasksError(f"--pairs={count}: the manifest has {stored} of {task.name}")
    wanted = {name for word in words for name in meant(word)} if words else set(names)
    return [(source, task) for source, task in known if task.name in wanted]


def who(options: Any) -> tuple[list[Listener], list[str]]:
    """Models and programs, and the names of baselines, that the options ask for."""
    listeners: list[Listener] = []
    names: list[str] = []
    for word in options.predictor:
        if word == "packaged":
            listeners.append(contestants.packaged())
        elif word == "baselines":
            names += BASELINES
        elif word in BASELINES:
            names.append(word)
        elif os.path.isdir(word) or card.is_exported(word):
            listeners.append(contestants.of_workdir(options.name, word))
        else:
            there = ", ".join(("packaged", "baselines", *BASELINES))
            raise ValueError(f"--predictor={word} is neither a run's folder nor one of {there}")
    if options.program:
        name = options.name or "program"
        listeners.append(contestants.program(name, options.program, options.timeout))
    taken = [one.name for one in listeners]
    for name in taken:
        if taken.count(name) > 1 or name in BASELINES:
            raise ValueError(f"two rows would be called {name!r}: score one at a time, with --name")
    return listeners, list(dict.fromkeys(names))


def _score(
    folder: pathlib.Path,
    options: Any,
    chosen: list[tuple[Source, Task]],
    listeners: list[Listener],
    names: list[str],
    say: Say,
) -> None:
    about = {"command": command.line("eqst.benchmark"), "commit": card.commit()}
    about["machine"] = f"{machine()}, load {os.getloadavg()[0]:.1f} before"
    facts: dict[str, dict[str, Any]] = {one.name: one.facts for one in listeners}
    tuned = {"tuning_pairs": contestants.TUNING_PAIRS}
    facts |= {name: {} if name in UNTUNED else tuned for name in names}
    if not options.overwrite:
        board = leaderboard.load_or_empty(folder)
        for one in listeners:
            leaderboard.check_same(board, one.name, one.facts)
    began, done = time.monotonic(), 0.0
    effort = [4.0 + task.seconds for _, task in chosen]  # of a pair, in proportion
    for number, (source, task) in enumerate(chosen):
        board = leaderboard.load_or_empty(folder)
        sha = tasks.expected(source.manifest, task, options.pairs)
        wanted = [
            name
            for name in facts
            if options.overwrite
            or not leaderboard.has(board, name, task, options.pairs, sha, facts[name])
        ]
        if not wanted:
            say(f"{task.name}: scored already")
            effort[number] = 0.0
            continue

        def keep(name: str, kind: str, found: list, entry: dict, task: Task = task) -> None:
            board = leaderboard.load_or_empty(folder)  # another command may have added rows
            leaderboard.add(board, name, kind, task, found, entry | {"facts": facts[name]} | about)
            leaderboard.write(folder, board)

        score_task(
            source,
            task,
            [one for one in listeners if one.name in wanted],
            [name for name in names if name in wanted],
            options.pairs,
            keep,
            say,
        )
        done += effort[number]
        left = (time.monotonic() - began) / done * sum(effort[number + 1 :])
        say(f"{task.name}: done; about {left / 60:.0f} min left")
    text = folder / leaderboard.FILES[1]
    if text.exists():
        say("\n" + text.read_text(encoding="utf-8") + str(text))


def _merge_and_compare(options: Any, say: Say) -> None:
    with files.result_folder(options.output, overwrite=True) as folder:
        board = leaderboard.load_or_empty(folder)
        for path in options.merge:
            for note in leaderboard.merge(
                board, leaderboard.load(path), overwrite=options.overwrite
            ):
                say(f"note: {note}")
        if options.merge:
            leaderboard.write(folder, board)
            say(leaderboard.table_text(board) + str(folder / leaderboard.FILES[0]))
        if options.compare:
            first, second = options.compare
            for task, x in leaderboard.compare(board, first, second).items():
                say(
                    f"{task:<34}{first} - {second}: {x.mean:+.3f} dB ({x.low:+.3f} .. "
                    f"{x.high:+.3f}), p {x.p:.3f}, {x.pairs} pairs"
                )


def _new_manifest(options: Any, workers: int, say: Say) -> None:
    target = pathlib.Path(options.new_manifest)
    files.check_target(target, overwrite=options.overwrite)
    source = target.stem
    if source == "synthetic":
        manifest = Manifest(source, (), {})
    elif options.list and options.data:
        manifest = tasks.list_files(source, options.data, options.list)
    else:
        raise ValueError("--new_manifest needs --list=CSV and --data=FOLDER as well")
    recordings = tasks.open_recordings(
        manifest, "dev", folder=options.data, workers=workers, say=say
    )
    manifest = tasks.hash_pairs(manifest, recordings, count=options.pairs, workers=workers, say=say)
    files.write_json(target, tasks.as_json(manifest), overwrite=options.overwrite)
    say(f"{target}: {len(manifest.files)} files, {len(manifest.hashes)} tasks")


def _export(options: Any, chosen: list[tuple[Source, Task]], say: Say) -> None:
    targets = [f"{task.name}/truth.json" for _, task in chosen]
    with files.result_folder(options.export, overwrite=options.overwrite) as folder:
        for target in targets:
            if (folder / target).exists() and not options.overwrite:
                raise ValueError(
                    f"'{folder / target}' exists already: name another, or --overwrite"
                )
        for source, task in chosen:
            made = source.pairs(task, options.pairs)
            count = leaderboard.export(folder / task.name, task, made)
            say(f"{folder / task.name}: {count} pairs")


def _check(options: Any, chosen: list[tuple[Source, Task]], say: Say) -> None:
    wrong = []
    for source, task in chosen:
        hashes = [pair.sha256 for pair in source.pairs(task, options.pairs)]
        if source.differing(task, hashes):
            wrong.append(task.name)
        else:
            say(f"{task.name}: {len(hashes)} pairs, {tasks.digest(hashes)[:16]}, as published")
    if wrong:
        raise TasksError(f"--check: pairs of {', '.join(wrong)} are not the published ones")


if __name__ == "__main__":
    command.start("eqst.benchmark", define_flags, main)
