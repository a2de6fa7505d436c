"""Matching with a known model in place of the trained one, and the command as users call it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from eqst import analysis, audio, biquad, eq, match, picture, render, settings
from eqst.audio import AudioError

KNOWN = eq.EqParams(
    np.array([100.0, 700.0, 2500.0, 8000.0]),
    np.array([4.0, -6.0, 5.0, -3.0]),
    np.array([0.7, 1.0, 2.0, 0.7]),
)


def noise(sample_rate, seconds=2.0, channels=2, rms=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return rms * rng.standard_normal((round(sample_rate * seconds), channels))


class Stub:
    """A model that always finds the same EQ, and remembers what it heard."""

    def __init__(self, params=KNOWN):
        self.params, self.heard = params, []

    def __call__(self, input_T, reference_T):
        self.heard.append((input_T, reference_T))
        return self.params

    def matcher(self):
        return match.Matcher(self)


def curve_db(params, sample_rate, freq_hz):
    return np.asarray(eq.response_db(params, freq_hz, sample_rate=sample_rate))


# ---- in Python


def test_prediction_at_the_models_rate_is_the_models():
    found = Stub().matcher().predict(noise(44_100), noise(44_100, 3.0, 1), 44_100)
    assert found.sample_rate == 44_100
    for got, expected in zip(found.params, KNOWN, strict=True):
        np.testing.assert_allclose(got, expected)
    assert found.preamp_db == pytest.approx(-settings.peak_db(found), abs=0.001)


def test_the_model_hears_mono_at_its_rate_and_one_loudness():
    stub = Stub()
    for gain in (1.0, 0.1):
        stub.matcher().predict(gain * noise(48_000), noise(48_000, 1.5, 1), 48_000)
    for input_T, reference_T in stub.heard:
        assert input_T.shape == (2 * 44_100,) and reference_T.shape == (round(1.5 * 44_100),)
        assert input_T.dtype == reference_T.dtype == np.float32
    np.testing.assert_allclose(stub.heard[0][0], stub.heard[1][0], atol=1e-6)


@pytest.mark.parametrize("sample_rate", [16_000, 32_000, 48_000, 96_000])
def test_at_another_rate_the_curve_is_kept(sample_rate):
    found = Stub().matcher().predict(noise(sample_rate), noise(sample_rate), sample_rate)
    assert found.sample_rate == sample_rate
    freq_hz = eq.curve_grid_hz(min(sample_rate, 44_100))
    freq_hz = freq_hz[freq_hz < 0.4 * sample_rate]
    got_F = curve_db(found.params, sample_rate, freq_hz)
    expected_F = curve_db(KNOWN, 44_100, freq_hz)
    assert np.sqrt(np.mean((got_F - expected_F) ** 2)) < 0.3  # dB; plain reuse is as far off at 96k


@pytest.mark.parametrize("sample_rate", [8000, 11_025])
def test_frequencies_stay_below_the_limit_of_a_low_rate(sample_rate):
    recording = analysis.from_array(noise(sample_rate), sample_rate, "a")
    result = Stub().matcher().match(recording, recording)
    assert result.settings.params.freq_hz.max() <= eq.RATE_LIMIT * sample_rate
    limit = round(eq.RATE_LIMIT * sample_rate)
    assert any(f"found at 8000 Hz: at {sample_rate} Hz" in note for note in result.notes)
    assert any(f"{limit} Hz" in note for note in result.notes)


def test_amount_scales_the_gains():
    whole = Stub().matcher().predict(noise(44_100), noise(44_100), 44_100)
    for amount in (0.0, 0.5, -1.0):
        part = Stub().matcher().predict(noise(44_100), noise(44_100), 44_100, amount=amount)
        np.testing.assert_allclose(part.params.gain_db, amount * whole.params.gain_db, atol=1e-3)
        np.testing.assert_array_equal(part.params.freq_hz, whole.params.freq_hz)
    with pytest.raises(AudioError, match="amount 3 is outside"):
        Stub().matcher().predict(noise(44_100), noise(44_100), 44_100, amount=3.0)


def test_unusable_arrays_name_which_one():
    good = noise(44_100)
    for bad, message in (
        (0 * good, "reference is silent"),
        (good[:1000], r"reference lasts 0\.02 s"),
        (good.T, "reference: shape .* transpose"),
    ):
        with pytest.raises(AudioError, match=message):
            Stub().matcher().predict(good, bad, 44_100)
    with pytest.raises(AudioError, match="input: sample rate 4000 Hz"):
        Stub().matcher().predict(good, good, 4000)


def test_a_reference_of_lower_rate_takes_no_treble_away():
    stub = Stub()
    result = stub.matcher().match(
        analysis.from_array(noise(48_000), 48_000, "a"),
        analysis.from_array(noise(16_000), 16_000, "b"),
    )
    for heard_T in stub.heard[0]:
        power_F = np.abs(np.fft.rfft(heard_T * np.hanning(len(heard_T)))) ** 2
        above = np.fft.rfftfreq(len(heard_T), 1 / 44_100) > 8200
        assert 10 * np.log10(power_F[above].mean() / power_F.mean()) < -80
    assert any("reference ends at 8000 Hz" in note for note in result.notes)
    assert result.top_hz == 7200


def test_a_matcher_is_loaded_from_weights(monkeypatch):
    """An untrained network stands for a trained one: every piece between card and settings."""
    import jax

    from eqst import card, config, observe, predictor

    small = config.default()
    small.model.hidden, small.model.channels = 16, 2
    trained = config.validate(small)
    bands = observe.heard(trained, np.ones(44_100, np.float32)).shape[-1:]
    params = {
        "network": predictor.init(trained, jax.random.key(0)),
        "normalisation": {"mean": np.zeros(bands), "scale": np.ones(bands)},
    }
    loaded = card.Loaded({"config": config.as_dict(trained), "commit": "none"}, params, 0)
    monkeypatch.setattr(card, "load_weights", lambda: loaded)
    matcher = match.Matcher.load()
    first = matcher.predict(noise(44_100), noise(44_100, seed=1), 44_100)
    assert first == matcher.predict(0.2 * noise(44_100), 5 * noise(44_100, seed=1), 44_100)
    table = eq.table(trained.eq_table)
    for got, inside in zip(first.params, eq.clamp(table, first.params), strict=True):
        np.testing.assert_allclose(got, inside, rtol=1e-3)


def test_a_workdir_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ValueError) as caught:
        match.Matcher.load(tmp_path)
    assert "\n" not in str(caught.value)


# ---- files


@pytest.fixture
def files(tmp_path):
    soundfile.write(tmp_path / "in.flac", noise(44_100), 44_100, subtype="PCM_24")
    soundfile.write(tmp_path / "ref.wav", noise(48_000, 3.0, 1, seed=1), 48_000)
    return tmp_path


def run(folder, stub=None, **kwargs):
    lines = []
    for key in ("output", "settings_file", "picture_file"):
        if key in kwargs:
            kwargs[key] = str(folder / kwargs[key])
    found = match.run(
        str(folder / "in.flac"),
        str(folder / "ref.wav"),
        load=(stub or Stub()).matcher,
        say=lines.append,
        **kwargs,
    )
    return found, "\n".join(lines)


def test_the_settings_file_says_exactly_what_was_rendered(files):
    found, said = run(files, output="out.wav", settings_file="s.json")
    loaded = settings.load(files / "s.json")
    assert loaded == found and found.preamp_db == 0
    dry = audio.read(files / "in.flac", dtype="float64")
    sos = biquad.sos(*loaded.params, kinds=eq.KINDS, sample_rate=loaded.sample_rate)
    wet_TC = audio.read(files / "out.wav", dtype="float64").samples_TC
    assert np.abs(wet_TC - render.render(dry.samples_TC, sos)).max() <= 2.0**-24 * (1 + 1e-9)
    assert audio.info(files / "out.wav").subtype == "PCM_24"
    assert "Mid1" in said and "700 Hz" in said and "-6.0 dB" in said
    assert "out.wav: WAV PCM_24, 44100 Hz, peak" in said


def test_a_loud_file_is_attenuated_and_the_settings_say_so(files):
    loud_TC = np.clip(noise(44_100, rms=0.6), -1, 1)
    soundfile.write(files / "in.flac", loud_TC, 44_100, subtype="PCM_24")
    found, said = run(files, output="out.wav", settings_file="s.json")
    assert found.preamp_db < -1 and "attenuated by" in said
    dry = audio.read(files / "in.flac", dtype="float64")
    sos = biquad.sos(*found.params, kinds=eq.KINDS, sample_rate=44_100)
    expected_TC = render.render(dry.samples_TC, sos) * 10 ** (found.preamp_db / 20)
    wet_TC = audio.read(files / "out.wav", dtype="float64").samples_TC
    assert np.abs(wet_TC - expected_TC).max() < 1e-4  # the preamp in the file has three digits
    assert 20 * np.log10(np.abs(wet_TC).max()) == pytest.approx(-0.1, abs=0.01)
    found, said = run(files, output="float.wav", clip="float")
    assert found.preamp_db == 0 and "over full scale" in said


def test_amount_zero_gives_the_file_back(files):
    run(files, output="out.flac", amount=0.0)
    before, after = (audio.read(files / name).samples_TC for name in ("in.flac", "out.flac"))
    np.testing.assert_array_equal(before, after)


def test_without_output_the_preamp_is_the_safe_one(files):
    found, said = run(files, settings_file="s.json")
    assert found.preamp_db == pytest.approx(-settings.peak_db(found), abs=0.001)
    assert sorted(path.name for path in files.iterdir()) == ["in.flac", "ref.wav", "s.json"]
    assert "preamp" in said


@pytest.mark.parametrize("rms", [0.05, 0.6])
def test_equalizer_apos_preamp_is_for_whatever_is_played(files, rms):
    """With an output, whose own preamp is another, as without."""
    loud_TC = np.clip(noise(44_100, rms=rms), -1, 1)
    soundfile.write(files / "in.flac", loud_TC, 44_100, subtype="PCM_24")
    safe, _ = run(files, settings_file="alone.txt")
    found, said = run(files, output="out.wav", settings_file="beside.txt")
    assert found.preamp_db != safe.preamp_db and safe.preamp_db < -4  # one file's, anything's
    assert (files / "alone.txt").read_text() == (files / "beside.txt").read_text()
    assert f"Preamp: {safe.preamp_db:.4f} dB" in (files / "beside.txt").read_text()
    assert f"beside.txt: preamp {safe.preamp_db:+.1f} dB, for whatever is played" in said


@pytest.mark.parametrize("extension", ["png", "svg", "pdf"])
def test_a_picture_is_drawn(files, extension):
    pytest.importorskip("matplotlib")
    run(files, picture_file=f"p.{extension}")
    data = (files / f"p.{extension}").read_bytes()
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert data.startswith(starts[extension]) and len(data) > 10_000


def test_file_names_are_drawn_as_they_are(files):
    """A dollar sign would start a formula in matplotlib."""
    pytest.importorskip("matplotlib")
    low = KNOWN._replace(freq_hz=np.minimum(KNOWN.freq_hz, 3600.0))
    scene = picture.Scene(
        settings=settings.from_params(low, 8000),
        input_T=noise(44_100)[:, 0],
        reference_T=noise(44_100, seed=1)[:, 0],
        matched_T=noise(44_100, seed=2)[:, 0],
        sample_rate=44_100,
        top_hz=3600.0,
        input_name="a$\\frac{$_é.flac",
        reference_name="b$.wav",
    )
    picture.draw(files / "p.svg", scene)
    assert "b$.wav" in (files / "p.svg").read_text(encoding="utf-8")


def test_spectra_in_the_picture_show_the_eq():
    """Matched minus input is the EQ's own curve, level aside."""
    dry_T = noise(44_100, 20.0, 1)[:, 0]
    sos = biquad.sos(*KNOWN, kinds=eq.KINDS, sample_rate=44_100)
    freq_hz, before = picture.spectrum_db(dry_T, 44_100, 16_000.0)
    _, after = picture.spectrum_db(render.render(dry_T, sos), 44_100, 16_000.0)
    difference = (after - before) - curve_db(KNOWN, 44_100, freq_hz)
    assert np.abs(difference - difference.mean()).max() < 0.3
    middle = (freq_hz >= 200) & (freq_hz <= 8000)
    assert abs(before[middle].mean()) < 1e-9 and abs(after[middle].mean()) < 1e-9
    assert freq_hz.max() <= 16_000


def test_no_matplotlib_is_a_note_and_no_failure(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, said = run(files, picture_file="p.png", settings_file="s.json")
    assert "no picture, for matplotlib is not installed: pip install 'eqst[report]'" in said
    assert (files / "s.json").exists() and not (files / "p.png").exists()


def test_mistakes_are_said_whatever_becomes_of_the_model(files):
    def load():
        raise AssertionError("loaded")

    (files / "old.wav").write_text("old")
    soundfile.write(files / "short.wav", noise(8000, 0.5), 8000)
    os.link(files / "ref.wav", files / "link.wav")
    good = {"input": "in.flac", "reference": "ref.wav"}
    cases = [
        ({"input": "none.wav"}, "none.wav' cannot be opened"),
        ({"reference": "short.wav"}, r"short.wav' lasts 0\.50 s"),
        ({"output": "old.wav"}, "exists already"),
        ({"output": "out.xyz"}, "unknown extension"),
        ({"output": "out.flac", "clip": "float"}, "no float samples"),
        ({"output": "missing/out.wav"}, "no folder"),
        ({"settings_file": "ref.wav", "overwrite": True}, "is an input itself"),
        ({"output": "link.wav", "overwrite": True}, "is an input itself"),
        ({"output": "a.wav", "settings_file": "a.wav"}, "are one file"),
        ({"settings_file": "a.csv"}, r"a\.csv': settings end in \.json, or for Equalizer APO in"),
        ({"settings_file": "a"}, "a': settings end in"),
        ({"picture_file": "a.jpg"}, "a picture ends in .png, .svg, .pdf"),
        ({"amount": 5.0}, "amount 5 is outside"),
    ]
    names = sorted(path.name for path in files.iterdir())
    for changes, message in cases:
        kwargs = {**good, **changes}
        for key in ("input", "reference", "output", "settings_file", "picture_file"):
            if key in kwargs:
                kwargs[key] = str(files / kwargs[key])
        with pytest.raises(AudioError, match=message) as caught:
            match.run(kwargs.pop("input"), kwargs.pop("reference"), load=load, **kwargs)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in files.iterdir()) == names


# ---- the command


def command(repo, *words):
    return subprocess.run(
        [sys.executable, "-m", "eqst.match", *words], cwd=repo, capture_output=True, text=True
    )


def test_help_fits_a_screen(repo):
    done = command(repo, "--help")
    assert len(done.stdout.splitlines()) <= 40 and "Traceback" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    for flag in "input reference output settings picture amount clip overwrite workdir".split():
        assert f"--{flag}" in done.stdout or f"--[no]{flag}" in done.stdout


def test_a_mistake_on_the_command_line_is_one_line(repo, files):
    done = command(repo, f"--input={files}/none.wav", f"--reference={files}/ref.wav")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("eqst.match: ") and len(done.stderr.splitlines()) == 1


LEAN = """
import sys
import time
import eqst.match
heavy = {"tensorflow", "orbax", "flax", "optax", "matplotlib", "soxr", "scipy.signal"}
print(sorted(heavy & set(sys.modules)))
"""


def test_starting_up_imports_little(repo):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAN], cwd=repo, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_json_is_what_the_design_promises(files):
    run(files, settings_file="s.json")
    content = json.loads((files / "s.json").read_text())
    assert set(content) == {"sample_rate", "preamp_db", "bands"}
    assert all(set(band) == {"type", "frequency_hz", "gain_db", "q"} for band in content["bands"])


STUBBED = """
import signal
# A shell that starts this in the background makes children deaf to SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys, time
import numpy as np
from eqst import command, eq, match, render
known = eq.EqParams(np.array([100., 700., 2500., 8000.]), np.full(4, 3.), np.ones(4))
match.Matcher.load = classmethod(lambda cls, workdir=None: cls(lambda a, b: known))
if sys.argv.pop() == "slow":
    render.flush_denormals = lambda state: time.sleep(5)  # once a block, of which none is awaited
command.start("eqst.match", match.define_flags, match.main)
"""


def stubbed(repo, files, speed):
    return subprocess.Popen(
        [sys.executable, "-c", STUBBED, f"--input={files}/in.flac", f"--reference={files}/ref.wav",
         f"--output={files}/out.wav", f"--settings={files}/s.json", "--amount=0.5", speed],
        cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.long
def test_the_command_does_it_all(repo, files):
    process = stubbed(repo, files, "fast")
    said, error = process.communicate(timeout=100)
    assert process.returncode == 0 and error == "", error
    assert settings.load(files / "s.json").params.gain_db.tolist() == [1.5] * 4
    assert audio.info(files / "out.wav").frames == audio.info(files / "in.flac").frames
    assert "+1.5 dB" in said and "out.wav" in said


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_leaves_nothing_half_written(repo, files, number):
    process = stubbed(repo, files, "slow")
    for _ in range(600):
        if any(path.name.endswith(".tmp.wav") for path in files.iterdir()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it never began to write")
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == (143 if number == signal.SIGTERM else 1)
    assert "Traceback" not in error
    assert sorted(path.name for path in files.iterdir()) == ["in.flac", "ref.wav"]
