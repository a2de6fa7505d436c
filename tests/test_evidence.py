"""Band evidence: what it must shift by, what it must not notice, what it refuses."""

import numpy as np
import pytest
import scipy.signal

from eqst.biquad import sos
from eqst.eq import KINDS, EqParams, response_db
from eqst.evidence import band_hz, band_matrix, evidence, frame_length, stack

RATE = 44_100


def bursts(seed: int, seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    """Noise whose level changes 40 dB over time, so that the two averages differ."""
    rng = np.random.default_rng(seed)
    level_db = np.repeat(rng.uniform(-40, 0, 30), round(seconds * rate / 30))
    return rng.standard_normal(level_db.size) * 10 ** (level_db / 20)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000, 96_000])
def test_bands_cover_the_curve_grid_and_each_is_an_average(rate):
    freq_hz_M = band_hz(rate)
    assert freq_hz_M[0] == pytest.approx(40.0)
    assert freq_hz_M[-1] == pytest.approx(min(18_000, 0.45 * rate))
    octaves = np.diff(np.log2(freq_hz_M))
    assert octaves.min() > 0.16 and octaves.max() < 0.17
    weight_MF = band_matrix(float(rate))
    np.testing.assert_allclose(weight_MF.sum(axis=1), 1.0)
    assert (weight_MF >= 0).all()
    # centre of gravity on the band's frequency, within a bin or 5 % of it
    bin_hz = rate / frame_length(rate)
    centre_hz_M = weight_MF @ (np.arange(weight_MF.shape[1]) * bin_hz)
    assert (np.abs(centre_hz_M - freq_hz_M) < np.maximum(bin_hz, 0.05 * freq_hz_M)).all()


def test_an_equaliser_shifts_both_spectra_by_its_response():
    params = EqParams(
        np.array([120.0, 700.0, 2500.0, 7000.0]),
        np.array([6.0, -8.0, 5.0, -9.0]),
        np.array([0.7, 0.9, 1.2, 0.6]),
    )
    audio_T = bursts(0)
    sections = sos(params.freq_hz, params.gain_db, params.q, kinds=KINDS, sample_rate=RATE)
    before, after = evidence(audio_T, RATE), evidence(scipy.signal.sosfilt(sections, audio_T), RATE)
    expected_M = np.asarray(
        response_db(
            EqParams(*(field.astype(np.float32) for field in params)),
            band_hz(RATE).astype(np.float32),
            sample_rate=float(RATE),
        )
    )
    # bands of one or two bins at the low end, and steps of 40 dB leaking between frames
    tolerance_db = 0.6
    np.testing.assert_allclose(after.power_db - before.power_db, expected_M, atol=tolerance_db)
    np.testing.assert_allclose(
        after.geometric_db - before.geometric_db, expected_M, atol=tolerance_db
    )


def test_level_shifts_everything_alike_whatever_the_floor():
    audio_T = bursts(1)
    audio_T[:RATE] = 0.0  # digital silence: those frames stand on the floor
    before, after = evidence(audio_T, RATE), evidence(audio_T * 10 ** (-30 / 20), RATE)
    np.testing.assert_allclose(after.power_db, before.power_db - 30, atol=1e-3)
    np.testing.assert_allclose(after.geometric_db, before.geometric_db - 30, atol=1e-3)
    assert np.isfinite(before.geometric_db).all()


def test_white_noise_is_flat_and_its_two_averages_differ_as_an_exponential_distribution_says():
    audio_T = np.random.default_rng(2).standard_normal(20 * RATE)
    found = evidence(audio_T, RATE)
    np.testing.assert_allclose(found.power_db - found.power_db.mean(), 0.0, atol=1.2)
    # the narrowest bands average 2 bins, near one exponential variable: E[dB] - dB[E] = -2.5 dB;
    # the widest average hundreds and lose next to nothing
    gap_M = found.geometric_db - found.power_db
    assert -2.51 < gap_M[0] < -1.0
    assert -0.1 < gap_M[-1] <= 0.0


def test_long_and_short_audio_agree_with_one_pass():
    audio_T = bursts(3, 20.0)  # more frames than are transformed at once
    length = frame_length(RATE)
    _, _, spectrum_FN = scipy.signal.stft(
        audio_T, nperseg=length, noverlap=length * 3 // 4, boundary=None, padded=False
    )
    power_NM = (np.abs(spectrum_FN) ** 2).T @ band_matrix(float(RATE)).T
    expected_M = 10 * np.log10(power_NM.mean(axis=0))
    found_M = evidence(audio_T, RATE).power_db
    np.testing.assert_allclose(found_M - found_M.mean(), expected_M - expected_M.mean(), atol=1e-3)
    assert np.isfinite(evidence(audio_T[:1000], RATE).power_db).all()


def test_stack_and_refusals():
    one = evidence(bursts(4), RATE)
    both = stack([one, one])
    assert both.power_db.shape == (2, len(band_hz(RATE)))
    with pytest.raises(ValueError, match="mono"):
        evidence(np.zeros((100, 2)), RATE)
    with pytest.raises(ValueError, match="silent"):
        evidence(np.zeros(RATE), RATE)
