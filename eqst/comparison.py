"""Variants compared over seeds, talkers and pairs: means, 95 % intervals, paired tests.

A member is one training run, a level some members that differ by their seed alone. All members are
judged on the same pairs, so that two levels are compared pair by pair and seed by seed.

Two things are left to chance, and both are in every interval. Which talkers and pairs were drawn:
bootstrap, talkers first, then the pairs of each. Which seed (and fold of the train talkers) a run
had: a deviation whose variance is pooled, as in an analysis of variance, over the levels of a sweep
that are of one kind and have two seeds or more. So a level with one seed has an honest, wide
interval too, as long as its kind varies alike. Its difference from another is taken to vary as if
the two runs had nothing in common: what a shared seed takes away is known of few levels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from eqst import metrics

RESAMPLES = 2000


class Level(NamedTuple):
    """The errors of one level: a row for each seed, a column for each pair.

    Attributes:
      seeds: [S] which seeds.
      error_SP: shape RMSE in dB.
      talker_P: whose the pairs are.
      pairs: what else decides the pairs; levels of other pairs are not compared.
      kind: which levels vary alike from seed to seed.
    """

    seeds: tuple[int, ...]
    error_SP: np.ndarray
    talker_P: np.ndarray
    pairs: str
    kind: str


class SeedNoise(NamedTuple):
    """How far one run's mean lies from its level's: standard deviation in dB, and its degrees of
    freedom (0: nothing is known of it, and intervals leave it out)."""

    deviation: float
    freedom: int


def seed_noise(means: list[np.ndarray]) -> SeedNoise:
    """Pooled over levels: `means` has one array [S] of seeds' means for each; single ones say
    nothing."""
    repeated = [mean_S for mean_S in means if len(mean_S) > 1]
    freedom = sum(len(mean_S) - 1 for mean_S in repeated)
    if freedom == 0:
        return SeedNoise(0.0, 0)
    squares = sum(float(np.sum((mean_S - mean_S.mean()) ** 2)) for mean_S in repeated)
    return SeedNoise(math.sqrt(squares / freedom), freedom)


def _noise_by_kind(groups: list[tuple[str, np.ndarray]]) -> dict[str, SeedNoise]:
    """`seed_noise` of every kind among (kind, [S, P]); of all together where a kind has no two
    seeds. What is there twice counts once: a factor's first level is mostly another's too."""
    once = {x_SP.tobytes(): (kind, x_SP.mean(axis=1)) for kind, x_SP in groups}.values()
    of_all = seed_noise([mean_S for _, mean_S in once])
    found = {}
    for kind in {kind for kind, _ in once}:
        own = seed_noise([mean_S for other, mean_S in once if other == kind])
        found[kind] = own if own.freedom else of_all
    return found


def _independent(first: SeedNoise, second: SeedNoise) -> SeedNoise:
    """Of the difference of two runs that share nothing."""
    deviation = math.hypot(first.deviation, second.deviation)
    return SeedNoise(deviation, min(first.freedom, second.freedom))


def interval(
    error_SP: np.ndarray, talker_P: np.ndarray, noise: SeedNoise, seed: int = 0
) -> dict[str, float]:
    """Mean over seeds and pairs, and its 95 % interval."""
    means_R = metrics.resampled_means(error_SP.mean(axis=0), talker_P, seed, RESAMPLES)
    if noise.freedom:
        rng = np.random.default_rng(seed + 1)
        scale = noise.deviation / math.sqrt(len(error_SP))
        means_R = means_R + scale * rng.standard_t(noise.freedom, len(means_R))
    low, high = np.percentile(means_R, [2.5, 97.5])
    return {"mean": float(error_SP.mean()), "low": float(low), "high": float(high)}


def comparable(level: Level, base: Level) -> bool:
    """Whether both have the same pairs, and a seed in common."""
    same = level.pairs == base.pairs and np.array_equal(level.talker_P, base.talker_P)
    return same and bool(set(level.seeds) & set(base.seeds))


def gaps(level: Level, base: Level) -> np.ndarray:
    """[S, P] level minus base on the seeds that both have.

    Raises:
      ValueError: they are not `comparable`.
    """
    if not comparable(level, base):
        raise ValueError("levels are compared on seeds and pairs that both have: there are none")
    common = [s for s in level.seeds if s in base.seeds]
    return np.stack(
        [level.error_SP[level.seeds.index(s)] - base.error_SP[base.seeds.index(s)] for s in common]
    )


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), against false alarms over all of them."""
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tables(
    levels: dict[str, dict[str, dict[str, Level]]],
) -> dict[str, list[dict[str, Any]]]:
    """One table for each factor: a row for each level, compared with the factor's first.

    Args:
      levels: {factor: {level: {column: Level}}}; a column is compared with the factor's first
        where they are `comparable`.

    Returns:
      {factor: [{level, base, seeds, figures: {column: mean, low, high}, differences: {column:
      mean, low, high, seeds, p, p_holm, clear}}]}. `p` is of a two-sided t-test of the seeds' mean
      difference against the pooled seed noise (None where no level has two seeds): whether another
      seed could have done it, on these talkers; `p_holm` counts all comparisons of a
      column. `clear`: neither other talkers and pairs (the interval excludes 0) nor other seeds
      (p_holm below 0.05) would explain it.
    """
    every = [columns for rows in levels.values() for columns in rows.values()]
    names = list(dict.fromkeys(name for columns in every for name in columns))
    compared: dict[str, dict[tuple[str, str], np.ndarray]] = {name: {} for name in names}
    kinds: dict[tuple[str, str], str] = {}  # of differences: of both sides
    for factor, rows in levels.items():
        base = next(iter(rows.values()))
        for level, columns in rows.items():
            for name in columns:
                if columns is not base and name in base and comparable(columns[name], base[name]):
                    compared[name][factor, level] = gaps(columns[name], base[name])
                    both = sorted({columns[name].kind, base[name].kind})
                    kinds[factor, level] = " and ".join(both)
    own_noise = {
        name: _noise_by_kind([(x[name].kind, x[name].error_SP) for x in every if name in x])
        for name in names
    }
    gap_noise = {
        name: _noise_by_kind([(kinds[place], gap_SP) for place, gap_SP in found.items()])
        for name, found in compared.items()
    }

    def noise_of(name: str, place: tuple[str, str], gap_SP: np.ndarray) -> SeedNoise:
        # Where a seed has one number, of pairs of its own, two levels share too much to be taken
        # as independent.
        if len(gap_SP) == 1 and gap_SP.size > 1:
            rows = levels[place[0]]
            sides = (rows[place[1]][name], next(iter(rows.values()))[name])
            found = _independent(*(own_noise[name][side.kind] for side in sides))
            if found.freedom:
                return found
        return gap_noise[name][kinds[place]]

    differences: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for name in names:
        found = differences[name] = {}
        for place, gap_SP in compared[name].items():
            noise = noise_of(name, place, gap_SP)
            found[place] = {
                **interval(gap_SP, levels[place[0]][place[1]][name].talker_P, noise),
                "seeds": len(gap_SP),
                "p": _p_value(gap_SP, noise),
            }
        tested = [row for row in found.values() if row["p"] is not None]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p
        for row in found.values():
            known = "p_holm" in row and row["p_holm"] < 0.05
            row["clear"] = bool(known and row["low"] * row["high"] > 0)
    return {
        factor: [
            {
                "level": level,
                "base": row == 0,
                "seeds": max(len(x.seeds) for x in columns.values()),
                "figures": {
                    name: interval(x.error_SP, x.talker_P, own_noise[name][x.kind])
                    for name, x in columns.items()
                },
                "differences": {
                    name: differences[name][factor, level]
                    for name in columns
                    if (factor, level) in differences[name]
                },
            }
            for row, (level, columns) in enumerate(rows.items())
        ]
        for factor, rows in levels.items()
    }


def _p_value(gap_SP: np.ndarray, noise: SeedNoise) -> float | None:
    if noise.freedom == 0 or noise.deviation == 0.0:
        return None
    t = gap_SP.mean() / (noise.deviation / math.sqrt(len(gap_SP)))
    return float(2 * scipy.stats.t.sf(abs(t), noise.freedom))


def table_text(content: dict[str, list[dict[str, Any]]], columns: list[str]) -> str:
    """The tables as aligned Markdown: a level's mean (interval) and its difference from the first.

    Bold is a difference that is clear. A factor of one level is left out. A mean of which nothing
    tells how far it varies (one run, and no level with two) stands alone.
    """
    blocks = []
    compared = {factor: rows for factor, rows in content.items() if len(rows) > 1}
    for factor, rows in compared.items():
        cells = [[f"{factor} (seeds)", *columns]]
        for row in rows:
            cells.append([f"{row['level']} ({row['seeds']})", *(_cell(row, x) for x in columns)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        lines = [
            "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
            for line in cells
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _cell(row: dict[str, Any], column: str) -> str:
    words = []
    if column in row["figures"]:
        x = row["figures"][column]
        own = f" ({x['low']:.2f}-{x['high']:.2f})" if x["low"] < x["high"] else ""
        words.append(f"{x['mean']:.2f}{own}")
    if column in row["differences"]:
        x = row["differences"][column]
        gap = f"**{x['mean']:+.2f}**" if x["clear"] else f"{x['mean']:+.2f}"
        own = f" ({x['low']:+.2f} {x['high']:+.2f})" if x["low"] < x["high"] else ""
        words.append(f"{gap}{own}")
    return " ".join(words)
