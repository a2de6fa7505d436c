"""Mel spectra of a segment, and how an EQ moves them.

STFT -> power in mel bands -> linear or dB, level removed, relative floor (design section 4). All
float32; products with the filterbank at the highest precision by argument, because accelerators
otherwise round them to bfloat16.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from eqst import biquad, config, eq

# Power below which a segment counts as digital silence (full scale is 1).
TINY = 1e-20


def mel(freq_hz: ArrayLike) -> np.ndarray:
    """O'Shaughnessy's mel scale: 2595 log10(1 + f / 700)."""
    return 2595.0 * np.log10(1.0 + np.asarray(freq_hz, np.float64) / 700.0)


def hertz(mel_value: ArrayLike) -> np.ndarray:
    """The inverse of `mel`."""
    return 700.0 * (10.0 ** (np.asarray(mel_value, np.float64) / 2595.0) - 1.0)


def band_centres_hz(features: config.Features) -> np.ndarray:
    """[M] centres of the mel bands in Hz, float64."""
    edges = np.linspace(mel(features.low_hz), mel(features.high_hz), features.mel_bands + 2)
    return hertz(edges)[1:-1]


@functools.cache
def filterbank(features: config.Features, sample_rate: int) -> np.ndarray:
    """Triangular mel weights that give the mean power of each band.

    The lowest bands are narrower than an STFT bin: each bin stands for the interval of one bin
    width round its frequency, and its weight is the triangle's area over it, so no band is empty.

    Args:
      features: bands and window; bands whose centre lies above Nyquist are all zero (masked).
      sample_rate: in Hz.

    Returns:
      [F, M] float64, columns summing to 1 (or 0 where masked).
    """
    edges_hz = hertz(
        np.linspace(mel(features.low_hz), mel(features.high_hz), features.mel_bands + 2)
    )
    bin_hz = sample_rate / features.window
    freq_hz_F = np.arange(features.window // 2 + 1) * bin_hz

    def area(x_FM: np.ndarray) -> np.ndarray:
        """Integral of each triangle from its lower edge to x."""
        low, mid, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
        rise = np.clip(x_FM, low, mid) - low
        fall = np.clip(x_FM, mid, high) - mid
        return rise**2 / (2 * (mid - low)) + fall - fall**2 / (2 * (high - mid))

    upper, lower = freq_hz_F[:, None] + bin_hz / 2, freq_hz_F[:, None] - bin_hz / 2
    weight_FM = area(upper) - area(lower)
    weight_FM[:, edges_hz[1:-1] > sample_rate / 2] = 0.0
    return weight_FM / np.maximum(weight_FM.sum(axis=0), 1e-12)


def frame_count(samples: int, window: int, hop: int) -> int:
    """Frames of a segment: 1 + (samples - window) // hop; whole windows only, no padding."""
    return 1 + (samples - window) // hop


def stft_power(samples_T: jax.Array, window: int, hop: int) -> jax.Array:
    """Power of Hann-windowed frames: |rfft|^2 / sum of the window's squares.

    Args:
      samples_T: [T] audio, T >= window.
      window, hop: in samples, static; the hop divides the window.

    Returns:
      [N, window // 2 + 1], N as in `frame_count`.

    Raises:
      ValueError: less than one window of audio.
    """
    frames = frame_count(samples_T.shape[-1], window, hop)
    if frames < 1:
        raise ValueError(
            f"{samples_T.shape[-1]} samples do not fill a window of {window}: give more audio"
        )
    hann_W = np.hanning(window + 1)[:-1]
    scaled_W = jnp.asarray(hann_W / np.sqrt(np.sum(hann_W**2)), jnp.float32)
    # Frames as shifted rows of hop-long blocks: a gather of every sample would cost more than
    # the FFT.
    parts = window // hop
    blocks_JH = samples_T[: (frames + parts - 1) * hop].reshape(-1, hop)
    frame_NW = jnp.concatenate([blocks_JH[p : p + frames] for p in range(parts)], axis=-1)
    spectrum_NF = jnp.fft.rfft(frame_NW * scaled_W[None, :], axis=-1)
    return jnp.real(spectrum_NF) ** 2 + jnp.imag(spectrum_NF) ** 2


def equalise_power(power_NF: jax.Array, params: eq.EqParams, sample_rate: int) -> jax.Array:
    """Device rendering: the STFT power times |H|^2 (inexact below 260 Hz: window leakage).

    Args:
      power_NF: [N, F] from `stft_power`.
      params: [K] or [2 K] bands, kinds repeating as in `eq.KINDS`.
    """
    bins = power_NF.shape[-1]
    freq_hz_F = jnp.asarray(np.linspace(0.0, sample_rate / 2, bins), jnp.float32)
    kinds = eq.KINDS * (params.freq_hz.shape[-1] // len(eq.KINDS))
    gain_db_F = biquad.cascade_db(
        freq_hz_F, params.freq_hz, params.gain_db, params.q, kinds=kinds, sample_rate=sample_rate
    )
    return power_NF * 10.0 ** (gain_db_F[None, :] / 10.0)


def warp_bins(power_NF: jax.Array, warp: jax.Array) -> jax.Array:
    """The spectrum with its frequency axis stretched: P'(f) = P(f / warp), linear between bins."""
    bins = power_NF.shape[-1]
    position_F = jnp.minimum(jnp.arange(bins) / warp, bins - 1.0)
    left_F = jnp.minimum(position_F.astype(jnp.int32), bins - 2)
    share_F = (position_F - left_F)[None, :]
    return power_NF[:, left_F] * (1.0 - share_F) + power_NF[:, left_F + 1] * share_F


def mel_power(features: config.Features, power_NF: jax.Array, sample_rate: int) -> jax.Array:
    """[N, M] mean power of each mel band."""
    weight_FM = jnp.asarray(filterbank(features, sample_rate), jnp.float32)
    return jnp.matmul(power_NF, weight_FM, precision=jax.lax.Precision.HIGHEST)


def levelled(features: config.Features, mel_NM: jax.Array) -> jax.Array:
    """Band powers relative to the segment's mean, on the scale of the config.

    The division makes every feature independent of level; the floor is relative too (-80 dB of
    the mean band power), so digital silence and any gain are treated alike.

    Returns:
      [N, M]: dB (>= floor_db, about) or linear power.
    """
    mean = jnp.maximum(jnp.mean(mel_NM), TINY)
    # A power of two near 1 / mean, on both sides of the division, rounds nothing. Without it the
    # derivative, which divides by the square of the mean, leaves float32 for what is very quiet.
    _, exponent = jnp.frexp(mean)
    scale = jax.lax.stop_gradient(jnp.ldexp(jnp.ones_like(mean), -exponent))
    relative_NM = (mel_NM * scale) / (mean * scale)
    if features.scale == "linear":
        return relative_NM
    return 10.0 * jnp.log10(relative_NM + 10.0 ** (features.floor_db / 10.0))
