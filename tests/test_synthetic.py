"""Synthetic talkers: repeatable, plausible, and no two alike."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from eqst import synthetic, talkers
from eqst.synthetic import synthesise
from eqst.talkers import GRID_HZ, SILENT_DB, random_talker

RATE = 44100
THIRDS_HZ = 1000.0 * 2.0 ** (np.arange(-9, 13) / 3.0)  # 125 Hz .. 16 kHz


def thirds_db(audio_T, rate=RATE):
    """Levels of thirds of an octave, mean removed."""
    freq, power = scipy.signal.welch(audio_T, rate, nperseg=4096)
    bands = [
        power[(freq >= f * 2 ** (-1 / 6)) & (freq < f * 2 ** (1 / 6))].sum() for f in THIRDS_HZ
    ]
    level = 10.0 * np.log10(np.array(bands) + 1e-20)
    return level - level.mean()


def level_above_db(audio_T, freq_hz):
    """Power above a frequency against all power above 100 Hz, in dB."""
    freq, power = scipy.signal.welch(audio_T, RATE, nperseg=4096)
    return 10.0 * np.log10(power[freq > freq_hz].sum() / power[freq > 100.0].sum())


def clean(who, **changes):
    """The talker before a perfect microphone in a dead and silent room."""
    quiet = replace(
        who.recording,
        response_db_G=np.zeros_like(GRID_HZ),
        reverb_db=-120.0,
        reflections=np.zeros((0, 2)),
        floor_db=-120.0,
        position_db=0.0,
        rumble_db=-120.0,
        puff_db=-120.0,
        hum_db=SILENT_DB,
        gate_db=SILENT_DB,
        codec_hz=np.inf,
        offset=0.0,
    )
    return replace(who, recording=replace(quiet, **changes))


def speak(who, seconds, seed=0):
    return synthetic._speak(who, np.random.default_rng(seed), round(seconds * RATE), RATE)


def record(recording, dry_T, seed=1):
    return synthetic._record(recording, np.random.default_rng(seed), dry_T, RATE)


@pytest.fixture(scope="module")
def crowd():
    """Four seconds of each of 20 talkers."""
    return [synthesise(11, talker, 4.0) for talker in range(20)]


def test_same_numbers_same_audio():
    np.testing.assert_array_equal(synthesise(3, 7, 2.0), synthesise(3, 7, 2.0))


def test_talkers_and_corpora_differ():
    first = synthesise(3, 7, 1.0)
    for other in (synthesise(3, 8, 1.0), synthesise(4, 7, 1.0)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_another_length_is_the_same_talker():
    """Longer performances of a talker are closer to each other than to other talkers."""
    long = [thirds_db(synthesise(5, talker, 8.0)) for talker in range(4)]
    longer = [thirds_db(synthesise(5, talker, 9.0)) for talker in range(4)]
    distance = np.array([[np.sqrt(np.mean((a - b) ** 2)) for b in longer] for a in long])
    assert np.all(np.argmin(distance, axis=1) == np.arange(4)), distance.round(1)


@pytest.mark.parametrize("rate", (16000, 22050, 44100, 48000))
@pytest.mark.parametrize("seconds", (0.01, 0.3, 2.0001))
def test_shape_and_rate(rate, seconds):
    audio = synthesise(0, 1, seconds, sample_rate=rate)
    assert audio.shape == (round(seconds * rate),) and audio.dtype == np.float32
    assert np.isfinite(audio).all() and np.abs(audio).max() < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((-1, 0, 1.0), "seed"),
        ((0, -1, 1.0), "talker"),
        ((0, 0, 0.0), "seconds"),
        ((0, 0, 1.0, 96000), "96000"),
    ),
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthesise(*arguments)


def test_levels(crowd):
    for audio in crowd:
        assert np.isfinite(audio).all() and np.abs(audio).max() < 1.0
        assert -45.0 < 10.0 * np.log10(np.mean(audio**2)) < -12.0


def test_pauses(crowd):
    """Energy comes and goes: speech, not a steady noise."""
    ranges = []
    for audio in crowd:
        frames = scipy.signal.sosfilt(
            scipy.signal.butter(4, 200, "high", fs=RATE, output="sos"), audio
        )
        power = (frames[: len(frames) // 1024 * 1024].reshape(-1, 1024) ** 2).mean(1)
        low, high = np.percentile(10.0 * np.log10(power + 1e-12), (5, 90))
        ranges.append(high - low)
    assert min(ranges) > 12.0 and np.median(ranges) > 30.0


def test_average_spectrum(crowd):
    """The mean over talkers follows the long-term spectrum of speech; talkers spread around it.

    Reference: Byrne et al., "An international comparison of long-term average speech spectra",
    JASA 96 (1994), table of both sexes combined, 250 Hz .. 8 kHz, dB SPL in thirds of an octave.
    Recordings here have microphones and rooms of their own, so several dB are allowed.
    """
    speech = (
        60.3,
        59.0,
        62.1,
        62.1,
        60.5,
        56.8,
        53.7,
        53.0,
        52.0,
        48.7,
        48.1,
        46.8,
        45.6,
        44.5,
        44.3,
        43.7,
    )
    level = np.array([thirds_db(audio) for audio in crowd])[:, 3:19]
    mean = level.mean(0)
    np.testing.assert_allclose(mean - mean.mean(), np.array(speech) - np.mean(speech), atol=6.0)
    spread = (level - level.mean(1, keepdims=True)).std(0)
    assert 2.5 < spread.min() and spread.max() < 11.0


def test_pulses_have_their_pitch():
    """A pulse train of 123.4 Hz has its power in the multiples of 123.4 Hz, level to 15 kHz."""
    voice = replace(random_talker(0, 0).voice, jitter=0.0, shimmer=0.0)
    hop, samples = 353, 2 * RATE
    f0 = np.full(samples // hop + 2, 123.4)
    pulses = synthetic._pulses(voice, np.random.default_rng(0), f0, hop, samples, RATE)
    assert np.mean(pulses**2) == pytest.approx(1.0, rel=0.1)
    spectrum = np.abs(np.fft.rfft(pulses * np.hanning(samples)))
    freq = np.fft.rfftfreq(samples, 1.0 / RATE)
    lines = np.array([spectrum[np.abs(freq - k * 123.4) < 2.0].max() for k in range(1, 122)])
    gaps = np.array([spectrum[np.abs(freq - (k + 0.5) * 123.4) < 2.0].max() for k in range(1, 122)])
    assert np.ptp(20.0 * np.log10(lines)) < 1.0
    assert np.all(20.0 * np.log10(lines / gaps) > 40.0)


def pitch_hz(audio_T):
    """Median over loud frames of the lag where the low-passed signal repeats best."""
    low = scipy.signal.sosfilt(scipy.signal.butter(4, 1000, fs=RATE, output="sos"), audio_T)[::8]
    rate, size, found = RATE / 8, 256, []
    power = scipy.ndimage.uniform_filter1d(low**2, size)
    for start in range(0, len(low) - size, size // 2):
        if power[start + size // 2] < np.mean(low**2):
            continue
        frame = low[start : start + size] * np.hanning(size)
        correlation = np.fft.irfft(np.abs(np.fft.rfft(frame, 2 * size)) ** 2)[:size]
        window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)[:size]
        lags = np.arange(int(rate / 450), int(rate / 65))
        best = lags[np.argmax((correlation / window)[lags] * (1.0 - 0.002 * lags))]
        found.append(rate / best)
    return float(np.median(found))


def test_pitch_of_speech():
    """Autocorrelation finds the talker's stated pitch, for low and high voices."""
    stated, found = [], []
    for talker in range(8):
        who = clean(random_talker(2, talker))
        stated.append(who.voice.f0_hz)
        found.append(pitch_hz(speak(who, 3.0)))
    octaves = np.log2(np.array(found) / np.array(stated))
    assert np.abs(np.median(octaves)) < 0.15 and np.sum(np.abs(octaves) < 0.45) >= 7, octaves.round(
        2
    )
    assert min(stated) > 70.0 and max(stated) < 400.0


@pytest.mark.parametrize("vowel", ("i", "a", "u", "E"))
def test_formants_are_peaks(vowel):
    """The envelope of a steady vowel peaks at its formants."""
    who = random_talker(1, 4)
    voice = replace(
        who.voice,
        bandwidth=0.7,
        tilt_hz=5000.0,
        colours_db_PG=np.zeros_like(who.voice.colours_db_PG),
        high_tract_db_G=np.zeros_like(GRID_HZ),
    )
    formants = voice.tract * np.array((*talkers.VOWELS[vowel][:3], 3600.0))
    names = ("effort_db", "nasal", "breath", "noise")
    track = {name: np.full(3, 1e-5, np.float32) for name in names}
    track |= {
        "formants_hz": np.tile(formants, (3, 1)).astype(np.float32),
        "phone": np.zeros(3, int),
    }
    track |= {
        "noise_hz": np.full(3, 3000.0),
        "rise_db": np.full(3, 6.0),
        "fall_db": np.full(3, 6.0),
    }
    track |= {"voice": np.ones(3), "f0_hz": np.full(3, 120.0)}
    mean_bins_G = synthetic._to_bins(RATE, 2048, np.float32)[0].mean(1)
    level_NG, _ = synthetic._envelopes(voice, track, mean_bins_G)
    peaks_hz = GRID_HZ[scipy.signal.argrelmax(level_NG[1])[0]]
    for formant in formants[1:]:
        assert np.abs(np.log2(peaks_hz / formant)).min() < 0.06, (formants, peaks_hz)
    assert np.abs(peaks_hz - formants[0]).min() < 60.0


def test_minimum_phase():
    """Level and phase of a one-pole filter agree with scipy.signal.freqz."""
    size = 2048
    level_GF, phase_GF = synthetic._to_bins(RATE, size, np.float32)
    freq, response = scipy.signal.freqz(
        [1.0], [1.0, -0.7], size // 2 + 1, fs=RATE, include_nyquist=True
    )
    level_db_G = 20.0 * np.log10(
        np.abs(scipy.signal.freqz([1.0], [1.0, -0.7], GRID_HZ, fs=RATE)[1])
    )
    np.testing.assert_allclose(level_db_G @ level_GF, 20.0 * np.log10(np.abs(response)), atol=0.02)
    np.testing.assert_allclose(level_db_G @ phase_GF, np.angle(response), atol=0.02)


def test_frames_overlap_add_to_the_signal():
    signal = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    frames = synthetic._frames(signal, -(-10_000 // 353) + 1, 353, 1024)
    np.testing.assert_allclose(synthetic._overlap_add(frames, 353, 1024, 10_000), signal, atol=1e-5)


def test_bandwidth_ends_at_the_codec():
    """Speech reaches beyond 18 kHz, unless a codec cuts it off."""
    who = clean(random_talker(6, 2))
    dry = speak(who, 6.0)
    whole = record(who.recording, dry)
    cut = record(replace(who.recording, codec_hz=16000.0), dry)
    assert level_above_db(whole, 18000.0) > -65.0
    assert level_above_db(cut, 17000.0) < level_above_db(whole, 17000.0) - 40.0
    assert level_above_db(cut, 10000.0) > level_above_db(whole, 10000.0) - 3.0


def test_codec_leaves_holes_and_keeps_the_bass():
    who = clean(random_talker(6, 3), floor_db=-60.0)
    dry = speak(who, 3.0)
    whole, coded = dry, synthetic._codec(dry, -60.0)
    _, _, before = scipy.signal.stft(whole, RATE, nperseg=1024)
    _, _, after = scipy.signal.stft(coded, RATE, nperseg=1024)
    lost_db = 20.0 * np.log10((np.abs(after) + 1e-9) / (np.abs(before) + 1e-9))
    assert np.mean(lost_db[250:] < -20.0) > 0.1
    np.testing.assert_allclose(np.median(lost_db[:80]), 0.0, atol=0.05)


def test_gate_gives_digital_silence():
    who = clean(random_talker(6, 3), floor_db=-70.0)
    dry = speak(who, 4.0)
    assert np.mean(record(who.recording, dry) == 0.0) < 0.01
    assert np.mean(record(replace(who.recording, gate_db=-40.0), dry) == 0.0) > 0.05


def test_microphone_response_reaches_the_audio():
    """Any curve of the microphone appears in the long-term spectrum as it was drawn."""
    who = clean(random_talker(8, 1))
    dry = speak(who, 5.0)
    curve_G = 6.0 * np.sin(2.0 * np.pi * np.log2(np.maximum(GRID_HZ, 20.0) / 1000.0) / 3.0)
    change = thirds_db(record(replace(who.recording, response_db_G=curve_G), dry))
    change -= thirds_db(record(who.recording, dry))
    expected = np.interp(THIRDS_HZ, GRID_HZ, curve_G)
    difference = (change - change.mean()) - (expected - expected.mean())
    assert np.abs(difference - np.median(difference)).max() < 2.0


def test_imports_neither_jax_nor_tensorflow():
    code = "import sys, eqst.synthetic; print({'jax', 'tensorflow', 'flax'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
