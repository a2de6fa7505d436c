"""Verdicts on the page's five take-home claims, from the statistics of `claims.measure`.

The rules stand in the docstring of `verdicts`; they and their bounds were fixed before any model of
the ablation was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

VARIANTS = ("linear_mel_bl", "db_mel_bl", "db_mel_pm")
_LINEAR, _DB, _PROPOSED = VARIANTS

CLAIMS = (
    "The baselines that subtract behave as theory expects: what they feed is sparser and of lower "
    "norm than what they extract.",
    "The baseline on linear mel feeds a degenerate vector: sparse, and of low norm.",
    "Features in dB extend the numeric range of the latents dramatically, and yet some of what is "
    "fed is nullified.",
    "What the proposed model feeds lies in sensible numeric ranges.",
    "The learned comparison alleviates nullification, and biases what is fed in a manner that the "
    "predictor can exploit.",
)


class Figure(NamedTuple):
    """Of a variant: the mean over its runs, and bounds that hold all their intervals."""

    mean: float
    low: float
    high: float


class _Finding(NamedTuple):
    """Of one claim: what was measured, the tests of its rule, whether so few held that it is
    refuted, and the numbers in words."""

    statistic: str
    tests: list[bool]
    refuted: bool
    why: str

    def verdict(self) -> str:
        return "confirmed" if all(self.tests) else "refuted" if self.refuted else "partly"


# figure("db_mel_bl", "fed", "norm") of the runs that are judged together.
_Look = Callable[..., Figure]


def verdicts(stats: dict[str, Any]) -> list[dict[str, Any]]:
    """Judges the five claims by rules written before any model of the ablation was measured.

    They were not written blind: a toy of 40 steps had been measured, and the fourth rule's bound on
    the rms was settled with its figure (0.068) in sight.

    A figure of a variant is the mean over its runs; it is *above* another where its lowest lower
    bound is over the other's highest upper bound, *below* likewise. Every rule is a few tests, and
    the verdict counts those that hold:

    1. For each of linear_mel_bl and db_mel_bl: fed's norm ratio below 1; fed's share of nullified
       coefficients above extracted's. Confirmed: all four; refuted: one or none.
    2. linear_mel_bl, fed: 10 % or more nullified; norm ratio 0.1 or less. Confirmed: both;
       refuted: none.
    3. The extent (99.9th less 0.1th percentile) of what db_mel_bl feeds is 10 times or more that of
       linear_mel_bl; its share of nullified coefficients is above a Gaussian's (0.08 %).
       Confirmed: both; refuted: the extent does not even double.
    4. db_mel_pm, fed: rms of 0.01 .. 10; 99.8 % of values within +-100; dynamic range of 40 dB or
       less. Confirmed: all; refuted: one or none.
    5. db_mel_pm against db_mel_bl: share of nullified coefficients lower, pair by pair (interval
       below 0); share of fed's energy in its mean over pairs above db_mel_bl's and above 5 %; error
       lower, pair by pair. Confirmed: all; refuted: neither the first nor the last.

    Runs with normalised features and raw ones are judged apart, where there are runs of all three
    variants; where the two differ, the verdict is "partly".

    Returns:
      for each claim {"claim": number, "text", "statistic", "verdict", "why"}, verdict one of
      "confirmed", "partly", "refuted".

    Raises:
      ValueError: not all three variants were measured.
    """
    found = {(model["variant"], model["normalised"]) for model in stats["models"].values()}
    kinds = [kind for kind in (True, False) if all((name, kind) in found for name in VARIANTS)]
    if not kinds:
        names = ", ".join(sorted({name for name, _ in found})) or "none"
        raise ValueError(f"the claims compare {', '.join(VARIANTS)}; measured: {names}")
    judged = [_judge(stats, kind) for kind in kinds]
    out = []
    for number, text in enumerate(CLAIMS):
        findings = [of_kind[number] for of_kind in judged]
        given = [finding.verdict() for finding in findings]
        why = findings[0].why if kinds[0] else f"Raw features: {findings[0].why}"
        if len(findings) == 2:
            why = f"Normalised features, {given[0]}: {why} Raw ones, {given[1]}: {findings[1].why}"
        out.append(
            {
                "claim": number + 1,
                "text": text,
                "statistic": findings[0].statistic,
                "verdict": given[0] if len(set(given)) == 1 else "partly",
                "why": why,
            }
        )
    return out


def _judge(stats: dict[str, Any], normalised: bool) -> list[_Finding]:
    """The five findings for runs of one kind."""

    def figure(name: str, *path: str) -> Figure:
        found = [
            functools.reduce(lambda node, key: node[key], path, model)
            for model in stats["models"].values()
            if (model["variant"], model["normalised"]) == (name, normalised)
        ]
        bounds = [x if isinstance(x, dict) else {"mean": x, "low": x, "high": x} for x in found]
        mean = float(np.mean([x["mean"] for x in bounds]))
        return Figure(mean, min(x["low"] for x in bounds), max(x["high"] for x in bounds))

    rows = stats["proposed_less_baseline"]
    paired = next(row for row in rows if row["normalised"] == normalised)
    return [
        _theory(figure),
        _degenerate(figure),
        _extended(figure, stats["nullified_by_chance"]),
        _sensible(figure),
        _exploited(figure, Figure(**paired["nullified"]), Figure(**paired["error_db"])),
    ]


def _theory(figure: _Look) -> _Finding:
    tests, told = [], []
    for name in (_LINEAR, _DB):
        ratio = figure(name, "fed", "norm_ratio")
        fed, extracted = (figure(name, part, "nullified") for part in ("fed", "extracted"))
        tests += [ratio.high < 1, fed.low > extracted.high]
        told.append(
            f"{name} feeds {_told(ratio)} of the extracted norm, with {_percent(fed)} nullified, "
            f"extracted {_percent(extracted)}"
        )
    statistic = "norm and share of nullified coefficients, fed against extracted"
    return _Finding(statistic, tests, sum(tests) <= 1, f"{'; '.join(told)}.")


def _degenerate(figure: _Look) -> _Finding:
    fed, ratio = (figure(_LINEAR, "fed", key) for key in ("nullified", "norm_ratio"))
    fed_db, ratio_db = (figure(_DB, "fed", key) for key in ("nullified", "norm_ratio"))
    tests = [fed.mean >= 0.1, ratio.mean <= 0.1]
    why = (
        f"{_percent(fed)} of what linear_mel_bl feeds is nullified, and its norm is {_told(ratio)} "
        f"of extracted (db_mel_bl: {_percent(fed_db)}, {_told(ratio_db)})."
    )
    statistic = "share of nullified coefficients, and norm over the extracted norm"
    return _Finding(statistic, tests, not any(tests), why)


def _extended(figure: _Look, by_chance: float) -> _Finding:
    def extent(name: str, part: str) -> float:
        high, low = (figure(name, part, "range", key).mean for key in ("p99.9", "p0.1"))
        return max(high - low, 1e-30)

    linear_, db = extent(_LINEAR, "fed"), extent(_DB, "fed")
    extracted = extent(_DB, "extracted") / extent(_LINEAR, "extracted")
    fed = figure(_DB, "fed", "nullified")
    why = (
        f"From the 0.1th to the 99.9th percentile fed spans {linear_:.3g} in linear mel and "
        f"{db:.3g} in dB, {db / linear_:.2g} times as much (extracted: {extracted:.2g} times); "
        f"{_percent(fed)} of fed is nullified, by chance it would be {100 * by_chance:.2f} %."
    )
    tests = [db >= 10 * linear_, fed.low > by_chance]
    return _Finding("extent of fed values, share of nullified ones", tests, db < 2 * linear_, why)


def _sensible(figure: _Look) -> _Finding:
    rms, width, low, high = (
        figure(_PROPOSED, "fed", "range", key).mean
        for key in ("rms", "dynamic_range_db", "p0.1", "p99.9")
    )
    tests = [0.01 <= rms <= 10, max(-low, high) <= 100, width <= 40]
    widths = [figure(name, "fed", "range", "dynamic_range_db").mean for name in (_LINEAR, _DB)]
    why = (
        f"Fed has an rms of {rms:.3g}, 99.8 % of it lies in {low:.3g} .. {high:.3g}, and its "
        f"dynamic range is {width:.0f} dB (linear_mel_bl {widths[0]:.0f}, db_mel_bl "
        f"{widths[1]:.0f}, a Gaussian 14)."
    )
    statistic = "rms, percentiles and dynamic range of fed values"
    return _Finding(statistic, tests, sum(tests) <= 1, why)


def _exploited(figure: _Look, less: Figure, gain: Figure) -> _Finding:
    fed, before = (figure(name, "fed", "nullified") for name in (_PROPOSED, _DB))
    bias, bias_before = (figure(name, "fed", "mean_share") for name in (_PROPOSED, _DB))
    tests = [less.high < 0, bias.low > max(bias_before.high, 0.05), gain.high < 0]
    whole, centred, probe_fed, probe_difference = (
        figure(_PROPOSED, "predictor", *path).mean
        for path in (
            ("error_db", "mean"),
            ("error_centred_db", "mean"),
            ("probe_fed",),
            ("probe_difference",),
        )
    )
    why = (
        f"{_percent(fed)} of what db_mel_pm feeds is nullified, of db_mel_bl {_percent(before)}; "
        f"{100 * bias.mean:.0f} % of its energy is the same for all pairs "
        f"({100 * bias_before.mean:.0f} % in db_mel_bl), and without that part its error is "
        f"{centred:.2f} dB in place of {whole:.2f}; pair by pair its error differs from that of "
        f"db_mel_bl by {_told(gain, '+')} dB; of the label a linear readout explains "
        f"{probe_fed:.2f} from fed, {probe_difference:.2f} from the extracted difference."
    )
    statistic = "share of nullified coefficients, fed energy in its mean, error, pair by pair"
    return _Finding(statistic, tests, not (tests[0] or tests[2]), why)


def _percent(share: Figure) -> str:
    return f"{100 * share.mean:.2f} % ({100 * share.low:.2f}-{100 * share.high:.2f})"


def _told(figure: Figure, sign: str = "") -> str:
    return f"{figure.mean:{sign}.2f} ({figure.low:{sign}.2f} to {figure.high:{sign}.2f})"
