"""Pooled statistics of a segment: what its levels in each band are like over time.

An EQ adds its band gain to every order statistic of a narrow band's level. So the statistics of a
segment (mean power, mean level, quantiles) can be measured once, without EQ, and moved by the EQ's
band gains: a CPU then trains on thousands of pairs a second (design section 5). Bands are narrow
against the EQ's curves, and below 500 Hz a four times longer window resolves them, so little is
lost; evaluation is on exactly filtered audio all the same.

Arrays are [S, M]: statistic (mean power first, mean level second, then quantiles) by band, in dB.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eqst import biquad, config, eq

Array = TypeVar("Array", jax.Array, np.ndarray)

QUANTILES = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95)
LOW_HZ = 34.0
# Below this the long window is used.
CROSSOVER_HZ = 480.0
LONG_FACTOR = config.POOLED_WINDOW_FACTOR
# Points of the EQ's curve averaged over a band's triangle.
POINTS = np.array([-0.75, -0.375, 0.0, 0.375, 0.75])
_LN_PER_DB = math.log(10.0) / 10.0  # a Python number: numpy's would drag arrays to float64


def centres_hz(features: config.Features, sample_rate: int) -> np.ndarray:
    """[M] band centres, evenly spaced in octaves from 34 Hz to just under Nyquist, float64."""
    top_hz = min(features.high_hz, 0.49 * sample_rate)
    count = 1 + int(np.floor(features.bands_per_octave * np.log2(top_hz / LOW_HZ)))
    return LOW_HZ * 2.0 ** (np.arange(count) / features.bands_per_octave)


def windows(features: config.Features) -> tuple[int, int]:
    """Samples of the long window (low bands) and of the short one."""
    return LONG_FACTOR * features.window, features.window


@functools.cache
def _triangles(features: config.Features, sample_rate: int) -> tuple[np.ndarray, ...]:
    """Filterbanks [F, M] of the long and the short window, columns summing to 1, float64."""
    centre_hz = centres_hz(features, sample_rate)
    banks = []
    for window, mine in zip(
        windows(features), (centre_hz < CROSSOVER_HZ, centre_hz >= CROSSOVER_HZ), strict=True
    ):
        freq_hz_F = np.arange(window // 2 + 1) * sample_rate / window
        half_hz_M = _half_width_hz(features, sample_rate)[mine]
        weight_FM = 1.0 - np.abs(freq_hz_F[:, None] - centre_hz[mine]) / half_hz_M
        weight_FM = np.maximum(weight_FM, 0.0)
        banks.append(weight_FM / weight_FM.sum(axis=0))
    return tuple(banks)


def _half_width_hz(features: config.Features, sample_rate: int) -> np.ndarray:
    """[M] half the base of each band's triangle: to its neighbours' centres, 1.5 bins at least."""
    centre_hz = centres_hz(features, sample_rate)
    step = 2.0 ** (1.0 / features.bands_per_octave)
    long, short = windows(features)
    bin_hz_M = sample_rate / np.where(centre_hz < CROSSOVER_HZ, long, short)
    return np.maximum(centre_hz * (step - 1.0 / step) / 2.0, 1.5 * bin_hz_M)


def band_power(
    features: config.Features, powers: tuple[jax.Array, ...], sample_rate: int
) -> tuple[jax.Array, ...]:
    """Mean power per band from the STFT powers of both windows: [N_long, M_low], [N, M_high]."""
    return tuple(
        jnp.matmul(power_NF, jnp.asarray(bank_FM, jnp.float32), precision=jax.lax.Precision.HIGHEST)
        for power_NF, bank_FM in zip(powers, _triangles(features, sample_rate), strict=True)
    )


def pool(
    features: config.Features, bands: tuple[Array, ...], *, extra_floor_db: float = 0.0
) -> Array:
    """Statistics in dB from band powers over time, floored relative to the mean power.

    JAX arrays stay in JAX; of numpy's the statistics are made on the host, whose sort is some fifty
    times faster than XLA's on a CPU.

    Args:
      bands: [..., N, M] for the long and the short window, from `band_power`.
      extra_floor_db: added to the floor of the config, for statistics that will be moved later.

    Returns:
      [..., S, M] float32.
    """
    xp = _module(bands[0])
    mean_M = xp.concatenate([x.mean(axis=-2) for x in bands], axis=-1)
    floor_db = features.floor_db + extra_floor_db
    floor = (mean_M.mean(axis=-1) * 10.0 ** (floor_db / 10.0) + 1e-30)[..., None]
    columns: list[Any] = []
    for band_NM in bands:
        level_NM = 10.0 * xp.log10(xp.sort(band_NM, axis=-2) + floor[..., None, :])
        mean_power_M = 10.0 * xp.log10(band_NM.mean(axis=-2) + floor)
        quantile_QM = _between(level_NM, np.array(QUANTILES))
        rows: list[Any] = [x[..., None, :] for x in (mean_power_M, level_NM.mean(axis=-2))]
        columns.append(xp.concatenate([*rows, quantile_QM], axis=-2))
    return xp.concatenate(columns, axis=-1)


def _module(array: Array) -> Any:
    """numpy for its own arrays, else jax.numpy."""
    return np if isinstance(array, np.ndarray) else jnp


def _between(sorted_NM: Array, share_Q: np.ndarray) -> Array:
    """[..., Q, M] quantiles of [..., N, M] sorted values, linear between neighbours."""
    last = sorted_NM.shape[-2] - 1
    left_Q = (share_Q * last).astype(int)
    right_Q = np.minimum(left_Q + 1, last)
    part_Q1 = (share_Q * last - left_Q).astype(np.float32)[:, None]
    return sorted_NM[..., left_Q, :] * (1 - part_Q1) + sorted_NM[..., right_Q, :] * part_Q1


def with_seconds(stats_SM: Array, seconds: float) -> Array:
    """[S + 1, M]: the statistics and, as a last row, how many seconds they are of."""
    xp = _module(stats_SM)
    return xp.concatenate([stats_SM, xp.full((1, stats_SM.shape[-1]), seconds, xp.float32)])


def levelled(stats_SM: Array) -> Array:
    """The statistics with the mean over bands of the mean power removed: no level is left."""
    return stats_SM - stats_SM[0].mean()


def band_gain_db(features: config.Features, params: eq.EqParams, sample_rate: int) -> jax.Array:
    """[M] gain of an EQ in each band in dB: mean power gain over the band's triangle.

    Args:
      params: [K] or [2 K] bands, kinds repeating as in `eq.KINDS`.
    """
    centre_hz = centres_hz(features, sample_rate)[:, None]
    freq_hz = centre_hz + POINTS * _half_width_hz(features, sample_rate)[:, None]
    freq_hz_F = jnp.asarray(np.clip(freq_hz, 1.0, 0.5 * sample_rate).reshape(-1), jnp.float32)
    kinds = eq.KINDS * (params.freq_hz.shape[-1] // len(eq.KINDS))
    gain_db_F = biquad.cascade_db(
        freq_hz_F, params.freq_hz, params.gain_db, params.q, kinds=kinds, sample_rate=sample_rate
    )
    weight_P = (1.0 - np.abs(POINTS)) / np.sum(1.0 - np.abs(POINTS))
    power_MP = jnp.exp(_LN_PER_DB * gain_db_F.reshape(-1, len(POINTS)))
    return jnp.log(jnp.sum(power_MP * weight_P.astype(np.float32)[None, :], axis=-1)) / _LN_PER_DB


def warp(features: config.Features, stats_SM: jax.Array, factor: jax.Array) -> jax.Array:
    """The frequency axis stretched by `factor`: a shift along the bands, linear in between."""
    bands = stats_SM.shape[-1]
    shift = features.bands_per_octave * jnp.log2(factor)
    position_M = jnp.clip(jnp.arange(bands) - shift, 0.0, bands - 1.001)
    left_M = position_M.astype(jnp.int32)
    share_M = (position_M - left_M)[None, :]
    return stats_SM[:, left_M] * (1.0 - share_M) + stats_SM[:, left_M + 1] * share_M


def add_power_db(a_db: jax.Array, b_db: jax.Array) -> jax.Array:
    """Level of two powers together, broadcasting; stable for any difference."""
    return jnp.logaddexp(a_db * _LN_PER_DB, b_db * _LN_PER_DB) / _LN_PER_DB
