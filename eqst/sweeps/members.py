"""What a sweep expands to: runs named for what they stand for, equal settings as one.

A config file has, beside get_config(), a generator sweep() of (factor, level, seed, changes): what
each run changes of the config, dotted key by dotted key. A run lives in a folder of its own,
WORKDIR/FACTOR/LEVEL/SEED, which says by itself whether it is done.
"""

from __future__ import annotations

import json
import operator
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from eqst import card, config, learner
from eqst.config import FREE_KEYS, differing_keys
from eqst.sweeps import spaces

# Of a part of a name: what file systems take is 255, of some that encrypt names 143.
MOST_CHARACTERS, DIGEST_CHARACTERS = 120, 12


class Place(NamedTuple):
    """What a run stands for: a level of a factor with a seed, in the `order` of sweep()."""

    factor: str
    level: str
    seed: int
    order: int


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, "factor/level/seed" made safe for a path; a long part is cut.
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
      ConfigError: no sweep() there, it fails or yields no run, it changes what is no setting, or
        two runs of other settings would have one folder.
      SpaceError: a space of it cannot be.
    """
    members: dict[str, Member] = {}
    for index, (factor, level, seed, changes) in enumerate(_yielded(path)):
        settings = base.copy_and_resolve_references()
        settings.seed = seed
        try:
            with settings.unlocked():  # what is no setting `validate` says best
                settings.update_from_flattened_dict(changes)
            made = config.validate(settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise config.ConfigError(f"sweep: {factor}/{level} cannot be set: {error}") from None
        key = json.dumps(config.as_dict(made), sort_keys=True)
        place = Place(factor, level, seed, index)
        name = "/".join(_safe(part) for part in (factor, level, str(seed)))
        if key in members:
            known = members[key]
            members[key] = known._replace(places=(*known.places, place))
        else:
            members[key] = Member(name, made, (place,))
    if not members:
        raise config.ConfigError(f"--config={path}: sweep() yields no run: have it yield one")
    by_name: dict[str, Member] = {}
    for member in members.values():
        other = by_name.setdefault(member.name, member)
        if other is not member:
            first, second = other.places[0], member.places[0]
            raise config.ConfigError(
                f"sweep: {first.factor}/{first.level} and {second.factor}/{second.level} of seed "
                f"{second.seed} are other settings of one folder, {member.name}: rename one"
            )
    return list(members.values())


def _yielded(path: str) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """What a config file's sweep() yields, with Python's numbers in the place of numpy's."""
    file, colon, argument = path.partition(":")
    module = runpy.run_path(file)
    if "sweep" not in module:
        raise config.ConfigError(
            f"--config={file} has no generator sweep(): see configs/ablation.py"
        )
    try:
        entries = list(module["sweep"](*([argument] if colon else [])))
    except spaces.SpaceError:
        raise
    except Exception as error:  # it is a program, which may raise anything
        lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
        where = f" in line {lines[-1]}" if lines else ""
        said = f"{type(error).__name__}{where}: {error}"
        raise config.ConfigError(f"--config={path}: sweep() fails ({said}): mend it") from None
    for entry in entries:
        match entry:
            case (str(factor), str(level), seed, Mapping() as changes):
                pass
            case _:
                raise config.ConfigError(
                    f"sweep: {entry!r} was yielded: give (factor, level, seed, changes), which are "
                    "two texts, a whole number and a dict"
                )
        try:
            number = operator.index(seed)
        except TypeError:
            raise config.ConfigError(
                f"sweep: {factor}/{level} has the seed {seed!r}: give a whole number"
            ) from None
        yield factor, level, number, {key: spaces.plain(x) for key, x in changes.items()}


def _safe(text: str) -> str:
    """A part of a path that any file system and shell takes; a long one ends in its digest."""
    safe = re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"
    if len(safe) <= MOST_CHARACTERS:
        return safe
    digest = card.digest(text)[:DIGEST_CHARACTERS]
    return f"{safe[: MOST_CHARACTERS - DIGEST_CHARACTERS - 1]}-{digest}"


def done(workdir: epath.Path, member: Member, data: str = "", manifest: str = "") -> bool:
    """Whether a member has been trained and evaluated, with these settings, on these recordings.

    `workdir` is a folder or in a bucket.
    One of other settings or with a damaged card is not done: training will refuse its folder, or
    mend it, and say why. One that was evaluated on other recordings is evaluated again.
    """
    folder = workdir / member.name
    if not (folder / "heldout" / "errors.csv").is_file():
        return False
    try:
        stored = config.from_card(card.card_of(folder)["config"])
        results = json.loads((folder / "heldout" / "results.json").read_text())
    except (ValueError, OSError):
        return False
    if "recordings" in results and results["recordings"] != [data, manifest]:
        return False
    return not differing_keys(result_settings(stored), result_settings(member.config))


def result_settings(settings: config.Config) -> dict[str, Any]:
    """The settings, but for what changes no result."""
    plain = config.as_dict(settings)
    for key in (*FREE_KEYS, "train.checkpoint_every"):
        group, name = key.split(".")
        plain[group].pop(name)
    return plain


def settings_hash(member: Member) -> str:
    return card.digest(json.dumps(result_settings(member.config), sort_keys=True))[:16]


def chosen(members: list[Member], pattern: str) -> list[Member]:
    try:
        chosen = [member for member in members if re.search(pattern, member.name)]
    except re.error as error:
        raise ValueError(f"--only={pattern} is no regular expression ({error})") from None
    if not chosen:
        raise ValueError(f"--only={pattern} fits none of the {len(members)} runs: see --dry_run")
    return chosen


def named(members: list[Member], names: str) -> list[Member]:
    """The members of names, with commas between them.

    Raises:
      ValueError: there is no such run.
    """
    by_name = {member.name: member for member in members}
    for name in names.split(","):
        if name not in by_name:
            raise ValueError(f"--member={name}: the sweep has no such run, see --dry_run")
    return [by_name[name] for name in names.split(",")]


def changes(member: Member, base: config.Config) -> str:
    """What a member's settings change of the sweep's base, 'key: old -> new; ..'."""
    found = differing_keys(config.as_dict(base), config.as_dict(member.config))
    return "; ".join(found) or "as the config"


def units(chosen: list[Member], most: int) -> dict[str, list[Member]]:
    """Runs that are started together, by the name of the first: up to `most` as one program.

    Together are those that differ in `learner.KNOBS` alone and train from the resident path; what
    cannot share a program is a unit of its own.
    """
    found: dict[str, list[Member]] = {}
    open_units: dict[str, list[Member]] = {}
    for member in chosen:
        program = json.dumps(learner.program(result_settings(member.config)), sort_keys=True)
        unit = open_units[program] if program in open_units else []
        resident = member.config.data.pipeline == "resident"
        if unit and len(unit) < most and resident:
            unit.append(member)
        else:
            found[member.name] = open_units[program] = [member]
    return found
