"""Every way to call the commands wrongly: one clear line, an exit code, and nothing left behind.

Most cases run an entry point in this process, as `eqst.command.start` does; one of each command is
a real process.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import joblib
import numpy as np
import pytest
import soundfile
from absl import flags

from eqst import (
    accuracy,
    audio,
    benchmark,
    build,
    checkpoint,
    command,
    config,
    corpus,
    eq,
    evaluate,
    match,
    predictor,
    resident,
    speed,
    train,
    triples,
)
from eqst.audio import AudioError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ENTRIES = {
    "eqst.match": (match.define_flags, match.main),
    "eqst.train": (train.define_flags, train.main),
    "eqst.evaluate": (evaluate.define_flags, evaluate.main),
    "eqst.triples": (triples.define_flags, triples.main),
    "eqst.accuracy": (accuracy._define_flags, accuracy._body),
    "eqst.benchmark": (benchmark.define_flags, benchmark.main),
    "eqst.speed": (speed._define_flags, speed.main),
    "eqst.build": (build.define_flags, build.main),
}
# ml_collections 1.1 loads files by a call that Python 3.15 will drop; theirs to change.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")

RATE = 8000
TINY = {
    "data.sample_rate": RATE,
    "data.segment_seconds": (1.5,),
    "features.window": 512,
    "features.hop": 256,
    "features.high_hz": 4000.0,
    "features.kind": "pooled",
    "model.comparison": "direct",
    "model.head": "continuous",
    "model.hidden": 8,
    "model.blocks": 1,
    "data.rendering": "pooled",
    "train.batch_size": 4,
    "train.steps": 1,
    "evaluation.seconds": (1.5,),
    "evaluation.pairs": 4,
}


def _named(x: object) -> str:
    """A test's name of what it is given, the same in every process: without addresses."""
    return re.sub(r"[^\w.]+", " ", re.sub(r" at 0x\w+", "", str(x)))[:40]


KNOWN = eq.EqParams(np.array([100.0, 700.0, 2500.0, 8000.0]), np.full(4, 3.0), np.ones(4))


def sound(seconds=1.3, channels=1, rms=0.05, seed=0, rate=RATE):
    return rms * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))


def wav(path, samples, rate=RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype, format="WAV")


def content(folder: Path) -> dict[str, str]:
    """Everything in a folder: files by checksum, links by target, folders too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"-> {os.readlink(path)}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        found[str(path.relative_to(folder))] = what
    return found


def call(entry: str, words: list[str], monkeypatch) -> tuple[int, str]:
    """Runs an entry point as its `__main__` does: exit code, and what it would end stderr with."""
    monkeypatch.setattr(sys, "argv", [entry, *words])
    monkeypatch.setattr(command, "keep_compiled", lambda: None)  # it is for all of a process
    before, on_sigterm = set(flags.FLAGS), signal.getsignal(signal.SIGTERM)
    sys.modules.pop("config_config", None)  # ml_collections loads every file as this one
    try:
        # One process: joblib's workers take seconds to start.
        with joblib.parallel_config(backend="sequential"):
            command.start(entry, *ENTRIES[entry])
        return 0, ""
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0, ""
        return 1, f"{exit.code}\n"
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """A function (entry, words, expected): the command fails with one line that matches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(match.Matcher, "load", classmethod(_no_model))

    def check(entry: str, words: list[str], expected: str) -> str:
        before = content(tmp_path)
        code, message = call(entry, words, monkeypatch)
        said, error = capfd.readouterr()
        error += message
        assert code not in (0, None), said
        assert error.startswith(f"{entry}: ") and len(error.splitlines()) == 1, error
        assert len(error) < 600 and "Traceback" not in error + said
        assert re.search(expected, error), error
        assert content(tmp_path) == before
        return said

    return check


def _no_model(cls, workdir=None):
    raise AssertionError("the model was loaded before the mistake was seen")


def words_of(options: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


# ---- files that are no recordings


def _link(folder):
    (folder / "link.wav").symlink_to(folder / "in.wav")
    os.link(folder / "ref.wav", folder / "hard.wav")


def _truncated(folder):
    data = (folder / "in.wav").read_bytes()
    (folder / "bad.wav").write_bytes(data[: len(data) // 2])


def _random(folder, count=20_000):
    (folder / "bad.wav").write_bytes(np.random.default_rng(1).bytes(count))


def _random_header(folder):
    data = np.random.default_rng(2).bytes(5000)
    (folder / "bad.wav").write_bytes(b"RIFF" + data[:4] + b"WAVEfmt " + data)


def _with(value):
    def make(folder):
        samples = sound(channels=2)
        samples[5000, 1] = value
        wav(folder / "bad.wav", samples, subtype="FLOAT")

    return make


def _samples(make, **kwargs):
    return lambda folder: wav(folder / "bad.wav", make(), **kwargs)


def _cut_flac(folder):
    soundfile.write(folder / "whole.flac", sound(3.0), RATE)
    data = (folder / "whole.flac").read_bytes()
    (folder / "bad.wav").write_bytes(data[: len(data) // 2])


BAD_AUDIO = {
    "missing": (lambda folder: None, "'bad.wav' cannot be opened .*: check the path"),
    "empty": (lambda folder: (folder / "bad.wav").touch(), r"is empty \(0 bytes\): copy"),
    "truncated": (_truncated, "is cut short: its header says .* bytes .*: copy or export"),
    "cut flac": (_cut_flac, "cut short|damaged"),
    "text": (lambda folder: (folder / "bad.wav").write_text("no audio" * 99), "convert it to WAV"),
    "random bytes": (_random, "is not audio .*: convert it to WAV"),
    "random header": (_random_header, "is not audio|holds no samples|sample rate|cut short"),
    "riff alone": (lambda folder: (folder / "bad.wav").write_bytes(b"RIFF"), "is not audio"),
    "nan": (_with(np.nan), r"samples that are not numbers \(NaN .* at 0\.625 s\): repair"),
    "infinite": (_with(np.inf), r"samples that are not numbers .* at 0\.625 s\): repair"),
    "silence": (_samples(lambda: np.zeros((10_000, 1))), "is silent .*: give a recording"),
    "offset": (_samples(lambda: np.full((12_000, 2), 0.5)), "constant offset .*: give a recording"),
    "quiet": (_samples(lambda: sound(rms=5e-4), subtype="FLOAT"), "too quiet: .* below -60"),
    "10 samples": (_samples(lambda: sound()[:10]), "lasts 0.00 s: at least 1 s"),
    "no samples": (_samples(lambda: sound()[:0]), "holds no samples"),
    "3 kHz": (_samples(sound, rate=3000), "3000 Hz, outside 8000 .. 192000 Hz: resample"),
    "1 MHz": (_samples(sound, rate=1_000_000), "1000000 Hz, outside 8000 .. 192000 Hz"),
    "folder": (lambda folder: (folder / "bad.wav").mkdir(), "is a folder: name one audio file"),
    "fifo": (lambda folder: os.mkfifo(folder / "bad.wav"), "not a regular file: save"),
    "dangling": (lambda folder: (folder / "bad.wav").symlink_to("gone"), "cannot be opened"),
}


NO_FILE = ("missing", "folder", "dangling")


@pytest.fixture
def here(tmp_path):
    wav(tmp_path / "in.wav", sound(seed=1, channels=2))
    wav(tmp_path / "ref.wav", sound(seed=2))
    return tmp_path


@pytest.mark.parametrize("case", BAD_AUDIO)
def test_match_refuses_what_is_no_recording(case, refused, here):
    make, expected = BAD_AUDIO[case]
    make(here)
    role = "reference" if len(case) % 2 else "input"
    options = {"input": "in.wav", "reference": "ref.wav", "output": "out.wav", "settings": "s.json"}
    refused("eqst.match", words_of(options | {role: "bad.wav"}), expected)


MATCH = [
    ({"input": ""}, "--input is empty: give it a value"),
    ({"output": ""}, "--output is empty: give it a value, or leave it out"),
    ({"input": None}, "--input missing: give --input=.."),
    ({"input": None, "reference": None}, "--input and --reference missing: give --input=.. "),
    ({"input": "in.wav/inside.wav"}, "cannot be opened .Not a directory.: check the path"),
    ({"input": "/dev/null"}, "not a regular file"),
    ({"input": "x" * 300}, "cannot be opened .File name too long"),
    ({"output": "old.wav"}, r"'old.wav' exists already: .*\(--overwrite\)"),
    ({"settings": "old.wav"}, r"'old.wav' exists already: .*\(--overwrite\)"),
    ({"picture": "old.png"}, r"'old.png' exists already: .*\(--overwrite\)"),
    ({"output": "in.wav", "overwrite": "true"}, "'in.wav' is an input itself: name another"),
    ({"output": "ref.wav", "overwrite": "true"}, "'ref.wav' is an input itself: name another"),
    ({"output": "link.wav", "overwrite": "true"}, "'link.wav' is an input itself"),
    ({"output": "hard.wav", "overwrite": "true"}, "'hard.wav' is an input itself"),
    ({"settings": "link.wav", "overwrite": "true"}, "'link.wav' is an input itself"),
    ({"settings": "out.wav"}, "two of out.wav, out.wav are one file: name them apart"),
    ({"output": "a/b/out.wav"}, "no folder .*: create it"),
    ({"output": "in.wav/out.wav"}, "no folder .*: create it"),
    ({"output": "."}, "is a folder: name a file"),
    ({"output": "folder.wav"}, "is a folder: name a file"),
    ({"output": "/dev/full"}, "not a regular file: name a file"),
    ({"output": "x" * 300 + ".wav"}, "cannot be written .File name too long.: name another"),
    ({"output": "out.xyz"}, "unknown extension '.xyz': end it in .wav"),
    ({"output": "out"}, "unknown extension '': end it in .wav"),
    ({"output": "out.flac", "clip": "float"}, "FLAC has no float samples: name a .wav"),
    ({"picture": "out.jpg"}, "a picture ends in .png"),
    ({"clip": "loud"}, "--clip=loud: value should be one of <preamp|float>"),
    ({"amount": "2.5"}, r"--amount=2.5: give a number in the range \[-2.0, 2.0\]"),
    ({"amount": "nan"}, "amount nan is outside -2 .. 2"),
    ({"amount": "half"}, "--amount=half: give a number in the range"),
    ({"amount": ""}, "--amount=: give a number in the range"),
    ({"overwrite": "perhaps"}, "--overwrite=perhaps: give true or false"),
    ({"inptu": "in.wav"}, "unknown option --inptu: did you mean --input"),
]


@pytest.mark.parametrize(("changes", "expected"), MATCH, ids=_named)
def test_match_refuses_options(changes, expected, refused, here):
    _link(here)
    (here / "old.wav").write_text("old")
    (here / "old.png").write_text("old")
    (here / "folder.wav").mkdir()
    options = {"input": "in.wav", "reference": "ref.wav", "output": "out.wav"}
    refused("eqst.match", words_of(options | changes), expected)


@pytest.mark.parametrize(
    "words", [["in.wav", "ref.wav"], ["--input=in.wav", "--reference=ref.wav", "out.wav"],
              ["--overwrite", "in.wav"], ["--input", "in.wav", "ref.wav"]],
)  # fmt: skip
def test_a_positional_argument_is_named(words, refused, here):
    refused("eqst.match", words, "unexpected argument '(in|ref|out).wav': options look like --name")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder no one can write in")
def test_a_folder_that_takes_no_files(refused, here):
    # Root may write anywhere but there.
    options = {"input": "in.wav", "reference": "ref.wav", "output": "out.wav"}
    for name, file in (("output", "x.wav"), ("settings", "x.json"), ("picture", "x.png")):
        changes = {name: f"/proc/self/{file}"}
        refused("eqst.match", words_of(options | changes), "does not take files .*: choose another")


# ---- workdirs that hold no run, or another one


@pytest.fixture(scope="module")
def tiny(configure, tmp_path_factory) -> config.Config:
    """Settings of a run on a folder of its own."""
    folder = tmp_path_factory.mktemp("home")
    _talkers(folder)
    changes = {"data.sources": (f"folder:{folder / 'data'}",), "data.cache_dir": f"{folder / 'c'}"}
    return configure(TINY | changes)


def write_run(workdir: Path, made: config.Config, extra: dict | None = None, **changes) -> None:
    """What training leaves behind, but the training; with more settings and other arrays."""
    network = predictor.init(made, jax.random.key(0))
    bands = network["predictor"]["enter"]["kernel"].shape[0] // 18
    facts = {"mean": np.zeros((10, bands)), "scale": np.ones((10, bands))}
    facts = {name: x.astype(np.float32) for name, x in facts.items()}
    tree = {"network": network, "normalisation": facts} | changes
    card = {"config": config.as_dict(made) | (extra or {}), "normalisation": {}, "band_table": {}}
    checkpoint.write_card(workdir, card)
    with checkpoint.Checkpoints(workdir) as saved:
        saved.save_best(1, tree, 1.0)


@pytest.fixture(scope="module")
def runs(tiny, configure, tmp_path_factory) -> Path:
    """A good run, and a folder for each way of being none."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "good", tiny)
    bad = predictor.init(tiny, jax.random.key(0))
    bad["predictor"]["head"]["bias"] = bad["predictor"]["head"]["bias"].at[0].set(np.nan)
    write_run(folder / "nan", tiny, network=bad)
    good_card = json.loads((folder / "good" / "config.json").read_text())
    write_run(folder / "other", configure(TINY | {"model.hidden": 12}))
    shutil.copy(folder / "good" / "config.json", folder / "other" / "config.json")
    write_run(folder / "unknown", tiny, {"colour": "red"})
    write_run(folder / "homeless", configure(TINY | {"data.sources": ("folder:/gone",)}))
    write_run(folder / "strange", tiny, network={"weights": np.ones(3, np.float32)})
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    for name, card in {
        "words": "hello",
        "list": "[1, 2]",
        "foreign": json.dumps({"model": "bert"}),
        "newer": json.dumps(good_card | {"format_version": 99}),
        "keyless": json.dumps({key: good_card[key] for key in ("format_version", "config")}),
        "nothing": json.dumps(good_card),
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(card)
    shutil.copytree(folder / "good", folder / "damaged")
    (step,) = (folder / "damaged" / "checkpoints" / "best").iterdir()
    largest = max((x for x in step.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-20])
    return folder


WORKDIRS = {
    "absent": "there is no folder .*absent: give the --workdir",
    "file": "there is no folder .*file: give the --workdir",
    "empty": "has no config.json, so it is no run of EQST: give",
    "words": "is not JSON .*: restore it",
    "list": "names no format_version: EQST did not write it",
    "foreign": "names no format_version: EQST did not write it",
    "newer": "format_version 99, this eqst reads 1: use a newer eqst",
    "keyless": r"lacks \['normalisation', 'band_table'\]: restore",
    "unknown": "no setting 'colour'; there are seed",
    "nothing": "has no best checkpoint: let it train for longer",
    "damaged": "no checkpoint in .* can be read .*: restore it from a copy",
    "other": "its checkpoint is another model's: network/predictor/.*: take the",
    "strange": "its checkpoint is another model's: network/.* absent",
    "nan": "a parameter is not finite: take another run",
}


@pytest.mark.parametrize("name", WORKDIRS)
@pytest.mark.parametrize("entry", ["eqst.match", "eqst.evaluate", "eqst.triples"])
def test_a_workdir_without_a_run(entry, name, refused, here, runs, monkeypatch):
    monkeypatch.undo()  # the real model is asked for
    monkeypatch.chdir(here)
    (here / "data").mkdir()
    for kind in ("input", "reference", "estimated"):
        shutil.copy(here / "ref.wav", here / "data" / f"a_{kind}.wav")
    options = {
        "eqst.match": {"input": "in.wav", "reference": "ref.wav", "settings": "s.json"},
        "eqst.evaluate": {"output": "out"},
        "eqst.triples": {"data": "data", "output": "out"},
    }[entry]
    refused(entry, words_of(options | {"workdir": runs / name}), WORKDIRS[name])


# ---- arrays


ARRAYS = {
    "integers": (np.ones((9000, 1), np.int16), RATE, "dtype int16: give floats"),
    "complex": (np.ones(9000, complex), RATE, "dtype complex128: give floats"),
    "objects": (np.array([None] * 9000), RATE, "dtype object: give floats"),
    "a number": (np.float64(1.0), RATE, r"shape \(\): give \[samples\]"),
    "three axes": (np.ones((9000, 2, 2)), RATE, "give .samples. or .samples, channels."),
    "nothing": (np.ones(0), RATE, r"shape \(0,\) holds no samples"),
    "no channels": (np.ones((9000, 0)), RATE, r"shape \(9000, 0\) holds no samples"),
    "transposed": (sound(channels=2).T, RATE, "more channels than samples: transpose"),
    "nan": (np.where(np.arange(9000) == 80, np.nan, 0.1), RATE, "not numbers .* at 0.010 s"),
    "infinite": (np.where(np.arange(9000) == 80, -np.inf, 0.1), RATE, "not numbers .* at 0.010 s"),
    "10 samples": (sound()[:10], RATE, "lasts 0.00 s: at least 1 s"),
    "silence": (np.zeros(9000), RATE, "is silent"),
    "offset": (np.full(9000, -0.25), RATE, "constant offset"),
    "quiet": (sound(rms=5e-4), RATE, "too quiet"),
    "3 kHz": (sound(), 3000, "3000 Hz is outside 8000 .. 192000 Hz: resample"),
    "no rate": (sound(), None, "sample rate None: give a whole number"),
    "rate in words": (sound(), "44.1k", "sample rate '44.1k': give a whole number"),
    "rate with a fraction": (sound(), 8000.5, "sample rate 8000.5: give a whole number"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_predict_refuses_arrays(case):
    samples, rate, expected = ARRAYS[case]
    matcher = match.Matcher(lambda a, b: pytest.fail("the model was asked"))
    with pytest.raises(AudioError, match=expected) as caught:
        matcher.predict(samples, sound(), rate)
    assert str(caught.value).startswith("input") and "\n" not in str(caught.value)
    if rate == RATE:
        with pytest.raises(AudioError, match=expected) as caught:
            matcher.predict(sound(), samples, rate)
        assert str(caught.value).startswith("reference")


# ---- training


def _talkers(folder, count=4, seconds=4.0):
    for number in range(count):
        wav(folder / "data" / f"t{number}" / "a.wav", sound(seconds, seed=number))


def _manifest(text):
    def make(folder):
        _talkers(folder)
        rows = text if isinstance(text, bytes) else text.encode()
        (folder / "m.csv").write_bytes(rows)

    return make


def _one_talker(folder):
    wav(folder / "data" / "only" / "a.wav", sound(4.0))


def _quiet_talkers(folder):
    for number in range(3):
        wav(folder / "data" / f"t{number}" / "a.wav", 0 * sound(4.0))


def _broken_talkers(folder):
    for number in range(3):
        (folder / "data" / f"t{number}").mkdir(parents=True)
        (folder / "data" / f"t{number}" / "a.wav").write_text("no audio")


def _short_talkers(folder):
    _talkers(folder, seconds=2.9)


def _text_files(folder):
    (folder / "data").mkdir()
    (folder / "data" / "notes.txt").write_text("no audio here")


def _cache_in_the_way(folder):
    _talkers(folder)
    (folder / "file").touch()


LISTING = "path,split\n" + "".join(f"data/t{i}/a.wav,train\n" for i in range(4))
FOLDER = {"data.sources": "folder:data"}
MANIFEST = FOLDER | {"data.manifest": "m.csv"}
TRAIN_DATA = {
    "no folder": (None, FOLDER, "data is not a folder; give a folder of audio"),
    "a file": (lambda folder: (folder / "data").touch(), FOLDER, "data is not a folder; give"),
    "no audio": (_text_files, FOLDER, "data: no audio file .* in it; give another"),
    "one talker": (_one_talker, FOLDER, "one talker only .*training needs 2 or more"),
    "silence": (_quiet_talkers, FOLDER, "no usable audio; t0: .*silent"),
    "broken": (_broken_talkers, FOLDER, "no usable audio; t0: .*convert it to WAV"),
    "short": (_short_talkers, FOLDER, r"no pair of 1.5 s .*t\d: no two separate segments"),
    "no source": (None, {"data.sources": "mp3s"}, "'mp3s' is not synthetic, folder:PATH"),
    "folds": (_talkers, FOLDER | {"data.folds": 9}, "9 folds of 3 train talkers; set data.folds"),
    "cache": (_cache_in_the_way, FOLDER | {"data.cache_dir": "file"}, "set --config.data.cache"),
    "no manifest": (_talkers, MANIFEST, "m.csv: no such manifest; give"),
    "manifest empty": (_manifest(""), MANIFEST, "m.csv: no column path, split; add"),
    "manifest column": (_manifest("path,talker\na,b\n"), MANIFEST, "no column split; add it"),
    "manifest row": (_manifest(LISTING + "data\n"), MANIFEST, "line 6 has no split; fill"),
    "manifest bytes": (_manifest(b"path,split\n\xff\xfe\x00"), MANIFEST, "not a CSV in UTF-8"),
    "manifest alien": (_manifest("path,split\nx.wav,train\n"), MANIFEST, "no audio .* m.csv lists"),
    "manifest split": (
        _manifest(LISTING.replace("train", "training")),
        MANIFEST,
        "m.csv: no file of data has the split train or dev .its splits: training.: training needs",
    ),
    "manifest licence": (
        _manifest(LISTING), MANIFEST | {"data.permissive_only": "true"}, "no column permissive",
    ),
}  # fmt: skip


@pytest.fixture
def training(refused, tmp_path_factory, monkeypatch):
    """A function (settings, expected, other options): eqst.train is refused before it trains."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(resident, "load", lambda *_: pytest.fail("training has begun"))

    def check(settings: dict, expected: str, **options) -> str:
        named = {f"config.{key}": value for key, value in settings.items()}
        usual = {f"config.{key}": value for key, value in TINY.items()}
        usual["config.data.cache_dir"] = cache
        first = {"config": CONFIGS / "pooled.py", "workdir": "run"} | options
        words = words_of(first | usual | named)
        said = refused("eqst.train", words, expected)
        assert all((store / "index.json").is_file() for store in cache.iterdir())  # whole or none
        return said

    return check


@pytest.mark.parametrize("case", TRAIN_DATA)
def test_training_refuses_sources(case, training, tmp_path):
    make, settings, expected = TRAIN_DATA[case]
    if make:
        make(tmp_path)
    weights = {"data.source_weights": 1.0}
    training(weights | settings, expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"trian.steps": 5}, "unknown setting 'trian.steps': the nearest are train.steps"),
        ({"train.stpes": 5}, "unknown setting 'train.stpes': the nearest are train.steps"),
        ({"steps": 5}, "unknown setting 'steps': the nearest are train.steps"),
        ({"batch_size": 5}, "the nearest are train.batch_size"),
        ({"lr": 5}, "unknown setting 'lr': the nearest are"),
        ({"": 5}, "unknown setting '': the nearest are"),
        ({"train": 5}, "--config.train is a group of settings: set one of it"),
        ({"train.steps": "many"}, "--config.train.steps=many: give an integer"),
        ({"train.steps": "5.5"}, "--config.train.steps=5.5: give an integer"),
        ({"train.steps": ""}, "--config.train.steps=: give an integer"),
        ({"train.steps": 0}, "train.steps is 0; it lies between 1 and 2147483647"),
        ({"train.learning_rate": "fast"}, "--config.train.learning_rate=fast: give a number"),
        ({"train.learning_rate": "nan"}, "train.learning_rate is nan; it takes a finite number"),
        ({"train.learning_rate": "1e400"}, "train.learning_rate is inf; it takes a finite"),
        ({"model.bfloat16": "perhaps"}, "--config.model.bfloat16=perhaps: give true or false"),
        ({"model.head": "best"}, "model.head is 'best'; choose grid or continuous"),
        ({"data.segment_seconds": "three"}, "data.segment_seconds is 'three'; it takes a float"),
        ({"data.segment_seconds": "(0.1,)"}, "data.segment_seconds is 0.1; it lies between"),
        ({"features.hop": 100}, "features.hop is 100; it has to divide features.window"),
        ({"features.window": 16384}, "windows of 65536 samples do not fit a segment of 12000"),
        ({"train.devices": 99}, "99 devices asked for, 1 to 4 are there"),
        ({"train.init_from": "nowhere"}, "there is no folder nowhere: give the --workdir"),
    ],
    ids=str,
)  # fmt: skip
def test_training_refuses_settings(settings, expected, training):
    training(settings, expected)


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [
        ("file", "Not a directory.*: check the path|cannot be written"),
        ("file/run", "Not a directory.*: check the path|cannot be written"),
        ("/proc/self/run", "/proc/self/run.*: check the path|cannot be written"),
        ("", "--workdir is empty: give it a value"),
        (None, "--workdir missing: give --workdir=.."),
        ("words", "words/config.json is not JSON .*: restore it"),
        ("foreign", "foreign/config.json names no format_version: EQST did not write it"),
        ("good", "good holds a run with other settings .*data.sources.*: take|choose another"),
        ("taken", "taken/checkpoints is in use by .*: wait for it, stop it, or choose"),
    ],
    ids=str,
)
def test_training_refuses_workdirs(workdir, expected, training, runs, tmp_path):
    _talkers(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    if workdir in ("words", "foreign", "good"):
        shutil.copytree(runs / workdir, tmp_path / workdir)
    if workdir == "taken":
        holder = hold_in_a_process(tmp_path / "taken" / "checkpoints")
    training(FOLDER, expected, workdir=workdir)
    if workdir == "taken":
        holder.communicate("go")


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""


def hold_in_a_process(checkpoints: Path) -> subprocess.Popen:
    """Another process that has the lock of a run, as one that trains has."""
    checkpoints.mkdir(parents=True)
    words = [sys.executable, "-c", HOLD, str(checkpoints / "lock")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def _config_file(text):
    def make(folder):
        (folder / "c.py").write_text(text)
        return "c.py"

    return make


BASE = "from eqst import config\ndef get_config():\n    made = config.default()\n"
CONFIG_FILES = {
    "missing": (lambda folder: "c.py", "--config=c.py is not there: check the path"),
    "empty path": (lambda folder: "", "--config is empty: name a config file"),
    "a folder": (lambda folder: ".", "--config=. is a folder: name a config file in it"),
    "no python": (_config_file("a b c"), "--config=c.py fails .SyntaxError: invalid syntax"),
    "bytes": (
        lambda folder: (folder / "c.py").write_bytes(b"\0\xff\0" * 99) and "c.py",
        "--config=c.py fails ",
    ),
    "empty file": (_config_file(""), "--config=c.py has no function get_config: see configs/"),
    "raises": (_config_file("1 / 0"), "--config=c.py fails .ZeroDivisionError"),
    "gives nothing": (_config_file("def get_config(): pass"), "c.py: get_config.. gives a None"),
    "gives a dict": (_config_file("def get_config(): return {}"), "gives a dict, not a ConfigDict"),
    "mistyped": (
        _config_file(f"{BASE}    made.train.stpes = 3\n"),
        "c.py fails .AttributeError: .*stpes.*steps",
    ),
    "no argument": (lambda folder: f"{CONFIGS / 'pooled.py'}:large", "pooled.py:large fails"),
    "part": (
        _config_file("from ml_collections import ConfigDict as D\ndef get_config(): return D()"),
        "setting seed is missing|'data'",
    ),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_training_refuses_config_files(case, training, tmp_path):
    make, expected = CONFIG_FILES[case]
    training({}, expected, config=make(tmp_path))


def test_training_says_who_is_left_out_and_why(training, tmp_path, monkeypatch):
    _talkers(tmp_path, count=6)
    wav(tmp_path / "data" / "brief" / "a.wav", sound(2.9, seed=7))
    wav(tmp_path / "data" / "still" / "a.wav", 0 * sound(4.0))
    wav(tmp_path / "data" / "offset" / "a.wav", 0 * sound(4.0) + 0.5)
    (tmp_path / "data" / "t1" / "b.wav").write_text("no audio")

    def enough(*_):
        raise ValueError("recordings were read")

    monkeypatch.setattr(resident, "load", enough)
    settings = FOLDER | {"data.source_weights": 1.0, "data.valid_share": 0.0, "data.dev_share": 0.0}
    for _ in range(2):  # the second time from the cache, which says it again
        said = training(settings, "recordings were read")
        left_out = [line for line in said.splitlines() if line.startswith("left out")]
        for expected in (
            r"folder/brief: no two separate segments of 1.5 s at -35 LUFS in 2.9 s",
            r"still: .*silent",
            r"offset: a constant offset",
            r"b.wav' is not audio",
        ):
            assert any(re.search(expected, line) for line in left_out), said


# ---- the commands that write folders


def _results(folder, name):
    (folder / "out").mkdir()
    (folder / "out" / name).write_text("old")


def _out_is_a_file(folder):
    (folder / "out").write_text("old")


def _short_data(folder):
    wav(folder / "data" / "a.wav", sound(2.0))


FOLDERS = [
    ({"output": ""}, None, "--output is empty: give it a value"),
    ({"output": None}, None, "--output missing: give --output=.."),
    ({"output": "out"}, _out_is_a_file, "'out' is a file: name a folder"),
    (
        {"output": "out/a/b"},
        _out_is_a_file,
        "'out/a/b' cannot hold results .Not a directory.: name",
    ),
    ({"output": "/proc/self/x"}, None, "'/proc/self/x' cannot hold results .*: name another"),
    ({"output": "x" * 300}, None, "cannot hold results .File name too long.: name another"),
    ({"overwrite": "perhaps"}, None, "--overwrite=perhaps: give true or false"),
    ({"nonsense": 3}, None, "unknown option --nonsense: .*--help"),
]
OWN = {
    "eqst.evaluate": [
        ({}, lambda folder: _results(folder, "results.json"), r"results.json' exists .*overwrite"),
        ({}, lambda folder: _results(folder, "table.txt"), r"table.txt' exists already: .*overwri"),
        ({"workdir": None}, None, "--workdir missing: give --workdir=.."),
        ({"workdir": ""}, None, "--workdir is empty: give it a value"),
        ({"pairs": -5}, None, "evaluation.pairs is -5; it lies between 4 and 1000000"),
        ({"pairs": "few"}, None, "--pairs=few: give an integer"),
        ({"seconds": "three"}, None, "--seconds=three: give numbers, as in --seconds=3,10"),
        ({"seconds": "-3"}, None, "evaluation.seconds is -3.0; it lies between 0.5 and 60"),
        ({"seconds": "nan"}, None, "evaluation.seconds is nan; it takes a finite number"),
        ({"seconds": ""}, None, "--seconds is empty: give it a value"),
        ({"seconds": "3,,10"}, None, "--seconds=3,,10: give numbers"),
        ({"split": "train"}, None, "--split=train: choose dev or valid"),
        ({"baselines": "some"}, None, "--baselines=some: give true or false"),
        ({"data": "nowhere"}, None, "nowhere is not a folder; give a folder"),
        ({"data": ""}, None, "--data is empty: give it a value, or leave it out"),
        ({"data": "data"}, _text_files, "data: no audio file .* in it; give another"),
        ({"data": "data"}, _quiet_talkers, "no usable audio; .*silent"),
        ({"data": "data"}, _short_data, "no pair of 1.5 s can be made .*: shorten --seconds"),
        ({"data": "data", "manifest": "m.csv"}, _talkers, "m.csv: no such manifest; give"),
        ({"data": "data", "manifest": "m.csv"}, _manifest(LISTING),
         "no talker in split 'dev' of 4 talkers .all are train."),
        ({"workdir": "homeless"}, None, "gone is not a folder; give a folder"),
    ],
    "eqst.triples": [
        ({}, lambda folder: _results(folder, "triples.json"), "triples.json' exists already: "),
        ({}, lambda folder: _results(folder, "triples.txt"), "triples.txt' exists already: "),
        ({"data": None}, None, "--data missing: give --data=.."),
        ({"data": ""}, None, "--data is empty"),
        ({"data": "nowhere"}, None, "--data=nowhere is not a folder: give one"),
        ({"data": "data"}, lambda folder: (folder / "data").touch(), "--data=data is not a folder"),
        ({"data": "data"}, _text_files, "data: no NAME_input, .* files in it: name them so"),
    ],
    "eqst.accuracy": [
        ({}, lambda folder: _results(folder, "accuracy.json"), "accuracy.json' exists already: "),
        ({"bands": 0}, None, "--bands=0: give a positive integer"),
        ({"bands": "all"}, None, "--bands=all: give a positive integer"),
        ({"seed": -1}, None, "--seed=-1: give a non-negative integer"),
        ({"section": "beauty"}, None, "--section=beauty: value should be one of <float32_resp"),
    ],
    "eqst.benchmark": [
        ({"predictor": None}, None, "nothing to do: give --predictor, --program"),
        ({"predictor": ""}, None, "--predictor is empty: give it a value"),
        ({"predictor": "magic"}, None, "--predictor=magic is neither a run.s folder nor one of"),
        ({"predictor": "."}, None, "no checkpoint|not a run|holds no run|config.json"),
        ({"program": "true {input}"}, None, "say where the answer goes, as {output}.json"),
        ({"program": "true {output}.json {output}.wav"}, None, "say where the answer goes, as"),
        ({"program": "true {inputs} {output}.json"}, None, "{inputs} is no part of it: there are"),
        ({"program": "'true"}, None, "--program='true: No closing quotation"),
        ({"program": "no/such/tool {output}.wav"}, None, "'no/such/tool' is no program here"),
        ({"program": "true {output}.wav", "name": "ridge"}, None, "would be called 'ridge'"),
        ({"timeout": 0}, None, "--timeout=0: give number >= 0.01"),
        ({"tasks": "speech"}, None, "none is 'speech': .* .--data=FOLDER brings speech and music."),
        ({"tasks": "synthetic-4s"}, None, "none is 'synthetic-4s': the nearest are synthetic-"),
        ({"pairs": 1}, None, r"--pairs=1: give an integer in the range \[2, 200\]"),
        ({"data": "nowhere"}, None, "No such file.*: --data names the folder that holds spee"),
        ({"manifest": "m.json"}, None, "'m.json' cannot be read .No such file.*: check the path"),
        ({"manifest": "m.json"}, lambda folder: (folder / "m.json").touch(), "is no manifest .*"),
        ({"merge": "b.json"}, None, "'b.json' cannot be read .No such file.*: check the path"),
        ({"merge": "b.json"}, lambda folder: (folder / "b.json").write_text("{}"), "no leaderboar"),
        ({"compare": "a"}, None, "--compare=a: name two methods"),
        ({"compare": "a,b"}, None, "no method 'a' in the leaderboard .there: none."),
        ({}, lambda folder: _results(folder, "leaderboard.json"), "is no leaderboard .*: move it"),
        ({"new_manifest": "m.json"}, None, "--new_manifest needs --list=CSV and --data=FOLDER"),
        ({"new_manifest": "m.json", "list": "l.csv", "data": "."}, None, "'l.csv': No such file"),
    ],
    "eqst.speed": [
        ({}, lambda folder: _results(folder, "speed.json"), "speed.json' exists already: "),
        ({}, lambda folder: _results(folder, "speed.png"), "speed.png' exists already: "),
        ({"rounds": 1}, None, "--rounds=1: give integer >= 2"),
        ({"section": "beauty"}, None, "--section=beauty: value should be one of <responses"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "changes", "make", "expected"),
    [(entry, *case) for entry in OWN for case in FOLDERS + OWN[entry]],
    ids=_named,
)
def test_commands_that_write_folders(entry, changes, make, expected, refused, runs, tmp_path):
    if make:
        make(tmp_path)
    options = {
        "eqst.evaluate": {"workdir": "good", "output": "out"},
        "eqst.triples": {"data": ".", "output": "out"},
        "eqst.accuracy": {"output": "out"},
        "eqst.benchmark": {"output": "out", "predictor": "do_nothing"},
        "eqst.speed": {"output": "out"},
    }[entry] | changes
    if options.get("workdir"):
        options["workdir"] = runs / options["workdir"]
    refused(entry, words_of(options), expected)


@pytest.mark.parametrize("case", [x for x in BAD_AUDIO if x not in NO_FILE])
def test_triples_refuse_what_is_no_recording(case, refused, here, monkeypatch):
    load = classmethod(lambda cls, workdir=None: cls(lambda a, b: KNOWN))
    monkeypatch.setattr(match.Matcher, "load", load)
    make, expected = BAD_AUDIO[case]
    make(here)
    for kind in ("input", "reference", "estimated"):
        os.link(here / "ref.wav", here / f"a_{kind}.wav")
    bad = here / f"a_{('input', 'reference', 'estimated')[len(case) % 3]}.wav"
    bad.unlink()
    (here / "bad.wav").rename(bad)
    expected = expected.replace("bad.wav", bad.name)
    refused("eqst.triples", ["--data=.", "--output=out"], expected)


# ---- as processes


@pytest.mark.parametrize("entry", ENTRIES)
def test_each_command_as_a_process(entry, runs, repo, tmp_path):
    options = {
        "eqst.match": {"input": "none.wav", "reference": "none.wav", "output": "out.wav"},
        "eqst.train": {
            "config": CONFIGS / "smoke.py", "workdir": "run", "config.train.steps": -3,
        },
        "eqst.evaluate": {"workdir": runs / "foreign", "output": "out"},
        "eqst.triples": {"data": "nowhere", "output": "out"},
        "eqst.accuracy": {"output": "out", "bands": "none"},
        "eqst.benchmark": {"output": "out", "pairs": "none"},
        "eqst.speed": {"output": "out", "rounds": "none"},
        "eqst.build": {"data": "nowhere", "output": "out", "name": "set"},
    }[entry]  # fmt: skip
    path = {"PYTHONPATH": os.pathsep.join([str(repo), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", entry, *words_of(options)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | path,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{entry}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_fits_a_screen_and_is_no_error(entry, monkeypatch, capsys):
    for word in ("--help", "-h", "--helpfull"):
        assert call(entry, [word], monkeypatch) == (0, "")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"python -m {entry}" and 8 < len(lines) <= 40
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("a\nb\\nc\x1b[31m"), r"eqst.x: a b c\x1b[31m"),
        (
            PermissionError(13, "Permission denied", "/a b"),
            "eqst.x: '/a b': Permission denied: check the path and its permissions",
        ),
        (
            OSError(28, "No space left on device", "/a"),
            "eqst.x: '/a': No space left on device: make room",
        ),
        (OSError(), "eqst.x: OSError"),
        (ModuleNotFoundError("No module named 'tfds'"), "eqst.x: No module named 'tfds'"),
        (FloatingPointError("loss is nan"), "eqst.x: loss is nan"),
        (MemoryError(), "eqst.x: out of memory, make batches smaller (MemoryError)"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
            "eqst.x: out of memory, make batches smaller (RESOURCE_EXHAUSTED: 9 GB)",
        ),
        (KeyboardInterrupt(), "eqst.x: interrupted"),
        (ValueError(f"first {'x' * 9999} last"), f"eqst.x: first {'x' * 274} .. {'x' * 275} last"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_a_command_raises_is_one_line(error, expected, monkeypatch):
    def body():
        raise error

    monkeypatch.setitem(ENTRIES, "eqst.x", (lambda: None, body))
    assert call("eqst.x", [], monkeypatch) == (1, f"{expected}\n")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    for error in (KeyError("x"), RuntimeError("INTERNAL"), AssertionError(), TypeError()):

        def body(error=error):
            raise error

        monkeypatch.setitem(ENTRIES, "eqst.x", (lambda: None, body))
        with pytest.raises(type(error)):
            call("eqst.x", [], monkeypatch)


# ---- what looks bad and is good


@pytest.fixture
def matched(tmp_path, monkeypatch, capfd):
    """A function (options): eqst.match succeeds, with a model that always finds `KNOWN`."""
    monkeypatch.chdir(tmp_path)
    load = classmethod(lambda cls, workdir=None: cls(lambda a, b: KNOWN))
    monkeypatch.setattr(match.Matcher, "load", load)

    def check(**options) -> audio.AudioInfo:
        named = {"input": "in.wav", "reference": "ref.wav", "output": "out.wav"} | options
        code, message = call("eqst.match", words_of(named), monkeypatch)
        assert (code, message) == (0, "") and capfd.readouterr().err == ""
        return audio.info(named["output"])

    return check


def test_twelve_channels(matched, here):
    wav(here / "in.wav", sound(channels=12))
    assert (matched().channels, matched(output="b.flac", input="ref.wav").channels) == (12, 1)


def test_values_may_stand_apart_from_their_names(here, monkeypatch, matched):
    words = ["--input", "in.wav", "-reference=ref.wav", "--amount", "-1", "--nooverwrite"]
    assert call("eqst.match", [*words, "--settings", "s.json"], monkeypatch) == (0, "")
    assert json.loads((here / "s.json").read_text())["bands"][0]["gain_db"] == pytest.approx(
        -3, abs=0.1
    )


def test_the_content_says_what_a_file_is_not_its_name(matched, here):
    for container, name in (("FLAC", "a.wav"), ("AIFF", "b.mp3"), ("OGG", "c"), ("MP3", "d.flac")):
        soundfile.write(here / name, sound(2.0, rate=16000), 16000, format=container)
        assert matched(input=name, overwrite=True).frames == 32000


def test_an_offset_under_sound_is_no_mistake(matched, here):
    wav(here / "in.wav", sound(rms=0.02) + 0.5)
    assert matched().frames == len(sound())


@pytest.mark.parametrize(
    "name", ["a\udcff", "日本 $x_{", "two\nlines", " ", "-", "%s'\"`"], ids=ascii
)
def test_names_of_any_bytes(name, matched, here):
    os.mkdir(f"{name}d")
    os.rename("in.wav", f"{name}.wav")
    made = {"output": f"{name}d/{name}.flac", "settings": f"{name}.json", "picture": f"{name}.png"}
    assert matched(input=f"{name}.wav", **made).frames == len(sound())
    assert all(os.path.getsize(path) for path in made.values())


def test_what_is_there_is_replaced_where_asked(matched, here):
    (here / "out.wav").write_text("old")
    assert matched(overwrite=True).frames == len(sound())


@pytest.mark.long
def test_an_hour_takes_no_more_memory_than_a_minute(matched, here):
    """Silence but for some bursts, as a sparse file: little to read, much to go through."""

    def peak_bytes(minutes):
        frames = minutes * 60 * RATE
        wav(here / "in.wav", sound(0.01, channels=2)[:0], subtype="PCM_16")
        with open(here / "in.wav", "r+b") as file:
            file.truncate(44 + frames * 4)
            for second in range(0, minutes * 60, 40):
                file.seek(44 + second * RATE * 4)
                file.write(np.round(32767 * sound(1.0, 2)).astype("<i2").tobytes())
            for position, size in ((4, 36 + frames * 4), (40, frames * 4)):
                file.seek(position)
                file.write(size.to_bytes(4, "little"))
        tracemalloc.start()
        assert matched(overwrite=True).frames == frames
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_bytes(6), peak_bytes(60)
    assert many < 1.1 * few + 2e6, f"{few / 1e6:.0f} MB for 6 minutes, {many / 1e6:.0f} for 60"


def test_training_does_not_start_from_another_model(training, runs, tmp_path):
    _talkers(tmp_path)
    for name in ("other", "strange", "nan"):
        settings = FOLDER | {"train.init_from": runs / name, "model.hidden": 8}
        training(settings, "its checkpoint is another model's: network|is not finite")


def test_training_needs_pairs_of_held_out_talkers_too(training, tmp_path):
    _talkers(tmp_path, count=6)
    data = config.Data(
        sources=("folder:data",), cache_dir=str(tmp_path / "c"), sample_rate=RATE, valid_share=0.3
    )
    with joblib.parallel_config(backend="sequential"):
        held_out = corpus.open_corpus(data, "valid", lambda _: None).talker_R
    for name in held_out:
        wav(tmp_path / "data" / name.split("/")[1] / "a.wav", sound(2.0))
    training(FOLDER | {"data.valid_share": 0.3}, "no pair of 1.5 s segments in any recording")
