"""EQ settings as a person takes them away: rounded numbers, a table, a JSON file.

What is rounded here is what is rendered, drawn and written, so that the file says exactly what was
heard. Settings belong to a sample rate: the same numbers at another rate are another filter.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from eqst import biquad, eq
from eqst.files import AudioError, write_json, write_text

EXTENSIONS = (".json", ".txt")

_TITLES = {"low_shelf": "low shelf", "peaking": "peaking", "high_shelf": "high shelf"}


@dataclasses.dataclass(frozen=True)
class Band:
    """One band: kind as in `eq.KINDS`, frequency in Hz, gain in dB, quality factor."""

    type: str
    frequency_hz: float
    gain_db: float
    q: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """An equaliser at a sample rate; also the content of the settings JSON, key by key.

    Attributes:
      sample_rate: Hz of the audio that the bands are for.
      preamp_db: gain to apply with the bands, <= 0. As predicted it is the cascade's peak turned
        round, with which no full-scale tone can clip; after rendering a file it is what that file
        took (0 where nothing came near full scale).
      bands: in the order of `eq.KINDS`: low shelf, two peaks, high shelf.
    """

    sample_rate: int
    preamp_db: float
    bands: tuple[Band, ...]

    @property
    def params(self) -> eq.EqParams:
        """The bands as [K] float64 arrays."""
        rows = [(band.frequency_hz, band.gain_db, band.q) for band in self.bands]
        return eq.EqParams(*np.array(rows, np.float64).T)


def from_params(params: eq.EqParams, sample_rate: int) -> Settings:
    """Settings from [K] arrays, rounded (0.01 Hz, 0.001 dB, Q 0.0001), with the safe preamp."""
    bands = tuple(
        Band(kind, round(float(freq), 2), round(float(gain), 3) + 0.0, round(float(q), 4))
        for kind, freq, gain, q in zip(eq.KINDS, *params, strict=True)
    )
    settings = Settings(int(sample_rate), 0.0, bands)
    return dataclasses.replace(settings, preamp_db=safe_preamp_db(settings))


def safe_preamp_db(settings: Settings) -> float:
    """Preamp with which no full-scale tone can clip, whatever the settings' own says: the curve's
    peak turned round, 0 where it only cuts. Rounded down, so that the peak is covered."""
    return -math.ceil(max(0.0, peak_db(settings)) * 1000) / 1000 + 0.0


def peak_db(settings: Settings) -> float:
    """Highest gain of the cascade in dB, 0 Hz to half the rate: of all bands together, not of the
    largest alone.

    Taken from the float64 sections that `render` runs, at once, where compiling the JAX response
    takes a second; at frequencies even in log tan(pi f / rate), where every band is as wide as
    its Q says, close enough for 0.01 dB at the sharpest.
    """
    lowest = np.tan(np.pi * 10.0 / settings.sample_rate)
    angle_F = np.arctan(np.geomspace(lowest, 1 / lowest, round(-768 * np.log2(lowest))))
    delay_F = np.exp(-2j * np.concatenate([[0.0], angle_F, [np.pi / 2]]))
    sections = biquad.sos(*settings.params, kinds=eq.KINDS, sample_rate=settings.sample_rate)
    response_F = np.ones(len(delay_F), complex)
    for b0, b1, b2, _, a1, a2 in sections:
        response_F *= (b0 + delay_F * (b1 + delay_F * b2)) / (1 + delay_F * (a1 + delay_F * a2))
    return 20 * float(np.log10(np.abs(response_F).max()))


def scale(params: eq.EqParams, amount: float) -> eq.EqParams:
    """The EQ with every gain in dB times `amount`: 0 is flat, 1 as predicted.

    Raises:
      AudioError: as `check_amount`.
    """
    check_amount(amount)
    return params._replace(gain_db=np.asarray(params.gain_db, np.float64) * amount)


def check_amount(amount: float) -> None:
    """Raises AudioError for an amount outside -2 .. 2; a negative one turns the match round."""
    if not -2.0 <= amount <= 2.0:
        raise AudioError(f"amount {amount:g} is outside -2 .. 2: 1 is the match as predicted")


def table_text(settings: Settings) -> str:
    """The bands as lines of text, for a terminal."""
    lines = [f"{'band':<6}{'type':<12}{'frequency':>12}{'gain':>11}{'Q':>8}"]
    for name, band in zip(_band_names(), settings.bands, strict=True):
        lines.append(
            f"{name:<6}{_TITLES[band.type]:<12}{band.frequency_hz:>9.0f} Hz"
            f"{band.gain_db:>+8.1f} dB{band.q:>8.2f}"
        )
    lines.append(f"{'preamp':<30}{settings.preamp_db:>+8.1f} dB")
    return "\n".join(lines)


def equalizer_apo_text(settings: Settings) -> str:
    """The settings as Equalizer APO and what follows its grammar read them, a line each.

    The preamp is the safe one and not the settings' own, which may be what a single file took:
    such a program plays whatever comes. Four decimals: a frequency with exactly three would be
    read as thousands. LSC and HSC are the shelves whose Q is the cookbook's.
    """
    names = {"low_shelf": "LSC", "peaking": "PK", "high_shelf": "HSC"}
    lines = [f"# for {settings.sample_rate} Hz", f"Preamp: {safe_preamp_db(settings):.4f} dB"]
    for number, band in enumerate(settings.bands, start=1):
        lines.append(
            f"Filter {number}: ON {names[band.type]} Fc {band.frequency_hz:.4f} Hz "
            f"Gain {band.gain_db:.4f} dB Q {band.q:.4f}"
        )
    return "\n".join(lines)


def check_extension(path: str | os.PathLike) -> None:
    """Raises AudioError unless the path ends in .json or .txt."""
    if Path(path).suffix.lower() not in EXTENSIONS:
        raise AudioError(
            f"{os.fspath(path)!r}: settings end in .json, or for Equalizer APO in .txt"
        )


def save(path: str | os.PathLike, settings: Settings, *, overwrite: bool = True) -> None:
    """Writes the settings, whole or not at all: as JSON, which `load` reads, or as Equalizer APO's
    text where the name ends in .txt.

    Raises:
      AudioError: as `check_extension` and `files.write_json`.
    """
    check_extension(path)
    if Path(path).suffix.lower() == ".txt":
        write_text(path, equalizer_apo_text(settings) + "\n", overwrite=overwrite)
    else:
        write_json(path, dataclasses.asdict(settings), overwrite=overwrite)


def load(path: str | os.PathLike) -> Settings:
    """Reads a settings JSON.

    Raises:
      AudioError: the file cannot be read, is not such a JSON, or holds an EQ of other bands.
    """
    name = repr(os.fspath(path))
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AudioError(f"{name} cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise AudioError(f"{name} is not JSON ({error}): write it with --settings") from None
    return _from_json(content, name)


def _from_json(content: Any, name: str) -> Settings:
    try:
        bands = tuple(
            Band(
                str(band["type"]),
                *(float(band[key]) for key in ("frequency_hz", "gain_db", "q")),
            )
            for band in content["bands"]
        )
        settings = Settings(int(content["sample_rate"]), float(content["preamp_db"]), bands)
    except (TypeError, KeyError, ValueError) as error:
        raise AudioError(
            f"{name} is not a settings file ({type(error).__name__}: {error}): it needs "
            "sample_rate, preamp_db, and bands of type, frequency_hz, gain_db, q"
        ) from None
    kinds = tuple(band.type for band in bands)
    if kinds != eq.KINDS:
        raise AudioError(f"{name} has bands {', '.join(kinds)}: wanted {', '.join(eq.KINDS)}")
    for band in bands:
        finite = all(math.isfinite(x) for x in (band.gain_db, settings.preamp_db))
        if not (0 < band.frequency_hz < settings.sample_rate / 2 and 0 < band.q and finite):
            raise AudioError(
                f"{name}: {band} cannot be: frequencies lie above 0 and below half of "
                f"{settings.sample_rate} Hz, Q above 0, gains are finite"
            )
    return settings


def _band_names() -> list[str]:
    return [band.name.capitalize() for band in eq.PAPER.bands]
