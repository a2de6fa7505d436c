"""A curve read from a program's audio is the curve that was applied."""

import numpy as np
import pytest
import scipy.signal

from eqst import biquad, eq, float64, linear, synthetic, transfer
from eqst.files import AudioError

RATE = 44_100


def sound(talker: int, seconds: float) -> np.ndarray:
    samples_T = synthetic.synthesise(3, talker, 2 * seconds + 2)
    loud = np.argmax(np.abs(samples_T[: -round(seconds * RATE)]))
    return float64.to_int16(samples_T[loud : loud + round(seconds * RATE)]) / 32768


def equalised(samples_T: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """By scipy, and the true curve."""
    params = eq.from_unit(eq.PAPER, np.random.default_rng(seed).uniform(size=(4, 3)))
    sos_K6 = biquad.sos(*params, kinds=eq.KINDS, sample_rate=RATE)
    one = eq.EqParams(*(x[None] for x in params))
    return scipy.signal.sosfilt(sos_K6, samples_T), linear.settings_curve(one, RATE)[0]


def errors(seconds: float, change, step: float = 0.0) -> np.ndarray:
    out = []
    for seed in range(12):
        input_T = sound(seed, seconds)
        output_T, true_F = equalised(input_T, seed)
        curve_F = transfer.curve_db(input_T, change(output_T), RATE, step=step)
        out.append(np.std(curve_F - true_F))
    return np.array(out)


@pytest.mark.parametrize(("seconds", "mean", "worst"), [(1.0, 0.3, 1.3), (3.0, 0.12, 0.6)])
def test_our_own_equaliser_is_read_back(seconds, mean, worst):
    found = errors(seconds, lambda x: x)
    assert found.mean() < mean and found.max() < worst


def test_level_delay_length_and_sign_do_not_matter():
    plain = errors(3.0, lambda x: x)
    late = errors(3.0, lambda x: -0.03 * np.concatenate([np.zeros(777), x, np.zeros(99)]))
    np.testing.assert_allclose(late, plain, atol=1e-6)
    early = errors(3.0, lambda x: x[500:])
    assert early.mean() < 0.2


def test_sixteen_bits_are_accounted_for():
    def rounded(output_T):
        quiet_T = 0.25 * output_T / np.abs(output_T).max()
        return np.round(quiet_T * 32768) / 32768

    known, unknown = errors(3.0, rounded, 2.0**-15), errors(3.0, rounded)
    assert known.mean() < 0.2 and known.mean() < 0.5 * unknown.mean()


def test_level_is_kept_in_the_curve_itself():
    input_T = sound(0, 1.0)
    curve_F = transfer.curve_db(input_T, 0.5 * input_T, RATE)
    np.testing.assert_allclose(curve_F, 20 * np.log10(0.5), atol=1e-9)


def test_what_the_input_lacks_is_held_from_below():
    sos = scipy.signal.butter(12, 8000, fs=RATE, output="sos")
    input_T = scipy.signal.sosfiltfilt(sos, scipy.signal.sosfiltfilt(sos, sound(1, 3.0)))
    output_T, _ = equalised(input_T, 5)
    curve_F = transfer.curve_db(input_T, output_T, RATE)
    top_F = eq.curve_grid_hz(RATE) > 16_000
    assert np.isfinite(curve_F).all() and np.ptp(curve_F[top_F]) < 1e-9


def test_a_bass_that_the_input_lacks_is_held_from_above_at_any_level():
    sos = scipy.signal.butter(12, 300, "highpass", fs=RATE, output="sos")
    input_T = scipy.signal.sosfiltfilt(sos, scipy.signal.sosfiltfilt(sos, sound(1, 3.0)))
    bass_F = eq.curve_grid_hz(RATE) < 80
    for gain in (1.0, 0.1):
        curve_F = transfer.curve_db(input_T, gain * input_T, RATE)
        np.testing.assert_allclose(curve_F[bass_F], 20 * np.log10(gain), atol=1e-6)
    hiss_T = np.zeros(RATE)
    hiss_T[::2000] = 2.0**-15
    with pytest.raises(AudioError, match="no band of the output is above its rounding"):
        transfer.curve_db(sound(0, 1.0), hiss_T, RATE, step=2.0**-10)


@pytest.mark.parametrize("bad", [np.zeros(RATE), np.full(RATE, np.nan)])
def test_nothing_is_read_from_nothing(bad):
    with pytest.raises(AudioError, match="the output is silent or not finite"):
        transfer.curve_db(sound(0, 1.0), bad, RATE)
    with pytest.raises(AudioError, match="the input is silent or not finite"):
        transfer.curve_db(bad, sound(0, 1.0), RATE)
