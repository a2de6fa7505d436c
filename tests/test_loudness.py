"""BS.1770-4: the Recommendation's numbers, closed forms, and pyloudnorm as an independent meter."""

import numpy as np
import pytest
import soundfile
from scipy.signal import sosfreqz

from eqst import audio, loudness

RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 88200, 96000, 192000)
# pyloudnorm's high pass is scaled to 0 dB at Nyquist; the Recommendation's has 0.043 dB there.
PYLOUDNORM_LU = 0.05


def programme(sample_rate, channels=2, seconds=8.0, seed=0):
    """Noise of speech-like tilt with loud, soft and silent stretches, so that both gates act."""
    rng = np.random.default_rng(seed)
    samples = round(sample_rate * seconds)
    spectrum_FC = np.fft.rfft(rng.standard_normal((samples, channels)), axis=0)
    freq_hz_F = np.fft.rfftfreq(samples, 1 / sample_rate)
    noise_TC = np.fft.irfft(spectrum_FC / (1 + freq_hz_F / 500)[:, None], samples, axis=0)
    steps = np.array([1.0, 0.3, 0.02, 0.0, 0.8, 0.1, 1.0, 0.003])
    gain_T = steps[(np.arange(samples) * len(steps)) // samples]
    return 0.3 * noise_TC / noise_TC.std() * gain_T[:, None]


def test_the_published_coefficients_at_48_khz():
    sos = loudness.k_weighting_sos(48_000)
    np.testing.assert_allclose(sos, loudness._K_WEIGHTING_48K, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sample_rate", RATES)
def test_the_weighting_is_the_same_filter_at_every_rate(sample_rate):
    """Up to the warping of the bilinear map: compared up to an eighth of the rate."""
    freq_hz_F = np.geomspace(20, min(sample_rate, 48_000) / 8, 200)
    _, ours_F = sosfreqz(loudness.k_weighting_sos(sample_rate), freq_hz_F, fs=sample_rate)
    _, published_F = sosfreqz(loudness._K_WEIGHTING_48K, freq_hz_F, fs=48_000)
    difference_db = 20 * np.log10(np.abs(ours_F) / np.abs(published_F))
    assert np.abs(difference_db).max() < (0.25 if sample_rate < 16_000 else 0.1)


@pytest.mark.parametrize("sample_rate", [48_000, 44_100, 96_000, 192_000])
def test_the_recommendations_own_check(sample_rate):
    """A full-scale 997 Hz sine in one front channel reads -3.01 LKFS (BS.1770-4, annex 1)."""
    tone_T = np.sin(2 * np.pi * 997 * np.arange(5 * sample_rate) / sample_rate)
    for channel in range(3):
        samples_TC = np.zeros((len(tone_T), 5))
        samples_TC[:, channel] = tone_T
        assert loudness.loudness_lufs(samples_TC, sample_rate) == pytest.approx(-3.01, abs=0.01)
    samples_TC = np.zeros((len(tone_T), 6))
    samples_TC[:, 4] = tone_T  # a surround channel of 5.1 counts 1.41 times
    expected = -3.01 + 10 * np.log10(1.41)
    assert loudness.loudness_lufs(samples_TC, sample_rate) == pytest.approx(expected, abs=0.01)
    samples_TC = np.zeros((len(tone_T), 6))
    samples_TC[:, 3] = tone_T  # the LFE does not count
    assert loudness.loudness_lufs(samples_TC, sample_rate) == -np.inf


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_agreement_with_pyloudnorm(sample_rate, channels):
    pyloudnorm = pytest.importorskip("pyloudnorm")
    samples_TC = programme(sample_rate, channels)
    theirs = pyloudnorm.Meter(sample_rate).integrated_loudness(samples_TC)
    assert loudness.loudness_lufs(samples_TC, sample_rate) == pytest.approx(
        theirs, abs=PYLOUDNORM_LU
    )


@pytest.mark.long
def test_agreement_with_pyloudnorm_on_recordings(shared):
    """Each 400 ms block agrees. The integrated values may part by more on short files: pyloudnorm
    counts an incomplete block at the end, and a block next to a gate can fall on either side."""
    pyloudnorm = pytest.importorskip("pyloudnorm")
    files = sorted(shared.rglob("*.flac"))[::6]
    assert len(files) >= 20
    integrated = []
    for path in files:
        sound = audio.read(path, dtype="float64")
        meter = pyloudnorm.Meter(sound.sample_rate)
        theirs = meter.integrated_loudness(sound.samples_TC)
        power_J = loudness.k_weighted_power(*sound)
        block_I = np.convolve(power_J, np.full(4, 0.25), "valid")
        their_I = np.array(meter.blockwise_loudness)[: len(block_I)]
        ours_I = -0.691 + 10 * np.log10(np.maximum(block_I, 1e-20))
        heard_I = ours_I > -70
        assert np.abs(ours_I - their_I)[heard_I].max() < PYLOUDNORM_LU, path
        integrated.append(abs(loudness.gated_loudness_lufs(power_J) - theirs))
    assert np.median(integrated) < PYLOUDNORM_LU and max(integrated) < 0.3


def test_loudness_follows_the_level_exactly_above_the_gates():
    samples_TC = programme(44_100)
    before = loudness.loudness_lufs(samples_TC, 44_100)
    for gain_db in (-20.0, -6.0, 6.0):
        after = loudness.loudness_lufs(samples_TC * 10 ** (gain_db / 20), 44_100)
        assert after == pytest.approx(before + gain_db, abs=1e-9)


def test_silence_and_near_silence_are_minus_infinity():
    assert loudness.loudness_lufs(np.zeros((44_100, 2)), 44_100) == -np.inf
    noise_TC = 1e-5 * np.random.default_rng(0).standard_normal((44_100, 1))
    assert loudness.loudness_lufs(noise_TC, 44_100) == -np.inf


@pytest.mark.parametrize("sample_rate", [8000, 11025, 44100])
def test_four_blocks_are_needed(sample_rate):
    samples_TC = programme(sample_rate, seconds=0.4)
    assert np.isfinite(loudness.loudness_lufs(samples_TC, sample_rate))
    with pytest.raises(audio.AudioError, match=r"0\.3 s is too short .* needs 0\.4 s"):
        loudness.loudness_lufs(samples_TC[:-1], sample_rate)
    with pytest.raises(audio.AudioError, match=r"0\.0 s is too short"):
        loudness.gated_loudness_lufs(np.zeros(0))


@pytest.mark.parametrize("sample_rate", [11025, 44100])
def test_power_is_the_mean_square_of_each_tenth_of_a_second(sample_rate):
    from scipy.signal import sosfilt

    samples_TC = programme(sample_rate, channels=5, seconds=1.234)
    weighted_TC = sosfilt(loudness.k_weighting_sos(sample_rate), samples_TC, axis=0)
    square_T = np.square(weighted_TC) @ np.array([1, 1, 1, 1.41, 1.41])
    edges = [j * sample_rate // 10 for j in range(13)]
    expected_J = [square_T[a:b].mean() for a, b in zip(edges[:-1], edges[1:], strict=True)]
    power_J = loudness.k_weighted_power(samples_TC, sample_rate)
    np.testing.assert_allclose(power_J, expected_J, rtol=1e-12)


@pytest.mark.parametrize("sample_rate", [11025, 48000])
def test_the_meter_does_not_care_how_audio_arrives(sample_rate):
    samples_TC = programme(sample_rate, seconds=2.0)
    whole_J = loudness.k_weighted_power(samples_TC, sample_rate)
    rng = np.random.default_rng(1)
    meter, position = loudness.LoudnessMeter(2, sample_rate), 0
    while position < len(samples_TC):
        step = int(rng.integers(1, 3 * sample_rate // 10))
        meter.push(samples_TC[position : position + step])
        position += step
    np.testing.assert_allclose(meter.power(), whole_J, rtol=1e-12)
    assert len(whole_J) == 20


def test_a_segments_loudness_is_a_slice_of_the_recordings_power():
    """Within the settling of the 38 Hz high pass, which only a fresh run has."""
    sample_rate = 44_100
    samples_TC = programme(sample_rate, seconds=8.0)
    power_J = loudness.k_weighted_power(samples_TC, sample_rate)
    for start, stop in ((0, 30), (7, 40), (50, 65)):
        piece_TC = samples_TC[start * 4410 : stop * 4410]
        alone = loudness.loudness_lufs(piece_TC, sample_rate)
        assert loudness.gated_loudness_lufs(power_J[start:stop]) == pytest.approx(alone, abs=0.02)


def test_scan_reads_loudness_peak_and_length_of_a_file(tmp_path):
    samples_TC = programme(44_100, seconds=30.0)  # several blocks of the stream
    soundfile.write(tmp_path / "a.wav", samples_TC, 44_100, subtype="DOUBLE")
    scan = audio.scan(tmp_path / "a.wav")
    assert scan.info.frames == len(samples_TC) and scan.info.seconds == 30.0
    assert scan.peak == pytest.approx(np.abs(samples_TC).max(), rel=1e-6)
    assert scan.loudness_lufs == pytest.approx(loudness.loudness_lufs(samples_TC, 44_100), abs=1e-5)
    np.testing.assert_allclose(scan.mono_weights_C, [0.5, 0.5])
