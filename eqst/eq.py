"""The space of equalisers: four bands, their ranges and grids, and the way back from a curve.

One `EqTable` says every range once; unit cube, grids, sampling and clamping follow from it. A setting
is an `EqParams` of arrays [..., K] (K bands, in the order of `KINDS`) or a point [..., K, 3] of the
unit cube, whose last axis is `PARAMETERS`: log frequency, gain in dB and log Q, each 0 at the low end
of its range and 1 at the high end.

Functions follow their arrays: numpy in, numpy float64 out; JAX in, JAX out, also under jit, vmap, grad.
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

from eqst import biquad

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
    """The bands, and the grid points of each parameter, evenly spaced in the cube, ends included."""

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


# The paper's space, measured from its own audio: whole dB, Q on 10^((20 - 3 k) / 20), k = 0 .. 13, and
# 21 frequencies a band. The range of its low shelf is not known (85 .. 242 Hz were seen).
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


def _float_params(params: EqParams) -> EqParams:
    xp = _namespace(*params)
    return EqParams(*(xp.asarray(array, xp.result_type(float)) for array in params))


def _bounds(limits: EqTable, rank: int) -> tuple[EqParams, EqParams]:
    """Lowest and highest settings as numpy [1, .., K], shaped to stand beside arrays of a rank."""
    rows = np.array(
        [(b.freq_low_hz, b.freq_high_hz, b.gain_limit_db, b.q_low, b.q_high) for b in limits.bands]
    )
    freq_low, freq_high, gain, q_low, q_high = rows.T.reshape((5,) + (1,) * (rank - 1) + (-1,))
    return EqParams(freq_low, -gain, q_low), EqParams(freq_high, gain, q_high)


def from_unit(limits: EqTable, unit_KP: Any) -> EqParams:
    """Points [..., K, 3] of the unit cube as settings. Values outside 0 .. 1 extrapolate; see `clamp`."""
    xp = _namespace(unit_KP)
    unit_KP = xp.asarray(unit_KP, xp.result_type(float))
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
    """Settings as points [..., K, 3] of the unit cube: the inverse of `from_unit`, outside it too."""
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
    """Index [..., K, 3] (int32) of the nearest grid point of each parameter, ends for what lies outside."""
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
    index_KP = xp.asarray(index_KP, xp.result_type(float))
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

    Reverse-mode derivatives only (`biquad.cascade_db`). Frequencies as there; bands below half the rate.
    """
    cascade = functools.partial(biquad.cascade_db, kinds=KINDS, sample_rate=sample_rate)
    arrays = [jnp.asarray(array) for array in params]
    leading = arrays[0].shape[:-1]
    for _ in leading:
        cascade = jax.vmap(cascade, in_axes=(None, 0, 0, 0))
    return cascade(jnp.asarray(freq_hz_F), *arrays)


def curve_grid_hz(sample_rate: float) -> np.ndarray:
    """The frequencies [F] on which curves are compared: 1/24 octave, 40 Hz .. min(18 kHz, 0.45 of the rate)."""
    top_hz = min(18000.0, RATE_LIMIT * sample_rate)
    return 40.0 * 2.0 ** (np.arange(int(np.floor(24.0 * np.log2(top_hz / 40.0))) + 1) / 24.0)


def remove_level(curve_F: Any) -> Any:
    """Curves [..., F] without their mean over frequency: what no listener can tell from a fader."""
    return curve_F - curve_F.mean(axis=-1, keepdims=True)
