"""What an outside program did to a recording, as a response curve: its output against its input."""

from __future__ import annotations

import numpy as np
import scipy.fft

from eqst import eq
from eqst.files import AudioError

TAPER_SECONDS = 0.25  # at each end, at most a quarter of the audio
HALF_WIDTH_OCTAVES = 1 / 24  # of a band, each side of its centre
LEAST_BINS = 8  # each side, where bands are narrower than that
FLOOR_DB = -95.0  # of the mean power, under which a band of the input says nothing


def curve_db(
    input_T: np.ndarray, output_T: np.ndarray, sample_rate: int, *, step: float = 0.0
) -> np.ndarray:
    """The response that turned the input into the output, on `eq.curve_grid_hz`.

    The ratio of the two power spectra of the whole recording, over triangular bands of 1/12 octave
    (wider in the bass, where there are few bins), after the output was brought to the input's time
    by the peak of their cross-correlation. So a delay, a change of level and the phase of a filter
    do not matter, and what changes over time is averaged. With the project's own EQs (random of
    the paper's table, 3 s of speech, 16 bits) the shape RMSE against the true curve is 0.1 dB in
    the mean; at 1 s it is twice that (`tests/test_transfer.py`). Where the input has next to no
    power (above a codec's edge) nothing can be measured, and the curve is held from below; in the
    bass, from above.

    Args:
      input_T, output_T: [T] mono samples; the output may be longer, shorter or late.
      sample_rate: of both, in Hz.
      step: what the output's samples were rounded to (2^-15 for 16 bits, 0 for floats): the power
        of that rounding is taken off.

    Returns:
      [F] dB, level included.

    Raises:
      AudioError: one of them is silent or not finite, or no band of both can be measured.
    """
    input_T, output_T = (np.asarray(x, np.float64) for x in (input_T, output_T))
    for name, samples_T in (("input", input_T), ("output", output_T)):
        if not (np.isfinite(samples_T).all() and np.any(samples_T)):
            raise AudioError(f"the {name} is silent or not finite: no curve can be read from it")
    output_T = _aligned(input_T, output_T)
    ramp = min(round(TAPER_SECONDS * sample_rate), len(input_T) // 4)
    window_T = np.ones(len(input_T))
    window_T[:ramp] = 0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)
    window_T[len(window_T) - ramp :] = window_T[:ramp][::-1]
    size = scipy.fft.next_fast_len(len(input_T), real=True)
    power_2F = [np.abs(scipy.fft.rfft(x_T * window_T, size)) ** 2 for x_T in (input_T, output_T)]
    floor = power_2F[0].mean() * 10.0 ** (FLOOR_DB / 10.0)
    rounding = step**2 / 12.0 * float(np.sum(window_T**2))
    grid_hz_G = eq.curve_grid_hz(sample_rate)
    bin_hz = sample_rate / size
    out_G = np.full(len(grid_hz_G), np.nan)
    for g, centre_hz in enumerate(grid_hz_G):
        half_hz = max(centre_hz * (2.0**HALF_WIDTH_OCTAVES - 1.0), LEAST_BINS * bin_hz)
        first = max(1, int(np.ceil((centre_hz - half_hz) / bin_hz)))
        last = min(len(power_2F[0]) - 1, int((centre_hz + half_hz) / bin_hz))
        bins = np.arange(first, last + 1)
        weight_F = 1.0 - np.abs(bins * bin_hz - centre_hz) / half_hz
        weight_F /= weight_F.sum()
        before, after = (float(weight_F @ power_F[bins]) for power_F in power_2F)
        after -= rounding
        if before > floor and after > rounding:
            out_G[g] = 10.0 * np.log10(after / before)
        elif g > 0:
            out_G[g] = out_G[g - 1]
    measured_G = np.isfinite(out_G)
    if not measured_G.any():
        raise AudioError(
            "no band of the output is above its rounding: no curve can be read from it"
        )
    out_G[~measured_G] = out_G[np.argmax(measured_G)]
    return out_G


def _aligned(input_T: np.ndarray, output_T: np.ndarray) -> np.ndarray:
    """The output moved in time to where it resembles the input most, cut to its length."""
    size = scipy.fft.next_fast_len(len(input_T) + len(output_T), real=True)
    cross_F = scipy.fft.rfft(output_T, size) * np.conj(scipy.fft.rfft(input_T, size))
    delay = int(np.argmax(np.abs(scipy.fft.irfft(cross_F, size))))
    if delay >= len(output_T):
        delay -= size
    moved_T = np.zeros(len(input_T))
    first, last = max(0, -delay), min(len(input_T), len(output_T) - delay)
    moved_T[first:last] = output_T[first + delay : last + delay]
    return moved_T
