"""The space of equalisers: four bands, their ranges and grids, and the way back from a curve.

One `EqTable` says every range once; unit cube, grids, sampling and clamping follow from it. A
setting is an `EqParams` of arrays [..., K] (K bands, in the order of `KINDS`) or a point
[..., K, 3] of the unit cube, whose last axis is `PARAMETERS`: log frequency, gain in dB and log Q,
each 0 at the low end of its range and 1 at the high end.

Functions of settings follow their arrays: numpy in, numpy float64 out; JAX in, JAX out, under jit,
vmap and grad as well.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.typing import ArrayLike

from eqst import biquad, curvefit

KINDS = (biquad.LOW_SHELF, biquad.PEAKING, biquad.PEAKING, biquad.HIGH_SHELF)
PARAMETERS = ("freq", "gain", "q")
RATE_LIMIT = 0.45  # the highest band frequency, as a share of the sample rate


class EqParams(NamedTuple):
    """Settings in physical units, each [..., K]: frequency in Hz, gain in dB, quality factor."""

    freq_hz: Any
    gain_db: Any
    q: Any


@dataclasses.dataclass(frozen=True)
class Band:
    """Kind and ranges of one band; gains run from -gain_limit_db to gain_limit_db."""

    name: str
    kind: str
    freq_low_hz: float
    freq_high_hz: float
    gain_limit_db: float
    q_low: float
    q_high: float


@dataclasses.dataclass(frozen=True)
class EqTable:
    """The bands, and how many grid points each parameter has: even steps in the cube, with ends."""

    name: str
    bands: tuple[Band, ...]
    freq_points: int
    gain_points: int
    q_points: int


def _table(name: str, gain_db: float, q_low: float, q_high: float, q_points: int) -> EqTable:
    freq_hz = {"low": (30, 260), "mid1": (260, 2000), "mid2": (1000, 4000), "high": (4000, 16000)}
    bands = tuple(
        Band(band, kind, float(low), float(high), gain_db, q_low, q_high)
        for (band, (low, high)), kind in zip(freq_hz.items(), KINDS, strict=True)
    )
    return EqTable(
        name, bands, freq_points=21, gain_points=round(2 * gain_db) + 1, q_points=q_points
    )


# The paper's space, measured from its own audio: whole dB, Q on 10^((20 - 3 k) / 20), k = 0 .. 13,
# and 21 frequencies a band. The range of its low shelf is not known (85 .. 242 Hz were seen).
PAPER = _table("paper", gain_db=10.0, q_low=10.0 ** (-19 / 20), q_high=10.0, q_points=14)
PRACTICAL = _table("practical", gain_db=12.0, q_low=0.3, q_high=4.0, q_points=14)


def table(name: str) -> EqTable:
    """The table of that name; ValueError names the choices."""
    tables = {known.name: known for known in (PAPER, PRACTICAL)}
    if name not in tables:
        raise ValueError(f"unknown EQ table {name!r}: choose from {', '.join(tables)}")
    return tables[name]


def _namespace(*arrays: Any) -> Any:
    """jax.numpy as soon as one array is JAX's (or traced), numpy otherwise."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _float_dtype(*arrays: Any) -> Any:
    """Float32 at least for JAX's arrays, also where 64 bits are allowed; float64 for numpy's."""
    if _namespace(*arrays) is np:
        return np.dtype(np.float64)
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _float_params(params: EqParams) -> EqParams:
    xp, dtype = _namespace(*params), _float_dtype(*params)
    return EqParams(*(xp.asarray(array, dtype) for array in params))


def _bounds(limits: EqTable, rank: int) -> tuple[EqParams, EqParams]:
    """Lowest and highest settings as numpy [1, .., K], shaped to stand beside arrays of a rank."""
    rows = np.array(
        [(b.freq_low_hz, b.freq_high_hz, b.gain_limit_db, b.q_low, b.q_high) for b in limits.bands]
    )
    freq_low, freq_high, gain, q_low, q_high = rows.T.reshape((5,) + (1,) * (rank - 1) + (-1,))
    return EqParams(freq_low, -gain, q_low), EqParams(freq_high, gain, q_high)


def from_unit(limits: EqTable, unit_KP: Any) -> EqParams:
    """Points [..., K, 3] of the unit cube as settings; outside 0 .. 1 it extrapolates (`clamp`)."""
    xp = _namespace(unit_KP)
    unit_KP = xp.asarray(unit_KP, _float_dtype(unit_KP))
    low, high = _bounds(limits, unit_KP.ndim - 1)
    freq, gain, q = (unit_KP[..., p] for p in range(len(PARAMETERS)))

    def geometric(bottom, top, unit):
        # exp of a small number times the low end: float32 keeps the frequency to a few ulp.
        return xp.asarray(bottom, unit.dtype) * xp.exp(
            unit * xp.asarray(np.log(top / bottom), unit.dtype)
        )

    return EqParams(
        geometric(low.freq_hz, high.freq_hz, freq),
        (2.0 * gain - 1.0) * xp.asarray(high.gain_db, gain.dtype),
        geometric(low.q, high.q, q),
    )


def to_unit(limits: EqTable, params: EqParams) -> Any:
    """Settings as points [..., K, 3] of the unit cube: the inverse of `from_unit`, everywhere."""
    xp = _namespace(*params)
    params = _float_params(params)
    low, high = _bounds(limits, params.freq_hz.ndim)

    def position(value, bottom, top):
        bottom, top = (xp.asarray(end, value.dtype) for end in (bottom, np.log(top / bottom)))
        return xp.log(value / bottom) / top

    return xp.stack(
        [
            position(params.freq_hz, low.freq_hz, high.freq_hz),
            0.5 * (params.gain_db / xp.asarray(high.gain_db, params.gain_db.dtype) + 1.0),
            position(params.q, low.q, high.q),
        ],
        axis=-1,
    )


def grid_sizes(limits: EqTable) -> tuple[int, int, int]:
    """Grid points of (frequency, gain, q), the same for every band."""
    return limits.freq_points, limits.gain_points, limits.q_points


def grid_units(limits: EqTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the grid points in the unit cube, per parameter, ascending; float64."""
    freq, gain, q = (np.linspace(0.0, 1.0, points) for points in grid_sizes(limits))
    return freq, gain, q


def to_grid_index(limits: EqTable, params: EqParams) -> Any:
    """Index [..., K, 3] (int32) of each parameter's nearest grid point, an end from outside."""
    unit_KP = to_unit(limits, params)
    xp = _namespace(unit_KP)
    top = (
        xp.asarray(grid_sizes(limits), unit_KP.dtype).reshape((1,) * (unit_KP.ndim - 1) + (-1,))
        - 1.0
    )
    return xp.clip(xp.round(unit_KP * top), 0.0, top).astype(xp.int32)


def from_grid_index(limits: EqTable, index_KP: Any) -> EqParams:
    """Settings at grid indices [..., K, 3]."""
    xp = _namespace(index_KP)
    index_KP = xp.asarray(index_KP, _float_dtype(index_KP))
    top = (
        xp.asarray(grid_sizes(limits), index_KP.dtype).reshape((1,) * (index_KP.ndim - 1) + (-1,))
        - 1.0
    )
    return from_unit(limits, index_KP / top)


def sample(limits: EqTable, key: jax.Array, shape: Sequence[int] = ()) -> EqParams:
    """Settings [*shape, K] uniform in the unit cube: in log frequency, gain in dB, log Q."""
    unit_KP = jax.random.uniform(key, (*shape, len(limits.bands), len(PARAMETERS)))
    return from_unit(limits, unit_KP)


def clamp(limits: EqTable, params: EqParams) -> EqParams:
    """Settings moved to the nearest values inside the table's ranges."""
    xp = _namespace(*params)
    params = _float_params(params)
    low, high = _bounds(limits, params.freq_hz.ndim)
    clamped = []
    for value, bottom, top in zip(params, low, high, strict=True):
        clamped.append(
            xp.clip(value, xp.asarray(bottom, value.dtype), xp.asarray(top, value.dtype))
        )
    return EqParams(*clamped)


def limit_to_rate(params: EqParams, sample_rate: float) -> tuple[EqParams, Any]:
    """Band frequencies held to 0.45 of a sample rate, and which bands [..., K] were (bool).

    A band near or above half the sample rate has no digital filter of its kind; a high shelf up
    there is flat in any case.
    """
    xp = _namespace(*params)
    params = _float_params(params)
    limit_hz = RATE_LIMIT * sample_rate
    limited = params.freq_hz > limit_hz
    return params._replace(freq_hz=xp.minimum(params.freq_hz, limit_hz)), limited


def negate(params: EqParams) -> EqParams:
    """The inverse equaliser, exact in magnitude and phase: every gain with the other sign."""
    return params._replace(gain_db=-params.gain_db)


def response_db(params: EqParams, freq_hz_F: ArrayLike, *, sample_rate: float) -> jax.Array:
    """Response of settings [..., K] at frequencies [F]: [..., F] in dB, float32.

    Reverse-mode derivatives only, and frequencies within half the rate: see `biquad.cascade_db`.
    """
    cascade = functools.partial(biquad.cascade_db, kinds=KINDS, sample_rate=sample_rate)
    arrays = [jnp.asarray(array) for array in params]
    leading = arrays[0].shape[:-1]
    for _ in leading:
        cascade = jax.vmap(cascade, in_axes=(None, 0, 0, 0))
    return cascade(jnp.asarray(freq_hz_F), *arrays)


def curve_grid_hz(sample_rate: float) -> np.ndarray:
    """Where curves are compared: [F] in 1/24 octaves, 40 Hz .. min(18 kHz, 0.45 of the rate)."""
    top_hz = min(18000.0, RATE_LIMIT * sample_rate)
    return 40.0 * 2.0 ** (np.arange(int(np.floor(24.0 * np.log2(top_hz / 40.0))) + 1) / 24.0)


def remove_level(curve_F: Any) -> Any:
    """Curves [..., F] without their mean over frequency: what no listener can tell from a fader."""
    return curve_F - curve_F.mean(axis=-1, keepdims=True)


def refit(params: EqParams, *, table: EqTable, from_rate: float, to_rate: float) -> EqParams:
    """Settings for another sample rate: those whose response there is nearest to what it was.

    Settings belong to a rate, most of all near its top. The curves are compared, level included, up
    to where both rates reach (`curve_grid_hz` of the lower), by bounded least squares in float64.

    Args:
      params: [..., K] settings at from_rate, their frequencies below half of it.
      table: bounds of the result; its frequencies also stay within 0.45 of to_rate.
      from_rate, to_rate: samples per second.

    Returns:
      [..., K] float64 numpy settings at to_rate; equal rates return the settings unchanged.

    Raises:
      ValueError: settings outside what `biquad.sos` takes at from_rate.
    """
    arrays = EqParams(*(np.asarray(array, np.float64) for array in params))
    if from_rate == to_rate:
        return arrays
    freq_hz_F = curve_grid_hz(min(from_rate, to_rate))
    shape = arrays.freq_hz.shape
    rows = zip(*(array.reshape(-1, shape[-1]) for array in arrays), strict=True)
    fitted = [_refit_one(EqParams(*row), table, freq_hz_F, from_rate, to_rate) for row in rows]
    return EqParams(*(np.stack(column).reshape(shape) for column in zip(*fitted, strict=True)))


def _refit_one(
    params: EqParams, limits: EqTable, freq_hz_F: np.ndarray, from_rate: float, to_rate: float
) -> EqParams:
    def curve(settings: EqParams, rate: float) -> np.ndarray:
        sections_K6 = biquad.sos(*settings, kinds=KINDS, sample_rate=rate)
        delay_3F = np.exp(-2j * np.pi * freq_hz_F / rate) ** np.arange(3)[:, None]
        ratio_KF = (sections_K6[:, :3] @ delay_3F) / (sections_K6[:, 3:] @ delay_3F)
        return 20 * np.log10(np.abs(ratio_KF)).sum(axis=0)

    def settings(unit: np.ndarray) -> EqParams:
        return limit_to_rate(from_unit(limits, unit.reshape(-1, len(PARAMETERS))), to_rate)[0]

    wanted_F = curve(params, from_rate)
    start = to_unit(limits, clamp(limits, params)).ravel()
    fit = scipy.optimize.least_squares(
        lambda unit: curve(settings(unit), to_rate) - wanted_F,
        np.clip(start, 1e-6, 1 - 1e-6),
        bounds=(0.0, 1.0),
        x_scale=0.1,
    )
    return settings(fit.x)


def fit_curve(
    curve_db_nF: ArrayLike,
    freq_hz_F: ArrayLike,
    *,
    table: EqTable,
    sample_rate: float,
    start: EqParams | None = None,
    weight_F: ArrayLike | None = None,
    gain_weight: float = 1e-5,
    starts: int = 8,
) -> EqParams:
    """Settings whose response has the shape of a curve: bounded least squares from several starts.

    The level is free: the (weighted) mean over frequency is removed from both. Deterministic, in
    float32; see `curvefit.search` for how the starts are found.

    Args:
      curve_db_nF: [..., F] curves in dB.
      freq_hz_F: [F] their frequencies in Hz, 0 .. sample_rate / 2.
      table: bounds of the result; static, like sample_rate and starts. Its highest frequency must
        be below half the rate.
      sample_rate: that the settings are for, samples per second.
      start: [..., K] settings to start from as well.
      weight_F: [F] weights of the squared errors, not negative; equal ones by default.
      gain_weight: what the mean square gain of the bands (dB^2) counts beside the mean square error
        (dB^2). The default only picks the least gain among settings of equal shape; more shrinks.
      starts: first guesses, 1 .. 1024. With more of them misses become rarer and fits slower.

    Returns:
      [..., K] settings inside the table, float32.

    Raises:
      ValueError: curves, frequencies and weights that do not fit each other; a band of the table
        that can lie above half the sample rate.
    """
    curve, freq_F = jnp.asarray(curve_db_nF, jnp.float32), jnp.asarray(freq_hz_F, jnp.float32)
    weight_F = jnp.ones_like(freq_F) if weight_F is None else jnp.asarray(weight_F, jnp.float32)
    if freq_F.ndim != 1 or not (curve.shape[-1:] == freq_F.shape == weight_F.shape):
        raise ValueError(
            f"curves {curve.shape}, frequencies {freq_F.shape}, weights {weight_F.shape}: want"
            " [..., F], [F] and [F]"
        )
    top_hz = max(band.freq_high_hz for band in table.bands)
    if top_hz >= 0.5 * sample_rate:
        raise ValueError(
            f"table {table.name!r} reaches {top_hz:g} Hz and half the sample rate is"
            f" {0.5 * sample_rate:g} Hz: fit at a higher rate, then `refit`"
        )
    leading, points = curve.shape[:-1], len(KINDS) * len(PARAMETERS)
    curve_nF = curve.reshape(-1, freq_F.size)
    given_nSP = jnp.zeros((len(curve_nF), 0, points), jnp.float32)
    if start is not None:
        unit = to_unit(table, EqParams(*(jnp.asarray(array) for array in start)))
        given_nSP = jnp.clip(unit, 0.0, 1.0).astype(jnp.float32).reshape(-1, 1, points)
    unit_nP = _fit(
        curve_nF,
        freq_F,
        weight_F / jnp.sum(weight_F),
        given_nSP,
        jnp.float32(gain_weight),
        table,
        float(sample_rate),
        starts,
    )
    return from_unit(table, unit_nP.reshape(*leading, len(KINDS), len(PARAMETERS)))


@functools.partial(jax.jit, static_argnames=("limits", "sample_rate", "starts"))
def _fit(curve_nF, freq_hz_F, weight_F, given_nSP, gain_weight, limits, sample_rate, starts):
    problem = curvefit.Problem(
        decode=functools.partial(from_unit, limits),
        kinds=KINDS,
        freq_hz_F=freq_hz_F,
        weight_F=weight_F,
        gain_weight=gain_weight,
        sample_rate=sample_rate,
    )
    return curvefit.search(problem, curve_nF, given_nSP, starts=starts)
