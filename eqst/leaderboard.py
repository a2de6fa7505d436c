"""Scores of the open benchmark, kept in one JSON that takes rows from anywhere.

tasks        [{name, about, pairs, sha256, talkers}]: sha256 of the pairs' hashes; talkers, the
             number of each pair's talker, as text
headline     the task that rows are sorted by
leaderboard  [{method, kind, figures: {task: {mean, low, high}}, seconds_per_pair}]: shape RMSE
             in dB (the predicted level where there is no EQ), mean and 95 % interval; kind is
             model, baseline, oracle or program; the time is the headline's, or the mean over
             tasks where that was not scored
methods      {method: {kind, scores: {task: score}}}: all that was measured; a score holds the
             figures, what was asked (facts), command, commit, machine, failures, how many pairs
             differ from the published ones, and errors_db, the error of each pair, as text
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import soundfile

from eqst import baselines, eq, files, metrics, settings
from eqst.tasks import HEADLINE, SAMPLE_RATE, SEED, TABLE, TASKS, Pair, Task, TasksError, digest

FORMAT = 1
FILES = ("leaderboard.json", "leaderboard.txt")
SHOWN_FAILURES = 5
MARKS = "*: pairs that are not the published ones, ~: fewer pairs than other rows"


def empty() -> dict[str, Any]:
    """A leaderboard without rows."""
    return {
        "format": FORMAT,
        "headline": HEADLINE.name,
        "tasks": [],
        "leaderboard": [],
        "methods": {},
    }


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a leaderboard; raises TasksError where it is none."""
    name = repr(os.fspath(path))
    try:
        board = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if board["format"] != FORMAT:
            raise ValueError(f"its format is {board['format']!r}, not {FORMAT}")
        _arrange(board)
        table_text(board)
        _talkers(board)
        for method in board["methods"].values():
            for score in method["scores"].values():
                score["sha256"], score["pairs"], score["differing_pairs"], score["facts"]
                score["errors_db"].split()
    except OSError as error:
        raise TasksError(f"{name} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TasksError(
            f"{name} is no leaderboard ({type(error).__name__}: {error}): move it away"
        ) from None
    return board


def _talkers(board: dict[str, Any]) -> dict[str, list[str]]:
    """The number of each pair's talker, by task."""
    return {row["name"]: row["talkers"].split() for row in board["tasks"]}


def load_or_empty(folder: pathlib.Path) -> dict[str, Any]:
    """The leaderboard of a folder."""
    path = folder / FILES[0]
    return load(path) if path.exists() else empty()


def score(
    answer: baselines.Prediction,
    unit_nKP: np.ndarray,
    talker_n: Sequence[str],
    *,
    failures: Sequence[str],
    seconds_per_pair: float,
) -> dict[str, Any]:
    """The figures of one method on one task.

    Args:
      answer: its curves [n, F] and, where it has them, settings.
      unit_nKP: the true settings in the unit cube.
      talker_n: whose recording the input is.
      failures: a line for each pair it had no answer to (scored as a flat curve).
      seconds_per_pair: cost.
    """
    true = eq.from_unit(TABLE, unit_nKP.astype(np.float64))
    errors = metrics.curve_errors(answer.curve_db_nF, baselines.settings_curve(true, SAMPLE_RATE))
    names = np.asarray(talker_n)
    figures: dict[str, Any] = {
        name: _rounded(metrics.summarise(errors[name], names, SEED)._asdict())
        for name in ("shape_rmse_db", "shape_mae_db", "shape_max_db")
    }
    shares = metrics.shares_within(errors["shape_rmse_db"])
    figures["share_within_db"] = {f"{bound:g}": share for bound, share in shares.items()}
    if answer.params is not None:
        for name, values_nK in metrics.parameter_errors(answer.params, true).items():
            if not np.isnan(values_nK).all():
                figures[f"{name}_error"] = round(float(np.nanmean(values_nK)), 4)
    if "ess" in answer.extra:
        figures["ess_p10"] = round(float(np.percentile(answer.extra["ess"], 10)), 1)
    return {
        "figures": figures,
        "seconds_per_pair": float(f"{seconds_per_pair:.3g}"),
        "failures": len(failures),
        "failure_lines": list(failures[:SHOWN_FAILURES]),
        "errors_db": " ".join(f"{x:.3f}" for x in errors["shape_rmse_db"]),
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


def has(
    board: dict[str, Any],
    method: str,
    task: Task,
    count: int,
    sha256: str | None,
    facts: dict[str, Any],
) -> bool:
    """Whether a method was scored on these pairs, or on more of the same list."""
    try:
        found = board["methods"][method]["scores"][task.name]
    except KeyError:
        return False
    same = found["pairs"] > count or (found["pairs"] == count and found["sha256"] == sha256)
    return same and found["facts"] == facts


def check_same(board: dict[str, Any], method: str, facts: dict[str, Any]) -> None:
    """Raises TasksError where a row of this name is of another model or program."""
    if method not in board["methods"]:
        return
    for task, score in board["methods"][method]["scores"].items():
        if score["facts"] != facts:
            raise TasksError(
                f"the row {method!r} is of another ({task}: {score['facts']}, here {facts}): give "
                "--name for a row of its own, or --overwrite to score it anew"
            )


def add(
    board: dict[str, Any],
    method: str,
    kind: str,
    task: Task,
    pairs: Sequence[tuple[str, str]],
    entry: dict[str, Any],
) -> None:
    """Puts a score in its place, and rows and tasks in order.

    Args:
      board: changed in place.
      method, kind, task: whose score of what.
      pairs: hash and talker of each pair.
      entry: from `score`, and what else belongs beside it (facts, command, commit, machine).
    """
    hashes = [sha for sha, _ in pairs]
    numbers = {name: i for i, name in enumerate(sorted({talker for _, talker in pairs}))}
    row = {
        "name": task.name,
        "about": task.about,
        "pairs": len(pairs),
        "sha256": digest(hashes),
        "talkers": " ".join(str(numbers[talker]) for _, talker in pairs),
    }
    known = {old["name"]: old for old in board["tasks"]}
    if task.name not in known or known[task.name]["pairs"] <= row["pairs"]:
        known[task.name] = row
    board["tasks"] = list(known.values())
    methods = board["methods"].setdefault(method, {"kind": kind, "scores": {}})
    methods["kind"] = kind
    methods["scores"][task.name] = {"pairs": len(pairs), "sha256": digest(hashes), **entry}
    _arrange(board)


def _arrange(board: dict[str, Any]) -> None:
    """Makes the rows from the scores: by error on the headline, those with fewer pairs than others
    had after them, then those that were not scored on it; oracles come last."""
    order = {name: i for i, name in enumerate(_task_order(board))}
    board["tasks"].sort(key=lambda row: order[row["name"]])
    rows = []
    for method, found in board["methods"].items():
        scores = dict(sorted(found["scores"].items(), key=lambda item: order[item[0]]))
        found["scores"] = scores
        times = [entry["seconds_per_pair"] for entry in scores.values()]
        head = board["headline"]
        rows.append(
            {
                "method": method,
                "kind": found["kind"],
                "figures": {
                    task: {
                        key: entry["figures"]["shape_rmse_db"][key]
                        for key in ("mean", "low", "high")
                    }
                    for task, entry in scores.items()
                },
                "seconds_per_pair": (
                    scores[head]["seconds_per_pair"]
                    if head in scores
                    else float(f"{np.mean(times):.3g}")
                ),
            }
        )

    pairs = {row["name"]: row["pairs"] for row in board["tasks"]}

    def place(row: dict[str, Any]) -> tuple:
        scores, head = board["methods"][row["method"]]["scores"], board["headline"]
        if head not in scores:
            return row["kind"] == "oracle", 2, 0.0, row["method"]
        few = scores[head]["pairs"] < pairs[head]  # not to be ranked among the others
        return row["kind"] == "oracle", int(few), row["figures"][head]["mean"], row["method"]

    board["leaderboard"] = sorted(rows, key=place)
    board["methods"] = {
        row["method"]: board["methods"][row["method"]] for row in board["leaderboard"]
    }


def _task_order(board: dict[str, Any]) -> list[str]:
    """The standard tasks in their order, then those of other manifests."""
    names = [task.name for task in TASKS]
    present = [row["name"] for row in board["tasks"]]
    return [n for n in names if n in present] + sorted(set(present) - set(names))


def merge(board: dict[str, Any], other: dict[str, Any], *, overwrite: bool) -> list[str]:
    """Takes another leaderboard's scores, in place; a line for each that was left out.

    Raises:
      TasksError: a task of the same name has other pairs there. (Pairs that are not the
        manifest's, by another library's rounding, are marked and no reason.)
    """
    notes = []
    here, there = _published(board), _published(other)
    for key in here.keys() & there.keys():
        if here[key] != there[key]:
            raise TasksError(
                f"--merge: {key[0]} has other pairs there ({there[key][:12]}, here "
                f"{here[key][:12]}): keep it in a folder of its own, or score both here"
            )
    tasks = {row["name"]: row for row in board["tasks"]}
    for row in other["tasks"]:
        if row["name"] not in tasks or tasks[row["name"]]["pairs"] < row["pairs"]:
            tasks[row["name"]] = row
    board["tasks"] = list(tasks.values())
    for method, found in other["methods"].items():
        scores = board["methods"].setdefault(method, {"kind": found["kind"], "scores": {}})[
            "scores"
        ]
        for task, entry in found["scores"].items():
            if task in scores and scores[task] != entry and not overwrite:
                notes.append(f"{method}, {task}: kept as it was (--overwrite takes the other)")
            else:
                scores[task] = entry
    _arrange(board)
    return notes


def _published(board: dict[str, Any]) -> dict[tuple[str, int], str]:
    """The hash of the first so many pairs of a task, by both, where all were the manifest's."""
    return {
        (task, score["pairs"]): score["sha256"]
        for method in board["methods"].values()
        for task, score in method["scores"].items()
        if not score["differing_pairs"]
    }


def compare(board: dict[str, Any], first: str, second: str) -> dict[str, metrics.Difference]:
    """The first method's error less the second's, pair by pair, on every task both have.

    Raises:
      TasksError: a method is not there, they have no task in common, or as many other pairs.
    """
    for name in (first, second):
        if name not in board["methods"]:
            there = ", ".join(board["methods"]) or "none"
            raise TasksError(f"--compare: no method {name!r} in the leaderboard (there: {there})")
    talkers = _talkers(board)
    a, b = (board["methods"][name]["scores"] for name in (first, second))
    out = {}
    for task in (name for name in a if name in b):
        errors = [np.array(x[task]["errors_db"].split(), float) for x in (a, b)]
        count = min(len(errors[0]), len(errors[1]))
        if len(errors[0]) == len(errors[1]) and a[task]["sha256"] != b[task]["sha256"]:
            raise TasksError(
                f"--compare: {first} and {second} were asked other pairs of {task}: score both here"
            )
        out[task] = metrics.paired_difference(
            errors[0][:count], errors[1][:count], np.array(talkers[task][:count]), SEED
        )
    if not out:
        raise TasksError(f"--compare: {first} and {second} have no task in common")
    return out


def write(folder: pathlib.Path, board: dict[str, Any]) -> None:
    """leaderboard.json and leaderboard.txt."""
    text = table_text(board)
    files.write_json(folder / FILES[0], board)
    files.write_text(folder / FILES[1], text)


def marks(score: dict[str, Any], pairs: int) -> str:
    """What stands behind a figure, as MARKS says; `pairs` is how many the task has."""
    return ("*" if score["differing_pairs"] else "") + ("~" if score["pairs"] < pairs else "")


def table_text(board: dict[str, Any]) -> str:
    """Every row, one block for each source, with `marks`."""
    lines = [f"shape RMSE in dB, mean (95 % interval over talkers and pairs); {MARKS}", ""]
    for source in dict.fromkeys(row["name"].split("-")[0] for row in board["tasks"]):
        columns = [row for row in board["tasks"] if row["name"].split("-")[0] == source]
        heads = [row["name"][len(source) + 1 :] for row in columns]
        lines.append(f"{source:<16}" + "".join(f"{head:>22}" for head in heads))
        for row in board["leaderboard"]:
            cells = []
            for column in columns:
                name = column["name"]
                if name not in row["figures"]:
                    cells.append("")
                    continue
                x = row["figures"][name]
                entry = board["methods"][row["method"]]["scores"][name]
                text = f"{x['mean']:.2f} ({x['low']:.2f}-{x['high']:.2f})"
                cells.append(text + marks(entry, column["pairs"]))
            if any(cells):
                lines.append(f"{row['method']:<16}" + "".join(f"{cell:>22}" for cell in cells))
        lines.append("")
    lines.append("seconds per pair")
    lines += [
        f"{row['method']:<16}{row['seconds_per_pair']:>10.3g}" for row in board["leaderboard"]
    ]
    return "\n".join(lines) + "\n"


def export(folder: pathlib.Path, task: Task, made: Iterable[Pair]) -> int:
    """Writes pairs as 16-bit WAV files and their truth as truth.json, for people with other tools.

    Returns:
      how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in made:
        names = {key: f"{pair.number:03d}_{key}.wav" for key in ("input", "reference")}
        for key, samples_T in (("input", pair.input_T), ("reference", pair.reference_T)):
            soundfile.write(folder / names[key], samples_T, SAMPLE_RATE, "PCM_16")
        params = eq.from_unit(TABLE, pair.unit_KP.astype(np.float64))
        true = settings.from_params(params, SAMPLE_RATE)
        rows.append(
            {
                **names,
                "talker": pair.talker,
                "reference_talker": pair.reference_talker,
                "sha256": pair.sha256,
                "bands": [vars(band) for band in true.bands],
            }
        )
    files.write_json(
        folder / "truth.json",
        {"task": task.name, "about": task.about, "sample_rate": SAMPLE_RATE, "pairs": rows},
    )
    return len(rows)
