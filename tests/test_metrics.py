"""Metrics against closed forms, scipy and brute force."""

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import soundfile

from eqst import metrics
from eqst.eq import EqParams

RATE = 44_100


def noise(seed: int, seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * rate))


def test_curve_errors_are_those_of_hand_made_errors():
    true_nF = np.random.default_rng(0).normal(size=(2, 4))
    error_nF = np.array([[1.0, 1.0, 1.0, 1.0], [3.0, -1.0, 3.0, -1.0]])
    figures = metrics.curve_errors(true_nF + error_nF, true_nF)
    np.testing.assert_allclose(figures["shape_rmse_db"], [0, 2], atol=1e-12)
    np.testing.assert_allclose(figures["shape_mae_db"], [0, 2], atol=1e-12)
    np.testing.assert_allclose(figures["shape_max_db"], [0, 2], atol=1e-12)
    np.testing.assert_allclose(figures["absolute_rmse_db"], [1, np.sqrt(5)], atol=1e-12)
    np.testing.assert_allclose(figures["absolute_mae_db"], [1, 2], atol=1e-12)
    np.testing.assert_allclose(figures["absolute_max_db"], [1, 3], atol=1e-12)


def test_shape_error_ignores_level_and_absolute_error_splits_into_shape_and_level():
    rng = np.random.default_rng(1)
    predicted_nF, true_nF = rng.normal(size=(2, 5, 30))
    figures = metrics.curve_errors(predicted_nF, true_nF)
    shifted = metrics.curve_errors(predicted_nF + 7.0, true_nF)
    np.testing.assert_allclose(shifted["shape_rmse_db"], figures["shape_rmse_db"], rtol=1e-12)
    level_n = (predicted_nF - true_nF).mean(axis=1)
    np.testing.assert_allclose(
        figures["absolute_rmse_db"] ** 2, figures["shape_rmse_db"] ** 2 + level_n**2, rtol=1e-12
    )


def test_curve_errors_refuse_mismatch_and_nan():
    with pytest.raises(ValueError, match="do not match"):
        metrics.curve_errors(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        metrics.curve_errors(np.array([[np.nan, 0.0]]), np.zeros((1, 2)))


def test_octave_errors_add_up_to_the_shape_error():
    freq_hz_F = 40.0 * 2.0 ** (np.arange(200) / 24)
    predicted_nF = np.random.default_rng(2).normal(size=(3, 200))
    edge_hz_O, error_nO = metrics.octave_errors(predicted_nF, np.zeros((3, 200)), freq_hz_F)
    np.testing.assert_allclose(edge_hz_O, 40.0 * 2.0 ** np.arange(9))
    points_O = np.array([24] * 8 + [8])
    total_n = np.sqrt((error_nO**2 * points_O).sum(axis=1) / 200)
    shape_n = metrics.curve_errors(predicted_nF, np.zeros((3, 200)))["shape_rmse_db"]
    np.testing.assert_allclose(total_n, shape_n, rtol=1e-12)


def test_shares_within_count_the_bound_itself():
    shares = metrics.shares_within(np.array([0.5, 1.0, 2.5, 4.0]))
    assert shares == {1.0: 0.5, 2.0: 0.5, 3.0: 0.75}


def test_parameter_errors_are_masked_where_the_band_is_flat():
    true = EqParams(np.array([[100.0, 500.0]]), np.array([[0.5, -6.0]]), np.array([[1.0, 2.0]]))
    predicted = EqParams(
        np.array([[50.0, 1000.0]]), np.array([[2.0, -5.0]]), np.array([[1.0, 0.5]])
    )
    errors = metrics.parameter_errors(predicted, true)
    np.testing.assert_allclose(errors["gain_db"], [[1.5, 1.0]])
    np.testing.assert_allclose(errors["gain_active_db"], [[np.nan, 1.0]])
    np.testing.assert_allclose(errors["log2_freq"], [[np.nan, 1.0]])
    np.testing.assert_allclose(errors["log2_q"], [[np.nan, 2.0]])


def test_band_curve_errors_are_per_band():
    true_nKF = np.zeros((1, 2, 4))
    predicted_nKF = np.array([[[1.0, 1, 1, 1], [2.0, -2, 2, -2]]])
    errors = metrics.band_curve_errors(predicted_nKF, true_nKF)
    np.testing.assert_allclose(errors["shape_rmse_db"], [[0, 2]], atol=1e-12)
    np.testing.assert_allclose(errors["absolute_rmse_db"], [[1, 2]], atol=1e-12)


# --- audio ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 44_100, 96_000])
@pytest.mark.parametrize("kind", ["third_octave", "bands64"])
def test_ltas_of_filtered_noise_shifts_by_the_filters_response(rate, kind):
    # A gentle filter, so that its response is near constant within a band; the same noise in both
    # makes the estimate nearly free of variance.
    sos = scipy.signal.butter(1, 0.05, output="sos")
    audio_T = noise(3, 3.0, rate)
    filtered_T = scipy.signal.sosfilt(sos, audio_T)
    length, weight_MF = metrics._ltas_bands(kind, float(rate))
    _, response_F = scipy.signal.sosfreqz(sos, np.arange(length // 2 + 1) / length * rate, fs=rate)
    expected_M = 10 * np.log10(weight_MF @ np.abs(response_F) ** 2)
    shift_M = metrics.ltas_db(filtered_T, rate, kind=kind) - metrics.ltas_db(
        audio_T, rate, kind=kind
    )
    tolerance_db = 0.5  # sampling error of the lowest bands, which hold one or two bins
    np.testing.assert_allclose(shift_M, expected_M, atol=tolerance_db)
    assert abs(np.mean(shift_M - expected_M)) < 0.05


def test_third_octaves_lie_where_they_are_said_to():
    _, weight_MF = metrics._ltas_bands("third_octave", float(RATE))
    centre_hz_M = weight_MF @ (np.arange(weight_MF.shape[1]) * RATE / 8192)
    np.testing.assert_allclose(centre_hz_M[5:], 1000 * 2.0 ** (np.arange(-8, 13) / 3), rtol=0.03)


def test_distances_vanish_for_a_louder_copy_and_not_for_another_signal():
    audio_T = noise(4)
    other_T = scipy.signal.lfilter([1.0], [1.0, -0.9], noise(5))
    for distance in (
        metrics.ltas_distance_db,
        metrics.mel_distance_db,
        metrics.stft_distance,
        metrics.centroid_difference_hz,
    ):
        assert distance(audio_T, 3.7 * audio_T, RATE) < 1e-6
        assert distance(audio_T, other_T, RATE) > 0.3


def test_ltas_distance_refuses_unknown_bands():
    with pytest.raises(ValueError, match="third_octave or bands64"):
        metrics.ltas_db(noise(0), RATE, kind="octave")


def test_mel_distance_of_a_shelf_is_its_level_free_size():
    # +12 dB above 3 kHz, as a hard edge in the spectrum: mel bands above shift by 12, below by 0.
    audio_T = noise(6)
    spectrum_F = np.fft.rfft(audio_T)
    freq_hz_F = np.fft.rfftfreq(audio_T.size, 1 / RATE)
    raised_T = np.fft.irfft(np.where(freq_hz_F > 3000, 10 ** (12 / 20), 1.0) * spectrum_F)
    mel = 2595 * np.log10(1 + np.array([20, 3000, 20_000]) / 700)
    share = (mel[2] - mel[1]) / (mel[2] - mel[0])
    expected_db = 12 * np.sqrt(share * (1 - share))
    assert metrics.mel_distance_db(raised_T, audio_T, RATE) == pytest.approx(expected_db, abs=0.1)


def test_stft_distance_agrees_with_scipys_stft():
    target_T, audio_T = noise(7, 1.0), 0.7 * noise(7, 1.0) + 0.3 * noise(8, 1.0)
    audio_T = audio_T * np.sqrt((target_T**2).sum() / (audio_T**2).sum())
    expected = []
    for length in (512, 1024, 2048):
        amps = []
        for signal in (audio_T, target_T):
            _, _, spectrum = scipy.signal.stft(
                signal, nperseg=length, noverlap=length * 3 // 4, boundary=None, padded=False
            )
            amps.append(np.abs(spectrum))
        floor = np.mean(amps[1] ** 2) * 1e-8
        a, b = (np.sqrt(amp**2 + floor) for amp in amps)
        expected.append(np.linalg.norm(a - b) / np.linalg.norm(b) + np.abs(np.log(a / b)).mean())
    assert metrics.stft_distance(audio_T, target_T, RATE) == pytest.approx(
        np.mean(expected), rel=1e-9
    )


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_centroid_of_a_tone_is_its_frequency(rate):
    tone_T = np.sin(2 * np.pi * 3000 * np.arange(rate) / rate)
    assert metrics.spectral_centroid_hz(tone_T, rate) == pytest.approx(3000, rel=0.01)


def test_audio_measures_refuse_what_they_cannot_measure():
    with pytest.raises(ValueError, match="mono"):
        metrics.ltas_db(np.zeros((10, 2)), RATE)
    with pytest.raises(ValueError, match="silent"):
        metrics.ltas_db(np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="time-aligned"):
        metrics.stft_distance(noise(0), noise(0)[:-1], RATE)


def test_the_papers_demo_is_as_far_from_its_references_as_measured(shared):
    # The design quotes 9.1 speech, 9.5 sibilance, 8.7 muddy bass, 5.0 music for untouched inputs
    # from a prototype whose bands are not recorded; of some 1500 definitions tried `bands64` comes
    # nearest, within 0.53 dB for those and for the paper's outputs. Our own values are pinned.
    demo = shared / "demo"
    groups = {
        "speech": [f"audio_files/ex{i}_{{}}.flac" for i in range(1, 6)],
        "sibilance": [
            f"application_examples/sibilance_examples/ex{i}_{{}}.flac" for i in range(1, 5)
        ],
        "bass": [f"application_examples/bassy_examples/ex{i}_{{}}.flac" for i in range(1, 5)],
        "music": [f"application_examples/mus_ex_{i}_{{}}.flac" for i in range(1, 6)],
    }
    quoted = {"speech": 9.1, "sibilance": 9.5, "bass": 8.7, "music": 5.0}
    for name, files in groups.items():
        distances = []
        for file in files:
            pair = []
            for role in ("input", "target" if name == "music" else "reference"):
                audio, rate = soundfile.read(demo / file.format(role), always_2d=True)
                pair.append(audio.mean(axis=1))
            distances.append(metrics.ltas_distance_db(*pair, rate, kind="bands64"))
        assert np.mean(distances) == pytest.approx(quoted[name], abs=0.6)


# --- summing up ----------------------------------------------------------------------------------


def test_summary_figures():
    values_n = np.arange(11.0)
    summary = metrics.summarise(values_n, np.arange(11), 0)
    assert (summary.mean, summary.median, summary.p90, summary.pairs) == (5.0, 5.0, 9.0, 11)
    assert summary.low < 5.0 < summary.high
    assert summary == metrics.summarise(values_n, np.arange(11), 0)
    assert summary != metrics.summarise(values_n, np.arange(11), 1)


def test_interval_is_that_of_a_brute_force_two_stage_bootstrap():
    rng = np.random.default_rng(9)
    talker_n = np.repeat(np.arange(8), [3, 5, 2, 9, 4, 6, 3, 8])
    values_n = rng.normal(size=talker_n.size) + rng.normal(size=8)[talker_n]
    means = []
    for _ in range(4000):
        drawn = rng.integers(8, size=8)
        parts = [rng.choice(values_n[talker_n == t], (talker_n == t).sum()) for t in drawn]
        means.append(np.concatenate(parts).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    summary = metrics.summarise(values_n, talker_n, 3, resamples=4000)
    tolerance = 0.06 * (high - low)  # 95 % quantiles of 4000 draws
    assert summary.low == pytest.approx(low, abs=tolerance)
    assert summary.high == pytest.approx(high, abs=tolerance)


def test_interval_knows_that_pairs_of_a_talker_are_alike():
    talker_n = np.repeat(np.arange(10), 50)
    values_n = np.random.default_rng(10).normal(size=10)[talker_n]
    clustered = metrics.summarise(values_n, talker_n, 0)
    naive = metrics.summarise(values_n, np.arange(500), 0)
    assert clustered.high - clustered.low > 4 * (naive.high - naive.low)


def test_summary_drops_what_means_nothing():
    summary = metrics.summarise(np.array([1.0, np.nan, 3.0]), np.array([0, 1, 2]), 0)
    assert summary.mean == 2.0 and summary.pairs == 2
    assert np.isnan(metrics.summarise(np.array([np.nan]), np.array([0]), 0).mean)
    with pytest.raises(ValueError, match="must both be"):
        metrics.summarise(np.zeros(3), np.zeros(2), 0)


# ---- two methods on the same pairs


def test_paired_difference_has_the_interval_of_theory():
    """One pair of each talker: the bootstrap is that of independent values."""
    rng = np.random.default_rng(0)
    common_n, own_n = 3 * rng.normal(size=400), rng.normal(0.1, 0.5, size=400)
    found = metrics.paired_difference(common_n + own_n, common_n, np.arange(400), seed=1)
    half = 1.96 * own_n.std() / np.sqrt(400)
    assert found.mean == pytest.approx(own_n.mean()) and found.pairs == 400
    assert found.low == pytest.approx(own_n.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(own_n.mean() + half, abs=0.15 * half)
    z = own_n.mean() / (own_n.std() / np.sqrt(400))
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), abs=0.003)
    turned = metrics.paired_difference(common_n, common_n + own_n, np.arange(400), seed=1)
    assert (turned.mean, turned.low, turned.high) == (-found.mean, -found.high, -found.low)


def test_paired_difference_counts_talkers_not_pairs():
    """Forty pairs of a talker that all say the same are one piece of evidence."""
    talker_n = np.repeat(np.arange(5), 40)
    offset_n = np.array([0.5, 0.3, -0.2, 0.4, 0.1])[talker_n]
    found = metrics.paired_difference(offset_n, np.zeros(200), talker_n, seed=0)
    alone = metrics.paired_difference(offset_n, np.zeros(200), np.arange(200), seed=0)
    assert found.high - found.low > 4 * (alone.high - alone.low)
    assert alone.p < 0.01 < found.p


def test_paired_difference_of_little():
    nothing = metrics.paired_difference(np.ones(9), np.ones(9), np.arange(9), seed=0)
    assert nothing[:4] == (0, 0, 0, 1)
    clear = metrics.paired_difference(np.ones(9), np.zeros(9), np.arange(9), seed=0, resamples=100)
    assert clear.p == 2 / 100
    gaps = np.array([1.0, np.nan, 3.0]), np.array([0.0, 1.0, np.nan])
    assert metrics.paired_difference(*gaps, np.arange(3), seed=0)[:3] == (1, 1, 1)
    empty = metrics.paired_difference([np.nan], [1.0], [0], seed=0)
    assert empty.pairs == 0 and np.isnan(empty.mean)
    with pytest.raises(ValueError, match="want"):
        metrics.paired_difference(np.ones(3), np.ones(2), np.arange(3), seed=0)
