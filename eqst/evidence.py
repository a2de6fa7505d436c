"""What the classical baselines know of a recording: two averaged spectra in log-spaced bands.

The long-term average spectrum (mean power) is what every matching equaliser uses; the geometric
mean over frames (mean of frame dB) hears the quiet frames as well, and an equaliser shifts both
by the same curve. Level is kept here and removed by whoever compares two recordings.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

LOWEST_HZ = 40.0
HIGHEST_HZ = 18_000.0
STEPS_PER_OCTAVE = 6.0
FLOOR_DB = -80.0  # relative to the mean frame power of the segment
WINDOW_S = 0.186  # 8192 samples at 44.1 kHz: 5.4 Hz bins, for the lowest bands
FRAMES_AT_ONCE = 256


class Evidence(NamedTuple):
    """Band spectra of a segment in dB, [M] each (or [n, M] stacked); see `evidence`."""

    power_db: np.ndarray
    geometric_db: np.ndarray


def top_hz(sample_rate: float) -> float:
    """The highest band centre in Hz: 18 kHz, or 0.45 of the rate where that is lower."""
    return min(HIGHEST_HZ, 0.45 * sample_rate)


def band_hz(sample_rate: float) -> np.ndarray:
    """Band centres, [M] float64 in Hz, near 1/6 octave apart, 40 Hz to `top_hz` inclusive."""
    octaves = np.log2(top_hz(sample_rate) / LOWEST_HZ)
    return np.geomspace(LOWEST_HZ, top_hz(sample_rate), round(octaves * STEPS_PER_OCTAVE) + 1)


def frame_length(sample_rate: float) -> int:
    """Samples per analysis frame: the power of two nearest to 186 ms."""
    return 2 ** round(np.log2(WINDOW_S * sample_rate))


@lru_cache(maxsize=8)
def band_matrix(sample_rate: float) -> np.ndarray:
    """Triangular band weights, [M, F] float64 over the rfft bins of a frame, rows summing to 1.

    Each triangle reaches its neighbours' centres, or one and a half bins where bands are narrower
    than that, so that no band is empty and every band is an average of power, not a sum.
    """
    length = frame_length(sample_rate)
    bin_hz = sample_rate / length
    centre_hz = band_hz(sample_rate)
    ratio = centre_hz[1] / centre_hz[0]
    freq_hz = np.arange(length // 2 + 1) * bin_hz
    below_hz = np.maximum(centre_hz - centre_hz / ratio, 1.5 * bin_hz)
    above_hz = np.maximum(centre_hz * ratio - centre_hz, 1.5 * bin_hz)
    offset_hz = freq_hz[None, :] - centre_hz[:, None]
    width_hz = np.where(offset_hz < 0, below_hz[:, None], above_hz[:, None])
    weight_MF = np.maximum(0.0, 1.0 - np.abs(offset_hz) / width_hz)
    return weight_MF / weight_MF.sum(axis=1, keepdims=True)


def evidence(audio_T: np.ndarray, sample_rate: float) -> Evidence:
    """Average and geometric-mean band spectra of a mono segment.

    Hann frames of `frame_length`, a quarter apart, of constant memory whatever the length. Power
    has a floor 80 dB under the segment's mean frame power, so digital silence stays finite and
    the result only shifts with the level of the audio.

    Args:
      audio_T: [T] samples, any level; a segment shorter than one frame is padded with zeros.
      sample_rate: samples per second.

    Returns:
      Evidence with [M] float64 arrays in dB, M bands at `band_hz(sample_rate)`.

    Raises:
      ValueError: if the audio is not one channel, is silent, or is not finite.
    """
    audio_T = np.asarray(audio_T)
    if audio_T.ndim != 1:
        raise ValueError(f"evidence needs mono audio [T], got shape {audio_T.shape}; mix it down")
    length = frame_length(sample_rate)
    if audio_T.size < length:
        audio_T = np.pad(audio_T, (0, length - audio_T.size))
    frames_NT = np.lib.stride_tricks.sliding_window_view(audio_T, length)[:: length // 4]
    window_T = np.hanning(length + 1)[:-1].astype(np.float32)
    weight_FM = band_matrix(float(sample_rate)).T.astype(np.float32)
    parts = []
    total = 0.0
    for start in range(0, len(frames_NT), FRAMES_AT_ONCE):
        spectrum_NF = np.fft.rfft(frames_NT[start : start + FRAMES_AT_ONCE] * window_T, axis=1)
        power_NF = spectrum_NF.real**2 + spectrum_NF.imag**2
        total += float(power_NF.sum())
        parts.append(power_NF @ weight_FM)
    band_NM = np.concatenate(parts).astype(np.float64)
    mean_power = total / (len(frames_NT) * (length // 2 + 1))
    if not (np.isfinite(mean_power) and mean_power > 0):
        raise ValueError(f"evidence needs finite audio that is not silent, mean power {mean_power}")
    band_NM = band_NM / mean_power + 10 ** (FLOOR_DB / 10)
    level_db = 10 * np.log10(mean_power)
    return Evidence(
        10 * np.log10(band_NM.mean(axis=0)) + level_db,
        10 * np.log10(band_NM).mean(axis=0) + level_db,
    )


def stack(items: list[Evidence]) -> Evidence:
    """Evidence of n segments, [n, M] each, from a list of [M] ones."""
    return Evidence(
        np.stack([item.power_db for item in items]),
        np.stack([item.geometric_db for item in items]),
    )
