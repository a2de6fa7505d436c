"""Frequency responses of second-order equaliser bands.

Peaks and shelves are those of Bristow-Johnson's Audio EQ Cookbook, taken from the closed form of
`halfangle`, never from filter coefficients: rounded to float32 these lose 0.1 to 0.5 dB at low
frequencies. Coefficients (`sos`, float64 numpy) are for rendering in time and for export.

Every response wants 0 <= f <= sample_rate / 2, 0 < cutoff < sample_rate / 2 and q > 0, and cannot
check them, for it runs on traced values. `sample_rate` and `kinds` are static. Arrays come out in
float32 (float64 where an input is). `python -m eqst.accuracy` measures the worst errors.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eqst import halfangle

PEAKING = halfangle.PEAKING
LOW_SHELF = halfangle.LOW_SHELF
HIGH_SHELF = halfangle.HIGH_SHELF


def _floats(*arrays: ArrayLike) -> list[jax.Array]:
    """The arrays in one float dtype, float32 at least."""
    converted = [jnp.asarray(array) for array in arrays]
    dtype = jnp.promote_types(jnp.result_type(*converted), jnp.float32)
    return [array.astype(dtype) for array in converted]


def _aligned(*arrays: ArrayLike) -> list[jax.Array]:
    """The same with one rank, so that they broadcast under rank_promotion="raise"."""
    floats = _floats(*arrays)
    rank = max(array.ndim for array in floats)
    return [array.reshape((1,) * (rank - array.ndim) + array.shape) for array in floats]


def _band_db(kind: str, sample_rate: float, *arrays: ArrayLike) -> jax.Array:
    return halfangle.band_db(halfangle.SHAPES[kind], float(sample_rate), *_aligned(*arrays))


def _band_complex(kind: str, sample_rate: float, *arrays: ArrayLike) -> jax.Array:
    shape, aligned = halfangle.SHAPES[kind], _aligned(*arrays)
    t = halfangle.evaluate(shape, float(sample_rate), *aligned)
    ln_a, inverse_q = halfangle.LN_A * aligned[2], 1.0 / aligned[3]
    xy = t.sin_t * t.cos_t0 * t.cos_t * t.sin_t0
    num_i = jnp.exp((0.5 * shape.num_r) * ln_a) * inverse_q * xy
    den_i = jnp.exp((0.5 * shape.den_r) * ln_a) * inverse_q * xy
    scale = jnp.exp(shape.s * ln_a) / (t.den_u * t.den_u + den_i * den_i)
    real = scale * (t.num_u * t.den_u + num_i * den_i)
    return jax.lax.complex(real, scale * (num_i * t.den_u - t.num_u * den_i))


def peaking_db(
    freq_hz: ArrayLike,
    cutoff_hz: ArrayLike,
    gain_db: ArrayLike,
    q: ArrayLike,
    *,
    sample_rate: float,
) -> jax.Array:
    """Magnitude response of a peak (bell) in dB.

    Args:
      freq_hz: frequencies in Hz, 0 .. sample_rate / 2 inclusive. The four arrays broadcast.
      cutoff_hz: centre in Hz, above 0 and below sample_rate / 2.
      gain_db: gain at the centre in dB.
      q: quality factor, above 0.
      sample_rate: samples per second, static.

    Returns:
      Gain in dB, of the broadcast shape; differentiable in every array, edges included.

    Source: Bristow-Johnson, Audio EQ Cookbook, peakingEQ; rearranged as in the module docstring.
    """
    return _band_db(PEAKING, sample_rate, freq_hz, cutoff_hz, gain_db, q)


def low_shelf_db(
    freq_hz: ArrayLike,
    cutoff_hz: ArrayLike,
    gain_db: ArrayLike,
    q: ArrayLike,
    *,
    sample_rate: float,
) -> jax.Array:
    """Magnitude response of a low shelf in dB: the gain at 0 Hz, half at the cutoff, 0 at Nyquist.

    Arguments as in `peaking_db`; a q above 1 / sqrt(2) overshoots on both sides of the cutoff.
    """
    return _band_db(LOW_SHELF, sample_rate, freq_hz, cutoff_hz, gain_db, q)


def high_shelf_db(
    freq_hz: ArrayLike,
    cutoff_hz: ArrayLike,
    gain_db: ArrayLike,
    q: ArrayLike,
    *,
    sample_rate: float,
) -> jax.Array:
    """Magnitude response of a high shelf in dB: 0 at 0 Hz, half at the cutoff, the gain at Nyquist.

    Arguments as in `peaking_db`; a q above 1 / sqrt(2) overshoots on both sides of the cutoff.
    """
    return _band_db(HIGH_SHELF, sample_rate, freq_hz, cutoff_hz, gain_db, q)


def peaking_complex(
    freq_hz: ArrayLike,
    cutoff_hz: ArrayLike,
    gain_db: ArrayLike,
    q: ArrayLike,
    *,
    sample_rate: float,
) -> jax.Array:
    """Complex response of a peak at z = exp(2 pi j f / sample_rate); see `peaking_db`."""
    return _band_complex(PEAKING, sample_rate, freq_hz, cutoff_hz, gain_db, q)


def low_shelf_complex(
    freq_hz: ArrayLike,
    cutoff_hz: ArrayLike,
    gain_db: ArrayLike,
    q: ArrayLike,
    *,
    sample_rate: float,
) -> jax.Array:
    """Complex response of a low shelf; see `peaking_complex`."""
    return _band_complex(LOW_SHELF, sample_rate, freq_hz, cutoff_hz, gain_db, q)


def high_shelf_complex(
    freq_hz: ArrayLike,
    cutoff_hz: ArrayLike,
    gain_db: ArrayLike,
    q: ArrayLike,
    *,
    sample_rate: float,
) -> jax.Array:
    """Complex response of a high shelf; see `peaking_complex`."""
    return _band_complex(HIGH_SHELF, sample_rate, freq_hz, cutoff_hz, gain_db, q)


def _check_kinds(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in halfangle.SHAPES:
            raise ValueError(
                f"unknown band kind {kind!r}: choose from {', '.join(halfangle.SHAPES)}"
            )


def _cascade_arrays(kinds: Sequence[str], *arrays: ArrayLike) -> tuple[jax.Array, ...]:
    _check_kinds(kinds)
    floats = _floats(*arrays)
    if floats[0].ndim != 1 or any(array.shape != (len(kinds),) for array in floats[1:]):
        raise ValueError(
            f"shapes {[array.shape for array in floats]}: want frequencies [F], then cutoff, gain"
            f" and q [{len(kinds)}], one per kind; batch with jax.vmap"
        )
    return tuple(floats)


def _each_band(
    arrays: tuple[jax.Array, ...], kinds: Sequence[str], sample_rate: float
) -> Iterator[tuple[halfangle.Terms, halfangle.Shape, jax.Array, jax.Array]]:
    """(terms, shape, gain in dB, q), band by band.

    Unrolled, as kinds are static: XLA then runs one vectorised loop over frequency without what a
    kind has no use for. Gradients take a fifth of what they took with bands as an array axis.
    """
    freq_F, cutoff_K, gain_K, q_K = arrays
    for k, kind in enumerate(kinds):
        shape = halfangle.SHAPES[kind]
        terms = halfangle.evaluate(shape, sample_rate, freq_F, cutoff_K[k], gain_K[k], q_K[k])
        yield terms, shape, gain_K[k], q_K[k]


def _jacobian(
    arrays: tuple[jax.Array, ...], kinds: Sequence[str], sample_rate: float
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of each band, derivatives [3, F] of its dB by cutoff, gain and q, and [F] by frequency."""
    per_hz = halfangle.DB * math.pi / sample_rate
    by_band, by_freq = [], []
    for terms, shape, _, q in _each_band(arrays, kinds, sample_rate):
        cutoff_F, gain_F, q_F, freq_F = halfangle.partials(terms, shape)
        by_band.append(
            jnp.stack(
                [
                    per_hz * cutoff_F,
                    (halfangle.DB * halfangle.LN_A) * gain_F,
                    (halfangle.DB / q) * q_F,
                ]
            )
        )
        by_freq.append(per_hz * freq_F)
    return by_band, by_freq


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _cascade(
    arrays: tuple[jax.Array, ...], kinds: tuple[str, ...], sample_rate: float
) -> jax.Array:
    # One logarithm for all bands: the product of their ratios stays well inside float32.
    ratio_F, level = jnp.ones_like(arrays[0]), jnp.zeros((), arrays[0].dtype)
    for terms, shape, gain, _ in _each_band(arrays, kinds, sample_rate):
        ratio_F = ratio_F * halfangle.ratio(terms)
        level = level + (0.5 * shape.s) * gain
    return 10.0 * jnp.log10(ratio_F) + level


def _cascade_forward(arrays, kinds, sample_rate):
    return _cascade(arrays, kinds, sample_rate), arrays


def _cascade_backward(kinds, sample_rate, arrays, cotangent_F):
    by_band, by_freq = _jacobian(arrays, kinds, sample_rate)
    # One matrix-vector product per band, at full precision (a TPU's default is bfloat16). The
    # derivative by frequency is exact too; where nobody asks for it, jit leaves it out.
    gradient_KP = jnp.stack(
        [
            jnp.matmul(rows_PF, cotangent_F, precision=jax.lax.Precision.HIGHEST)
            for rows_PF in by_band
        ]
    )
    return ((sum(by_freq) * cotangent_F, *gradient_KP.T),)


_cascade.defvjp(_cascade_forward, _cascade_backward)


def cascade_db(
    freq_hz_F: ArrayLike,
    cutoff_hz_K: ArrayLike,
    gain_db_K: ArrayLike,
    q_K: ArrayLike,
    *,
    kinds: Sequence[str],
    sample_rate: float,
) -> jax.Array:
    """Magnitude response of bands in series in dB, with a fast reverse-mode derivative of its own.

    The function of one example: batch it with jax.vmap. First derivatives in reverse mode only (a
    custom VJP, for all four arrays); for forward mode, Jacobians and higher derivatives there are
    `cascade_jacobian_db` and the sum of `bands_db`.

    Args:
      freq_hz_F: [F] frequencies in Hz, 0 .. sample_rate / 2 inclusive.
      cutoff_hz_K: [K] centres, or midpoints of shelves, in Hz, above 0 and below sample_rate / 2.
      gain_db_K: [K] gains in dB.
      q_K: [K] quality factors, above 0.
      kinds: K names among "peaking", "low_shelf" and "high_shelf", static.
      sample_rate: samples per second, static.

    Returns:
      [F] gain in dB.

    Raises:
      ValueError: shapes that do not fit, or an unknown kind.
    """
    arrays = _cascade_arrays(kinds, freq_hz_F, cutoff_hz_K, gain_db_K, q_K)
    return _cascade(arrays, tuple(kinds), float(sample_rate))


def cascade_jacobian_db(
    freq_hz_F: ArrayLike,
    cutoff_hz_K: ArrayLike,
    gain_db_K: ArrayLike,
    q_K: ArrayLike,
    *,
    kinds: Sequence[str],
    sample_rate: float,
) -> tuple[jax.Array, jax.Array]:
    """The response of `cascade_db` and its analytic derivatives, for Gauss-Newton steps.

    Arguments and errors as in `cascade_db`. Returns [F] in dB and [K, 3, F]: derivatives by cutoff
    (dB per Hz), gain (dB per dB) and q (dB per unit).
    """
    arrays = _cascade_arrays(kinds, freq_hz_F, cutoff_hz_K, gain_db_K, q_K)
    by_band, _ = _jacobian(arrays, kinds, float(sample_rate))
    return _cascade(arrays, tuple(kinds), float(sample_rate)), jnp.stack(by_band)


def bands_db(
    freq_hz_F: ArrayLike,
    cutoff_hz_K: ArrayLike,
    gain_db_K: ArrayLike,
    q_K: ArrayLike,
    *,
    kinds: Sequence[str],
    sample_rate: float,
) -> jax.Array:
    """Response of every band by itself, [K, F] in dB, differentiable in any way.

    Arguments and errors as in `cascade_db`.
    """
    freq_F, *bands = _cascade_arrays(kinds, freq_hz_F, cutoff_hz_K, gain_db_K, q_K)
    responses = zip(kinds, zip(*bands, strict=True), strict=True)
    return jnp.stack([_band_db(kind, sample_rate, freq_F, *band) for kind, band in responses])


def cascade_complex(
    freq_hz_F: ArrayLike,
    cutoff_hz_K: ArrayLike,
    gain_db_K: ArrayLike,
    q_K: ArrayLike,
    *,
    kinds: Sequence[str],
    sample_rate: float,
) -> jax.Array:
    """Complex response of bands in series at z = exp(2 pi j f / sample_rate): [F] complex64.

    Multiplied with an rfft it filters circularly with the cascade's exact phase. Real at 0 Hz and
    Nyquist; differentiable in any way. Arguments and errors as in `cascade_db`.
    """
    freq_F, *bands = _cascade_arrays(kinds, freq_hz_F, cutoff_hz_K, gain_db_K, q_K)
    responses = zip(kinds, zip(*bands, strict=True), strict=True)
    return math.prod(
        (_band_complex(kind, sample_rate, freq_F, *band) for kind, band in responses),
        start=jax.lax.complex(jnp.ones_like(freq_F), jnp.zeros_like(freq_F)),
    )


def sos(
    cutoff_hz_K: ArrayLike,
    gain_db_K: ArrayLike,
    q_K: ArrayLike,
    *,
    kinds: Sequence[str],
    sample_rate: float,
) -> np.ndarray:
    """Second-order sections, for rendering in the time domain and for export only.

    Args:
      cutoff_hz_K, gain_db_K, q_K: [..., K] as in `cascade_db`; leading axes broadcast.
      kinds: K names of band kinds.
      sample_rate: samples per second.

    Returns:
      [..., K, 6] float64 numpy: b0 b1 b2 1 a1 a2 of each band, as scipy.signal.sosfilt takes them.

    Raises:
      ValueError: an unknown kind, a wrong number of bands, or a value out of range.

    Source: Bristow-Johnson, Audio EQ Cookbook: peakingEQ, lowShelf, highShelf in terms of Q.
    """
    _check_kinds(kinds)
    cutoff, gain, q = np.broadcast_arrays(
        *(np.asarray(array, np.float64) for array in (cutoff_hz_K, gain_db_K, q_K))
    )
    if cutoff.shape[-1:] != (len(kinds),):
        raise ValueError(f"settings of shape {cutoff.shape} for {len(kinds)} kinds: want [..., K]")
    if not np.all((cutoff > 0) & (cutoff < 0.5 * sample_rate)):
        raise ValueError(
            f"band frequencies {cutoff.min():g} .. {cutoff.max():g} Hz: want them above 0 and below"
            f" half the sample rate, {0.5 * sample_rate:g} Hz; see eq.limit_to_rate"
        )
    if not (np.all(q > 0) and np.all(np.isfinite(q)) and np.all(np.isfinite(gain))):
        raise ValueError(
            f"q from {q.min():g}, gains from {gain.min():g} dB: want q > 0, all finite"
        )
    w0, a = 2 * np.pi * cutoff / sample_rate, 10 ** (gain / 40)
    cos, alpha = np.cos(w0), np.sin(w0) / (2 * q)
    sections = np.empty((*cutoff.shape, 6))
    for k, kind in enumerate(kinds):
        a_k, cos_k, alpha_k = a[..., k], cos[..., k], alpha[..., k]
        if kind == PEAKING:
            num = (1 + alpha_k * a_k, -2 * cos_k, 1 - alpha_k * a_k)
            den = (1 + alpha_k / a_k, -2 * cos_k, 1 - alpha_k / a_k)
        else:
            # A high shelf is the low shelf of the mirrored frequency axis: z becomes -z.
            sign = 1 if kind == LOW_SHELF else -1
            up, down = a_k + 1, (a_k - 1) * sign * cos_k
            middle_up, middle_down = (a_k + 1) * cos_k, sign * (a_k - 1)
            root = 2 * np.sqrt(a_k) * alpha_k
            num = (
                a_k * (up - down + root),
                2 * a_k * (middle_down - middle_up),
                a_k * (up - down - root),
            )
            den = (up + down + root, -2 * (middle_down + middle_up), up + down - root)
        sections[..., k, :] = np.stack([*num, *den], axis=-1) / den[0][..., None]
    return sections
