"""What the runs of a sweep came to: from their folders or an earlier sweep.json, compared."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from eqst import card, command, comparison, config
from eqst.config import differing_keys
from eqst.sweeps.members import Member, result_settings, settings_hash

VALID = "cross-validation"  # the column of errors on held-out train talkers
# A run's own error on held-out train talkers is of the same pairs as another's unless these differ.
OTHER_PAIRS = re.compile(
    r"eq_table|data\.(sources|source_weights|manifest|permissive_only|folds|protocol"
    r"|segment_seconds|context_seconds|synthetic_.*|min_loudness_lufs|sample_rate)"
)
# Likewise its errors on held-out talkers, in a column of one protocol and length; --data, where it
# is given, stands in the place of the run's own sources.
OTHER_HELD_OUT = r"eq_table|evaluation\.(pairs|seed)|data\.(min_loudness_lufs|sample_rate)"
OTHER_SOURCES = r"data\.(sources|source_weights|manifest|permissive_only|synthetic_.*)"


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


def outcome(workdir: epath.Path, member: Member) -> Outcome:
    """Reads what a member left in its folder, which may be in a bucket."""
    folder = workdir / member.name / "heldout"
    columns: dict[str, list[float]] = {}
    talkers: dict[str, list[str]] = {}
    for row in csv.DictReader(io.StringIO((folder / "errors.csv").read_text())):
        name = f"{row['protocol']} {row['seconds']} s"
        columns.setdefault(name, []).append(round(float(row["shape_rmse_db"]), 3))
        talkers.setdefault(name, []).append(row["talker"])
    results = json.loads((folder / "results.json").read_text())
    rows = card.metrics_of(workdir / member.name)
    # Of the checkpoint that was evaluated: the best one on the train talkers it did not train on.
    valid = [row["valid_shape_db"] for row in rows if "valid_shape_db" in row]
    facts = {name: results[name] for name in ("commit", "machine", "step")}
    return Outcome(
        columns, talkers, {**facts, "cross_validation_db": min(valid) if valid else None}
    )


def read_known(path: str) -> dict[str, Any]:
    """An earlier sweep.json.

    Raises:
      ValueError: the file is none of a sweep.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        for entry in content["members"]:
            _stored(entry, content)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"--known={path} is no sweep.json ({error!r}): name one") from None
    return content


def _stored(entry: dict[str, Any], content: dict[str, Any]) -> tuple[str, Outcome]:
    """One run of a sweep.json: the hash of its settings, what it came to."""
    errors = {name: [float(x) for x in text.split()] for name, text in entry["errors"].items()}
    talkers = (entry if "talkers" in entry else content)["talkers"]
    return entry["settings"], Outcome(errors, talkers, entry["facts"])


def known_outcomes(content: dict[str, Any], members: list[Member]) -> dict[str, Outcome]:
    """Members that an earlier sweep.json has, with the settings they have now, by name."""
    stored = dict(_stored(entry, content) for entry in content["members"])
    keys = {member.name: settings_hash(member) for member in members}
    return {name: stored[key] for name, key in keys.items() if key in stored}


def known_line(content: dict[str, Any], known: int, members: list[Member]) -> str:
    """How many runs a sweep.json knows, and what stands in the way if it is none."""
    line = f"known: {known} of the {len(members)} runs, by their settings"
    if known or "first_settings" not in content:
        return line
    differing = differing_keys(content["first_settings"], result_settings(members[0].config))
    return f"{line}; its first run differs from this one's in {'; '.join(differing) or 'nothing'}"


def gather(members: list[Member], outcomes: dict[str, Outcome], data: str = "") -> dict[str, Any]:
    """Tables of everything that is done.

    Levels that were judged on other pairs than the first of their factor stand beside it, without a
    difference.

    Args:
      members: of the sweep.
      outcomes: of those that are done, by name.
      data: the folder whose recordings they were judged on; "": their own held-out ones.

    Raises:
      ValueError: nothing is done yet, or seeds of one level were judged on different pairs.
    """
    finished = [member for member in members if member.name in outcomes]
    if not finished:
        raise ValueError("no run of the sweep is done yet")
    names = list(dict.fromkeys(name for x in finished for name in outcomes[x.name].columns))
    talkers = outcomes[finished[0].name].talkers
    at = {place[:3]: member for member in finished for place in member.places}
    places = sorted((place for member in members for place in member.places), key=lambda x: x.order)
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
        own_talkers = outcomes[own[0].name].talkers
        for member in own[1:]:
            if outcomes[member.name].talkers != own_talkers:
                raise ValueError(
                    f"{own[0].name} and {member.name} were judged on different pairs: give all "
                    "seeds of a level the same --data"
                )
        columns = {
            name: comparison.Level(
                seeds,
                np.array([outcomes[member.name].columns[name] for member in own]),
                np.array(own_talkers[name]),
                _held_out_of(own[0], data),
                _kind(own[0]),
            )
            for name in own_talkers
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
        "columns": [*names, VALID],
        "first_settings": result_settings(members[0].config),
        "tables": comparison.tables(levels),
        "talkers": talkers,
        "members": [
            {
                "name": member.name,
                "settings": settings_hash(member),
                "places": [list(place[:3]) for place in member.places],
                "facts": outcomes[member.name].facts,
                "errors": {
                    name: " ".join(f"{x:.3f}" for x in errors)
                    for name, errors in outcomes[member.name].columns.items()
                },
                **(
                    {}
                    if outcomes[member.name].talkers == talkers
                    else {"talkers": outcomes[member.name].talkers}
                ),
            }
            for member in finished
        ],
    }


def _pairs_of(member: Member) -> str:
    """What decides the pairs of train talkers that a run holds out, but for the fold (a seed's)."""
    own = config.as_dict(member.config)
    own["data"]["segment_seconds"] = own["data"]["segment_seconds"][:1]  # what is held out has this
    return _unusual(own, OTHER_PAIRS)


def _held_out_of(member: Member, data: str) -> str:
    """What decides the held-out talkers' pairs of a column, beside the recordings of `data`."""
    which = OTHER_HELD_OUT if data else f"{OTHER_HELD_OUT}|{OTHER_SOURCES}"
    return _unusual(config.as_dict(member.config), re.compile(which))


def _unusual(settings: dict[str, Any], which: re.Pattern) -> str:
    """Which of the settings named are not the defaults, and what they are."""
    lines = differing_keys(config.as_dict(config.Config()), settings)
    return "; ".join(line for line in lines if which.fullmatch(line.split(":")[0]))


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


def heading(content: dict[str, Any], path: str) -> str:
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
