"""A picture of one match: three long-term spectra, and the equaliser with its bands.

matplotlib (extra [report]) is imported when a picture is drawn, not before.
"""

import functools
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eqst import biquad, eq, evidence
from eqst.files import AudioError, write_atomically
from eqst.settings import Settings

EXTENSIONS = (".png", ".svg", ".pdf")
_INK, _FAINT, _GRID = "#1f2430", "#6b7280", "#d9dde3"
_INPUT, _REFERENCE, _MATCHED = "#8a94a6", "#1f2430", "#d1495b"
_BANDS = ("#3a7ca5", "#5d9c59", "#d99a2b", "#8e5aa8")
_TICKS_HZ = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)


class Scene(NamedTuple):
    """What a picture shows.

    Attributes:
      settings: the equaliser that is drawn.
      input_T, reference_T, matched_T: [T] mono audio at `sample_rate`, any level.
      sample_rate: Hz of the three.
      top_hz: spectra are drawn up to here: what the lower of the two rates can hold.
      input_name, reference_name: for the title.
    """

    settings: Settings
    input_T: np.ndarray
    reference_T: np.ndarray
    matched_T: np.ndarray
    sample_rate: int
    top_hz: float
    input_name: str
    reference_name: str


def check_extension(path: str | os.PathLike) -> None:
    """Raises AudioError unless the path ends in .png, .svg or .pdf."""
    if Path(path).suffix.lower() not in EXTENSIONS:
        raise AudioError(f"{os.fspath(path)!r}: a picture ends in {', '.join(EXTENSIONS)}")


def draw(path: str | os.PathLike, scene: Scene, *, overwrite: bool = True) -> None:
    """Draws a match and writes it, whole or not at all.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      AudioError: as `files.write_atomically`, or an extension other than .png, .svg, .pdf.
    """
    check_extension(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw_spectra(top, scene)
    _draw_equaliser(bottom, scene.settings)
    top.set_title(
        f"{_shown(scene.input_name)}  →  {_shown(scene.reference_name)}",
        loc="left", fontsize=12, color=_INK, parse_math=False,
    )  # fmt: skip
    for axes in (top, bottom):
        _style(axes)
    bottom.set_xlabel("frequency (Hz)", color=_FAINT)
    suffix = Path(path).suffix.lower()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, and no reason to worry anyone.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        save = functools.partial(figure.savefig, format=suffix[1:])
        write_atomically(path, save, overwrite=overwrite)


def _shown(name: str) -> str:
    """A file's name as text that can be drawn: names are bytes, which need not be text."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in name)


def spectrum_db(audio_T: np.ndarray, sample_rate: int, top_hz: float) -> tuple[Any, Any]:
    """Long-term spectrum in 1/6-octave bands up to `top_hz`: [M] Hz, [M] dB.

    Without its mean over 200 Hz .. 8 kHz: of the middle, since the high pass or the hiss of one
    file should not move its whole curve.
    """
    freq_hz_M = evidence.band_hz(sample_rate)
    kept_M = freq_hz_M <= top_hz
    level_M = evidence.evidence(audio_T, sample_rate).power_db[kept_M]
    freq_hz_M = freq_hz_M[kept_M]
    middle_M = (freq_hz_M >= 200) & (freq_hz_M <= 8000)
    return freq_hz_M, level_M - level_M[middle_M].mean()


def _draw_spectra(axes: Any, scene: Scene) -> None:
    curves = (
        ("input", scene.input_T, _INPUT, 1.6),
        ("reference", scene.reference_T, _REFERENCE, 1.8),
        ("input with this EQ", scene.matched_T, _MATCHED, 1.8),
    )
    floor, ceiling = np.inf, -np.inf
    for label, audio_T, colour, width in curves:
        freq_hz_M, level_M = spectrum_db(audio_T, scene.sample_rate, scene.top_hz)
        axes.plot(freq_hz_M, level_M, color=colour, linewidth=width, label=label)
        floor, ceiling = min(floor, float(level_M.min())), max(ceiling, float(level_M.max()))
    axes.set_ylim(max(floor, ceiling - 70) - 3, ceiling + 3)
    axes.set_ylabel("long-term spectrum (dB)", color=_FAINT)
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=_INK)


def _draw_equaliser(axes: Any, settings: Settings) -> None:
    rate, params = settings.sample_rate, settings.params
    # float32 must not round the last point to above half the rate.
    freq_hz_F = np.geomspace(20.0, min(20_000.0, 0.499 * rate), 600)
    bands_KF = np.asarray(
        biquad.bands_db(
            freq_hz_F, params.freq_hz, params.gain_db, params.q, kinds=eq.KINDS, sample_rate=rate
        )
    )
    cascade_F = bands_KF.sum(axis=0)
    for k, colour in enumerate(_BANDS):
        band = settings.bands[k]
        label = (
            f"{band.frequency_hz:.0f} Hz  {band.gain_db:+.1f} dB  Q {band.q:.2f}  "
            f"({band.type.replace('_', ' ')})"
        )
        axes.fill_between(freq_hz_F, bands_KF[k], color=colour, alpha=0.18, linewidth=0)
        axes.plot(freq_hz_F, bands_KF[k], color=colour, linewidth=1.0, label=label)
        at_band = np.interp(np.log(band.frequency_hz), np.log(freq_hz_F), cascade_F)
        axes.plot([band.frequency_hz], [at_band], "o", color=colour, markersize=6, zorder=4)
    axes.plot(freq_hz_F, cascade_F, color=_MATCHED, linewidth=2.2, zorder=3)
    axes.axhline(0, color=_FAINT, linewidth=0.8)
    reach = max(6.0, float(np.abs(bands_KF).max()), float(np.abs(cascade_F).max())) * 1.12
    axes.set_ylim(-reach, reach)
    axes.set_xlim(30, min(20_000.0, rate / 2))
    axes.set_ylabel(f"equaliser at {rate / 1000:g} kHz (dB)", color=_FAINT)
    axes.legend(loc="best", fontsize=8, labelcolor=_INK, framealpha=0.85, edgecolor=_GRID, ncols=2)


def _style(axes: Any) -> None:
    axes.set_xscale("log")
    shown = [tick for tick in _TICKS_HZ if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(shown, [f"{t // 1000}k" if t >= 1000 else str(t) for t in shown])
    axes.minorticks_off()
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
