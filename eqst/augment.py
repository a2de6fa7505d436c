"""Augmentation of a pair before the EQ, from its plan's uniform numbers.

What real recordings of one talker have in common (a microphone, a voice's size, a noise floor) and
what they do not (another gate, a floor in one take alone). Design section 5: without it a network
learns the training talkers by heart, and trusts pauses that other recordings do not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import pairs, pooled
from eqst.config import Data, Features

# Deviations of the cosines that make up a smooth random curve, slow to fast, relative to the first.
_COSINES = np.array([1.0, 1.0, 0.8, 0.6, 0.5, 0.4], np.float32)
_NOISE_CURVE_DB, _NOISE_TILT_DB, _NO_NOISE_DB = 5.0, 10.0, -200.0
_GATE_DEPTH_DB, _GATE_SHARE, _GATE_EDGE = (3.0, 40.0), (0.05, 0.5), 0.02

Curve = Callable[[jax.Array], jax.Array]


class Side(NamedTuple):
    """What one of the two segments gets for itself.

    Attributes:
      noise_db: (position) -> level of a noise floor against the loudest band's mean power.
      gate_share: [] share of the time that the gate is closed.
      gate_db: [] how far the level falls then; 0 without a gate.
    """

    noise_db: Curve
    gate_share: jax.Array
    gate_db: jax.Array


class Augmentation(NamedTuple):
    """What is done to a pair. Positions are 0 at 34 Hz and 1 at the top band, by octaves.

    Attributes:
      warp: [] factor of the frequency axis.
      curve_db: (position) -> dB to add, as a microphone would.
      input, reference: what each segment gets for itself.
    """

    warp: jax.Array
    curve_db: Curve
    input: Side
    reference: Side


def _smooth_curve(normal_6: jax.Array, position_X: jax.Array) -> jax.Array:
    order_6 = jnp.arange(1, len(_COSINES) + 1, dtype=jnp.float32)
    waves = jnp.cos(jnp.pi * position_X[:, None] * order_6[None, :])
    return jnp.sum(waves * (normal_6 * _COSINES)[None, :], axis=-1)


def used(data: Data) -> bool:
    """Whether these settings augment at all."""
    shares = data.curve_share + data.noise_share + data.one_sided_noise_share + data.gate_share
    return data.warp > 1.0 or shares > 0.0


def of_plan(data: Data, plan: pairs.Plan) -> Augmentation:
    """The augmentation a plan's uniform numbers stand for under these settings."""
    u = plan.augment_A
    normal_A = jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1.0 - 1e-6))
    warp = jnp.exp((2.0 * u[0] - 1.0) * math.log(data.warp))
    with_curve, with_noise = u[1] < data.curve_share, u[2] < data.noise_share

    def curve_db(position_X: jax.Array) -> jax.Array:
        curve_X = data.curve_db * _smooth_curve(normal_A[5:11], position_X)
        return jnp.where(with_curve, curve_X, 0.0)

    def floor_db(level: int, tilt: int, first: int, position_X: jax.Array) -> jax.Array:
        level_db = data.noise_low_db + (data.noise_high_db - data.noise_low_db) * u[level]
        shape_X = _NOISE_CURVE_DB * _smooth_curve(normal_A[first : first + 6], position_X)
        return level_db + shape_X + _NOISE_TILT_DB * normal_A[tilt] * (1.0 - 2.0 * position_X)

    def side(own: jax.Array, coin: int) -> Side:
        def noise_db(position_X: jax.Array) -> jax.Array:
            both_X = jnp.where(with_noise, floor_db(3, 4, 11, position_X), _NO_NOISE_DB)
            return jnp.where(own, floor_db(25, 26, 27, position_X), both_X)

        low, high = _GATE_SHARE
        depth_low, depth_high = _GATE_DEPTH_DB
        depth = depth_low + (depth_high - depth_low) * u[coin + 2]
        return Side(
            noise_db,
            low + (high - low) * u[coin + 1],
            jnp.where(u[coin] < data.gate_share, depth, 0.0),
        )

    one_sided, left = u[23] < data.one_sided_noise_share, u[24] < 0.5
    return Augmentation(warp, curve_db, side(one_sided & left, 17), side(one_sided & ~left, 20))


def position(spec: Features, freq_hz: np.ndarray, sample_rate: int) -> jax.Array:
    """Where frequencies lie between 34 Hz (0) and the top band (1), by octaves, clipped."""
    top_hz = pooled.centres_hz(spec, sample_rate)[-1]
    octaves = np.log2(np.maximum(freq_hz, 1.0) / pooled.LOW_HZ) / np.log2(top_hz / pooled.LOW_HZ)
    return jnp.asarray(np.clip(octaves, 0.0, 1.0), jnp.float32)


def gated(stats_SM: jax.Array, side: Side) -> jax.Array:
    """Pooled statistics as a gate leaves them: low quantiles fall, the mean power stays."""
    quantile_Q = jnp.asarray(pooled.QUANTILES, jnp.float32)
    closed_Q = jax.nn.sigmoid((side.gate_share - quantile_Q) / _GATE_EDGE)
    power_and_level = jnp.stack([jnp.zeros_like(side.gate_share), side.gate_share])
    share_S = jnp.concatenate([power_and_level, closed_Q])
    return stats_SM - side.gate_db * share_S[:, None]
