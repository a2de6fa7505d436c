"""Results as tables and pictures: what `evaluate` prints and draws, from its results.json alone."""

from __future__ import annotations

import os
import re
from typing import Any

from eqst.files import write_atomically

# Order of tables and curves: results.json's name, label, colour (None: in the table alone).
METHODS = (
    ("model", "EQST", "#c1272d"),
    ("do_nothing", "do nothing", "#888888"),
    ("mean_setting", "mean setting", None),
    ("ltas", "LTAS fit, plain", None),
    ("ltas_shrunk", "LTAS fit, tuned", "#b8860b"),
    ("ridge", "ridge", "#6a8f3c"),
    ("wiener", "linear Bayes", None),
    ("bayes", "Bayes", "#1f5fa8"),
    ("bayes_blind", "Bayes, reference alone", "#7ba7d7"),
    ("oracle_grid", "oracle, paper's grid", None),
    ("oracle", "oracle fit", None),
)


def table_text(results: dict[str, Any]) -> str:
    """Shape error of every method by protocol and length, with the interval of the mean."""
    lines = []
    for protocol, by_length in results["figures"].items():
        lines.append(f"shape RMSE in dB, {protocol}".ljust(28) + _row(list(by_length)))
        counts = [f"{x['pairs']} pairs, {x['talkers']} talkers" for x in by_length.values()]
        lines.append(" " * 28 + _row(counts))
        for name, label, _ in METHODS:
            cells = []
            for figures in by_length.values():
                if name in figures:
                    x = figures[name]["shape_rmse_db"]
                    cells.append(f"{x['mean']:.2f} ({x['low']:.2f}-{x['high']:.2f})")
            if cells:
                lines.append(f"  {label}".ljust(28) + _row(cells))
        lines.append("")
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "".join(f"{cell:>24}" for cell in cells)


def error_against_seconds(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws shape error against the length of both recordings, one panel per protocol.

    Raises:
      ImportError: matplotlib (the extra [report]) is not installed.
    """
    new_figure = _figure_class()
    protocols = [name for name, by_length in results["figures"].items() if by_length]
    figure = new_figure(figsize=(4.6 * len(protocols), 4.2), layout="constrained")
    panels = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    for panel, protocol in zip(panels, protocols, strict=True):
        by_length = results["figures"][protocol]
        seconds = [float(label.split()[0]) for label in by_length]
        for name, label, colour in METHODS:
            rows = [
                figures[name]["shape_rmse_db"] for figures in by_length.values() if name in figures
            ]
            if colour is None or len(rows) != len(seconds):
                continue
            mean = [row["mean"] for row in rows]
            width = 2.4 if name == "model" else 1.4
            panel.plot(seconds, mean, "o-", color=colour, lw=width, ms=4, label=label)
            low, high = [row["low"] for row in rows], [row["high"] for row in rows]
            panel.fill_between(seconds, low, high, color=colour, alpha=0.12, lw=0)
        panel.set_xscale("log")
        panel.set_xticks(seconds, [f"{x:g}" for x in seconds])
        panel.minorticks_off()
        panel.set(title=protocol, xlabel="seconds of input and of reference", ylim=(0, None))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("shape RMSE (dB)")
    panels[-1].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


# What a section of a benchmark is drawn by, the first that its rows have.
_UNITS = {
    "milliseconds": "milliseconds, less is better",
    "seconds": "seconds, less is better",
    "pairs_per_s": "pairs per second, more is better",
}
# Words in the rows that are not ours.
_OTHERS = {"JAX", "dasp", "scipy", "PyTorch", "matchering", "alone"}


def speed(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws every ratio of a benchmark to ours on a logarithmic axis, one panel per section.

    Args:
      content: of speed.json.
      path: PNG to write.

    Raises:
      ImportError: matplotlib (the extra [report]) is not installed.
    """
    new_figure = _figure_class()
    panels = []
    for name, section in content["sections"].items():
        unit = next(unit for unit in _UNITS if unit in section["rows"][0])
        bars = [(row["what"], row[unit]) for row in section["rows"] if unit in row]
        panels.append((name.replace("_", " "), unit, bars))
    heights = [len(bars) + 1 for _, _, bars in panels]
    figure = new_figure(figsize=(9, 0.28 * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, unit, bars) in zip(axes, panels, strict=True):
        labels, values = zip(*bars, strict=True)
        colours = ["#7ba7d7" if _OTHERS & set(re.findall(r"\w+", x)) else "#c1272d" for x in labels]
        axis.barh(labels, values, color=colours)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.3g}", va="center", fontsize=7)
        axis.invert_yaxis()
        if max(values) > 20 * min(values):
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 3, 3 * max(values))
        else:
            axis.set_xlim(0, 1.15 * max(values))
        axis.set_title(f"{name} ({_UNITS[unit]})", fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def sweep(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws every level of a sweep: how far its error is from its factor's first, with intervals.

    Args:
      content: of sweep.json; its first column is drawn.
      path: PNG to write.

    Raises:
      ImportError: matplotlib (the extra [report]) is not installed.
    """
    new_figure = _figure_class()
    column = content["columns"][0]
    rows: list[tuple[str, Any, bool]] = []
    for factor, levels in content["tables"].items():
        if len(levels) < 2:  # nothing to compare with yet
            continue
        rows.append((factor, None, True))
        for row in levels:
            name = f"{row['level']} ({row['seeds']})"
            if row["base"]:
                mean = row["figures"][column]["mean"]
                rows.append(
                    (
                        f"{name}: {mean:.2f} dB",
                        {"mean": 0, "low": 0, "high": 0, "clear": False},
                        False,
                    )
                )
            elif column in row["differences"]:
                rows.append((name, row["differences"][column], False))
    figure = new_figure(figsize=(8.5, 0.2 * len(rows) + 0.9), layout="constrained")
    panel = figure.subplots()
    panel.axvline(0, color="#888888", lw=0.8)
    for place, (_, found, _) in enumerate(rows):
        if found is not None:
            clear = found["clear"]
            colour = "#888888" if not clear else "#c1272d" if found["mean"] > 0 else "#1f5fa8"
            panel.plot([found["low"], found["high"]], [place, place], color=colour, lw=1.6)
            panel.plot([found["mean"]], [place], "o", color=colour, ms=4)
    panel.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    for label, (_, _, heading) in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if heading else "normal")
    panel.set_ylim(max(len(rows), 1) - 0.5, -0.5)  # with nothing to compare too
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.25)
    panel.set_xlabel(f"shape RMSE, {column}: difference in dB from the first level (left: better)")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need the extra: pip install 'eqst[report]'") from None
    return Figure
