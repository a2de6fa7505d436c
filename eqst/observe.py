"""What the network sees of a pair, for each way of rendering the EQ.

`heard` starts from finished audio (host and exact rendering, evaluation), and so does `listen`, for
one recording of any length (matching); `rendered` from dry audio, with the EQ on the STFT power;
`shifted` from pooled statistics made once. One pair each; vmapped at the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from eqst import augment, eq, features, pairs, pooled
from eqst.config import Config, Features


def hops(spec: Features) -> tuple[int, ...]:
    """Samples between frames, for each window the features need: the same share of it."""
    return tuple(size * spec.hop // spec.window for size in _windows(spec))


def _windows(spec: Features) -> tuple[int, ...]:
    return pooled.windows(spec) if spec.kind == "pooled" else (spec.window,)


def _powers(spec: Features, samples_T: jax.Array) -> tuple[jax.Array, ...]:
    """STFT power, for each window the features need."""
    return tuple(
        features.stft_power(samples_T, size, hop)
        for size, hop in zip(_windows(spec), hops(spec), strict=True)
    )


def _summary(
    spec: Features, powers: tuple[jax.Array, ...], sample_rate: int, samples: int
) -> jax.Array:
    if spec.kind == "pooled":
        stats_SM = pooled.pool(spec, pooled.band_power(spec, powers, sample_rate))
        return pooled.with_seconds(pooled.levelled(stats_SM), samples / sample_rate)
    return features.levelled(spec, features.mel_power(spec, powers[0], sample_rate))


def heard(config: Config, samples_T: jax.Array) -> jax.Array:
    """Features of one recording as it is: [N, M] mel frames or [S + 1, M] pooled
    statistics (the last row is the seconds they are of).

    Args:
      samples_T: [T] mono at `config.data.sample_rate`, any level, T >= the longest window.
    """
    spec = config.features
    powers = _powers(spec, samples_T)
    return _summary(spec, powers, config.data.sample_rate, samples_T.shape[-1])


# Long frames that `band_powers` measures at a time: one compilation serves any length.
_FRAMES = 64


@functools.partial(jax.jit, static_argnums=0)
def _block_bands(config: Config, samples_T: jax.Array) -> tuple[jax.Array, ...]:
    """Band powers of one block, as many short frames as belong to its long ones."""
    (long, short), spec = pooled.windows(config.features), config.features
    bands = pooled.band_power(spec, _powers(spec, samples_T), config.data.sample_rate)
    # The short window has more frames than the block is asked for at its end; they come next time.
    keep = (_FRAMES, _FRAMES * long // short)
    return tuple(band_NM[:count] for band_NM, count in zip(bands, keep, strict=True))


def band_powers(
    config: Config, segment: Callable[[int, int], np.ndarray], length: int
) -> tuple[np.ndarray, ...]:
    """Band powers over time of dry audio of any length, measured block by block.

    Args:
      segment: (start, count) -> [count] mono samples, zeros past the end.
      length: of the recording in samples.

    Returns:
      [N, M] for the long and for the short window, whole frames only.
    """
    spec = config.features
    (long, short), (long_hop, short_hop) = pooled.windows(spec), hops(spec)
    step = _FRAMES * long_hop
    parts = [
        _block_bands(config, segment(start, step + long - long_hop))
        for start in range(0, max(length - short, 0) + 1, step)
    ]
    return tuple(
        np.concatenate([np.asarray(x) for x in column])[: features.frame_count(length, window, hop)]
        for column, window, hop in zip(
            zip(*parts, strict=True), (long, short), (long_hop, short_hop), strict=True
        )
    )


def listen(config: Config, samples_T: np.ndarray) -> np.ndarray:
    """`heard` of one recording on the host: pooled statistics without a compilation per length."""
    if config.features.kind != "pooled":
        return np.asarray(jax.jit(heard, static_argnums=0)(config, samples_T))

    def segment(start: int, count: int) -> np.ndarray:
        part_T = samples_T[start : start + count]
        return np.pad(part_T, (0, count - len(part_T))).astype(np.float32, copy=False)

    powers = band_powers(config, segment, len(samples_T))
    stats_SM = pooled.levelled(pooled.pool(config.features, powers))
    return pooled.with_seconds(stats_SM, len(samples_T) / config.data.sample_rate)


def least_samples(config: Config) -> int:
    """The shortest recording `heard` takes: its longest window."""
    return max(_windows(config.features))


def _equalisers(config: Config, plan: pairs.Plan) -> tuple[eq.EqParams, eq.EqParams]:
    """The EQs on the input (colour) and on the reference (colour and label)."""
    table, rate = eq.table(config.eq_table), config.data.sample_rate
    colour, label = (
        pairs.settings(table, unit_KP, rate) for unit_KP in (plan.colour_KP, plan.label_KP)
    )
    return colour, pairs.concatenate(colour, label)


def rendered(
    config: Config, input_T: jax.Array, reference_T: jax.Array, plan: pairs.Plan
) -> tuple[jax.Array, jax.Array]:
    """Features of a pair from dry audio: augmentation and EQ on the STFT power.

    Args:
      input_T, reference_T: [T] dry segments.
    """
    spec, rate, data = config.features, config.data.sample_rate, config.data

    change = augment.of_plan(data, plan)

    def one(samples_T: jax.Array, params: eq.EqParams, side: augment.Side) -> jax.Array:
        powers = []
        for power_NF in _powers(spec, samples_T):
            if augment.used(data):
                freq_hz_F = np.linspace(0.0, rate / 2, power_NF.shape[-1])
                where_F = augment.position(spec, freq_hz_F, rate)
                power_NF = features.warp_bins(power_NF, change.warp)
                power_NF = power_NF * 10.0 ** (change.curve_db(where_F)[None, :] / 10.0)
                peak = jnp.max(jnp.mean(power_NF, axis=0))
                power_NF = power_NF + peak * 10.0 ** (side.noise_db(where_F)[None, :] / 10.0)
            powers.append(features.equalise_power(power_NF, params, rate))
        return _summary(spec, tuple(powers), rate, samples_T.shape[-1])

    colour, both = _equalisers(config, plan)
    return one(input_T, colour, change.input), one(reference_T, both, change.reference)


def shifted(
    config: Config,
    input_SM: jax.Array,
    reference_SM: jax.Array,
    plan: pairs.Plan,
    *,
    seconds: float,
) -> tuple[jax.Array, jax.Array]:
    """Features of a pair from its segments' statistics without EQ, moved by the EQs' band gains.

    Args:
      input_SM, reference_SM: [S, M] from `pool_dry`.
      seconds: the segments' length.
    """
    spec, rate, data = config.features, config.data.sample_rate, config.data

    change = augment.of_plan(data, plan)
    where_M = augment.position(spec, pooled.centres_hz(spec, rate), rate)

    def one(stats_SM: jax.Array, params: eq.EqParams, side: augment.Side) -> jax.Array:
        stats_SM = stats_SM.astype(jnp.float32)
        if augment.used(data):
            stats_SM = pooled.warp(spec, stats_SM, change.warp) + change.curve_db(where_M)[None, :]
            stats_SM = augment.gated(stats_SM, side)
            noise_M = jnp.max(stats_SM[0]) + side.noise_db(where_M)
            stats_SM = pooled.add_power_db(stats_SM, noise_M[None, :])
        stats_SM = stats_SM + pooled.band_gain_db(spec, params, rate)[None, :]
        stats_SM = pooled.add_power_db(stats_SM, _mean_power_db(stats_SM) + spec.floor_db)
        return pooled.with_seconds(pooled.levelled(stats_SM), seconds)

    colour, both = _equalisers(config, plan)
    return one(input_SM, colour, change.input), one(reference_SM, both, change.reference)


def _mean_power_db(stats_SM: jax.Array) -> jax.Array:
    """Level of the mean power over the bands."""
    bands = stats_SM.shape[-1]
    total = jax.nn.logsumexp(stats_SM[0] * (jnp.log(10.0) / 10.0))
    return (total - jnp.log(1.0 * bands)) * (10.0 / jnp.log(10.0))


def pool_dry(config: Config, long_BNM: np.ndarray, short_BNM: np.ndarray) -> np.ndarray:
    """[B, S, M] statistics of dry segments for `shifted`: level kept, floored 20 dB lower."""
    return pooled.pool(config.features, (long_BNM, short_BNM), extra_floor_db=-20.0)
