"""Whose file is whose: the layouts of public sets through `folder:` and `eqst.build`, which have to
agree; folders that may be read in two ways; links. (What the builder alone does: test_build.)"""

import csv
import os
import re
import zlib
from pathlib import Path

import pytest
import soundfile

from eqst import build, chunking, corpus, layouts, shards
from eqst.config import Data
from eqst.corpus import CorpusError

RATE = 8000


def silent(_):
    pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Starting workers would be most of the time."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def put(bursts):
    """A function (root, names): writes another second of sound for each name."""

    def write(root: Path, *names: str) -> None:
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, bursts(zlib.crc32(name.encode()), 1.1, RATE), RATE)

    return write


def found_in(root: Path, **options) -> layouts.Found:
    usual = {"layout": None, "stems": ("mixture",), "manifest": None, "permissive_only": False}
    return layouts.find(root, **(usual | options))


def talkers_of(root: Path) -> dict[str, list[str]]:
    """The files of each talker (or track)."""
    files: dict[str, list[str]] = {}
    for place, paths in found_in(root).files.items():
        files.setdefault(place.talker, []).extend(str(path) for path in paths)
    return files


def by_folder(root: Path, cache: Path, manifest: str = "", say=silent) -> dict[str, set[str]]:
    """Names of the recordings in each split, through the folder source."""
    data = Data(
        sources=(f"folder:{root}",), cache_dir=str(cache), sample_rate=RATE, manifest=manifest,
        dev_share=0.3, valid_share=0.0,
    )  # fmt: skip
    opened = {split: corpus.open_corpus(data, split, say) for split in ("train", "dev")}
    return {
        split: {x.removeprefix("folder/") for x in recordings.talker_R}
        for split, recordings in opened.items()
    }


def by_build(root: Path, data_dir: Path) -> dict[str, set[str]]:
    """The same through a set."""
    pytest.importorskip("tensorflow_datasets", reason="needs the extra [data]: TFDS")
    pytest.importorskip("array_record", reason="needs the extra [data]: array-record")
    found = found_in(root)
    settings = chunking.Settings(
        name="tiny", version="1.0.0", layout=found.layout, stems=("mixture",), manifest="",
        permissive_only=False, sample_rate=RATE, chunk_seconds=1.0, dev_share=0.3,
        min_seconds=1.0, min_lufs=-60.0, shard_mb=1,
    )  # fmt: skip
    _, info = build.build(root, data_dir, settings, found, workers=1, say=silent)
    return {
        split: {row["recording"] for row in info["recordings"] if row["split"] == split}
        for split in shards.SPLITS
    }


def librispeech(above: str = "", mark: str = "-") -> list[str]:
    return [
        f"{above}{speaker}/{chapter}/{mark.join((speaker, chapter, f'{number:04d}'))}.flac"
        for speaker in ("100", "101", "102", "103")
        for chapter in (f"1{speaker}", "2000")  # 2000: of several speakers
        for number in range(2)
    ]


@pytest.mark.parametrize("above", ["", "train-clean-100/", "LibriSpeech/train-clean-100/"])
@pytest.mark.parametrize("mark", ["-", "_"])
def test_a_speaker_of_librispeech_is_one_talker_in_all_chapters(above, mark, put, tmp_path):
    put(tmp_path / "in", *librispeech(above, mark))
    assert found_in(tmp_path / "in").layout == "librispeech"
    talkers = talkers_of(tmp_path / "in")
    assert set(talkers) == {"100", "101", "102", "103"}
    assert len(talkers["101"]) == 4 and all("/101/" in f"/{x}" for x in talkers["101"])


def test_librispeech_is_split_by_speaker_by_both_ways(put, tmp_path):
    put(tmp_path / "in", *librispeech())
    splits = by_folder(tmp_path / "in", tmp_path / "cache")
    assert not splits["train"] & splits["dev"] and splits["dev"]
    assert splits["train"] | splits["dev"] == {"100", "101", "102", "103"}
    assert by_build(tmp_path / "in", tmp_path / "sets") == splits


def test_names_that_only_look_so_stay_with_their_folder(put, tmp_path):
    put(tmp_path, *(f"{name}/2024-01-{day:02d}.wav" for name in "abc" for day in (1, 2)))
    assert found_in(tmp_path).layout == "folder" and set(talkers_of(tmp_path)) == set("abc")


def test_voices_of_daps_are_not_torn_apart_by_condition(put, tmp_path):
    names = [
        f"{condition}/{talker}_script1_{condition}.wav"
        for condition in ("clean", "produced")
        for talker in ("f1", "f2", "m1", "m10")
    ]
    put(tmp_path / "in", *names, "clean/readme_tone.wav", "clean/._f1_script1_clean.wav")
    said: list[str] = []
    splits = by_folder(tmp_path / "in", tmp_path / "cache", say=said.append)
    voices = {split: {x.split("/")[0] for x in names} for split, names in splits.items()}
    assert not voices["train"] & voices["dev"] and len(voices["dev"]) == 1
    assert {x.split("/")[1] for x in splits["dev"]} == {"clean", "produced"}
    assert sum(map(len, splits.values())) == 8
    assert by_build(tmp_path / "in", tmp_path / "sets") == splits
    notes = [x for x in said if not x.startswith("reading")]
    assert len(notes) == 2 and "has the layout daps: 4 talkers" in notes[0]
    assert "left out 1 for this: clean/readme_tone.wav: not TALKER_scriptN" in notes[1]


@pytest.mark.parametrize("above", ["", "musdb18hq/", "sets/musdb18hq/"])
def test_nothing_of_musdbs_test_is_trained_on(above, put, tmp_path):
    tracks = ["train/A - 1", "train/B - 2", "test/C - 3", "test/D - 4"]
    put(tmp_path / "in", *(f"{above}{x}/{stem}.wav" for x in tracks for stem in layouts.STEMS))
    wanted = {
        "train": {f"{above}{x}/mixture" for x in tracks[:2]},
        "dev": {f"{above}{x}/mixture" for x in tracks[2:]},
    }
    assert by_folder(tmp_path / "in", tmp_path / "cache") == wanted
    assert by_build(tmp_path / "in", tmp_path / "sets") == wanted


def test_tracks_beside_musdbs_are_split_by_hash_in_both_ways(put, tmp_path):
    tracks = ["train/A", "test/B", *(f"mine/{x}" for x in "CDEF")]
    put(tmp_path / "in", *(f"{x}/mixture.wav" for x in tracks))
    splits = by_folder(tmp_path / "in", tmp_path / "cache")
    assert "train/A/mixture" in splits["train"] and "test/B/mixture" in splits["dev"]
    assert len(splits["dev"]) == 2 and sum(map(len, splits.values())) == 6
    assert by_build(tmp_path / "in", tmp_path / "sets") == splits


def test_vctk_through_the_folder_source(put, tmp_path):
    names = [
        f"wav48_silence_trimmed/p{talker}/p{talker}_{number:03d}_mic{microphone}.flac"
        for talker in (225, 226, 227)
        for number in (1, 2)
        for microphone in (1, 2)
    ]
    put(tmp_path / "in", *names)
    splits = by_folder(tmp_path / "in", tmp_path / "cache")
    voices = {split: {x.split("/")[0] for x in names} for split, names in splits.items()}
    assert sorted(voices["train"] | voices["dev"]) == ["p225", "p226", "p227"]
    assert not voices["train"] & voices["dev"] and sum(map(len, splits.values())) == 6
    assert by_build(tmp_path / "in", tmp_path / "sets") == splits


# --- which folder is the talker ------------------------------------------------------------------


NESTED = ("ann/monday/0.wav", "ann/tuesday/0.wav", "bob/monday/0.wav", "cy/0.wav")


@pytest.mark.parametrize("names", [NESTED, ("ann/0.wav", "ann/more/0.wav", "bob/0.wav")])
def test_of_folders_in_folders_it_is_said_that_the_inner_ones_are_talkers(names, put, tmp_path):
    put(tmp_path / "in", *names)
    said: list[str] = []
    by_folder(tmp_path / "in", tmp_path / "cache", say=said.append)
    (doubt,) = (x for x in said if not x.startswith("reading"))
    assert re.search(r"in: ann\S* and ann\S* count as two talkers.* manifest \(path", doubt)
    inner = found_in(tmp_path / "in")
    assert inner.doubt == doubt
    assert {x.talker for x in inner.files} == {str(Path(x).parent) for x in names}
    assert not found_in(tmp_path / "in", layout="folder").doubt  # who names it knows


def test_a_manifest_says_who_it_is(put, tmp_path):
    put(tmp_path / "in", *NESTED)
    with open(tmp_path / "m.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "split", "talker"))
        for name in NESTED:
            talker = name.split("/")[0]
            split = "dev" if talker == "bob" else "train"
            writer.writerow((f"in/{name}", split, talker))
    splits = by_folder(tmp_path / "in", tmp_path / "cache", str(tmp_path / "m.csv"))
    assert splits == {"train": {"ann", "cy"}, "dev": {"bob"}}


def test_folders_that_can_be_read_in_one_way_only(put, tmp_path):
    put(tmp_path, "a/0.wav", "b/deep/er/0.wav", "b/deep/er/1.wav", "c.wav")
    assert talkers_of(tmp_path) == {
        "a": ["a/0.wav"], "b/deep/er": ["b/deep/er/0.wav", "b/deep/er/1.wav"], "c": ["c.wav"],
    }  # fmt: skip


def test_files_straight_in_the_folder_are_said_to_be_talkers(put, tmp_path):
    put(tmp_path / "in", "a.wav", "b.wav", "c/0.wav", "c/1.wav")
    said: list[str] = []
    by_folder(tmp_path / "in", tmp_path / "cache", say=said.append)
    (note,) = (x for x in said if not x.startswith("reading"))
    assert note.endswith(": 2 files lie straight in it: each counts as a talker")


# --- links ---------------------------------------------------------------------------------------


def test_links_to_talkers_and_files_are_followed(put, tmp_path):
    put(tmp_path / "far", "a/0.wav", "b/0.wav", "b/.hidden/1.wav", "c.wav")
    put(tmp_path / "in", "d/0.wav")
    for name in ("a", "b", "c.wav"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "far" / name)
    wanted = {x: [f"{x}/0.wav"] for x in "abd"} | {"c": ["c.wav"]}
    assert talkers_of(tmp_path / "in") == wanted
    splits = by_folder(tmp_path / "in", tmp_path / "cache")
    assert splits["train"] | splits["dev"] == set("abcd")
    assert by_build(tmp_path / "in", tmp_path / "sets") == splits


def test_loops_of_links_end_and_a_folder_of_two_names_is_one_talker(put, tmp_path):
    put(tmp_path / "in", "z/0.wav", "y/0.wav")
    put(tmp_path, "beside/0.wav")
    links = {"y/loop": "in/y", "y/up": ".", "a": "in/z", "again": "in", "b": "in/a"}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    assert talkers_of(tmp_path / "in") == {"y": ["y/0.wav"], "z": ["z/0.wav"]}


@pytest.mark.parametrize("name", ["a", "b/1.wav"])
def test_a_link_that_leads_nowhere_is_named(name, put, tmp_path):
    put(tmp_path, "b/0.wav", "c/0.wav")
    (tmp_path / name).symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone")  # no business of ours
    with pytest.raises(CorpusError, match=f"{name} is a link that leads nowhere: mend it"):
        found_in(tmp_path)


def test_a_folder_that_cannot_be_looked_into_is_an_error(put, tmp_path, monkeypatch):
    put(tmp_path, "b/0.wav", "c/0.wav")
    scan = os.scandir

    def refuses(path):
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(PermissionError, match="denied.*c'"):
        found_in(tmp_path)
