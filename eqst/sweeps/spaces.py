"""What a sweep is over, for the sweep() of a config file: grids, zips, random draws, named levels.

A space is a list of levels, and a level a name and what it changes of the config, dotted key by
dotted key; so spaces are joined by `+`, and `runs` makes of them what sweep() yields:

    def sweep():
        rates = {"train.learning_rate": spaces.log_uniform(1e-4, 1e-2)}
        levels = spaces.named({"as it is": {}}) + spaces.random(rates, count=20)
        yield from spaces.runs("learning rate", levels, seeds=range(3))

configs/search.py is an example.
"""

from __future__ import annotations

import itertools
import math
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Level = tuple[str, dict[str, Any]]
# From a number in 0 .. 1 to a value: the inverse of a cumulative distribution.
Distribution = Callable[[float], Any]

DIGITS = 4  # of drawn numbers: a level's name then says all of its values, on any machine


class SpaceError(ValueError):
    """A space that cannot be: one line with the value and the way out."""


def named(levels: Mapping[str, Mapping[str, Any]]) -> list[Level]:
    """Levels by their names."""
    return [(name, dict(changes)) for name, changes in levels.items()]


def grid(values: Mapping[str, Iterable[Any]]) -> list[Level]:
    """Every combination of the keys' values; the last key changes fastest.

    Raises:
      SpaceError: a key has one value in the place of a list.
    """
    columns = [_listed(f"grid: {key}", column) for key, column in values.items()]
    return _levels(values, itertools.product(*columns))


def zipped(values: Mapping[str, Iterable[Any]]) -> list[Level]:
    """The first values of all keys, then the second ones, and so on.

    Raises:
      SpaceError: the keys have different numbers of values, or one that is no list of them.
    """
    columns = {key: _listed(f"zipped: {key}", column) for key, column in values.items()}
    counts = {key: len(column) for key, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise SpaceError(
            f"sweep: {', '.join(f'{key} has {n}' for key, n in counts.items())} values: "
            "what is zipped needs as many of each"
        )
    return _levels(values, zip(*columns.values(), strict=True))


def random(distributions: Mapping[str, Distribution], *, count: int, seed: int = 0) -> list[Level]:
    """`count` draws, each key independent of the others.

    What level k has at a key is a function of (seed, k, key) alone: with a larger count, or another
    key, the draws that were there stay as they are, and runs that are done stay done.

    Args:
      distributions: of each key: `uniform`, `log_uniform`, `integers`, `choice`, or any function of
        a number in 0 .. 1.
      count: how many.
      seed: of the draws; not of the runs, whose seeds `runs` is given.

    Raises:
      SpaceError: there are none to draw, or a key has something else than a distribution.
    """
    if count < 1:
        raise SpaceError(f"sweep: {count} random draws asked for: take 1 or more")
    for key, draw in distributions.items():
        if not callable(draw):
            raise SpaceError(
                f"sweep: random: {key} is {draw!r}: give a distribution, as choice([1, 2]) is"
            )
    rows = [
        [draw(_unit(seed, k, key)) for key, draw in distributions.items()] for k in range(count)
    ]
    levels = _levels(distributions, rows)
    return [(f"{k}: {name}", changes) for k, (name, changes) in enumerate(levels)]


def uniform(low: float, high: float) -> Distribution:
    """Between two numbers.

    Raises:
      SpaceError: they are not ascending.
    """
    if not low < high:
        raise SpaceError(f"sweep: uniform({low}, {high}): the first has to be the lower one")
    return lambda share: _rounded(low + share * (high - low))


def log_uniform(low: float, high: float) -> Distribution:
    """Between two positive numbers, every octave as likely as another.

    Raises:
      SpaceError: they are not positive and ascending.
    """
    if not 0 < low < high:
        raise SpaceError(f"sweep: log_uniform({low}, {high}): give 0 < the lower < the higher")
    return lambda share: _rounded(low * (high / low) ** share)


def integers(low: int, high: int) -> Distribution:
    """A whole number from `low` to `high`, both among them, all as likely.

    Raises:
      SpaceError: they are not whole, or not ascending.
    """
    try:
        first, last = operator.index(low), operator.index(high)
    except TypeError:
        raise SpaceError(f"sweep: integers({low!r}, {high!r}): give two whole numbers") from None
    if not first < last:
        raise SpaceError(f"sweep: integers({low}, {high}): the first has to be the lower one")
    return lambda share: min(first + int(share * (last - first + 1)), last)


def choice(values: Iterable[Any]) -> Distribution:
    """One of these, all as likely.

    Raises:
      SpaceError: there is none.
    """
    known = _listed("what choice takes", values)
    if not known:
        raise SpaceError("sweep: choice([]): give at least one value")
    return lambda share: known[min(int(share * len(known)), len(known) - 1)]


def crossed(*parts: Sequence[Level]) -> list[Level]:
    """Every combination of the levels of spaces; the last one changes fastest.

    Raises:
      SpaceError: two of them change the same key.
    """
    combined = []
    for levels in itertools.product(*parts):
        keys = [key for _, changes in levels for key in changes]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise SpaceError(f"sweep: crossed spaces both change {', '.join(twice)}: leave one out")
        name = ", ".join(name for name, _ in levels)
        combined.append((name, {k: x for _, changes in levels for k, x in changes.items()}))
    return combined


def runs(
    factor: str, levels: Iterable[Level], *, seeds: Iterable[int] = (0,)
) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """What sweep() yields: each level with each seed, all levels of one seed before the next, so
    that a sweep stopped early has fewer seeds of all of it.

    Results are compared with the first level.

    Args:
      factor: what the levels are compared as; a folder and a table of that name.
      levels: of a space.
      seeds: of the runs.

    Raises:
      SpaceError: two levels have one name, or `seeds` is no list.
    """
    levels, seeds = list(levels), _listed("seeds", seeds)
    names = [name for name, _ in levels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpaceError(f"sweep: {factor} has two levels named {twice[0]!r}: name them apart")
    for seed in seeds:
        for name, changes in levels:
            yield factor, name, seed, dict(changes)


def plain(value: Any) -> Any:
    """A value with what is numpy's, in tuples and lists too, as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _listed(what: str, values: Any) -> tuple[Any, ...]:
    """Values that are many; a text is one, and would be read letter by letter."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise SpaceError(f"sweep: {what} is {values!r}: give a list of values, as in [1, 2]")
    return tuple(values)


def _levels(keys: Iterable[str], rows: Iterable[Sequence[Any]]) -> list[Level]:
    """Levels named by their values, 'learning_rate=0.001, hidden=256'."""
    keys, rows = tuple(keys), [plain(tuple(row)) for row in rows]
    last = [key.rpartition(".")[2] for key in keys]
    short = [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
    return [
        (
            ", ".join(f"{name}={value}" for name, value in zip(short, row, strict=True)),
            dict(zip(keys, row, strict=True)),
        )
        for row in rows
    ]


def _unit(seed: int, k: int, key: str) -> float:
    """A number in 0 .. 1 that is a function of its arguments."""
    entropy = (seed, k, zlib.crc32(key.encode()))
    return float(np.random.default_rng(entropy).random())


def _rounded(value: float) -> float:
    """To `DIGITS` significant digits."""
    return value if value == 0 else round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))
