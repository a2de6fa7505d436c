"""The exact filter in float64 numpy, and its rounding to 16 bits: the same samples on any machine.

A float32 FFT differs in its last bits from one processor, library version and number of threads to
the next. In float64 these differences are some 1e-10 of a 16-bit step, so that after rounding to
int16 hardly one sample in a billion is left to chance. This is the twin of `pairs.filter_circular`,
which renders for training and evaluation ten times as fast.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.fft

from eqst import eq, halfangle

PEAK = 29_491  # 0.9 of full scale


def response(freq_hz_F: np.ndarray, params: eq.EqParams, sample_rate: float) -> np.ndarray:
    """Complex response of bands in series: the closed form of `halfangle`.

    Args:
      freq_hz_F: [F] frequencies in Hz, 0 .. sample_rate / 2.
      params: [K] or [n K] bands, kinds repeating as in `eq.KINDS`; frequencies below Nyquist.
      sample_rate: in Hz.

    Returns:
      [F] complex128.
    """
    step = math.pi / sample_rate
    sin_F, cos_F = np.sin(step * freq_hz_F), np.sin(step * (0.5 * sample_rate - freq_hz_F))
    out_F = np.ones(len(freq_hz_F), np.complex128)
    bands = [np.asarray(field, np.float64) for field in params]
    kinds = eq.KINDS * (len(bands[0]) // len(eq.KINDS))
    for kind, cutoff_hz, gain_db, q in zip(kinds, *bands, strict=True):
        shape = halfangle.SHAPES[kind]
        x_F = sin_F * math.sin(step * (0.5 * sample_rate - cutoff_hz))
        y_F = cos_F * math.sin(step * cutoff_hz)
        c_F, s_F, xy_F = y_F * y_F, x_F * x_F, x_F * y_F
        d_F = np.sin(step * (cutoff_hz - freq_hz_F)) * (x_F + y_F)
        ln_a = halfangle.LN_A * gain_db
        lift = {"C": math.expm1(ln_a) * c_F, "-S": -math.expm1(ln_a) * s_F, "": 0.0}
        above_F = d_F + lift[shape.num_lift] + 1j * (math.exp(0.5 * shape.num_r * ln_a) / q) * xy_F
        below_F = d_F + lift[shape.den_lift] + 1j * (math.exp(0.5 * shape.den_r * ln_a) / q) * xy_F
        out_F *= math.exp(shape.s * ln_a) * above_F / below_F
    return out_F


def filter_circular(
    samples_T: np.ndarray, params: eq.EqParams, *, sample_rate: int, context: int
) -> np.ndarray:
    """A segment filtered by one circular FFT over its context and itself.

    Args:
      samples_T: [context + T] the segment with what came before it in the recording.
      params: as in `response`.
      sample_rate: in Hz.
      context: samples of context at the front; the filter's ring wraps into them.

    Returns:
      [T] float64.
    """
    spectrum_F = scipy.fft.rfft(np.asarray(samples_T, np.float64))
    freq_hz_F = np.fft.rfftfreq(len(samples_T), 1.0 / sample_rate)
    spectrum_F *= response(freq_hz_F, params, sample_rate)
    return scipy.fft.irfft(spectrum_F, len(samples_T))[context:]


def to_int16(samples_T: np.ndarray) -> np.ndarray:
    """Samples scaled so that the largest is `PEAK`, rounded to even: [..., T] int16, each alone.

    The level is no part of a pair (nobody can tell an EQ's level between two recordings), and so
    no EQ clips. Silence stays silence.
    """
    peak = np.abs(samples_T).max(axis=-1, keepdims=True)
    scale = np.divide(PEAK, peak, out=np.zeros_like(peak), where=peak > 0)
    return np.rint(samples_T * scale).astype(np.int16)
