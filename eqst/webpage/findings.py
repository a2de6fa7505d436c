"""What was measured, as sections of the page: responses, ablation, benchmark, curves."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eqst import biquad, charts, eq
from eqst.leaderboard import MARKS, marks
from eqst.verdict import VARIANTS
from eqst.webpage import drawing
from eqst.webpage.drawing import Curve, even_axis, frequency_axis, legend, plot
from eqst.webpage.examples import Test, one
from eqst.webpage.markup import Html, anchor, details, figure, missing, signed, table, tag

LOW_HZ, HIGH_HZ = 30.0, 20000.0
OCTAVES_HZ = (63, 125, 250, 500, 1000, 2000, 4000, 8000, 16000)
MODELS_DRAWN = 5
PAPERS = tuple(reversed(VARIANTS))

BIBTEX = """\
@inproceedings{mimilakis2020oneshot,
  title = {One-Shot Parametric Audio Production Style Transfer with Application to Frequency
    Equalization},
  author = {Mimilakis, Stylianos I. and Bryan, Nicholas J. and Smaragdis, Paris},
  booktitle = {IEEE International Conference on Acoustics, Speech and Signal Processing (ICASSP)},
  pages = {256--260}, year = {2020}, doi = {10.1109/ICASSP40776.2020.9054108}
}
@software{eqst,
  title = {EQST: one-shot EQ style transfer in JAX}, year = {2026}, license = {Apache-2.0}
}"""


# ------------------------------------------------------------------------------ responses


def responses(made: Test, chosen: Sequence[int]) -> Html:
    """Target against predicted for the chosen pairs: the cascade, each band, the numbers."""
    figures = [_response(made, i, number) for number, i in enumerate(chosen, start=1)]
    return tag(
        "div",
        legend([("target", 0), ("predicted", 1)]),
        tag("div", figures, cls="grid-wide"),
    )


def _response(made: Test, i: int, number: int) -> Html:
    rate, name = made.sample_rate, f"response-{number}"
    true, predicted = one(made.true, i), one(made.predicted, i)
    top_hz = min(HIGH_HZ, 0.49 * rate)
    grid_F = eq.curve_grid_hz(rate)
    on_grid = [_cascade(x, grid_F, rate) for x in (true, predicted)]
    level_db = float(np.mean(on_grid[0] - on_grid[1]))
    error_F = on_grid[1] + level_db - on_grid[0]
    worst = int(np.argmax(np.abs(error_F)))
    within = (
        f"within {np.abs(error_F[worst]):.1f} dB from {grid_F[0]:.0f} Hz to "
        f"{grid_F[-1] / 1000:.0f} kHz, furthest at {grid_F[worst]:.0f} Hz"
    )
    shape = f"{made.shape_db_n[i]:.2f} dB"
    wide_F = np.geomspace(LOW_HZ, top_hz, 110)
    curves = [
        Curve("target", wide_F, _cascade(true, wide_F, rate), 0),
        Curve("predicted", wide_F, _cascade(predicted, wide_F, rate) + level_db, 1),
    ]
    span = max(6.0, *(float(np.abs(curve.y).max()) for curve in curves))
    cascade = plot(
        name,
        curves,
        frequency_axis(LOW_HZ, top_hz),
        even_axis("gain (dB)", -span, span, steps=4),
        title=f"Example {number}: frequency response of the four bands together",
        words=f"Target and predicted, brought to one level, lie {within}; shape error {shape}.",
    )
    caption = (
        tag("b", f"Example {number}."),
        f" Shape error {shape}; {within}. The level, which cannot be heard, was "
        f"{signed(-level_db)} dB off and is drawn equal.",
    )
    bands = tag("div", _bands(name, true, predicted, rate, top_hz), cls="bands")
    octaves_F = np.array([x for x in OCTAVES_HZ if x < top_hz], float)
    values = [_cascade(true, octaves_F, rate), _cascade(predicted, octaves_F, rate) + level_db]
    rows = [
        (f"{x:g} Hz", signed(a), signed(b), signed(b - a))
        for x, a, b in zip(octaves_F, *values, strict=True)
    ]
    head = ("frequency", "target", "predicted", "difference")
    numbers = [
        table(f"Example {number}, gain in dB by octave, levels equal", head, rows),
        _settings_table(number, true, predicted),
    ]
    return tag(
        "figure",
        cascade,
        bands,
        tag("figcaption", caption),
        details("Numbers", numbers),
        cls="example-figure",
        id=name,
    )


# Compiled once for each grid; step by step JAX takes a twentieth of a second for every curve.
_response_db = jax.jit(eq.response_db, static_argnames="sample_rate")
_bands_db = jax.jit(biquad.bands_db, static_argnames=("kinds", "sample_rate"))


def _cascade(params: eq.EqParams, freq_hz_F: np.ndarray, rate: int) -> np.ndarray:
    return np.asarray(_response_db(params, freq_hz_F, sample_rate=rate), np.float64)


def _bands(
    name: str, true: eq.EqParams, predicted: eq.EqParams, rate: int, top_hz: float
) -> list[Html]:
    wide_F = np.geomspace(LOW_HZ, top_hz, 60)
    by_band = [
        np.asarray(_bands_db(wide_F, *x, kinds=eq.KINDS, sample_rate=rate), np.float64)
        for x in (true, predicted)
    ]
    span = max(3.0, *(float(np.abs(x).max()) for x in by_band))
    plots = []
    for k, band in enumerate(eq.PAPER.bands):
        title = f"{band.name.capitalize()} ({band.kind.replace('_', ' ')})"
        words = f"target {_said(true, k)}; predicted {_said(predicted, k)}"
        curves = [Curve("", wide_F, x[k], style) for style, x in enumerate(by_band)]
        drawn = plot(
            f"{name}-{band.name}",
            curves,
            frequency_axis(LOW_HZ, top_hz, few=True),
            even_axis("", -span, span, steps=2),
            title=title,
            words=words,
            width=180,
            height=118,
        )
        plots.append(tag("div", drawn, tag("p", title), cls="band-figure"))
    return plots


def _said(params: eq.EqParams, k: int) -> str:
    return f"{params.freq_hz[k]:.0f} Hz, {signed(params.gain_db[k])} dB, Q {params.q[k]:.2f}"


def _settings_table(number: int, true: eq.EqParams, predicted: eq.EqParams) -> Html:
    rows = []
    for k, band in enumerate(eq.PAPER.bands):
        cells: list[str] = [band.name.capitalize()]
        for x in (true, predicted):
            cells += [f"{x.freq_hz[k]:.0f}", signed(x.gain_db[k]), f"{x.q[k]:.2f}"]
        rows.append(cells)
    head = ["band"] + [
        f"{who} {what}" for who in ("target", "predicted") for what in ("Hz", "dB", "Q")
    ]
    return table(f"Example {number}, settings", head, rows)


# ------------------------------------------------------------------------------ results in files


def read_results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Every JSON object under a folder, by its path without the ending; others are passed over."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict):
            found[path.relative_to(folder).with_suffix("").as_posix()] = content
    return found


def ablation(content: Mapping[str, Any] | None) -> Html:
    """A table for each factor of the ablation: means over seeds, and differences from the base."""
    if content is None:
        return missing(
            "No ablation.json was given: run launch/sweep.py and name its folder by --results."
        )
    columns = list(content["columns"])
    about = tag(
        "p",
        "Shape RMSE in dB, lower is better: mean over seeds and pairs, 95 % interval over seeds, "
        "talkers and pairs; below it the difference from the first level of the factor (bold), "
        "with its interval and p of a paired test, adjusted for their number (Holm). A factor of "
        "which only the first level has been run is left out. ",
        f"Budget: {_plain(content['budget'])}. Data: {_plain(content['data'])}.",
    )
    tables = []
    for factor, levels in content["tables"].items():
        if len(levels) < 2:
            continue
        rows = [
            [row["level"], row["seeds"], *(_ablation_cell(row, column) for column in columns)]
            for row in levels
        ]
        base = [number for number, row in enumerate(levels) if row["base"]]
        tables.append(table(f"Factor: {factor}", ["level", "seeds", *columns], rows, marked=base))
    return tag("div", about, tables)


def _ablation_cell(row: Mapping[str, Any], column: str) -> Html | str:
    if column not in row["figures"]:
        return "\u2013"
    cell = tag("span", _interval(row["figures"][column]))
    if "differences" in row and column in row["differences"]:
        x = row["differences"][column]
        words = f"{signed(x['mean'], 2)} ({signed(x['low'], 2)} .. {signed(x['high'], 2)})"
        if "p_holm" in x:
            words += ", p < 0.001" if x["p_holm"] < 1e-3 else f", p {x['p_holm']:.2g}"
        cell = Html(cell + tag("br") + tag("small", words))
    return cell


def _interval(x: Mapping[str, float]) -> str:
    known = x["low"] < x["high"]  # else nothing tells how far it varies
    return f"{x['mean']:.2f}" + (f" ({x['low']:.2f}\u2013{x['high']:.2f})" if known else "")


def _plain(value: Any) -> str:
    """A value of a results file as words."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def leaderboard(content: Mapping[str, Any] | None) -> Html:
    """The open benchmark: every method by task, with intervals and cost."""
    if content is None:
        return missing(
            "No benchmark_leaderboard.json was given: run python -m eqst.benchmark and name its "
            "folder by --results."
        )
    tasks, methods = content["tasks"], content["methods"]
    names = [task["name"] for task in tasks]
    pairs = {task["name"]: task["pairs"] for task in tasks}

    def cell(row: Mapping[str, Any], name: str) -> str:
        if name not in row["figures"]:
            return "\u2013"
        score = methods[row["method"]]["scores"][name]
        return _interval(row["figures"][name]) + marks(score, pairs[name])

    # In the leaderboard's own order: oracles last, what was asked fewer pairs after the others.
    rows = [
        [row["method"], row["kind"], f"{row['seconds_per_pair']:.3g}"]
        + [cell(row, name) for name in names]
        for row in content["leaderboard"]
    ]
    models = [k for k, row in enumerate(content["leaderboard"]) if row["kind"] == "model"]
    head = ["method", "kind", "s per pair", *names]
    caption = (
        f"Shape RMSE in dB (95 % interval), lower is better, sorted by {content['headline']}; "
        f"models in bold; {MARKS}"
    )
    about = [tag("li", tag("b", task["name"]), ": ", task["about"]) for task in tasks]
    return tag(
        "div",
        table(caption, head, rows, first=2, marked=models),
        details("What the tasks are", tag("ul", about)),
    )


def error_against_seconds(results: Mapping[str, Mapping[str, Any]]) -> Html:
    """Shape error by length of the recordings, a plot for each protocol, from evaluate's files."""
    evaluated = {
        name: content["figures"]
        for name, content in results.items()
        if isinstance(content.get("figures"), dict) and "plain" in content["figures"]
    }
    if not evaluated:
        return missing(
            "No results of python -m eqst.evaluate were given: name the folder of its results.json "
            "by --results."
        )
    fullest = max(evaluated, key=lambda name: _methods(evaluated[name]))
    protocols = [x for x in ("plain", "coloured") if any(x in y for y in evaluated.values())]
    order = sorted(evaluated, key=lambda name: (_paper_rank(name), _mean_error(evaluated[name])))
    drawn = order[:MODELS_DRAWN]
    lines = [(name, name, "model", 1 + style) for style, name in enumerate(drawn)]
    lines += [
        (label, fullest, method, style)
        for method, label, style in (
            ("do_nothing", "do nothing", 0),
            ("ltas_shrunk", "LTAS fit, tuned", 6),
            ("bayes", "Bayes", 7),
        )
        if _series(evaluated[fullest], protocols[0], method)
    ]
    plots = [_seconds_plot(protocol, evaluated, lines) for protocol in protocols]
    labels = {name: label for name, label, _ in charts.METHODS}
    rows = []
    for name in order:
        for method, label in labels.items():
            cells = []
            for protocol in protocols:
                series = dict(_series(evaluated[name], protocol, method))
                cells += [
                    _interval(series[x]) if x in series else "\u2013"
                    for x in _lengths(evaluated, protocol)
                ]
            if any(cell != "\u2013" for cell in cells) and (method == "model" or name == fullest):
                rows.append([name if method == "model" else label, *cells])
    head = ["method"] + [f"{p} {x:g} s" for p in protocols for x in _lengths(evaluated, p)]
    about = tag(
        "p",
        "Shape RMSE over held-out talkers against seconds of input and of reference; shaded: 95 % "
        f"intervals. The baselines are those of {fullest}. ",
        f"Drawn are the paper's three and the best of the others, {len(drawn)} of {len(order)}; "
        "all stand in the table."
        if len(order) > len(drawn)
        else None,
    )
    return tag(
        "div",
        about,
        legend([(label, style) for label, _, _, style in lines]),
        tag("div", plots, cls="grid-wide"),
        details("Numbers", table("Shape RMSE in dB (95 % interval)", head, rows)),
    )


def _paper_rank(name: str) -> int:
    return min((i for i, paper in enumerate(PAPERS) if paper in name), default=len(PAPERS))


def _methods(figures: Mapping[str, Any]) -> int:
    return max((len(x) for x in figures["plain"].values()), default=0)


def _mean_error(figures: Mapping[str, Any]) -> float:
    series = _series(figures, "plain", "model")
    return float(np.mean([x["mean"] for _, x in series])) if series else np.inf


def _series(figures: Mapping[str, Any], protocol: str, method: str) -> list[tuple[float, Any]]:
    """(seconds, interval) of a method, shortest first."""
    if protocol not in figures:
        return []
    found = [
        (float(label.split()[0]), x[method]["shape_rmse_db"])
        for label, x in figures[protocol].items()
        if method in x
    ]
    return sorted(found, key=lambda pair: pair[0])


def _lengths(evaluated: Mapping[str, Any], protocol: str) -> list[float]:
    every = {x for figures in evaluated.values() for x, _ in _series(figures, protocol, "model")}
    return sorted(every)


def _seconds_plot(
    protocol: str, evaluated: Mapping[str, Any], lines: Sequence[tuple[str, str, str, int]]
) -> Html:
    curves, said = [], []
    for label, name, method, style in lines:
        series = _series(evaluated[name], protocol, method)
        if not series:
            continue
        x, rows = np.array([pair[0] for pair in series]), [pair[1] for pair in series]
        mean, low, high = (np.array([row[key] for row in rows]) for key in ("mean", "low", "high"))
        curves.append(Curve(label, x, mean, style, low, high, points=True))
        said.append(f"{label} {mean[0]:.2f} dB at {x[0]:g} s, {mean[-1]:.2f} dB at {x[-1]:g} s")
    ticks = tuple(_lengths(evaluated, protocol))
    axis = drawing.Axis(
        "seconds of each recording", ticks[0] / 1.15, ticks[-1] * 1.15, ticks, log=True
    )
    top = max(float(curve.high.max()) for curve in curves if curve.high is not None)
    drawn = plot(
        f"seconds-{anchor(protocol)}",
        curves,
        axis,
        even_axis("shape RMSE (dB)", 0.0, top, zero=True),
        title=f"Shape error against seconds, {protocol}",
        words="; ".join(said) + ".",
        height=260,
    )
    return tag("figure", drawn, tag("figcaption", tag("b", protocol)))


# ------------------------------------------------------------------------------ training


def training(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Html:
    """Training curves of runs: rows of metrics.jsonl by name."""
    curves, rows = [], []
    for number, (name, record) in enumerate(metrics.items()):
        trained = [(x["step"], x["shape_db"]) for x in record if "shape_db" in x]
        valid = [(x["step"], x["valid_shape_db"]) for x in record if "valid_shape_db" in x]
        shown = valid or trained
        if not shown:
            continue
        steps, values = (np.array(column, float) for column in zip(*shown, strict=True))
        curves.append(Curve(name, steps, values, 1 + number, points=len(steps) < 12))
        for k in sorted({round(q * (len(shown) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)}):
            near = (
                min(trained, key=lambda pair: abs(pair[0] - shown[k][0]))[1] if trained else np.nan
            )
            rows.append(
                [
                    name,
                    f"{shown[k][0]:,}",
                    f"{near:.2f}",
                    f"{shown[k][1]:.2f}" if valid else "\u2013",
                ]
            )
    if not curves:
        return missing("The runs have no metrics.jsonl with a step in it: train for longer.")
    last = max(float(curve.x.max()) for curve in curves)
    top = max(float(curve.y.max()) for curve in curves)
    words = "; ".join(
        f"{c.label}: {c.y[0]:.2f} dB at step {c.x[0]:.0f}, {c.y[-1]:.2f} dB at step {c.x[-1]:.0f}"
        for c in curves
    )
    drawn = plot(
        "training-curves",
        curves,
        even_axis("steps", 0.0, last, steps=4),
        even_axis("shape error (dB)", 0.0, top, zero=True),
        title="Shape error while training",
        words=words + ".",
        height=240,
    )
    caption = (
        "Shape error during training: on train talkers held out (on the batches where none are)."
    )
    head = ["run", "step", "training", "held out"]
    numbers = table("Shape error in dB while training", head, rows)
    return tag(
        "div",
        legend([(curve.label, curve.style) for curve in curves]),
        figure(drawn, caption, numbers, cls="training"),
    )
