"""Rendering against scipy's one-shot filter, across formats, and every way it may not go."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from scipy.signal import sosfilt

from eqst import audio, biquad, eq, render
from eqst.audio import AudioError

LOUD = eq.EqParams(
    np.array([80.0, 700.0, 2500.0, 8000.0]), np.array([6.0, -9.0, 8.0, -4.0]), np.full(4, 0.9)
)
FLAT = LOUD._replace(gain_db=np.zeros(4))
RINGING = eq.EqParams(
    np.array([31.0, 261.0, 1001.0, 15_000.0]), np.array([10.0, 10.0, -10.0, 10.0]), np.full(4, 10.0)
)


def sos(params, sample_rate):
    params, _ = eq.limit_to_rate(params, sample_rate)
    return biquad.sos(*params, kinds=eq.KINDS, sample_rate=sample_rate)


def noise(sample_rate, channels=2, seconds=1.0, rms=0.05):
    rng = np.random.default_rng(0)
    return rms * rng.standard_normal((round(sample_rate * seconds), channels))


def written(path, samples_TC, sample_rate, **kwargs):
    soundfile.write(path, samples_TC, sample_rate, **kwargs)
    return audio.read(path, dtype="float64").samples_TC


def error_db(a, b):
    return 20 * np.log10(np.abs(a - b).max() / np.abs(b).max() + 1e-30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(8000,), (8000, 1), (8000, 5)])
def test_arrays_keep_shape_and_dtype(dtype, shape):
    samples = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    got = render.render(samples, sos(RINGING, 44_100))
    assert got.shape == shape and got.dtype == dtype
    expected = sosfilt(sos(RINGING, 44_100), samples.astype(np.float64), axis=0)
    assert error_db(got, expected) < (-135 if dtype == np.float32 else -290)


# Extension, sample format, and the bound of the error: half a step for integers.
EXACT = [
    ("wav", "PCM_U8", 2.0**-8),
    ("wav", "PCM_16", 2.0**-16),
    ("wav", "PCM_24", 2.0**-24),
    ("wav", "PCM_32", 2.0**-32),
    ("wav", "FLOAT", 1e-7),
    ("wav", "DOUBLE", 1e-14),
    ("flac", "PCM_S8", 2.0**-8),
    ("flac", "PCM_16", 2.0**-16),
    ("flac", "PCM_24", 2.0**-24),
    ("aiff", "PCM_16", 2.0**-16),
    ("aiff", "FLOAT", 1e-7),
    ("caf", "PCM_24", 2.0**-24),
    ("w64", "PCM_24", 2.0**-24),
    ("rf64", "PCM_16", 2.0**-16),
    ("au", "PCM_16", 2.0**-16),
]


@pytest.mark.parametrize(("extension", "subtype", "bound"), EXACT)
@pytest.mark.parametrize(("sample_rate", "channels"), [(8000, 1), (44100, 2), (96000, 6)])
def test_files_are_the_one_shot_filter(tmp_path, extension, subtype, bound, sample_rate, channels):
    source, output = tmp_path / f"in.{extension}", tmp_path / f"out.{extension}"
    samples_TC = written(source, noise(sample_rate, channels, 0.3), sample_rate, subtype=subtype)
    report = render.render_file(source, output, LOUD, block_frames=1000)
    expected_TC = sosfilt(sos(LOUD, sample_rate), samples_TC, axis=0)
    got_TC = audio.read(output, dtype="float64").samples_TC
    assert got_TC.shape == samples_TC.shape
    assert np.abs(got_TC - expected_TC).max() <= bound * (1 + 1e-9)
    before, after = audio.info(source), audio.info(output)
    assert (after.sample_rate, after.format, after.subtype) == (
        before.sample_rate,
        before.format,
        before.subtype,
    )
    assert (report.format, report.subtype) == (after.format, after.subtype)
    assert (report.frames, report.channels) == samples_TC.shape and report.preamp_db == 0.0
    assert report.peak_dbfs == pytest.approx(20 * np.log10(np.abs(expected_TC).max()), abs=1e-6)
    assert report.input_peak_dbfs == pytest.approx(20 * np.log10(np.abs(samples_TC).max()))


@pytest.mark.parametrize(("extension", "subtype", "bound"), EXACT)
def test_a_flat_eq_gives_the_samples_back(tmp_path, extension, subtype, bound):
    """Bit by bit, full scale of both signs included."""
    source, output = tmp_path / f"in.{extension}", tmp_path / f"out.{extension}"
    loud_TC = np.clip(noise(44_100, 2, 0.2, rms=0.5), -1, 1)
    samples_TC = written(source, loud_TC, 44_100, subtype=subtype)
    assert samples_TC.min() == -1.0
    report = render.render_file(source, output, FLAT)
    assert report.preamp_db == 0.0
    np.testing.assert_array_equal(audio.read(output, dtype="float64").samples_TC, samples_TC)


@pytest.mark.parametrize("block_frames", [1, 13, 4096, None])
def test_block_size_does_not_matter(tmp_path, block_frames):
    source, output = tmp_path / "in.wav", tmp_path / "out.wav"
    samples_TC = written(source, noise(44_100, 2, 0.2), 44_100, subtype="DOUBLE")
    render.render_file(source, output, RINGING, block_frames=block_frames)
    expected_TC = sosfilt(sos(RINGING, 44_100), samples_TC, axis=0)
    assert error_db(audio.read(output, dtype="float64").samples_TC, expected_TC) < -280


def test_digital_silence_after_sound_is_rendered_exactly(tmp_path):
    """The state is freed of denormals between blocks; what that changes lies below -600 dB."""
    loud_TC = np.concatenate([noise(44_100, 1, 0.2), np.zeros((44_100 * 4, 1))])
    samples_TC = written(tmp_path / "in.wav", loud_TC, 44_100, subtype="DOUBLE")
    render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", RINGING, block_frames=4410)
    expected_TC = sosfilt(sos(RINGING, 44_100), samples_TC, axis=0)
    assert (
        error_db(audio.read(tmp_path / "out.wav", dtype="float64").samples_TC, expected_TC) < -280
    )
    silence_TC = np.zeros((8000, 1))
    soundfile.write(tmp_path / "in.wav", silence_TC, 8000)
    report = render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", LOUD, overwrite=True)
    assert report.peak_dbfs == -np.inf and report.preamp_db == 0.0


@pytest.mark.parametrize(
    ("name", "sample_rate"),
    [("a.ogg", 44100), ("a.opus", 48000), ("a.mp3", 44100), ("b.mp3", 16000)],
)
def test_lossy_files_stay_what_they_are(tmp_path, name, sample_rate):
    container = "MP3" if name.endswith("mp3") else "OGG"
    subtype = {"ogg": "VORBIS", "opus": "OPUS", "mp3": "MPEG_LAYER_III"}[name.split(".")[1]]
    t_T = np.arange(sample_rate + 123) / sample_rate
    tone_TC = 0.25 * np.sin(2 * np.pi * np.array([440.0, 660.0]) * t_T[:, None])
    source, output = tmp_path / name, tmp_path / f"out_{name}"
    soundfile.write(source, tone_TC, sample_rate, format=container, subtype=subtype)
    samples_TC = audio.read(source, dtype="float64").samples_TC
    report = render.render_file(source, output, LOUD)
    got_TC = audio.read(output, dtype="float64").samples_TC
    assert got_TC.shape == samples_TC.shape == tone_TC.shape
    assert (report.format, report.subtype) == (container, subtype)
    expected_TC = sosfilt(sos(LOUD, sample_rate), samples_TC, axis=0)
    middle = slice(sample_rate // 4, -sample_rate // 4)
    error = np.sqrt(
        np.mean((got_TC - expected_TC)[middle] ** 2) / np.mean(expected_TC[middle] ** 2)
    )
    assert error < 0.05


def test_the_bands_near_nyquist_are_limited_and_reported(tmp_path):
    samples_TC = written(tmp_path / "in.wav", noise(8000, 1), 8000, subtype="DOUBLE")
    report = render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", LOUD)
    assert report.limited_K == (False, False, False, True)
    limited = LOUD._replace(freq_hz=np.minimum(LOUD.freq_hz, 3600.0))
    coefficients = biquad.sos(*limited, kinds=eq.KINDS, sample_rate=8000)
    expected_TC = sosfilt(coefficients, samples_TC, axis=0)
    assert (
        error_db(audio.read(tmp_path / "out.wav", dtype="float64").samples_TC, expected_TC) < -200
    )


# ---- containers and sample formats


def source_info(**changes):
    values = {
        "path": "in",
        "sample_rate": 44_100,
        "channels": 2,
        "frames": 1000,
        "format": "WAV",
        "subtype": "PCM_16",
    }
    return audio.AudioInfo(**{**values, **changes})


@pytest.mark.parametrize(
    ("container", "subtype", "output", "expected"),
    [
        ("FLAC", "PCM_24", "a.wav", ("WAV", "PCM_24")),
        ("WAV", "PCM_24", "a.FLAC", ("FLAC", "PCM_24")),
        ("WAV", "FLOAT", "a.flac", ("FLAC", "PCM_24")),
        ("WAV", "PCM_32", "a.flac", ("FLAC", "PCM_24")),
        ("WAV", "DOUBLE", "a.aiff", ("AIFF", "DOUBLE")),
        ("WAVEX", "PCM_24", "a.wav", ("WAVEX", "PCM_24")),
        ("RF64", "PCM_24", "a.wav", ("RF64", "PCM_24")),
        ("WAV", "PCM_U8", "a.flac", ("FLAC", "PCM_S8")),
        ("WAV", "IMA_ADPCM", "a.wav", ("WAV", "PCM_16")),
        ("CAF", "ALAC_24", "a.caf", ("CAF", "PCM_24")),
        ("MP3", "MPEG_LAYER_III", "a.mp3", ("MP3", "MPEG_LAYER_III")),
        ("MP3", "MPEG_LAYER_III", "a.wav", ("WAV", "PCM_24")),
        ("OGG", "VORBIS", "a.flac", ("FLAC", "PCM_24")),
        ("OGG", "OPUS", "a.ogg", ("OGG", "OPUS")),
        ("OGG", "VORBIS", "a.opus", ("OGG", "OPUS")),
        ("WAV", "PCM_16", "a.ogg", ("OGG", "VORBIS")),
        ("WAV", "PCM_16", "a.mp3", ("MP3", "MPEG_LAYER_III")),
    ],
)
def test_the_output_is_the_nearest_that_the_extension_allows(container, subtype, output, expected):
    source = source_info(format=container, subtype=subtype)
    assert render.output_format(source, output, "preamp") == expected


def test_wav_beyond_four_gigabytes_becomes_rf64():
    long = source_info(frames=2**30 + 1)  # 4 GiB and 4 bytes
    assert render.output_format(long, "a.wav", "preamp") == ("RF64", "PCM_16")
    assert render.output_format(source_info(frames=2**29), "a.wav", "preamp")[0] == "WAV"
    assert render.output_format(source_info(frames=2**29), "a.wav", "float")[0] == "RF64"
    with pytest.raises(AudioError, match=r"4\.0 GiB are more than AIFF holds"):
        render.output_format(long, "a.aiff", "preamp")


def test_rf64_and_tags_are_written(tmp_path, monkeypatch):
    with soundfile.SoundFile(tmp_path / "in.wav", "w", 8000, 1, "PCM_16") as file:
        file.title = "Morgenstück"
        file.write(noise(8000, 1))
    monkeypatch.setattr(render, "_RIFF_BYTES", 1000)
    report = render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", LOUD)
    assert report.format == "RF64"
    with soundfile.SoundFile(tmp_path / "out.wav") as file:
        assert file.title == "Morgenstück" and file.format == "RF64" and file.frames == 8000


# ---- clipping


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_a_file_that_would_clip_is_attenuated_just_enough(tmp_path, subtype):
    loud_TC = 0.8 * np.tanh(noise(44_100, 2, 0.5, rms=1.0))
    samples_TC = written(tmp_path / "in.wav", loud_TC, 44_100, subtype=subtype)
    report = render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", LOUD)
    filtered_TC = sosfilt(sos(LOUD, 44_100), samples_TC, axis=0)
    peak_db = 20 * np.log10(np.abs(filtered_TC).max())
    assert peak_db > 1.0 and report.peak_dbfs == pytest.approx(peak_db, abs=1e-9)
    assert report.preamp_db == pytest.approx(-0.1 - peak_db, abs=1e-9)
    got_TC = audio.read(tmp_path / "out.wav", dtype="float64").samples_TC
    expected_TC = filtered_TC * 10 ** (report.preamp_db / 20)
    assert np.abs(got_TC - expected_TC).max() <= 0.5 * 2.0 ** (-15 if subtype == "PCM_16" else -23)
    assert 20 * np.log10(np.abs(got_TC).max()) == pytest.approx(-0.1, abs=0.001)


def test_the_float_policy_changes_no_level(tmp_path):
    samples_TC = written(tmp_path / "in.flac", np.clip(noise(44_100, rms=0.5), -1, 1), 44_100)
    report = render.render_file(tmp_path / "in.flac", tmp_path / "out.wav", LOUD, clip="float")
    assert (report.format, report.subtype, report.preamp_db) == ("WAV", "FLOAT", 0.0)
    assert report.peak_dbfs > 0
    filtered_TC = sosfilt(sos(LOUD, 44_100), samples_TC, axis=0)
    got_TC = audio.read(tmp_path / "out.wav", dtype="float64").samples_TC
    assert np.abs(got_TC).max() > 1 and error_db(got_TC, filtered_TC) < -140
    with pytest.raises(AudioError, match="FLAC has no float samples: name a .wav"):
        render.render_file(tmp_path / "in.flac", tmp_path / "out.flac", LOUD, clip="float")


def test_float_files_cannot_clip_and_keep_their_level(tmp_path):
    written(tmp_path / "in.wav", 3 * noise(44_100, rms=0.5), 44_100, subtype="FLOAT")
    report = render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", LOUD)
    assert report.peak_dbfs > 6 and report.preamp_db == 0 and report.subtype == "FLOAT"


# ---- refusals


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse(message, *args, **kwargs):
    with pytest.raises(AudioError, match=message) as caught:
        render.render_file(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_the_input_is_never_the_output(tmp_path):
    source = tmp_path / "in.wav"
    soundfile.write(source, noise(8000), 8000)
    before = source.read_bytes()
    (tmp_path / "symlink.wav").symlink_to(source)
    os.link(source, tmp_path / "hardlink.wav")
    (tmp_path / "folder").mkdir()
    same = [source, "symlink.wav", "hardlink.wav", "folder/../in.wav"]
    for output in same:
        refuse("is the input itself", source, tmp_path / output, LOUD, overwrite=True)
        refuse("is the input itself", tmp_path / output, source, LOUD, overwrite=True)
    assert source.read_bytes() == before
    assert listing(tmp_path) == ["folder", "hardlink.wav", "in.wav", "symlink.wav"]


def test_refusals_leave_nothing_behind(tmp_path):
    source = tmp_path / "in.wav"
    soundfile.write(source, noise(96_000, 3), 96_000)
    (tmp_path / "old.wav").write_text("old")
    names = listing(tmp_path)
    refuse("exists already", source, tmp_path / "old.wav", LOUD)
    refuse("unknown extension '.xyz': end it in .wav", source, tmp_path / "a.xyz", LOUD)
    refuse("unknown extension ''", source, tmp_path / "a", LOUD)
    refuse("no folder", source, tmp_path / "missing" / "a.wav", LOUD)
    refuse("clip policy 'hard': choose one of preamp, float", source, "a.wav", LOUD, clip="hard")
    refuse("No such file", tmp_path / "none.wav", tmp_path / "a.wav", LOUD)
    refuse("cannot write 3 channels at 96000 Hz as MP3", source, tmp_path / "a.mp3", LOUD)
    assert listing(tmp_path) == names and (tmp_path / "old.wav").read_text() == "old"


def test_a_run_that_fails_half_way_leaves_the_old_output(tmp_path):
    samples_TC = noise(44_100, 2, 2.0)
    samples_TC[-5] = np.nan
    soundfile.write(tmp_path / "in.wav", samples_TC, 44_100, subtype="FLOAT")
    (tmp_path / "out.wav").write_text("old")
    refuse(
        "not numbers",
        tmp_path / "in.wav",
        tmp_path / "out.wav",
        LOUD,
        overwrite=True,
        block_frames=1000,
    )
    assert (tmp_path / "out.wav").read_text() == "old"
    assert listing(tmp_path) == ["in.wav", "out.wav"]


def test_overwriting_when_allowed(tmp_path):
    soundfile.write(tmp_path / "in.wav", noise(8000), 8000)
    (tmp_path / "out.wav").write_text("old")
    render.render_file(tmp_path / "in.wav", tmp_path / "out.wav", LOUD, overwrite=True)
    assert audio.info(tmp_path / "out.wav").frames == 8000


# ---- long files

MEMORY = """
import resource, sys
import numpy as np
from eqst import eq, render
params = eq.EqParams(np.array([80., 700., 2500., 8000.]), np.full(4, 3.0), np.full(4, 0.9))
render.render_file(sys.argv[1], sys.argv[2], params)  # a second of audio: everything is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = render.render_file(sys.argv[3], sys.argv[4], params)
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(report.frames, report.preamp_db < 0, growth)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(tmp_path, repo):
    """Ten minutes of eight channels (1.7 GB in float64) within 40 MB; both passes are needed."""
    rate, channels, seconds = 44_100, 8, 600
    block_TC = np.clip(noise(rate, channels, 1.0, rms=0.4), -1, 1)
    soundfile.write(tmp_path / "short.wav", block_TC, rate)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, channels, "PCM_16") as file:
        for _ in range(seconds):
            file.write(block_TC)
    names = ["short.wav", "short_out.wav", "long.wav", "long_out.wav"]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in names)],
        cwd=repo,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    frames, attenuated, growth = done.stdout.split()
    assert int(frames) == rate * seconds and attenuated == "True"
    assert int(growth) * (1 if sys.platform == "darwin" else 1024) < 40e6
