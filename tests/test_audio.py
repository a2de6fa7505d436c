"""Reading, checking, resampling, mono."""

import numpy as np
import pytest
import soundfile

from eqst import audio
from eqst.audio import AudioError

# Container, sample format, and the largest error of a round trip in steps of full scale.
FORMATS = [
    ("wav", "PCM_U8", 2.0**-7),
    ("wav", "PCM_16", 2.0**-15),
    ("wav", "PCM_24", 2.0**-23),
    ("wav", "PCM_32", 2.0**-24),  # float32 samples
    ("wav", "FLOAT", 2.0**-24),
    ("wav", "ULAW", 2.0**-5),
    ("flac", "PCM_16", 2.0**-15),
    ("flac", "PCM_24", 2.0**-23),
    ("aiff", "PCM_24", 2.0**-23),
    ("caf", "PCM_24", 2.0**-23),
    ("w64", "FLOAT", 2.0**-24),
    ("au", "PCM_16", 2.0**-15),
]


def tone(sample_rate, channels=1, seconds=1.0, amplitude=0.5):
    t_T = np.arange(round(sample_rate * seconds)) / sample_rate
    freq_hz_C = 300.0 * (1 + np.arange(channels))
    return amplitude * np.sin(2 * np.pi * freq_hz_C * t_T[:, None])


@pytest.mark.parametrize(("extension", "subtype", "step"), FORMATS)
@pytest.mark.parametrize(("sample_rate", "channels"), [(8000, 1), (44100, 2), (192000, 6)])
def test_files_come_back(tmp_path, extension, subtype, step, sample_rate, channels):
    samples_TC = tone(sample_rate, channels, seconds=0.3)
    path = tmp_path / f"a.{extension}"
    soundfile.write(path, samples_TC, sample_rate, subtype=subtype)
    sound = audio.read(path)
    assert sound.sample_rate == sample_rate
    assert sound.samples_TC.dtype == np.float32
    assert sound.samples_TC.shape == samples_TC.shape
    assert np.abs(sound.samples_TC - samples_TC).max() <= step
    header = audio.info(path)
    assert (header.frames, header.channels, header.subtype) == (*samples_TC.shape, subtype)
    assert header.seconds == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "subtype", "sample_rate"),
    [("a.ogg", "VORBIS", 44100), ("a.opus", "OPUS", 48000), ("a.mp3", "MPEG_LAYER_III", 44100)],
)
def test_lossy_files_come_back_in_length_and_sound(tmp_path, name, subtype, sample_rate):
    samples_TC = tone(sample_rate, 2, seconds=1.0)
    container = "MP3" if name.endswith("mp3") else "OGG"
    path = tmp_path / name
    soundfile.write(path, samples_TC, sample_rate, subtype=subtype, format=container)
    sound = audio.read(path)
    assert sound.samples_TC.shape == samples_TC.shape
    middle = slice(sample_rate // 4, -sample_rate // 4)
    error = np.sqrt(np.mean((sound.samples_TC - samples_TC)[middle] ** 2))
    assert error < 0.02  # and not shifted by an encoder's delay


def test_a_part_of_a_file(tmp_path):
    samples_TC = np.arange(1000, dtype=np.float64)[:, None] / 1000
    soundfile.write(tmp_path / "a.wav", samples_TC, 8000, subtype="DOUBLE")
    part = audio.read(tmp_path / "a.wav", start=100, frames=50, dtype="float64")
    np.testing.assert_array_equal(part.samples_TC, samples_TC[100:150])
    for start, frames in ((-1, None), (1000, None), (990, 11), (0, 0)):
        with pytest.raises(AudioError, match="outside the file's 0 .. 1000"):
            audio.read(tmp_path / "a.wav", start=start, frames=frames)


@pytest.mark.parametrize("block_frames", [None, 1, 7, 1000, 4096])
def test_blocks_join_to_the_file(tmp_path, block_frames):
    samples_TC = tone(8000, 3, seconds=0.25)
    soundfile.write(tmp_path / "a.wav", samples_TC, 8000, subtype="FLOAT")
    blocks = list(audio.stream(tmp_path / "a.wav", block_frames=block_frames))
    joined_TC = np.concatenate(blocks)
    np.testing.assert_array_equal(joined_TC, audio.read(tmp_path / "a.wav").samples_TC)
    if block_frames:
        assert max(len(block) for block in blocks) <= block_frames


# ---- every way to be unusable


def one_line(caught):
    return "\n" not in str(caught.value) and len(str(caught.value)) < 400


def broken_files(folder):
    """Name -> expected message, for files made in `folder`."""
    samples_TC = tone(44_100, 2, seconds=2.0)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio" * 100)
    (folder / "headerless.raw").write_bytes(bytes(1000))
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "no_samples.wav", samples_TC[:0], 44_100)
    soundfile.write(folder / "slow.wav", samples_TC, 7999)
    soundfile.write(folder / "fast.wav", samples_TC, 192_001)
    for name, value in (("nan.wav", np.nan), ("inf.wav", -np.inf)):
        bad_TC = samples_TC.copy()
        bad_TC[44_100:44_102, 1] = value
        soundfile.write(folder / name, bad_TC, 44_100, subtype="FLOAT")
    noise_TC = np.random.default_rng(0).uniform(-0.5, 0.5, (100_000, 2))
    soundfile.write(folder / "whole.flac", noise_TC, 44_100)
    data = bytearray((folder / "whole.flac").read_bytes())
    (folder / "cut.flac").write_bytes(data[: len(data) // 2])
    endless = bytearray(data)
    endless[21] &= 0xF0  # STREAMINFO's count of samples, 36 bits: zero is "unknown"
    endless[22:26] = bytes(4)
    (folder / "endless.flac").write_bytes(endless)
    middle = len(data) // 2
    data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    (folder / "damaged.flac").write_bytes(data)
    soundfile.write(folder / "whole.mp3", noise_TC, 44_100, format="MP3")
    data = bytearray((folder / "whole.mp3").read_bytes())
    (folder / "cut.mp3").write_bytes(data[: len(data) // 2])
    return {
        "missing.wav": "No such file",
        "folder.wav": "is a folder",
        "empty.wav": r"is empty \(0 bytes\)",
        "text.wav": "not audio that libsndfile reads .*convert it",
        "headerless.raw": "not audio that libsndfile reads .*convert it",
        "no_samples.wav": r"holds no samples",
        "slow.wav": r"7999 Hz, outside 8000 \.\. 192000 Hz: resample",
        "fast.wav": r"192001 Hz, outside 8000 \.\. 192000 Hz: resample",
        "nan.wav": r"not numbers .*2 or more, the first at 1\.000 s",
        "inf.wav": r"not numbers .*2 or more, the first at 1\.000 s",
        "cut.flac": "is damaged|is cut short",
        "damaged.flac": "is damaged|is cut short",
        "endless.flac": "does not say how long it is",
        "cut.mp3": r"is cut short: it ends after 1\.\d\d of the 2\.27 s",
    }


def test_broken_files_say_what_is_wrong_in_one_line(tmp_path):
    for name, message in broken_files(tmp_path).items():
        for use in (audio.read, audio.scan):
            with pytest.raises(AudioError, match=message) as caught:
                use(tmp_path / name)
            assert one_line(caught) and name in str(caught.value), name


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "AIFF", "AU", "W64", "RF64"])
def test_a_truncated_file_of_samples_is_refused(container, tmp_path):
    """libsndfile would shorten it without a word: half a recording would pass for the whole."""
    path = tmp_path / "a.audio"
    soundfile.write(path, tone(8000, 2), 8000, subtype="PCM_16", format=container)
    assert audio.info(path).frames == 8000
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 16000])
    with pytest.raises(
        AudioError, match=r"cut short: its header says 320\d\d bytes of audio"
    ) as caught:
        audio.info(path)
    assert one_line(caught)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024, 32036])
def test_a_wav_written_through_a_pipe_or_by_a_careless_program_is_whole(size, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8000, 2), 8000, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[40:44] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    assert audio.scan(tmp_path / "a.wav").info.frames == 8000


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match="not a regular file"):
        audio.read(tmp_path / "pipe.wav")


def test_arrays_are_checked():
    good_T = tone(8000)[:, 0]
    assert audio.as_samples(good_T, 8000).shape == (8000, 1)
    assert audio.as_samples(good_T.astype(np.float16), 8000).dtype == np.float32
    assert audio.as_samples(good_T, 8000).dtype == np.float64
    bad = good_T.copy()
    bad[5] = np.nan
    cases = [
        (bad, 8000, "input holds samples that are not numbers"),
        (good_T, 4000, r"input: sample rate 4000 Hz is outside 8000 \.\. 192000 Hz"),
        ((good_T * 100).astype(np.int16), 8000, "dtype int16: give floats"),
        (good_T[:0], 8000, r"shape \(0,\) holds no samples"),
        (np.zeros((2, 8000)), 8000, "more channels than samples: transpose"),
        (np.zeros((2, 2, 2)), 8000, r"shape \(2, 2, 2\): give \[samples\]"),
        (good_T + 0j, 8000, "dtype complex128: give floats"),
    ]
    for array, rate, message in cases:
        with pytest.raises(AudioError, match=message) as caught:
            audio.as_samples(array, rate, "input")
        assert one_line(caught)


# ---- resampling and mono


@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(44100, 48000), (48000, 44100), (8000, 44100), (192000, 44100)]
)
def test_resampling_keeps_a_tone_and_its_phase(from_rate, to_rate):
    before_TC, expected_TC = tone(from_rate, 2, 1.0), tone(to_rate, 2, 1.0)
    after_TC = audio.resample(before_TC, from_rate, to_rate)
    assert after_TC.shape == expected_TC.shape and after_TC.dtype == np.float64
    middle = slice(to_rate // 4, -to_rate // 4)
    assert np.abs(after_TC - expected_TC)[middle].max() < 1e-5


def test_resampling_removes_what_would_alias():
    t_T = np.arange(48_000) / 48_000
    after_T = audio.resample(np.sin(2 * np.pi * 20_000 * t_T), 48_000, 16_000)
    assert np.abs(after_T[2000:-2000]).max() < 1e-6


@pytest.mark.parametrize("samples", [1, 2, 999, 1000, 44_101])
def test_resampled_length_is_rounded(samples):
    signal_T = np.zeros(samples, np.float32)
    for to_rate in (8000, 48_000, 96_000):
        after_T = audio.resample(signal_T, 44_100, to_rate)
        assert len(after_T) == round(samples * to_rate / 44_100) and after_T.dtype == np.float32
    assert audio.resample(signal_T, 8000, 8000) is signal_T


def test_mono_is_the_mean_unless_the_channels_cancel():
    rng = np.random.default_rng(0)
    left_T, right_T = 0.1 * rng.standard_normal((2, 44_100)).astype(np.float32)
    unrelated_TC = np.stack([left_T, right_T], axis=1)
    np.testing.assert_allclose(audio.to_mono(unrelated_TC), unrelated_TC.mean(axis=1), atol=1e-7)
    one_sided_TC = np.stack([left_T, 0 * left_T], axis=1)
    np.testing.assert_allclose(audio.to_mono(one_sided_TC), left_T / 2, atol=1e-7)
    swapped_TC = np.stack([0.5 * left_T, -0.6 * left_T], axis=1)
    np.testing.assert_array_equal(audio.to_mono(swapped_TC), swapped_TC[:, 1])
    # A constant offset is no sound and decides nothing.
    np.testing.assert_array_equal(audio.to_mono(swapped_TC + 0.3), swapped_TC[:, 1] + 0.3)
    np.testing.assert_array_equal(audio.to_mono(left_T[:, None]), left_T)
    np.testing.assert_array_equal(audio.to_mono(np.zeros((100, 2), np.float32)), np.zeros(100))


def test_a_files_mono_weights_are_those_of_its_samples(tmp_path):
    left_T = 0.1 * np.random.default_rng(0).standard_normal(44_100)
    soundfile.write(tmp_path / "a.wav", np.stack([left_T, -left_T * 0.9], axis=1), 44_100)
    np.testing.assert_array_equal(audio.scan(tmp_path / "a.wav").mono_weights_C, [1.0, 0.0])
