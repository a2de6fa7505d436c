"""Sets of chunks: what a folder becomes, read where it lies, against the folder source and the
files; layouts, rejects, interruption, damage."""

import contextlib
import csv
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from etils import epath
from test_interruption import assert_same_run
from test_processes import train_words
from test_train import POOLED, TINY, command, silent

from eqst import audio, build, chunking, corpus, layouts, lock, shards, train
from eqst.config import Data
from eqst.corpus import CorpusError

tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra [data]: TFDS")
pytest.importorskip("array_record", reason="needs the extra [data]: array-record")

RATE = 16000
SETTINGS = {
    "name": "tiny",
    "version": "1.0.0",
    "manifest": "",
    "permissive_only": False,
    "sample_rate": RATE,
    "chunk_seconds": 1.0,
    "dev_share": 0.3,
    "min_seconds": 1.0,
    "min_lufs": -60.0,
    "shard_mb": 1,
}
TALKERS = {"ann": (2.5, 3.0), "bob/deep": (4.0,), "cy": (1.2, 1.7, 2.0), "dee": (6.0,)}


def put(path: Path, samples: np.ndarray, rate: int = RATE, **kwargs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **kwargs)


def made(root: Path, data_dir: Path, *, layout=None, stems=("mixture",), workers=1, **changes):
    """Builds in this process (one worker) and gives the folder and info.json."""
    manifest = changes.pop("manifest_file", None)
    found = layouts.find(root, layout=layout, stems=stems, manifest=manifest, permissive_only=False)
    settings = chunking.Settings(**(SETTINGS | {"layout": found.layout, "stems": stems} | changes))
    return build.build(root, data_dir, settings, found, workers=workers, say=silent)


def opened(place: Path, split: str = "all", **settings) -> corpus.Corpus:
    data = Data(sources=(f"tfds:{place}",), **({"sample_rate": RATE} | settings))
    return corpus.open_corpus(data, split, silent)


def contents(folder: Path) -> dict[str, str]:
    """Checksum of every file of a set."""
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bursts) -> Path:
    """Four talkers, at two rates; ann's second file is stereo."""
    root = tmp_path_factory.mktemp("voices")
    for seed, (talker, lengths) in enumerate(TALKERS.items()):
        for number, seconds in enumerate(lengths):
            rate = RATE if seed else 22050
            samples = bursts(10 * seed + number, seconds, rate)
            if (seed, number) == (0, 1):
                samples = np.stack([samples, 0.4 * bursts(77, seconds, rate)], axis=-1)
            put(root / talker / f"{number:03d}.wav", samples, rate, subtype="PCM_24")
    return root


@pytest.fixture(scope="module")
def tiny(folder, tmp_path_factory) -> Path:
    return made(folder, tmp_path_factory.mktemp("sets"))[0]


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory) -> corpus.Corpus:
    """The same folder through the folder source."""
    cache = tmp_path_factory.mktemp("cache")
    data = Data(sources=(f"folder:{folder}",), cache_dir=str(cache), sample_rate=RATE)
    return corpus.open_corpus(data, "all", silent)


# --- reading -------------------------------------------------------------------------------------


def pairs_of(got: corpus.Corpus, expected: corpus.Corpus):
    """(number in one, number in the other) of each recording."""
    names = [name.removeprefix("tfds/") for name in got.talker_R]
    for number, name in enumerate(expected.talker_R):
        yield names.index(name.removeprefix("folder/")), number


def test_samples_levels_and_powers_are_those_of_the_folder_source(tiny, stored):
    got = opened(tiny)
    assert len(got.talker_R) == len(stored.talker_R) == len(TALKERS)
    for i, j in pairs_of(got, stored):
        length = int(stored.length_R[j])
        assert got.length_R[i] == length and got.gain_R[i] == stored.gain_R[j]
        assert got.weight_R[i] == pytest.approx(stored.weight_R[j], rel=1e-12)
        np.testing.assert_array_equal(got.power_R[i], stored.power_R[j])
        np.testing.assert_array_equal(got.segment(i, 0, length), stored.segment(j, 0, length))


def test_segments_inside_across_and_outside_chunks(tiny, stored):
    got = opened(tiny)
    for i, j in pairs_of(got, stored):
        length = int(stored.length_R[j])
        for start, count in [
            (0, RATE), (5, 7), (RATE - 3, 6), (RATE, RATE), (2 * RATE - 1, 1), (-40, 90),
            (-RATE, length + 3 * RATE), (length - 9, 30), (length + 5, 10), (-50, 20),
        ]:  # fmt: skip
            got_T = got.segment(i, start, count)
            assert got_T.dtype == np.float32
            np.testing.assert_array_equal(got_T, stored.segment(j, start, count))


def test_a_segment_costs_the_chunks_it_lies_in(tiny):
    read = []

    class Counted(shards.Chunks):
        def _read(self, number):
            read.append(number)
            return super()._read(number)

    info = shards.read_info(tiny)
    part = info["shards"]["train"]
    paths, counts = [str(tiny / x["name"]) for x in part], [x["examples"] for x in part]
    chunks = Counted(paths, counts, info["chunk"])
    assert len(chunks) == sum(counts) * RATE
    for start, stop, numbers in [
        (10, 20, [0]),
        (RATE - 1, RATE + 1, [0, 1]),
        (RATE, 2 * RATE, [1]),
    ]:
        read.clear()
        assert len(chunks[start:stop]) == stop - start and read == numbers


def test_splits_are_those_of_the_folder_source(folder, tiny, tmp_path):
    for split in ("train", "valid", "dev"):
        settings = {"dev_share": 0.3, "valid_share": 0.4, "sample_rate": RATE}
        data = Data(sources=(f"folder:{folder}",), cache_dir=str(tmp_path), **settings)
        expected = {x.split("/", 1)[1] for x in corpus.open_corpus(data, split, silent).talker_R}
        got = {x.split("/", 1)[1] for x in opened(tiny, split, valid_share=0.4).talker_R}
        assert got == expected


def test_tfds_reads_it_as_a_set_of_its_own(tiny, stored):
    builder = tfds.builder("tiny", data_dir=tiny.parents[1])
    assert builder.info.full_name == "tiny/1.0.0"
    assert builder.info.metadata["sample_rate"] == RATE
    source = builder.as_data_source()
    pieces: dict[str, list] = {}
    for part in source.values():
        for example in part:
            assert example["audio"].shape == (RATE,) and example["audio"].dtype == np.int16
            assert not example["audio"][example["length"] :].any()
            name = example["recording"].decode()
            assert example["talker"].decode() == name
            assert example["chunk"] == len(pieces.setdefault(name, []))
            audio_T = example["audio"][: example["length"]]
            pieces[name].append(audio_T * np.float32(example["gain"] / 32768.0))
    for number, name in enumerate(stored.talker_R):
        whole_T = np.concatenate(pieces[name.removeprefix("folder/")])
        expected_T = stored.segment(number, 0, int(stored.length_R[number]))
        np.testing.assert_allclose(whole_T, expected_T, rtol=1e-6)


def test_by_name_in_the_data_dir(tiny, monkeypatch):
    builder = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: builder(name, data_dir=tiny.parents[1]))
    by_name, by_path = opened("tiny"), opened(tiny)
    assert by_name.talker_R == by_path.talker_R
    np.testing.assert_array_equal(by_name.segment(1, 99, 999), by_path.segment(1, 99, 999))


def test_by_a_path_from_here(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parents[2])
    relative = tiny.relative_to(tiny.parents[2])
    assert not str(relative).startswith(("/", "."))
    assert opened(relative).talker_R == opened(tiny).talker_R


def test_another_rate_is_resampled_into_a_store(tiny, stored, tmp_path):
    got = opened(tiny, sample_rate=8000, cache_dir=str(tmp_path))
    assert got.sample_rate == 8000 and len(list(tmp_path.iterdir())) == 1
    for i, j in pairs_of(got, stored):
        assert got.length_R[i] == pytest.approx(stored.length_R[j] / 2, abs=1)
    dev = opened(tiny, "dev", sample_rate=8000, cache_dir=str(tmp_path))
    assert dev.talker_R == opened(tiny, "dev").talker_R


def test_no_tensorflow_to_build_and_read(folder, tmp_path):
    words = (
        "import sys; from test_build import made, opened; from pathlib import Path;"
        "place = made(Path(sys.argv[1]), Path(sys.argv[2]))[0];"
        "opened(place).segment(0, 0, 5000);"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    here = Path(__file__).parent
    path = f"{here.parent}{os.pathsep}{here}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", words, str(folder), str(tmp_path)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]


@pytest.mark.parametrize("pipeline", ["resident", pytest.param("tfdata", marks=pytest.mark.long)])
def test_training_is_the_same_as_from_the_folder(
    pipeline, folder, tiny, configure, tmp_path, monkeypatch
):
    if pipeline == "tfdata":
        pytest.importorskip("tensorflow", reason="needs the extra [data]: tensorflow")
    changes = {
        "data.sample_rate": RATE, "data.segment_seconds": (0.6,), "data.dev_share": 0.3,
        "train.steps": 3, "train.eval_every": 3, "data.min_loudness_lufs": -50.0,
        "data.valid_share": 0.0, "features.window": 512, "features.hop": 256,
    }  # fmt: skip
    if pipeline == "resident":
        changes |= POOLED
    else:
        changes |= {"data.pipeline": "tfdata", "data.rendering": "host", "features.mel_bands": 16}
    curves = []
    for number, source in enumerate((f"folder:{folder}", f"tfds:{tiny}")):
        named = {"data.sources": (source,), "data.cache_dir": str(tmp_path / "cache")}
        workdir = tmp_path / str(number)
        train.train(configure(TINY | changes | named), workdir, silent)
        rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        curves.append([row["loss"] for row in rows if "loss" in row])
    assert len(curves[0]) == 3 and curves[0] == curves[1]


# --- layouts -------------------------------------------------------------------------------------


def placed(root: Path, **options) -> layouts.Found:
    usual = {"layout": None, "stems": ("mixture",), "manifest": None, "permissive_only": False}
    return layouts.find(root, **(usual | options))


def names(found: layouts.Found) -> dict[str, list[str]]:
    return {x.recording: [str(path) for path in paths] for x, paths in found.files.items()}


def test_daps(tmp_path, bursts):
    for condition in ("clean", "ipad_office1"):
        for script in (1, 2):
            for talker in ("f1", "m10"):
                seed = script + 3 * len(talker) + 50 * len(condition)
                name = f"{talker}_script{script}_{condition}.wav"
                put(tmp_path / condition / name, bursts(seed, 1.1, RATE))
    put(tmp_path / "clean" / "noise.wav", bursts(1, 1.0, RATE))
    put(tmp_path / "clean" / "._f1_script1_clean.wav", bursts(1, 1.0, RATE))
    found = placed(tmp_path)
    assert found.layout == "daps" and len(found.files) == 4
    assert names(found)["m10/ipad_office1"] == [
        f"ipad_office1/m10_script{n}_ipad_office1.wav" for n in (1, 2)
    ]
    assert [(x.name, x.kind) for x in found.rejected] == [("clean/noise.wav", "layout")]
    # One talker has one split, whatever the conditions.
    _, info = made(tmp_path, tmp_path / "sets")
    splits = {(row["talker"], row["split"]) for row in info["recordings"]}
    assert len(info["recordings"]) == 4 and len(splits) == 2 and len(set(dict(splits))) == 2
    # And a talker's conditions are not torn apart by the share for choosing.
    both = placed(tmp_path, layout="folder")
    assert both.layout == "folder" and set(names(both)) == {"clean", "ipad_office1"}


def test_valid_talkers_are_held_out_in_all_their_conditions():
    talkers = tuple(f"t{i // 3}" for i in range(30))
    data = Data(dev_share=0.2, valid_share=0.3)
    parts = [corpus._split(talkers, x, data, None, "tfds:x") for x in ("train", "valid", "dev")]
    found = [{talkers[i] for i in part} for part in parts]
    assert sum(map(len, parts)) == 30 and not found[0] & found[1] and not found[1] & found[2]
    assert [len(x) for x in found] == [6, 2, 2]


def test_musdb(tmp_path, bursts):
    for number, track in enumerate(("train/A - B", "train/C", "test/D")):
        for seed, stem in enumerate(layouts.STEMS):
            put(tmp_path / track / f"{stem}.wav", bursts(10 * number + seed, 1.2, RATE))
    found = placed(tmp_path)
    assert found.layout == "musdb"
    assert set(names(found)) == {f"{x}/mixture" for x in ("train/A - B", "train/C", "test/D")}
    stems = placed(tmp_path, stems=("bass", "vocals"))
    assert len(stems.files) == 6 and names(stems)["test/D/bass"] == ["test/D/bass.wav"]
    _, info = made(tmp_path, tmp_path / "sets", stems=("bass", "vocals"))
    splits = {row["recording"]: row["split"] for row in info["recordings"]}
    assert [x for x, split in splits.items() if split == "dev"] == ["test/D/bass", "test/D/vocals"]
    with pytest.raises(CorpusError, match="no file of --stems=mixture in the layout musdb"):
        for path in tmp_path.rglob("mixture.wav"):
            path.unlink()
        placed(tmp_path)


def test_vctk(tmp_path, bursts):
    for talker in ("p225", "p226"):
        for number in (1, 2):
            for end in ("mic1.flac", "mic2.flac"):
                name = f"{talker}_{number:03d}_{end}"
                put(tmp_path / "wav48_silence_trimmed" / talker / name, bursts(number, 0.6, RATE))
        put(tmp_path / "wav48" / talker / f"{talker}_009.wav", bursts(9, 1.0, RATE))
    found = placed(tmp_path)
    assert found.layout == "vctk"
    assert set(names(found)) == {f"p22{i}{x}" for i in (5, 6) for x in ("", "/mic1", "/mic2")}
    assert len(names(found)["p225/mic2"]) == 2


def test_manifest_says_split_and_talker(folder, tmp_path):
    def listing(rows, columns=("path", "split", "talker")):
        with open(tmp_path / "list.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([str(folder / row[0]), *row[1:]] for row in rows)
        return tmp_path / "list.csv"

    rows = [
        ("ann/000.wav", "train", "one"),
        ("cy/001.wav", "train", "one"),
        ("dee/000.wav", "dev", ""),
        ("bob/deep/000.wav", "test", ""),
        ("ann/gone.wav", "train", "one"),
        ("../elsewhere.wav", "train", "two"),
    ]
    place, info = made(folder, tmp_path / "sets", manifest_file=listing(rows))
    assert {(x["recording"], x["split"]) for x in info["recordings"]} == {
        ("one", "train"), ("dee", "dev"),
    }  # fmt: skip
    assert {(x["name"], x["kind"]) for x in info["rejected"]} == {
        ("ann/gone.wav", "absent"), ("bob/deep/000.wav", "split"),
    }  # fmt: skip
    assert opened(place, "dev").talker_R == ("tfds/dee",)
    with pytest.raises(CorpusError, match="talker one is in 'train' and in 'dev'"):
        placed(folder, manifest=listing([*rows, ("ann/001.wav", "dev", "one")]))


# --- rejects -------------------------------------------------------------------------------------


def test_what_is_rejected_and_why(tmp_path, bursts):
    root = tmp_path / "in"
    put(root / "a" / "0.wav", bursts(1, 2.0, RATE))
    put(root / "b" / "0.wav", bursts(2, 2.0, RATE))
    put(root / "b" / "copy.wav", bursts(1, 2.0, RATE))
    put(root / "b" / "other.wav", bursts(3, 2.0, RATE))  # as long, and no copy
    (root / "b" / "text.wav").write_text("no audio")
    put(root / "b" / "nan.wav", np.full(RATE, np.nan, np.float32), subtype="FLOAT")
    put(root / "short" / "0.wav", bursts(4, 0.7, RATE))
    put(root / "quiet" / "0.wav", 1e-4 * bursts(5, 2.0, RATE), subtype="FLOAT")
    put(root / "faint" / "0.wav", 10 ** (-37 / 20) * bursts(5, 2.0, RATE), subtype="FLOAT")
    put(root / "zeros" / "0.wav", np.zeros(2 * RATE))
    put(root / "offset" / "0.wav", np.full(2 * RATE, 0.25, np.float32))
    place, info = made(root, tmp_path / "sets")
    got = {x["name"]: x["kind"] for x in info["rejected"]}
    assert got == {
        "b/copy.wav": "duplicate", "b/text.wav": "unreadable", "b/nan.wav": "not finite",
        "short": "too short", "quiet": "silent", "faint": "too quiet", "zeros": "silent",
        "offset": "silent",
    }  # fmt: skip
    lengths = {x["recording"]: x["length"] for x in info["recordings"]}
    assert lengths == {"a": 2 * RATE, "b": 4 * RATE}
    assert str(tmp_path) not in json.dumps(info)  # no place of this machine
    text = build.table_text(info)
    assert "rejected: 8" in text and "the same bytes as a/0.wav" in text
    assert "a, 0.70 s" not in text and "0.70 s, less than --min_seconds=1" in text
    said: list[str] = []
    data = Data(sources=(f"tfds:{place}",), sample_rate=RATE)
    corpus.open_corpus(data, "all", said.append)
    assert len(said) == 1 and "info.json" in said[0]


def test_nothing_usable_leaves_nothing(tmp_path):
    put(tmp_path / "in" / "a" / "0.wav", np.zeros(RATE * 2))
    with pytest.raises(build.BuildError, match="no usable audio: a: silent"):
        made(tmp_path / "in", tmp_path / "sets")
    assert list((tmp_path / "sets" / "tiny").iterdir()) == []


# --- interruption --------------------------------------------------------------------------------


def words_of(folder: Path, sets: Path, **changes) -> list[str]:
    options = {"data": folder, "output": sets, "name": "tiny", "sample_rate": RATE}
    options |= {"chunk_seconds": 0.5, "shard_mb": 1, "workers": 1} | changes
    return [f"--{key}={value}" for key, value in options.items()]


def run(words: list[str], code: str = "") -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "eqst.build"]
    repo = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, *start, *words], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(repo)},
    )  # fmt: skip


def finish(words: list[str]) -> str:
    done = run(words)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    return done.stdout


# Kills itself at the renaming of this number, before it or after it. One worker: it is all there.
KILLS_ITSELF = """
import os, signal, sys
from eqst import build, command
left, late, rename = [int(sys.argv.pop(1))], sys.argv.pop(1) == "late", os.replace
def replace(a, b):
    left[0] -= 1
    if left[0] == 0 and not late:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
command.start("eqst.build", build.define_flags, build.main)
"""


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The build that nothing happened to."""
    sets = tmp_path_factory.mktemp("whole")
    assert "train with" in finish(words_of(folder, sets))
    return sets / "tiny" / "1.0.0"


@pytest.mark.long
def test_kill_9_at_every_kind_of_moment_ends_bitwise_equal(folder, whole, tmp_path):
    words, draw, kills = words_of(folder, tmp_path), random.Random(1), 0
    while True:
        moment = [str(draw.randint(1, 4)), draw.choice(["early", "late"])]
        done = run([*moment, *words], KILLS_ITSELF)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL and done.stderr == "", done.stderr[-3000:]
        kills += 1
        if not (tmp_path / "tiny" / "1.0.0").exists():
            with pytest.raises(CorpusError, match="cannot be opened"):
                opened(tmp_path / "tiny" / "1.0.0")
    assert kills >= 5
    assert contents(tmp_path / "tiny" / "1.0.0") == contents(whole)
    assert [x.name for x in (tmp_path / "tiny").iterdir()] == ["1.0.0"]


@pytest.mark.long
def test_kill_9_of_the_parent_while_its_workers_write(folder, whole, tmp_path):
    words, sessions = words_of(folder, tmp_path, workers=2), []
    for number, seconds in enumerate((0.0, 0.15, 0.4, 0.8)):
        with open(tmp_path / f"{number}.txt", "w") as said:  # not a pipe: the workers keep it open
            process = subprocess.Popen(
                [sys.executable, "-m", "eqst.build", *words], stdout=said, start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            )  # fmt: skip
        sessions.append(process.pid)
        while not Path(said.name).stat().st_size:  # the layout; then it begins
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        assert process.wait(timeout=60) in (-signal.SIGKILL, 0)
    finish(words)
    for session in sessions:  # joblib's workers go by themselves, after minutes
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)
    assert contents(tmp_path / "tiny" / "1.0.0") == contents(whole)


def test_one_kill_then_no_recording_is_made_twice(folder, whole, tmp_path, monkeypatch):
    """Interrupted in the middle (here by an exception), it does the rest alone."""
    made_now: list[str] = []
    real, write = chunking.make_recording, chunking.write_shard

    def counted(task):
        made_now.append(task.name)
        if len(made_now) == 3:
            raise KeyboardInterrupt
        real(task)

    monkeypatch.setattr(chunking, "make_recording", counted)
    options = {"chunk_seconds": 0.5, "dev_share": 0.2, "stems": ()}
    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path, **options)
    assert not (tmp_path / "tiny" / "1.0.0").exists()
    interrupted = iter([True])

    def stops(task):
        result = write(task)
        if next(interrupted, False):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(chunking, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path, **options)
    place, _ = made(folder, tmp_path, **options)
    assert made_now == ["ann", "bob/deep", "cy", "cy", "dee"]
    assert contents(place) == contents(whole)
    assert [x.name for x in (tmp_path / "tiny").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("when", ["compared", "decoded"])
def test_a_file_that_is_away_ends_the_build_which_then_goes_on(when, folder, tmp_path, monkeypatch):
    """As the share that holds it may be for a moment: it is not left out of the set."""
    root = shutil.copytree(folder, tmp_path / "in")
    shutil.copytree(root / "dee", root / "eve")  # of one size: their bytes are compared
    expected = contents(made(root, tmp_path / "expected")[0])
    file, kept = root / "dee" / "000.wav", tmp_path / "kept"
    checksum, make = corpus.checksum, chunking.make_recording

    def goes(path):
        if when == "compared" and path == file:
            file.rename(kept)
        return checksum(path)

    def goes_later(task):
        if when == "decoded" and task.name == "dee":
            file.rename(kept)
        make(task)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "checksum", goes)
        patch.setattr(chunking, "make_recording", goes_later)
        with pytest.raises(
            CorpusError, match=r"dee/000.wav' cannot be read \(No such file.*goes on"
        ):
            made(root, tmp_path / "sets")
    assert not (tmp_path / "sets" / "tiny" / "1.0.0").exists()
    kept.rename(file)
    assert contents(made(root, tmp_path / "sets")[0]) == expected


def test_an_error_of_the_disk_is_no_content(folder, tmp_path, monkeypatch):
    """Decoding fails, and reading the bytes does too: the file is not called unreadable."""

    def damaged(path, rate):
        raise audio.AudioError("it cannot be decoded after 1.00 s")

    def fails(file, name):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "mono_blocks", damaged)
        patch.setattr(hashlib, "file_digest", fails)
        with pytest.raises(CorpusError, match="ann/000.wav' cannot be read .Input/output error"):
            made(folder, tmp_path)
    _, info = made(folder, tmp_path)
    assert info["rejected"] == [] and len(info["recordings"]) == len(TALKERS)


LITTLE_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from eqst import build, command
command.start("eqst.build", build.define_flags, build.main)
"""


def test_without_room_it_says_where_and_goes_on_with_more(folder, whole, tmp_path):
    words = words_of(folder, tmp_path)
    done = run(words, LITTLE_ROOM)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert f"{tmp_path}/tiny/.1.0.0.building/recordings" in done.stderr
    assert "cannot be written (File too large): make room there, and the same command goes on" in (
        done.stderr
    )
    finish(words)
    assert contents(tmp_path / "tiny" / "1.0.0") == contents(whole)


def test_a_file_that_is_cut_leaves_nothing_of_itself(tmp_path, bursts):
    """What was decoded before the damage is not in the recording."""
    root = tmp_path / "in"
    put(root / "a" / "0.wav", bursts(1, 2.0, RATE))
    put(root / "a" / "1.flac", bursts(2, 200.0, RATE), format="FLAC")
    put(root / "a" / "2.wav", bursts(3, 1.0, RATE))
    cut = (root / "a" / "1.flac").read_bytes()
    (root / "a" / "1.flac").write_bytes(cut[: len(cut) * 3 // 4])
    put(tmp_path / "good" / "a" / "0.wav", bursts(1, 2.0, RATE))
    put(tmp_path / "good" / "a" / "2.wav", bursts(3, 1.0, RATE))
    (got, info), (expected, _) = (
        made(x, tmp_path / f"{x.name}-sets", dev_share=0.0) for x in (root, tmp_path / "good")
    )
    assert [x["name"] for x in info["rejected"]] == ["a/1.flac"]
    for one, other in zip(read_all(opened(got)), read_all(opened(expected)), strict=True):
        assert one == other


def test_two_workers_bitwise_and_a_second_run_does_nothing(folder, whole, tmp_path):
    words = words_of(folder, tmp_path, workers=2)
    finish(words)
    place = tmp_path / "tiny" / "1.0.0"
    assert contents(place) == contents(whole)
    times = {x: x.stat().st_mtime_ns for x in place.iterdir()}
    out = finish(words)
    assert "is finished: nothing to do" in out and "reading" not in out
    assert times == {x: x.stat().st_mtime_ns for x in place.iterdir()}


def test_a_second_build_at_the_same_time_is_refused(folder, tmp_path):
    work = tmp_path / "tiny" / ".1.0.0.building"
    work.mkdir(parents=True)
    with lock.hold(epath.Path(work)):
        done = run(words_of(folder, tmp_path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"is in use by process {os.getpid()}" in done.stderr
    assert "choose another --version" in done.stderr


def test_what_a_kill_at_the_very_end_left_is_not_in_the_set(folder, whole, tmp_path):
    options = {"chunk_seconds": 0.5, "dev_share": 0.2, "stems": ()}
    left = tmp_path / "tiny" / ".1.0.0.building" / "set"
    left.mkdir(parents=True)
    (left / "dataset_info.json.incomplete.1234").write_text("{")
    assert contents(made(folder, tmp_path, **options)[0]) == contents(whole)


@pytest.mark.parametrize("finished", [True, False])
def test_changed_flags_and_files_are_refused(finished, folder, tmp_path, monkeypatch):
    root = shutil.copytree(folder, tmp_path / "in")
    if finished:
        made(root, tmp_path)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(chunking, "make_recording", lambda task: _interrupt())
            made(root, tmp_path)
    with pytest.raises(build.BuildError, match="--chunk_seconds is 2.0, but .* with 1.0: choose"):
        made(root, tmp_path, chunk_seconds=2.0)
    with pytest.raises(build.BuildError, match="--layout is 'vctk', but .* with 'folder'"):
        chosen = chunking.Settings(**(SETTINGS | {"layout": "vctk", "stems": ("mixture",)}))
        build.build(root, tmp_path, chosen, placed(root), workers=1, say=silent)
    put(root / "dee" / "new.wav", np.ones(10))
    with pytest.raises(build.BuildError, match="files under --data have changed"):
        made(root, tmp_path)


def _interrupt() -> None:
    raise KeyboardInterrupt


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "copy")


def shard_of(place: Path) -> Path:
    return place / shards.read_info(place)["shards"]["train"][0]["name"]


def test_sizes_and_small_files_are_checked_at_once(copied):
    shard, good = shard_of(copied), shard_of(copied).read_bytes()
    for damaged in (good[:-65536], good + b"x"):
        shard.write_bytes(damaged)
        with pytest.raises(CorpusError, match=rf"{shard.name} is damaged: {len(damaged)} bytes"):
            opened(copied)
    shard.unlink()
    with pytest.raises(CorpusError, match=f"{shard.name} cannot be read"):
        opened(copied)
    shard.write_bytes(good)
    power = (copied / "power.npy").read_bytes()
    (copied / "power.npy").write_bytes(power[:-40])
    with pytest.raises(CorpusError, match="power.npy is damaged"):
        opened(copied)
    (copied / "info.json").write_text("{")
    with pytest.raises(CorpusError, match="info.json is damaged"):
        opened(copied)


def read_all(recordings: corpus.Corpus) -> np.ndarray:
    lengths = enumerate(recordings.length_R)
    return np.concatenate([recordings.segment(r, 0, int(length)) for r, length in lengths])


def damage(shard: Path, *, zeros: bool = False) -> None:
    """Flipped bytes in every 5,000, or zeros all over; the size stays."""
    raw = bytearray(shard.read_bytes())
    if zeros:
        raw[:] = bytes(len(raw))
    else:
        raw[::5000] = bytes(x ^ 0x55 for x in raw[::5000])
    shard.write_bytes(raw)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_damaged_shard_is_named_when_it_is_read(copied, zeros):
    shard = shard_of(copied)
    damage(shard, zeros=zeros)
    with pytest.raises(CorpusError, match=f"{shard.name} is damaged .*copy it again") as caught:
        read_all(opened(copied))
    assert "\n" not in str(caught.value)


def test_any_flipped_bit_of_a_shard_is_named_or_changes_nothing(copied):
    """Some lie in what fills the blocks, and some in what only a repair would look at."""
    shard, good = shard_of(copied), shard_of(copied).read_bytes()
    samples_V = read_all(opened(copied))
    draw = random.Random(3)
    named = 0
    for position in (0, len(good) // 2, len(good) - 1, *(draw.sample(range(len(good)), 40))):
        damaged = bytearray(good)
        damaged[position] ^= 1 << draw.randrange(8)
        shard.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_all(opened(copied)), samples_V)
        except CorpusError as error:
            assert f"{shard.name} is damaged (" in str(error) and "\n" not in str(error)
            named += 1
    assert named > 20


@pytest.mark.long
def test_a_flipped_byte_in_a_shard_ends_training_in_one_line_that_names_it(copied, tmp_path):
    shard, good = shard_of(copied), shard_of(copied).read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    shard.write_bytes(damaged)
    changes = {
        "data.sources": f"('tfds:{copied}',)", "data.sample_rate": RATE, "features.window": 512,
        "data.segment_seconds": (0.6,), "features.hop": 256, "data.min_loudness_lufs": -50.0,
    }  # fmt: skip
    words = command(tmp_path / "run", tmp_path / "cache", changes)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"eqst.train: {shard} is damaged (") and "copy it again" in line
    shard.write_bytes(good)  # copied again
    subprocess.run(words, check=True, capture_output=True, timeout=300)


@pytest.mark.long
def test_a_shard_damaged_under_a_run_ends_it_and_mended_it_ends_bitwise_equal(copied, tmp_path):
    pytest.importorskip("tensorflow", reason="needs the extra [data]: tensorflow")
    shard, good = shard_of(copied), shard_of(copied).read_bytes()
    changes = {
        "data.sources": f"('tfds:{copied}',)", "data.sample_rate": RATE, "features.window": 512,
        "data.segment_seconds": (0.6,), "features.hop": 256, "data.min_loudness_lufs": -50.0,
        "data.pipeline": "tfdata", "data.rendering": "device", "features.mel_bands": 16,
        "train.steps": 60, "train.checkpoint_every": 10, "train.eval_every": 30,
    }  # fmt: skip
    whole, run = (train_words(tmp_path / name, tmp_path / "cache", changes) for name in ("a", "b"))
    done = subprocess.run(whole, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 25/"):
                with shard.open("r+b") as file:  # in place: it is read while it is open
                    file.write(bytes(len(good)))
                break
        _, err = process.communicate(timeout=300)
    said = [x for x in err.splitlines() if x.startswith("eqst.train: ")]
    assert process.returncode == 1 and len(said) == 1 and "is damaged" in said[0], err[-2000:]
    with shard.open("r+b") as file:
        file.write(good)
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=300)
    assert "resumed at step " in done.stdout
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_damaged_shard_ends_tf_data_in_one_line(copied, configure):
    pytest.importorskip("tensorflow", reason="needs the extra [data]: tensorflow")
    from eqst import data, pairs

    changes = {
        "data.sample_rate": RATE, "data.segment_seconds": (0.6,), "features.window": 512,
        "features.hop": 256, "data.pipeline": "tfdata", "data.rendering": "device",
    }  # fmt: skip
    made_config = configure(changes)
    recordings = opened(copied, "train")
    index, _ = pairs.build_index(recordings, 0.6, -60.0)
    damage(shard_of(copied), zeros=True)
    with pytest.raises(CorpusError, match="is damaged"):
        next(data.batches(made_config, recordings, (index,), first=0))


# --- the command, and public sets ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "My Set"}, "--name=My Set: take lower-case letters"),
        ({"version": "2"}, "--version=2: give three numbers"),
        ({"stems": "kazoo"}, "--stems=kazoo: choose of mixture, bass"),
        ({"data": "nowhere"}, "nowhere is not a folder"),
        ({"layout": "vctk"}, "no file in the layout vctk .looked for wav48/TALKER/FILE"),
        ({"manifest": "m.csv"}, "m.csv: no such manifest"),
        ({"output": "gs://bucket/sets"}, "--output=gs://bucket/sets is no folder: build in one"),
        ({"chunk_seconds": "0"}, "--chunk_seconds=0: give a number in the range"),
    ],
)
def test_mistakes_are_one_line(changes, expected, folder, tmp_path):
    done = run(words_of(folder, tmp_path, **changes))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert expected.split(" .")[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_public_sets_may_call_their_features_otherwise(tmp_path, bursts, monkeypatch):
    pytest.importorskip("tensorflow", reason="needs the extra [data]: tensorflow")
    monkeypatch.setattr("tensorflow_datasets.core.utils.gcs_utils._is_gcs_disabled", True)

    class EqstSpeech(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "speech": tfds.features.Audio(sample_rate=RATE),
                "speaker_id": tfds.features.ClassLabel(names=["x", "y"]),
                "text": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, talker in enumerate("xyx"):
                wave = np.round(32767 * bursts(number, 1.0, RATE)).astype(np.int64)
                yield number, {"speech": wave, "speaker_id": talker, "text": ""}

    builder = EqstSpeech(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    got = opened(builder.data_path, cache_dir=str(tmp_path / "cache"))
    lengths = dict(zip(got.talker_R, got.length_R.tolist(), strict=True))
    assert sorted(lengths.values()) == [RATE, 2 * RATE]


@pytest.mark.long
def test_real_recordings(shared, tmp_path):
    """Three talkers of the shared recordings, by their manifest, at 44.1 kHz in 10 s."""
    root = tmp_path / "speech"
    chosen = ("cattale/narrator", "ravdess/actor01", "ftm/hausa")
    for name in chosen:
        shutil.copytree(shared / "speech" / name, root / name)
    with open(shared / "manifest.csv", newline="") as file:
        rows = [x for x in csv.DictReader(file) if "/".join(x["path"].split("/")[1:3]) in chosen]
    with open(tmp_path / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    settings = {"sample_rate": 44100, "chunk_seconds": 10.0}
    place, info = made(root, tmp_path / "sets", manifest_file=tmp_path / "m.csv", **settings)
    assert {x["recording"]: x["split"] for x in info["recordings"]} == {
        "cattale/narrator": "dev", "ravdess/actor01": "train", "ftm/hausa": "train",
    }  # fmt: skip
    data = Data(sources=(f"folder:{root}",), cache_dir=str(tmp_path / "cache"))
    expected = corpus.open_corpus(data, "all", silent)
    got = opened(place, sample_rate=44100)
    draw = np.random.default_rng(0)
    for i, j in pairs_of(got, expected):
        assert got.length_R[i] == expected.length_R[j] > 44100 * 45
        for start in draw.integers(0, int(got.length_R[i]), 20):
            got_T = got.segment(i, int(start), 3 * 44100)
            np.testing.assert_array_equal(got_T, expected.segment(j, int(start), 3 * 44100))
