"""Stores and sources: what a folder of files becomes, against the files themselves."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyloudnorm
import pytest
import soundfile
from etils import epath

from eqst import audio, corpus, store, synthetic
from eqst.config import Data
from eqst.corpus import CorpusError

RATE = 22050


def silent(_):
    pass


@pytest.fixture(scope="session")
def folder(tmp_path_factory, bursts):
    """Talkers a (two files), b, c/deep, solo (a file in the root), and what cannot be used."""
    root = tmp_path_factory.mktemp("voices")

    def put(name, samples, rate, **kwargs):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate, **kwargs)

    put("a/000.wav", bursts(0, 3.0, RATE), RATE, subtype="FLOAT")
    stereo = np.stack([bursts(1, 2.0, 44100), 0.5 * bursts(2, 2.0, 44100)], axis=-1)
    put("a/001.flac", stereo, 44100, subtype="PCM_24")
    put("b/x.WAV", bursts(3, 4.0, 48000), 48000, subtype="PCM_16")
    put("c/deep/y.ogg", bursts(4, 3.0, 16000), 16000)
    put("solo.aiff", bursts(5, 2.5, 11025), 11025)
    (root / "b" / "notes.txt").write_text("no audio")
    (root / "b" / "broken.wav").write_bytes(b"RIFF but not really")
    (root / "corrupt").mkdir()
    (root / "corrupt" / "only.wav").write_bytes(b"nothing of the kind")
    put("hush/zeros.wav", np.zeros(RATE), RATE)
    put("short/blip.wav", bursts(6, 0.3, RATE), RATE)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def voices(folder, cache):
    data = Data(sources=(f"folder:{folder}",), cache_dir=str(cache), sample_rate=RATE)
    return corpus.open_corpus(data, "all", silent)


def whole(recordings, number):
    return recordings.segment(number, 0, int(recordings.length_R[number]))


def named(recordings, name):
    return recordings.talker_R.index(f"folder/{name}")


def test_a_talker_is_a_folder(voices):
    assert set(voices.talker_R) == {"folder/a", "folder/b", "folder/c/deep", "folder/solo"}
    assert voices.sample_rate == RATE
    expected = {"a": 5.0, "b": 4.0, "c/deep": 3.0, "solo": 2.5}
    for name, seconds in expected.items():
        assert voices.length_R[named(voices, name)] == pytest.approx(seconds * RATE, abs=2)
    assert voices.seconds() == pytest.approx(14.5, abs=1e-3)


def test_what_is_left_out_has_its_reason(voices):
    reasons = {line.split(":")[0]: line for line in voices.skipped}
    assert len(voices.skipped) == 4
    assert "not audio" in reasons["corrupt"]
    assert "silent" in reasons["hush"]
    assert "0.3 s is too short" in reasons["short"]
    assert any("broken.wav" in line for line in voices.skipped)  # though b has another file
    assert all("\n" not in line for line in voices.skipped)


def test_every_recording_is_at_23_lufs_by_another_meter(voices):
    for number in range(len(voices.talker_R)):
        samples_T = whole(voices, number).astype(np.float64)
        got = pyloudnorm.Meter(RATE).integrated_loudness(samples_T)
        # Its 400 ms blocks are rounded differently: of seconds with pauses that is some tenths.
        assert got == pytest.approx(-23.0, abs=0.25), voices.talker_R[number]


def test_samples_are_the_files(voices, bursts):
    """One gain for the recording, and the file's samples within half a step of 16 bits."""
    number = named(voices, "a")
    got_T, source_T = whole(voices, number)[: 3 * RATE], bursts(0, 3.0, RATE)
    gain = np.dot(got_T, source_T) / np.dot(source_T, source_T)
    peak = np.abs(whole(voices, number)).max()
    assert np.abs(got_T - gain * source_T).max() < 0.6 * peak / 32767
    # The second file: the mean of its channels, at another rate.
    stereo = np.stack([bursts(1, 2.0, 44100), 0.5 * bursts(2, 2.0, 44100)], axis=-1)
    second_T = audio.resample(stereo.mean(axis=1), 44100, RATE)
    rest_T = whole(voices, number)[3 * RATE :]
    error_T = rest_T - gain * second_T[: len(rest_T)]
    assert np.abs(error_T).max() < 1.5 * peak / 32767


def test_power_is_that_of_the_segments(voices):
    for number, power_J in enumerate(voices.power_R):
        assert len(power_J) == int(voices.length_R[number]) * 10 // RATE
        assert audio.gated_loudness_lufs(power_J.astype(np.float64)) == pytest.approx(
            -23.0, abs=0.01
        )
        again_J = audio.k_weighted_power(whole(voices, number)[:, None], RATE)
        np.testing.assert_allclose(power_J, again_J, rtol=1e-2, atol=1e-9)


def test_random_access_inside_before_and_after(voices):
    full_T = whole(voices, 1)
    length = len(full_T)
    assert np.abs(full_T).max() > 0
    padded_T = np.concatenate([np.zeros(5000, np.float32), full_T, np.zeros(5000, np.float32)])
    for start, count in [
        (0, 100),
        (1234, 999),
        (-300, 1000),
        (-900, 900),
        (-4000, 100),
        (length - 50, 100),
        (length, 100),
        (length + 900, 10),
        (-100, length + 200),
    ]:
        got_T = voices.segment(1, start, count)
        assert got_T.dtype == np.float32 and got_T.shape == (count,)
        np.testing.assert_array_equal(got_T, padded_T[5000 + start : 5000 + start + count])


def test_weights(voices):
    assert voices.weight_R.sum() == pytest.approx(1.0)
    root_R = np.sqrt(voices.length_R)
    np.testing.assert_allclose(voices.weight_R, root_R / root_R.sum())


def test_store_is_reused_and_a_changed_file_makes_a_new_one(tmp_path, bursts):
    root = tmp_path / "voices"
    for name in ("p", "q"):
        (root / name).mkdir(parents=True)
        soundfile.write(root / name / "0.wav", bursts(ord(name), 1.0, 8000), 8000)
    data = Data(sources=(f"folder:{root}",), cache_dir=str(tmp_path / "c"), sample_rate=8000)
    said: list[str] = []
    first = corpus.open_corpus(data, "all", said.append)
    assert said
    said.clear()
    again = corpus.open_corpus(data, "all", said.append)
    assert not said and len(list((tmp_path / "c").iterdir())) == 1
    np.testing.assert_array_equal(whole(first, 0), whole(again, 0))
    soundfile.write(root / "q" / "0.wav", bursts(9, 1.5, 8000), 8000)
    changed = corpus.open_corpus(data, "all", said.append)
    assert said and len(list((tmp_path / "c").iterdir())) == 2
    assert changed.length_R[named(changed, "q")] == 12000
    np.testing.assert_array_equal(whole(first, 0), whole(changed, 0))


def test_what_a_killed_build_left_goes_a_day_later(tmp_path, bursts):
    data = Data(cache_dir=str(tmp_path), sample_rate=8000)
    for name, days in ((".folder-old", 2), (".folder-new", 0), (".other-old", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.int16").write_bytes(b"12")
        then = time.time() - days * 86400
        for path in (tmp_path / name / "samples.int16", tmp_path / name):
            os.utime(path, (then, then))
    recordings = [store.Recording("a", bursts(1, 3.0, 8000))]
    folder = store.make_store(data, "folder", "facts", lambda: iter(recordings))
    assert {x.name for x in tmp_path.iterdir()} == {".folder-new", ".other-old", folder.name}


def test_an_interrupted_build_leaves_nothing(tmp_path, bursts):
    data = Data(cache_dir=str(tmp_path), sample_rate=8000)

    def recordings():
        yield corpus.Recording("one", bursts(0, 1.0, 8000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make_store(data, "folder", "facts", recordings)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_made(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    data = Data(sources=(f"folder:{folder}",), cache_dir=str(tmp_path / "file" / "x"))
    with pytest.raises(CorpusError, match="data.cache_dir"):
        corpus.open_corpus(data, "all", silent)


# --- splits ------------------------------------------------------------------------------------


def split_of(names, split, **settings):
    return set(corpus._split(names, split, Data(**settings), None, "folder:x").tolist())


def test_splits_are_by_talker_and_disjoint():
    names = tuple(f"folder/{i}" for i in range(40))
    settings = {"dev_share": 0.25, "valid_share": 0.2}
    train, valid, dev = (split_of(names, s, **settings) for s in ("train", "valid", "dev"))
    assert (len(train), len(valid), len(dev)) == (24, 6, 10)
    assert train | valid | dev == set(range(40)) and not train & valid and not train & dev
    # By name: the order of the files does not matter.
    backwards = split_of(names[::-1], "dev", **settings)
    assert {39 - i for i in backwards} == dev


def test_folds_are_a_partition_of_train():
    names = tuple(f"folder/{i}" for i in range(23))
    dev = split_of(names, "dev")
    parts = [split_of(names, "valid", folds=4, fold=f) for f in range(4)]
    assert set.union(*parts) == set(range(23)) - dev and sum(map(len, parts)) == 23 - len(dev)
    for f, part in enumerate(parts):
        assert split_of(names, "train", folds=4, fold=f) == set(range(23)) - dev - part
    with pytest.raises(CorpusError, match="90 folds of 18 train talkers"):
        split_of(names, "valid", folds=90, fold=80)


def test_few_talkers_still_hold_one_out():
    names = ("folder/a", "folder/b", "folder/c")
    train, valid, dev = (split_of(names, s) for s in ("train", "valid", "dev"))
    assert len(train) == len(valid) == len(dev) == 1 and len(train | valid | dev) == 3
    # Two talkers: nobody is left to choose on, so it is the train talker, as documented.
    assert split_of(names[:2], "valid") == split_of(names[:2], "train")
    assert split_of(names, "valid", valid_share=0.0) == split_of(names, "train", valid_share=0.0)


def test_one_talker_only():
    with pytest.raises(CorpusError, match="one talker only .*folder of their own"):
        split_of(("folder/a",), "train")
    assert split_of(("folder/a",), "all") == {0}


def manifest_of(folder, path, rows, columns=("path", "split", "permissive")):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for name, split, permissive in rows:
            place = (
                (folder / name).relative_to(path.parent, walk_up=True) if False else folder / name
            )
            writer.writerow({"path": place, "split": split, "permissive": permissive})
    return path


ROWS = [
    ("a/000.wav", "train", "yes"),
    ("b/x.WAV", "dev", "yes"),
    ("c/deep/y.ogg", "train", "no"),
]


def test_manifest_gives_splits_and_files(folder, tmp_path, cache):
    manifest = manifest_of(folder, tmp_path / "m.csv", ROWS)
    data = Data(
        sources=(f"folder:{folder}",),
        manifest=str(manifest),
        cache_dir=str(cache),
        sample_rate=RATE,
        valid_share=0.0,
    )
    names = {
        split: set(corpus.open_corpus(data, split, silent).talker_R)
        for split in ("train", "dev", "all")
    }
    assert names["train"] == {"folder/a", "folder/c/deep"} and names["dev"] == {"folder/b"}
    assert names["all"] == names["train"] | names["dev"]
    train = corpus.open_corpus(data, "train", silent)
    assert train.length_R[named(train, "a")] == 3 * RATE  # the one listed file of two
    free = Data(**{**vars(data), "permissive_only": True})
    assert corpus.open_corpus(free, "train", silent).talker_R == ("folder/a",)


def test_manifest_mistakes(folder, tmp_path):
    def opened(manifest, **settings):
        data = Data(
            sources=(f"folder:{folder}",),
            manifest=str(manifest),
            cache_dir=str(tmp_path / "c"),
            **settings,
        )
        return corpus.open_corpus(data, "train", silent)

    with pytest.raises(CorpusError, match="no such manifest"):
        opened(tmp_path / "absent.csv")
    both = manifest_of(folder, tmp_path / "b.csv", [*ROWS, ("a/001.flac", "dev", "yes")])
    with pytest.raises(CorpusError, match="talker a is in 'train' and in 'dev'"):
        opened(both)
    narrow = manifest_of(folder, tmp_path / "n.csv", ROWS, columns=("path",))
    with pytest.raises(CorpusError, match="no column split"):
        opened(narrow)
    unlicensed = manifest_of(folder, tmp_path / "u.csv", ROWS, columns=("path", "split"))
    with pytest.raises(CorpusError, match="no column permissive"):
        opened(unlicensed, permissive_only=True)


def test_folders_that_are_none(tmp_path):
    for place, words in [(tmp_path / "absent", "is not a folder"), (tmp_path, "no audio file")]:
        with pytest.raises(CorpusError, match=words):
            corpus.open_corpus(Data(sources=(f"folder:{place}",)), "all", silent)


# --- synthetic, mixtures, TFDS -------------------------------------------------------------------


def test_synthetic_source(tmp_path):
    data = Data(
        synthetic_talkers=3, synthetic_seconds=5.0, sample_rate=16000, cache_dir=str(tmp_path)
    )
    recordings = corpus.open_corpus(data, "all", silent)
    assert recordings.talker_R == tuple(f"synthetic/{i:05d}" for i in range(3))
    assert set(recordings.length_R) == {80000}
    got_T = whole(recordings, 2)
    source_T = synthetic.synthesise(0, 2, 5.0, sample_rate=16000)
    gain = np.dot(got_T, source_T) / np.dot(source_T, source_T)
    assert np.abs(got_T - gain * source_T).max() < 0.6 * np.abs(got_T).max() / 32767
    assert pyloudnorm.Meter(16000).integrated_loudness(got_T.astype(float)) == pytest.approx(
        -23.0, abs=0.2
    )


def test_two_sources_share_by_their_weights(folder, voices, cache, tmp_path, bursts):
    other = tmp_path / "others"
    for name in ("p", "q"):
        (other / name).mkdir(parents=True)
        soundfile.write(other / name / "0.wav", bursts(ord(name), 1.0, RATE), RATE)
    data = Data(
        sources=(f"folder:{folder}", f"folder:{other}"),
        source_weights=(3.0, 1.0),
        cache_dir=str(cache),
        sample_rate=RATE,
    )
    both = corpus.open_corpus(data, "all", silent)
    count = len(voices.talker_R)
    assert len(both.talker_R) == count + 2 and both.weight_R.sum() == pytest.approx(1.0)
    assert both.weight_R[:count].sum() == pytest.approx(0.75)
    np.testing.assert_array_equal(whole(both, 1), whole(voices, 1))
    single = corpus.open_corpus(
        Data(sources=(f"folder:{other}",), cache_dir=str(cache), sample_rate=RATE), "all", silent
    )
    np.testing.assert_array_equal(whole(both, count), whole(single, 0))


def test_tfds_source(tmp_path, bursts, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")
    pytest.importorskip("array_record", reason="needs array-record")
    # No look into the public bucket for facts about the set.
    monkeypatch.setattr("tensorflow_datasets.core.utils.gcs_utils._is_gcs_disabled", True)
    sounds = {("s1", 0): 1.0, ("s1", 1): 0.5, ("s2", 0): 1.5}

    class EqstTinyTalkers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Audio(sample_rate=16000),
                    "speaker": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, ((talker, _), seconds) in enumerate(sounds.items()):
                wave = np.round(32767 * bursts(number, seconds, 16000)).astype(np.int64)
                yield number, {"audio": wave, "speaker": talker}

    EqstTinyTalkers(
        data_dir=str(tmp_path / "tfds"), file_format="array_record"
    ).download_and_prepare()
    data = Data(
        sources=("tfds:eqst_tiny_talkers",), cache_dir=str(tmp_path / "c"), sample_rate=8000
    )
    builder = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name: builder(name, data_dir=str(tmp_path / "tfds"))
    )
    recordings = corpus.open_corpus(data, "all", silent)
    lengths = dict(zip(recordings.talker_R, recordings.length_R.tolist(), strict=True))
    assert lengths == {"tfds/s1": 12000, "tfds/s2": 12000}
    with pytest.raises(CorpusError, match="array_record"):
        corpus.open_corpus(Data(**{**vars(data), "sources": ("tfds:absent_set",)}), "all", silent)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
@pytest.mark.parametrize(("channels", "phase"), [(1, 1), (2, 1), (2, -1)])
def test_blocks_are_those_of_the_whole_file_to_the_bit(rate, channels, phase, bursts, tmp_path):
    """More than a block of samples; with a wire swapped one channel stands for all."""
    sound_T = bursts(rate, 40.0, rate)
    sound_TC = np.stack([sound_T, phase * 0.9 * sound_T], axis=-1)[:, :channels]
    soundfile.write(tmp_path / "x.wav", sound_TC, rate, subtype="FLOAT")
    blocks = list(corpus.mono_blocks(tmp_path / "x.wav", 44100))
    assert len(blocks) > 2 and all(x.dtype == np.float32 for x in blocks)
    whole = audio.read(tmp_path / "x.wav")
    expected_T = audio.resample(audio.to_mono(whole.samples_TC), rate, 44100)
    np.testing.assert_array_equal(np.concatenate(blocks), expected_T)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("samples", [3, 50, 800])
def test_blocks_of_a_short_file(channels, samples, tmp_path):
    noise_TC = 0.1 * np.random.default_rng(samples).standard_normal((samples, channels))
    soundfile.write(tmp_path / "x.wav", noise_TC, 8000, subtype="FLOAT")
    got_T = np.concatenate(list(corpus.mono_blocks(tmp_path / "x.wav", 44100)))
    mono_T = audio.to_mono(audio.read(tmp_path / "x.wav").samples_TC)
    np.testing.assert_array_equal(got_T, audio.resample(mono_T, 8000, 44100))


def test_the_memory_of_decoding_does_not_depend_on_the_length(bursts, tmp_path):
    def peak_bytes(seconds):
        sound_T = bursts(1, seconds, 48000)
        soundfile.write(tmp_path / "x.wav", np.stack([sound_T, sound_T], axis=-1), 48000)
        tracemalloc.start()
        for _ in corpus.mono_blocks(tmp_path / "x.wav", 44100):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(1.0)  # what is imported and planned once
    few, many = peak_bytes(30.0), peak_bytes(120.0)
    assert many < 1.1 * few + 1e6 < 46e6  # which is 120 s as float32


def test_a_file_that_is_away_makes_no_store_without_it(tmp_path, bursts, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "in" / name / "0.wav", bursts(ord(name), 1.0, 8000), 8000)
    gone, read = tmp_path / "in" / "b" / "0.wav", corpus.mono_blocks
    data = Data(sources=(f"folder:{tmp_path / 'in'}",), cache_dir=f"{tmp_path}/c", sample_rate=8000)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # in this process

    def away(path, rate):
        if gone.exists() and "/a/" in path:  # listed, and not there when its turn comes
            gone.rename(tmp_path / "kept")
        return read(path, rate)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "mono_blocks", away)
        with pytest.raises(
            CorpusError, match=r"b/0.wav' cannot be read \(No such file.*: mend that"
        ):
            corpus.open_corpus(data, "all", silent)
    assert list((tmp_path / "c").iterdir()) == []
    (tmp_path / "kept").rename(gone)
    assert len(corpus.open_corpus(data, "all", silent).talker_R) == 2


def test_what_fails_once_is_tried_again(tmp_path, bursts):
    soundfile.write(tmp_path / "0.wav", bursts(1, 1.0, 8000), 8000)
    left = [audio.AudioError("an error of the network")]

    def once():
        if left:
            raise left.pop()
        return 5

    assert corpus.tried_again(once, tmp_path / "0.wav") == 5 and not left


# --- workers -------------------------------------------------------------------------------------


def in_python(words: str, *places: Path) -> subprocess.CompletedProcess:
    """Runs words that import from `places`, in a Python in which warnings are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", words],
        capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))},
    )  # fmt: skip


DIES = """
import os, signal, time
def job(number):
    time.sleep(0.1)
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory ends
    return number
"""


def test_a_worker_that_is_killed_is_one_line(repo, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    words = (
        "import dies; from eqst import command, parallel; say = lambda line: None;"
        "work = lambda: list(parallel.results(dies.job, list(range(8)), 'reading', say, 2));"
        "command.start('eqst.x', lambda: None, work)"
    )
    done = in_python(words, repo, tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert "eqst.x: reading: one of 2 worker processes was killed, out of memory" in done.stderr
    assert "--workers" in done.stderr


# --- TFDS sets of others --------------------------------------------------------------------------


class Audio:
    """A feature of TFDS's by this name, as far as it is looked at."""

    sample_rate = 8000


class Examples(list):
    """A data source that counts what is read of it."""

    reads = 0

    def __getitem__(self, position):
        self.reads += 1
        return super().__getitem__(position)


def test_a_tfds_set_is_not_read_again_once_its_store_is_made(tmp_path, bursts, monkeypatch):
    names = ("s1", "s1", "s2", "s2", "s3")
    examples = Examples({"audio": bursts(i, 1.0, 8000), "speaker": x} for i, x in enumerate(names))
    builder = SimpleNamespace(
        data_path=epath.Path(tmp_path / "set"),
        data_dir=tmp_path / "set",
        info=SimpleNamespace(features={"audio": Audio(), "speaker": ""}, full_name="set/1.0.0"),
        as_data_source=lambda split: examples,
    )
    monkeypatch.setattr(corpus, "_builder", lambda name: builder)
    data = Data(sources=("tfds:set",), cache_dir=str(tmp_path / "c"), sample_rate=8000)
    said = []
    made = corpus.open_corpus(data, "all", said.append)
    assert said == ["tfds:set: making a store of 5 examples, once"]
    assert made.length_R.tolist() == [16000, 16000, 8000] and examples.reads >= len(examples)
    examples.reads = 0
    again = [corpus.open_corpus(data, split, silent) for split in ("train", "valid", "all")]
    assert examples.reads == 0 and again[2].talker_R == made.talker_R


@pytest.mark.parametrize("voice", ["speaker", "speaker_id", "client_id", "accent"])
def test_who_speaks_may_have_other_names_and_to_know_nobody_is_said(
    voice, tmp_path, bursts, monkeypatch
):
    names = ("s1", "s2", "s1", "s2", "s3")
    examples = Examples({"audio": bursts(i, 1.0, 8000), voice: x} for i, x in enumerate(names))
    builder = SimpleNamespace(
        data_path=epath.Path(tmp_path / "set"),
        data_dir=tmp_path / "set",
        info=SimpleNamespace(features={"audio": Audio()}, full_name="set/1.0.0"),
        as_data_source=lambda split: examples,
    )
    monkeypatch.setattr(corpus, "_builder", lambda name: builder)
    data = Data(sources=("tfds:set",), cache_dir=str(tmp_path / "c"), sample_rate=8000)
    # A store of before, when this name was not known, had five talkers: it is not taken.
    assert len(corpus.open_corpus(data, "all", silent).talker_R) == 5
    builder.info.features[voice] = ""
    said: list[str] = []
    train, dev = (corpus.open_corpus(data, x, said.append).talker_R for x in ("train", "dev"))
    known = voice != "accent"
    assert len(corpus.open_corpus(data, "all", silent).talker_R) == (3 if known else 5)
    assert not set(train) & set(dev)
    noted = [line for line in said if "has no feature speaker, speaker_id, client_id" in line]
    assert len(noted) == (0 if known else 1)
    assert known or "each of its 5 examples counts as a talker of its own" in noted[0]


def test_index_is_readable_json(voices, cache):
    for place in cache.glob("folder-*"):
        index = json.loads((place / "index.json").read_text())
        assert {"sample_rate", "recordings", "skipped"} <= set(index)


GROWS = """
import time
import numpy as np
KEPT = []
def job(number):
    KEPT.append(np.ones(30_000_000))  # 240 MB; joblib takes a worker away that grew by 300
    time.sleep(0.7)  # and looks once a second
    return number
"""


def test_a_worker_that_grows_is_replaced_even_where_warnings_are_errors(repo, tmp_path):
    pytest.importorskip("psutil", reason="joblib sees a worker's memory by psutil alone")
    (tmp_path / "grows.py").write_text(GROWS)
    words = (
        "import grows; from eqst import parallel; "
        "print(list(parallel.results(grows.job, list(range(12)), 'x', lambda line: None, 2)))"
    )
    done = in_python(words, repo, tmp_path)
    assert done.stdout.strip() == str(list(range(12))), done.stderr[-2000:]
    assert done.stderr == ""


KILLED = """
import os, signal, subprocess
os.cpu_count = lambda: 2
from eqst import config, corpus
few = {"synthetic_talkers": 4, "synthetic_seconds": 2.0}
data = config.Data(sources=("synthetic",), cache_dir=".", **few)
corpus.open_corpus(data, "all", print)
words = ["ps", "-o", "args=", "--ppid", str(os.getpid())]
print(subprocess.run(words, capture_output=True, text=True).stdout, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_worker_outlives_a_store(repo, tmp_path):
    """One would hold the stdout of a process that is killed, and `.. | tee log` would wait."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repo)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "4 of 4" in done.stdout and "ps -o" in done.stdout and "popen_loky" not in done.stdout
