"""How exact and how fast the responses are, measured: `python -m eqst.accuracy --output=DIR`.

Every section is a function that returns rows, lists of {"what", "worst", "limit", "unit"} and more;
`SECTIONS` lists them. A row passes when its worst value is within its limit (None: for the record).
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqst import biquad, command, eq, files

RATES = (8000, 16000, 44100, 48000, 96000, 192000)
RESPONSES = {
    biquad.PEAKING: biquad.peaking_db,
    biquad.LOW_SHELF: biquad.low_shelf_db,
    biquad.HIGH_SHELF: biquad.high_shelf_db,
}
FLOAT32_LIMIT_DB = 5e-5
_CHUNK = 5000  # bands at once
_FREQUENCIES = 48  # for each band
Row = dict[str, Any]


def _random_bands(rng: np.random.Generator, rate: float, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Cutoff 20 Hz .. min(20 kHz, 0.49 rate), gain +-15 dB, q 0.1 .. 10; exact in float32."""
    top_hz = min(20000.0, 0.49 * rate)
    cutoff_hz = 20.0 * (top_hz / 20.0) ** rng.random(shape)
    gain_db, q = rng.uniform(-15.0, 15.0, shape), 10.0 ** rng.uniform(-1.0, 1.0, shape)
    return [np.float64(np.float32(array)) for array in (cutoff_hz, gain_db, q)]


def _frequencies(rng: np.random.Generator, rate: float, cutoff_hz_B: np.ndarray) -> np.ndarray:
    """[B, F] per band: 0 Hz, Nyquist, round the cutoff, near Nyquist, and log-uniform elsewhere."""
    count, nyquist_hz = len(cutoff_hz_B), 0.5 * rate
    near_BF = cutoff_hz_B[:, None] * np.exp(rng.normal(0.0, 0.3, (count, 12)) ** 3)
    top_BF = nyquist_hz * (1.0 - 10.0 ** rng.uniform(-7.0, -0.5, (count, 6)))
    rest_BF = nyquist_hz * 10.0 ** rng.uniform(-5.0, 0.0, (count, _FREQUENCIES - 21))
    ends_BF = np.broadcast_to([0.0, nyquist_hz], (count, 2))
    freq_BF = np.concatenate([ends_BF, cutoff_hz_B[:, None], near_BF, top_BF, rest_BF], axis=1)
    return np.minimum(np.float64(np.float32(freq_BF)), nyquist_hz)


def _chunks(
    seed: int, rate: int, bands: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """Frequencies [B, F] and bands [B, 1] in float64, `bands` of them in equal chunks."""
    rng = np.random.default_rng([seed, rate])
    for first in range(0, bands, _CHUNK):
        size = min(_CHUNK, bands - first)
        band_B = _random_bands(rng, rate, (size,))
        yield _frequencies(rng, rate, band_B[0]), tuple(array[:, None] for array in band_B)


def _cookbook_db(kind: str, freq_hz: np.ndarray, band: tuple[np.ndarray, ...], rate: float):
    """The response from float64 coefficients, and how far coefficients alone can put it off.

    Both polynomials are sums of terms much larger than themselves at low frequencies; the bound is
    the rounding of those terms (2^-53 of their sum) beside the polynomial, in dB.
    """
    sections = biquad.sos(*band, kinds=[kind], sample_rate=rate)[:, 0, :]
    delay = np.exp(-2j * np.pi * freq_hz[..., None] / rate * np.arange(3))
    value_db, bound_db = np.zeros(freq_hz.shape), np.zeros(freq_hz.shape)
    for sign, row in ((1, sections[:, :3]), (-1, sections[:, 3:])):
        polynomial = np.abs(np.einsum("bfi,bi->bf", delay, row))
        value_db += sign * 20.0 * np.log10(polynomial)
        terms = np.abs(row).sum(axis=-1)[:, None]
        # Coefficients and products are rounded a handful of times each.
        bound_db += 20.0 / np.log(10.0) * 8.0 * 2.0**-53 * terms / polynomial
    return value_db, bound_db


def float32_responses(bands: int, seed: int) -> list[Row]:
    """Float32 against float64 of the same formula at the same (float32) arguments."""
    rows = []
    for kind, response in RESPONSES.items():
        for rate in RATES:
            compiled, worst = jax.jit(functools.partial(response, sample_rate=rate)), 0.0
            for freq_BF, band in _chunks(seed, rate, bands):
                single = np.asarray(compiled(*(np.float32(x) for x in (freq_BF, *band))))
                with jax.enable_x64(True):
                    double = np.asarray(compiled(freq_BF, *band))
                worst = max(worst, float(np.max(np.abs(single - double))))
            rows.append(_row(f"float32 {kind} at {rate} Hz", worst, FLOAT32_LIMIT_DB, "dB"))
    return rows


def float64_coefficients(bands: int, seed: int) -> list[Row]:
    """The formula in float64 against the cookbook's coefficients in float64.

    What is left is the coefficients' own rounding: near 0 Hz, at high rates, it is the larger error.
    `limit` is what that rounding allows at the worst point.
    """
    rows = []
    for kind, response in RESPONSES.items():
        for rate in RATES:
            compiled, worst, limit, share = jax.jit(functools.partial(response, sample_rate=rate)), 0.0, 0.0, 0.0
            for freq_BF, band in _chunks(seed + 1, rate, max(1, bands // 10)):
                with jax.enable_x64(True):
                    formula = np.asarray(compiled(freq_BF, *band))
                # Poles and zeros on the unit circle exist at no setting: nothing is infinite here.
                coefficients, bound = _cookbook_db(kind, freq_BF, band, rate)
                error = np.abs(formula - coefficients)
                worst, limit = max(worst, float(error.max())), max(limit, float(bound.max()))
                share = max(share, float((error / (bound + 1e-11)).max()))
            rows.append(_row(f"float64 {kind} at {rate} Hz", worst, limit, "dB", share_of_bound=share))
    return rows
