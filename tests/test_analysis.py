"""What a model hears of a recording: rate, level, mono, windows, and what is refused."""

import numpy as np
import pytest
import soundfile

from eqst import analysis, audio
from eqst.audio import AudioError


def noise(sample_rate, seconds, channels=2, rms=0.05):
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((round(sample_rate * seconds), channels))
    return (rms * samples).astype(np.float32)


@pytest.mark.parametrize("sample_rate", [8000, 22_050, 44_100, 96_000])
def test_files_and_arrays_are_heard_alike(tmp_path, sample_rate):
    samples_TC = noise(sample_rate, 3.0)
    soundfile.write(tmp_path / "a.wav", samples_TC, sample_rate, subtype="FLOAT")
    from_file = analysis.from_file(tmp_path / "a.wav")
    from_array = analysis.from_array(samples_TC, sample_rate, "a")
    assert from_file.loudness_lufs == pytest.approx(from_array.loudness_lufs, abs=1e-6)
    heard_T = analysis.heard(from_file, 44_100)
    np.testing.assert_allclose(heard_T, analysis.heard(from_array, 44_100), atol=1e-6)
    assert heard_T.dtype == np.float32 and len(heard_T) == 3 * 44_100


def test_every_level_is_heard_at_one_loudness():
    samples_TC = noise(44_100, 3.0, channels=1)
    expected_T = analysis.heard(analysis.from_array(samples_TC, 44_100, "a"), 44_100)
    assert audio.loudness_lufs(expected_T[:, None], 44_100) == pytest.approx(-23.0, abs=0.01)
    for gain in (0.02, 20.0):
        heard_T = analysis.heard(analysis.from_array(gain * samples_TC, 44_100, "a"), 44_100)
        np.testing.assert_allclose(heard_T, expected_T, atol=1e-6)


def test_swapped_wires_are_heard():
    left_T = noise(44_100, 2.0, channels=1)[:, 0]
    swapped_TC = np.stack([left_T, -left_T], axis=1)
    heard_T = analysis.heard(analysis.from_array(swapped_TC, 44_100, "a"), 44_100)
    alike = np.corrcoef(heard_T, left_T)[0, 1]
    assert alike > 0.9999 and np.std(heard_T) > 0.01


def test_a_recording_of_higher_rate_loses_what_the_other_cannot_hold():
    samples_TC = noise(48_000, 2.0)
    recording = analysis.from_array(samples_TC, 48_000, "a")
    for band_rate, empty_hz in ((16_000, 8200), (None, None)):
        heard_T = analysis.heard(recording, 44_100, band_rate=band_rate)
        assert len(heard_T) == 2 * 44_100
        power_F = np.abs(np.fft.rfft(heard_T * np.hanning(len(heard_T)))) ** 2
        freq_hz_F = np.fft.rfftfreq(len(heard_T), 1 / 44_100)
        above_db = 10 * np.log10(power_F[freq_hz_F > 8200].mean() / power_F.mean())
        assert (above_db < -80) if empty_hz else (above_db > -3)


def test_windows_cover_a_long_recording_evenly():
    assert analysis.windows(300 * 8000, 8000) == [(0, 300 * 8000)]
    spans = analysis.windows(3600 * 8000 + 7, 8000)
    starts = np.array([start for start, _ in spans])
    assert len(spans) == 10 and {length for _, length in spans} == {30 * 8000}
    assert starts[0] == 0 and starts[-1] + 30 * 8000 == 3600 * 8000 + 7
    assert np.ptp(np.diff(starts)) <= 1
    barely = analysis.windows(300 * 8000 + 1, 8000)
    assert sum(length for _, length in barely) == 300 * 8000
    assert all(a[0] + a[1] <= b[0] for a, b in zip(barely[:-1], barely[1:], strict=True))


def test_windows_of_a_long_file_are_joined_without_a_click(tmp_path):
    rate = 8000
    tone_T = 0.1 * np.sin(2 * np.pi * 440.25 * np.arange(rate * 400) / rate)
    soundfile.write(tmp_path / "long.wav", tone_T, rate)
    heard_T = analysis.heard(analysis.from_file(tmp_path / "long.wav"), rate)
    assert len(heard_T) == 300 * rate
    # A tone holds nothing above 2 kHz; a click would be there.
    frames = heard_T.reshape(-1, rate // 4) * np.hanning(rate // 4)
    spectrum_NF = np.abs(np.fft.rfft(frames, axis=1))
    assert spectrum_NF[:, len(spectrum_NF[0]) // 2 :].max() < 1e-3 * spectrum_NF.max()


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    cases = [
        (noise(44_100, 0.99), "a lasts 0.99 s: at least 1 s"),
        (noise(44_100, 0.1), "a lasts 0.10 s: at least 1 s"),
        (0 * noise(44_100, 2.0), "a is silent"),
        (noise(44_100, 2.0, channels=1, rms=4e-4), r"a is too quiet: -6\d\.\d LUFS, below -60"),
        (np.full((44_100, 1), np.nan), "a holds samples that are not numbers"),
    ]
    for samples_TC, message in cases:
        with pytest.raises(AudioError, match=message) as caught:
            analysis.from_array(samples_TC, 44_100, "a")
        assert "\n" not in str(caught.value)
        soundfile.write(tmp_path / "a", samples_TC, 44_100, format="WAV", subtype="FLOAT")
        with pytest.raises(AudioError, match=message.replace("a ", "a' ", 1)):
            analysis.from_file(tmp_path / "a")
    analysis.from_array(noise(44_100, 1.0, rms=0.003), 44_100, "a")
