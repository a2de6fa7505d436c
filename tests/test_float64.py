"""The float64 filter against scipy's sections and against the filter that training uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from eqst import biquad, eq, float64, pairs

RATE = 44_100


def settings(seed: int, count: int = 1) -> eq.EqParams:
    unit_KP = np.random.default_rng(seed).uniform(size=(count * 4, 3))
    parts = [eq.from_unit(eq.PAPER, part) for part in np.split(unit_KP, count)]
    return eq.EqParams(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def sections(params: eq.EqParams) -> np.ndarray:
    kinds = eq.KINDS * (len(params.q) // 4)
    return biquad.sos(*params, kinds=kinds, sample_rate=RATE)


@pytest.mark.parametrize("seed", range(6))
def test_response_is_that_of_the_sections(seed):
    params = settings(seed, 1 + seed % 2)
    freq_hz_F = np.concatenate([[0.0, 1.0], np.geomspace(20.0, RATE / 2, 400)])
    _, expected_F = scipy.signal.sosfreqz(sections(params), freq_hz_F, fs=RATE)
    # The sections themselves lose digits in the bass, 1e-9 at most.
    np.testing.assert_allclose(
        float64.response(freq_hz_F, params, RATE), expected_F, rtol=1e-7, atol=1e-9
    )


def test_no_bands_and_no_gain_change_nothing():
    none = eq.EqParams(*(np.zeros(0),) * 3)
    flat = settings(0)._replace(gain_db=np.zeros(4))
    freq_hz_F = np.linspace(0, RATE / 2, 50)
    assert np.all(float64.response(freq_hz_F, none, RATE) == 1)
    np.testing.assert_allclose(float64.response(freq_hz_F, flat, RATE), 1, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_filter_is_the_one_over_the_whole_recording_and_that_of_pairs(seed, bursts):
    params, context = settings(seed, 2), 2 * RATE
    samples_T = bursts(seed, 4.0, RATE)
    whole_T = scipy.signal.sosfilt(sections(params), samples_T.astype(float))[context:]
    here = {"sample_rate": RATE, "context": context}
    got_T = float64.filter_circular(samples_T, params, **here)
    single = eq.EqParams(*(jnp.asarray(x, jnp.float32) for x in params))
    other_T = jax.jit(lambda x: pairs.filter_circular(x, single, **here))(samples_T)
    peak = np.abs(whole_T).max()
    assert got_T.dtype == np.float64
    assert np.abs(got_T - whole_T).max() < 10 ** (-95 / 20) * peak
    assert np.abs(got_T - other_T).max() < 10 ** (-95 / 20) * peak


def test_rounding_has_one_level_and_one_rule():
    samples_T = np.random.default_rng(0).normal(size=1000)
    out_T = float64.to_int16(samples_T)
    assert out_T.dtype == np.int16 and np.abs(out_T.astype(int)).max() == float64.PEAK
    assert np.array_equal(out_T, float64.to_int16(samples_T * 2.0**-20))
    assert np.abs(out_T - samples_T * (float64.PEAK / np.abs(samples_T).max())).max() <= 0.5
    both = float64.to_int16(np.stack([samples_T, 9.0 * samples_T[::-1], np.zeros(1000)]))
    assert np.array_equal(both[0], out_T) and not both[2].any()
    assert np.abs(both[1].astype(int)).max() == float64.PEAK
    # half a step to even, up and down
    np.testing.assert_array_equal(
        float64.to_int16(np.array([29491, 0.5, 1.5, -2.5])), [29491, 0, 2, -2]
    )
