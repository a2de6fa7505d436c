"""The benchmark's fixed pairs: the same bits from any process, and the ones that were published."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from eqst import batches, config, eq, float64, pairs, synthetic, tasks

RATE = tasks.SAMPLE_RATE
COLOURED = tasks.Task("here", 1.0, "coloured")


@pytest.fixture(scope="module")
def recordings(bursts, corpus_of):
    return corpus_of([bursts(seed, 6.0, RATE) for seed in range(4)], RATE)


def made(task, recordings, count=6, workers=2):
    return list(tasks.make_pairs(task, recordings, count, workers=workers))


def test_tasks_are_as_the_issue_wants_them():
    names = [task.name for task in tasks.TASKS]
    assert len(set(names)) == len(names) and 15 <= len(names) <= 25
    assert tasks.HEADLINE.name == names[0] == "speech-3s-coloured"
    for source in ("speech", "synthetic"):
        own = [task for task in tasks.TASKS if task.source == source]
        assert {task.seconds for task in own} == {1.0, 3.0, 10.0, 20.0, 30.0}
    for source in ("speech", "music", "synthetic"):
        own = [task for task in tasks.TASKS if task.source == source]
        assert {task.protocol for task in own} == {"plain", "coloured"}
        assert any(task.different for task in own) and not all(task.equalised for task in own)
    assert (
        tasks.TASKS[-1].about
        == "synthetic, 3 s, one EQ on both first, one recording, no EQ between them"
    )


def test_synthetic_talkers_are_not_those_of_training():
    training = config.Data()
    assert tasks.SYNTHETIC_SEED != training.synthetic_seed
    assert not set(tasks.SYNTHETIC_TALKERS["dev"]) & set(tasks.SYNTHETIC_TALKERS["train"])
    evaluation = config.Evaluation()
    seeds = {config.Config().seed + i for i in range(5)} | {evaluation.seed, evaluation.seed + 1}
    assert not {tasks.SEED, tasks.TUNING_SEED} & seeds


@pytest.mark.parametrize("protocol", ["plain", "coloured"])
def test_pairs_are_those_that_evaluation_would_render(protocol, recordings, configure):
    """The renderer of training, in float32 by XLA, is the independent reference."""
    setting = configure({"data.context_seconds": tasks.CONTEXT_SECONDS})
    (chunk,) = batches.rendered_chunks(
        setting, recordings, seconds=1.0, protocol=protocol, count=6, seed=tasks.SEED
    )
    plan, sounds = chunk
    for pair in made(COLOURED._replace(protocol=protocol), recordings):
        assert np.array_equal(pair.unit_KP, plan.label_KP[pair.number])
        assert pair.talker == recordings.talker_R[plan.input_recording[pair.number]]
        for got_T, sound_BT in ((pair.input_T, sounds[0]), (pair.reference_T, sounds[1])):
            wanted_T = np.asarray(sound_BT[pair.number], np.float64)
            wanted_T *= float64.PEAK / np.abs(wanted_T).max()
            assert got_T.dtype == np.int16 and len(got_T) == RATE
            assert np.abs(got_T - wanted_T).max() < 1.0  # half a step is rounding


def test_no_eq_and_different_recordings(recordings):
    flat, same = made(COLOURED._replace(equalised=False), recordings), made(COLOURED, recordings)
    for a, b in zip(flat, same, strict=True):
        assert np.array_equal(a.input_T, b.input_T)
        gains = eq.from_unit(tasks.TABLE, a.unit_KP.astype(float)).gain_db
        assert np.all(gains == 0) and not np.array_equal(a.reference_T, b.reference_T)
    assert all(pair.talker == pair.reference_talker for pair in same)
    apart = made(COLOURED._replace(different=True), recordings)
    assert all(pair.talker != pair.reference_talker for pair in apart)
    assert [np.array_equal(a.unit_KP, b.unit_KP) for a, b in zip(apart, same, strict=True)]


def test_hash_covers_samples_and_label(recordings):
    pair = made(COLOURED, recordings, 1)[0]
    others = [
        pair._replace(unit_KP=np.nextafter(pair.unit_KP, np.float32(2))),
        pair._replace(input_T=pair.input_T + np.int16(1)),
        pair._replace(reference_T=np.roll(pair.reference_T, 1)),
        pair._replace(input_T=pair.reference_T, reference_T=pair.input_T),
    ]
    assert len({x.sha256 for x in (pair, *others)}) == 5
    big_endian = pair._replace(input_T=pair.input_T.astype(">i2"))
    assert big_endian.sha256 == pair.sha256


def test_any_number_of_workers_and_any_count_give_the_same_pairs(recordings):
    hashes = [pair.sha256 for pair in made(COLOURED, recordings, 7, workers=1)]
    assert [pair.sha256 for pair in made(COLOURED, recordings, 7, workers=3)] == hashes
    assert [pair.sha256 for pair in made(COLOURED, recordings, 3, workers=2)] == hashes[:3]
    assert len(set(hashes)) == 7


REGENERATE = """
import sys
from eqst import tasks
tasks.SYNTHETIC_SECONDS = 8.0
tasks.SYNTHETIC_TALKERS = {"dev": range(3)}
workers = int(sys.argv[1])
manifest = tasks.Manifest("synthetic", (), {})
recordings = tasks.open_recordings(manifest, "dev", workers=workers, say=lambda line: None)
for task in (task for task in tasks.TASKS if task.source == "synthetic" and task.seconds <= 3):
    print(task.name, *(x.sha256 for x in tasks.make_pairs(task, recordings, 4, workers=workers)))
"""


def older_processor() -> dict[str, str]:
    """What makes numpy and OpenBLAS of this x86-64 process take the kernels of an older one."""
    import numpy._core._multiarray_umath as core

    newer = [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(newer), "OPENBLAS_CORETYPE": "Nehalem"}


@pytest.mark.long
def test_other_processes_workers_and_kernels_give_the_same_hashes(repo, tmp_path):
    """Everything anew: talkers too, in a cache of their own."""
    answers = []
    for workers, changes in ((1, {}), (3, older_processor())):
        environment = os.environ | changes | {"XDG_CACHE_HOME": str(tmp_path / str(workers))}
        environment["PYTHONPATH"] = str(repo)
        done = subprocess.run(
            [sys.executable, "-c", REGENERATE, str(workers)],
            capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(done.stdout)
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 5


def test_float32_talkers_would_not_do(repo):
    """Why the benchmark's talkers are made in float64: the test above could otherwise pass idly."""
    sounds = [synthetic.synthesise(7, 0, 4.0, exact=exact) for exact in (False, True)]
    assert sounds[1].dtype == np.float32
    steps = np.abs(float64.to_int16(sounds[0]).astype(int) - float64.to_int16(sounds[1]))
    assert 0 < steps.max() and np.corrcoef(*sounds)[0, 1] > 0.999


# ---- the published pairs


def first_pairs(source, monkeypatch, folder, talkers, count):
    """The first hashes of every task that needs no more than these recordings, and the stored."""
    manifest = tasks.standard(source)
    recordings = tasks.open_recordings(
        manifest, "dev", folder=str(folder), workers=2, say=lambda line: None
    )
    for task in tasks.of_manifest(manifest):
        if not (task.different and len(recordings.talker_R) < talkers):
            found = [x.sha256 for x in tasks.make_pairs(task, recordings, count, workers=2)]
            stored = manifest.hashes[task.name]
            assert len(stored) == tasks.STORED_PAIRS
            assert tuple(x[: tasks.HASH_DIGITS] for x in found) == stored[:count], task.name
            assert tasks.expected(manifest, task, count) == tasks.digest(found)
            yield task.name


def test_synthetic_pairs_are_the_published_ones(monkeypatch, tmp_path):
    """Pairs 0 and 1 are of talkers 0 and 1, for recordings are taken in turn."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(tasks.SYNTHETIC_TALKERS, "dev", range(2))
    checked = list(first_pairs("synthetic", monkeypatch, "", 20, 2))
    assert len(checked) == 7


def test_music_pairs_are_the_published_ones(shared, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(list(first_pairs("music", monkeypatch, shared, 3, 4))) == 4


@pytest.mark.long
@pytest.mark.parametrize("source", ["speech", "synthetic"])
def test_pairs_of_every_talker_are_the_published_ones(source, shared, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shared if source == "speech" else ""
    assert len(list(first_pairs(source, monkeypatch, folder, 1, 25))) in (11, 8)


def test_standard_manifests_list_what_their_tasks_need(shared):
    for source in ("speech", "music"):
        manifest = tasks.standard(source)
        assert {row.split for row in manifest.files} == {"dev", "train"}
        by_talker = {(row.talker, row.split) for row in manifest.files}
        assert len({talker for talker, _ in by_talker}) == len(by_talker)  # no talker in both
        tasks.check_files(list(manifest.files), str(shared))
        own = [task for task in tasks.TASKS if task.source == source]
        assert tasks.of_manifest(manifest) == own


# ---- bad input


def test_manifests_that_are_none(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(tasks.TasksError, match="cannot be read .No such file"):
        tasks.load_manifest(path)
    good = {"format": 1, "source": "x", "files": [], "pairs": {}}
    for bad in (
        "[]",
        "{",
        "{}",
        json.dumps(good | {"format": 2}),
        json.dumps(good | {"files": [{}]}),
    ):
        path.write_text(bad)
        with pytest.raises(tasks.TasksError, match="is no manifest .*: make one by"):
            tasks.load_manifest(path)
    path.write_text(json.dumps(good))
    assert tasks.load_manifest(path) == tasks.Manifest("x", (), {})


def test_files_that_are_not_the_manifests(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    row = tasks.File("a.wav", "0" * 64, "a", "dev")
    with pytest.raises(tasks.TasksError, match="is not the manifest's .SHA-256 .*: take the"):
        tasks.check_files([row], str(tmp_path))
    with pytest.raises(tasks.TasksError, match="No such file.*: --data names the folder"):
        tasks.check_files([row._replace(path="b.wav")], str(tmp_path))


def test_too_short_recordings_give_no_pairs(recordings):
    with pytest.raises(pairs.PairsError, match="no pair of 20 s"):
        made(COLOURED._replace(seconds=20.0), recordings)
    with pytest.raises(tasks.TasksError, match="its recordings give no pair of any task"):
        short = recordings._replace(power_R=tuple(x[:15] for x in recordings.power_R))
        tasks.hash_pairs(
            tasks.Manifest("here", (), {}), short, count=2, workers=1, say=lambda line: None
        )


def test_draws_do_not_depend_on_the_platform():
    """The bits that JAX drew for pair 0 when the hashes were made."""
    u = jax.random.uniform(jax.random.fold_in(jax.random.key(tasks.SEED), 0), (3,))
    assert np.asarray(u).view(np.uint32).tolist() == [1041543096, 1047671760, 1032397856]
