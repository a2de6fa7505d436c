"""The closed form of one second-order equaliser band: magnitude, and derivatives, at half angles.

Peaks and shelves are those of Bristow-Johnson's Audio EQ Cookbook, but no filter coefficient is
formed for a response: coefficients rounded to float32 lose 0.1 to 0.5 dB at low frequencies. The
analog prototype is evaluated through the bilinear map at half angles instead. With
t = pi f / sample_rate, t0 = pi cutoff / sample_rate, A = 10^(gain_db / 40) and

    x = sin t cos t0,  y = cos t sin t0,  S = x^2,  C = y^2,  D = C - S,

the three kinds are one expression,

    |H|^2 = A^(2 s) (Un^2 + Rn S C) / (Ud^2 + Rd S C),  U = D + (A - 1) L,  R = A^r / q^2,

where L is C, -S or nothing: the factor s, and L and r of numerator and denominator, are all that
tells a peak from a shelf (`SHAPES`). H is A^s (Un + j Rn^(1/2) x y) / (Ud + j Rd^(1/2) x y).

Nothing cancels: cos t is taken as sin(pi (sample_rate / 2 - f) / sample_rate), D as
sin(t0 - t) (x + y), so that differences are taken between frequencies, before the sine, and A - 1
as expm1, so that 0 dB is flat to the last bit.

`biquad` has the functions to call; this is what they, and the measuring of them, are made of.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PEAKING = "peaking"
LOW_SHELF = "low_shelf"
HIGH_SHELF = "high_shelf"

LN_A = math.log(10.0) / 40.0  # ln A of one dB of gain
DB = 10.0 / math.log(10.0)  # dB of one unit of ln |H|^2


class Shape(NamedTuple):
    """What tells the kinds apart: s, then L ("C", "-S" or "") and r above and below the line."""

    s: int
    num_lift: str
    num_r: int
    den_lift: str
    den_r: int


SHAPES = {
    PEAKING: Shape(0, "", 2, "", -2),
    LOW_SHELF: Shape(1, "C", 1, "-S", 1),
    HIGH_SHELF: Shape(1, "-S", 1, "C", 1),
}


class Terms(NamedTuple):
    """The letters of the module docstring for one band, broadcastable against each other."""

    sin_t: jax.Array
    cos_t: jax.Array
    sin_t0: jax.Array
    cos_t0: jax.Array
    s: jax.Array
    c: jax.Array
    a_minus_1: jax.Array
    num_u: jax.Array
    num_r: jax.Array
    den_u: jax.Array
    den_r: jax.Array


def _sin(angle: jax.Array) -> jax.Array:
    """Sine by its series, to the rounding of the dtype on [-pi / 2, pi / 2], where all angles are.

    XLA's sine, which must reduce its argument, takes some 40 times as long on a CPU.
    """
    highest = 13 if jnp.finfo(angle.dtype).bits <= 32 else 23
    square = angle * angle
    series = jnp.full_like(square, (-1) ** (highest // 2) / math.factorial(highest))
    for power in range(highest - 2, 0, -2):
        series = series * square + (-1) ** (power // 2) / math.factorial(power)
    return angle * series


def _lift(name: str, if_c: Any, if_s: Any) -> Any:
    """The L named, from what stands for C and for S; 0 for none, so that XLA drops what follows."""
    return {"C": if_c, "-S": -if_s, "": 0.0}[name]


def evaluate(
    shape: Shape,
    sample_rate: float,
    freq_hz: jax.Array,
    cutoff_hz: jax.Array,
    gain_db: jax.Array,
    q: jax.Array,
) -> Terms:
    """The terms at frequencies and settings that broadcast against each other."""
    step, nyquist_hz = math.pi / sample_rate, 0.5 * sample_rate
    sin_t, cos_t = _sin(step * freq_hz), _sin(step * (nyquist_hz - freq_hz))
    sin_t0, cos_t0 = _sin(step * cutoff_hz), _sin(step * (nyquist_hz - cutoff_hz))
    x, y = sin_t * cos_t0, cos_t * sin_t0
    s, c = x * x, y * y
    d = _sin(step * (cutoff_hz - freq_hz)) * (x + y)
    ln_a = LN_A * gain_db
    a_minus_1 = jnp.expm1(ln_a)
    inverse_q2 = 1.0 / (q * q)
    return Terms(
        sin_t=sin_t,
        cos_t=cos_t,
        sin_t0=sin_t0,
        cos_t0=cos_t0,
        s=s,
        c=c,
        a_minus_1=a_minus_1,
        num_u=d + a_minus_1 * _lift(shape.num_lift, c, s),
        num_r=jnp.exp(shape.num_r * ln_a) * inverse_q2,
        den_u=d + a_minus_1 * _lift(shape.den_lift, c, s),
        den_r=jnp.exp(shape.den_r * ln_a) * inverse_q2,
    )


def ratio(t: Terms) -> jax.Array:
    """|H|^2 without its factor A^(2 s), which is shape.s * gain_db / 2 in dB."""
    product = t.s * t.c
    num = t.num_u * t.num_u + t.num_r * product
    return num / (t.den_u * t.den_u + t.den_r * product)


def partials(t: Terms, shape: Shape) -> tuple[jax.Array, ...]:
    """Derivatives of ln |H|^2 by t0, ln A, ln q and t; rational, so finite at every edge."""
    sin2_t, cos2_t = t.sin_t * t.sin_t, t.cos_t * t.cos_t
    sin2_t0, cos2_t0 = t.sin_t0 * t.sin_t0, t.cos_t0 * t.cos_t0
    product = t.s * t.c
    num = 1.0 / (t.num_u * t.num_u + t.num_r * product)
    den = 1.0 / (t.den_u * t.den_u + t.den_r * product)
    num_2u, den_2u = 2.0 * t.num_u * num, 2.0 * t.den_u * den
    num_l, den_l = _lift(shape.num_lift, t.c, t.s), _lift(shape.den_lift, t.c, t.s)
    # Wherever numerator and denominator nearly agree, the differences 2 Un / N - 2 Ud / D and
    # Rn / N - Rd / D of what is above and below the line would cancel. Multiplied out they need
    # only Ud - Un, which is 0 for peaks, and Rn - Rd, which is 0 for shelves.
    gap, spread = t.a_minus_1 * (den_l - num_l), t.num_r - t.den_r
    u_difference = 2.0 * (gap * num) * ((t.num_u * t.den_u - t.den_r * product) * den) - spread * (
        product * num * den_2u
    )
    r_difference = (t.num_r * gap * (t.num_u + t.den_u) + spread * t.num_u * t.num_u) * num * den

    by_gain = (
        (1.0 + t.a_minus_1) * (num_l * num_2u - den_l * den_2u)
        + (shape.num_r * t.num_r * num - shape.den_r * t.den_r * den) * product
        + 2.0 * shape.s
    )
    by_q = -2.0 * r_difference * product
    # By t0, D changes by sin 2 t0, C by that times cos^2 t, S by that times -sin^2 t.
    num_l, den_l = (_lift(lift, cos2_t, -sin2_t) for lift in (shape.num_lift, shape.den_lift))
    by_cutoff = (2.0 * t.sin_t0 * t.cos_t0) * (
        u_difference
        + t.a_minus_1 * (num_l * num_2u - den_l * den_2u)
        + r_difference * (sin2_t * cos2_t * (cos2_t0 - sin2_t0))
    )
    # By t the same with the two angles exchanged, and with them the signs of D, C and S.
    num_l, den_l = (_lift(lift, sin2_t0, -cos2_t0) for lift in (shape.num_lift, shape.den_lift))
    by_freq = (-2.0 * t.sin_t * t.cos_t) * (
        u_difference
        + t.a_minus_1 * (num_l * num_2u - den_l * den_2u)
        - r_difference * (sin2_t0 * cos2_t0 * (cos2_t - sin2_t))
    )
    return by_cutoff, by_gain, by_q, by_freq


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def band_db(
    shape: Shape,
    sample_rate: float,
    freq_hz: jax.Array,
    cutoff_hz: jax.Array,
    gain_db: jax.Array,
    q: jax.Array,
) -> jax.Array:
    """Response of one band in dB; arrays of one rank, which broadcast.

    Its derivatives, of either mode and any order, are those of `partials`, which do not cancel
    where autodiff of the quotient does.
    """
    terms = evaluate(shape, sample_rate, freq_hz, cutoff_hz, gain_db, q)
    return 10.0 * jnp.log10(ratio(terms)) + (0.5 * shape.s) * gain_db


@functools.partial(band_db.defjvp, symbolic_zeros=True)
def _band_db_jvp(shape, sample_rate, arrays, tangents):
    by_cutoff, by_gain, by_q, by_freq = partials(evaluate(shape, sample_rate, *arrays), shape)
    per_hz = DB * math.pi / sample_rate
    slopes = (per_hz * by_freq, per_hz * by_cutoff, (DB * LN_A) * by_gain, (DB / arrays[3]) * by_q)
    zero = jax.custom_derivatives.SymbolicZero
    moved = [slope * dx for slope, dx in zip(slopes, tangents, strict=True) if type(dx) is not zero]
    value = band_db(shape, sample_rate, *arrays)
    return value, sum(moved, start=jnp.zeros_like(value))
