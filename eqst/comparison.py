"""Variants compared over seeds, talkers and pairs: means, 95 % intervals, paired tests.

A member is one training run, a level some members that differ by their seed alone. All members are
judged on the same pairs, so that two levels are compared pair by pair and seed by seed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

RESAMPLES = 2000


class Level(NamedTuple):
    """The errors of one level: a row for each seed, a column for each pair.

    Attributes:
      seeds: [S] which seeds.
      error_SP: shape RMSE in dB.
      talker_P: whose the pairs are.
    """

    seeds: tuple[int, ...]
    error_SP: np.ndarray
    talker_P: np.ndarray


def bootstrap_means(
    error_SP: np.ndarray, talker_P: np.ndarray, seed: int, *, resamples: int = RESAMPLES
) -> np.ndarray:
    """[resamples] means over seeds, then talkers, then pairs of each, all drawn with replacement.

    A few seeds drawn with replacement vary less than fresh ones would, by (S - 1) / S; the seeds'
    deviations from their mean are made larger by the root of its inverse to make up for it.
    """
    rng = np.random.default_rng(seed)
    count = len(error_SP)
    mean_P = error_SP.mean(axis=0)
    if count > 1:
        error_SP = mean_P + (error_SP - mean_P) * math.sqrt(count / (count - 1))
    error_RP = error_SP[rng.integers(count, size=(resamples, count))].mean(axis=1)
    talkers, which_P = np.unique(talker_P, return_inverse=True)
    drawn_RG = rng.integers(len(talkers), size=(resamples, len(talkers)))
    sums_R, counts_R = np.zeros(resamples), np.zeros(resamples)
    for index in range(len(talkers)):
        own = np.flatnonzero(which_P == index)
        times_R = (drawn_RG == index).sum(axis=1)
        # As many of a talker's pairs as it has, for each time the talker was drawn.
        weight_RP = rng.multinomial(times_R * len(own), np.full(len(own), 1 / len(own)))
        sums_R += np.sum(weight_RP * error_RP[:, own], axis=1)
        counts_R += times_R * len(own)
    return sums_R / counts_R


def summary(level: Level, seed: int = 0) -> dict[str, float]:
    """Mean error of a level and its 95 % interval over seeds, talkers and pairs."""
    low, high = np.percentile(bootstrap_means(level.error_SP, level.talker_P, seed), [2.5, 97.5])
    return {"mean": float(level.error_SP.mean()), "low": float(low), "high": float(high)}


def difference(level: Level, base: Level, seed: int = 0) -> dict[str, float | None]:
    """Level minus base on the seeds and pairs that both have.

    Returns:
      mean, low, high (95 % over seeds, talkers and pairs), seeds, and p: two-sided, of a paired
      t-test over the seeds' means (None with fewer than two seeds).

    Raises:
      ValueError: no seed in common, or other pairs.
    """
    common = [s for s in level.seeds if s in base.seeds]
    if not common or not np.array_equal(level.talker_P, base.talker_P):
        raise ValueError("levels are compared on seeds and pairs that both have: there are none")
    rows = [
        level.error_SP[level.seeds.index(s)] - base.error_SP[base.seeds.index(s)] for s in common
    ]
    gap_SP = np.stack(rows)
    low, high = np.percentile(bootstrap_means(gap_SP, level.talker_P, seed), [2.5, 97.5])
    gap_S = gap_SP.mean(axis=1)
    p = None
    if len(gap_S) > 1 and np.ptp(gap_S) > 0:
        p = float(scipy.stats.ttest_1samp(gap_S, 0.0).pvalue)
    return {
        "mean": float(gap_S.mean()),
        "low": float(low),
        "high": float(high),
        "seeds": len(common),
        "p": p,
    }


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
      levels: {factor: {level: {column: Level}}}; a column the base lacks is left out.

    Returns:
      {factor: [{level, base, seeds, figures: {column: mean, low, high}, differences: {column:
      mean, low, high, seeds, p, p_holm}}]}; `p_holm` counts all comparisons of a column.
    """
    out: dict[str, list[dict[str, Any]]] = {}
    by_column: dict[str, list[dict[str, Any]]] = {}
    for factor, rows in levels.items():
        out[factor] = []
        first = next(iter(rows))
        for name, columns in rows.items():
            row: dict[str, Any] = {
                "level": name,
                "base": name == first,
                "seeds": max(len(level.seeds) for level in columns.values()),
                "figures": {column: summary(level) for column, level in columns.items()},
            }
            if name != first:
                row["differences"] = {
                    column: difference(level, rows[first][column])
                    for column, level in columns.items()
                    if column in rows[first]
                }
                for column, found in row["differences"].items():
                    if found["p"] is not None:
                        by_column.setdefault(column, []).append(found)
            out[factor].append(row)
    for found in by_column.values():
        for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
            row["p_holm"] = p
    return out


def table_text(content: dict[str, list[dict[str, Any]]], columns: list[str]) -> str:
    """The tables as text: mean (interval), and the difference from the first level with its own."""
    lines = []
    for factor, rows in content.items():
        lines.append(f"{factor}".ljust(44) + "".join(f"{column:>40}" for column in columns))
        for row in rows:
            cells = []
            for column in columns:
                cell = ""
                if column in row["figures"]:
                    x = row["figures"][column]
                    cell = f"{x['mean']:.3f} ({x['low']:.2f}-{x['high']:.2f})"
                if not row["base"] and column in row["differences"]:
                    x = row["differences"][column]
                    star = "*" if x["low"] * x["high"] > 0 else " "
                    cell += f" {x['mean']:+.3f} ({x['low']:+.2f} {x['high']:+.2f}){star}"
                else:
                    cell += " " * 22
                cells.append(f"{cell:>40}")
            lines.append(f"  {row['level']} ({row['seeds']})".ljust(44) + "".join(cells))
        lines.append("")
    return "\n".join(lines)
