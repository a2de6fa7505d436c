"""Training: that it learns, exact resuming, any number of devices, and how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from eqst import (
    batches,
    checkpoint,
    config,
    corpus,
    learner,
    objective,
    pairs,
    record,
    stopping,
    train,
)

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))

# Small enough for seconds: a few synthetic talkers, one-second segments, narrow networks.
TINY = {
    "data.synthetic_talkers": 8,
    "data.synthetic_seconds": 6.0,
    "data.segment_seconds": (1.0,),
    "data.valid_share": 0.3,
    "model.hidden": 16,
    "model.blocks": 1,
    "model.channels": 2,
    "train.batch_size": 8,
    "train.steps": 6,
    "train.warmup_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 3,
    "train.eval_pairs": 8,
    "train.checkpoint_every": 2,
}
POOLED = {
    "features.kind": "pooled",
    "model.comparison": "direct",
    "model.head": "continuous",
    "data.rendering": "pooled",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def silent(_: str) -> None:
    """Takes progress lines and keeps nothing."""


def losses(workdir: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def final_params(workdir: Path) -> dict[str, np.ndarray]:
    loaded = checkpoint.load(workdir, which="last")
    leaves = jax.tree_util.tree_flatten_with_path(loaded.params)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def assert_bitwise_equal(a: Path, b: Path) -> None:
    left, right = final_params(a), final_params(b)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.tobytes() == right[name].tobytes(), name


def command(workdir: Path, cache: Path, changes: dict) -> list[str]:
    settings = TINY | POOLED | {"data.cache_dir": str(cache)} | changes
    values = [f"--config.{key}={value}" for key, value in settings.items()]
    file = CONFIGS[0].with_name("pooled.py")
    return [sys.executable, "-m", "eqst.train", f"--config={file}", f"--workdir={workdir}", *values]


def test_it_learns(configure, cache, tmp_path):
    """On few talkers the shape error falls well under that of the first steps."""
    changes = {
        "train.steps": 150,
        "train.batch_size": 64,
        "model.hidden": 64,
        "train.learning_rate": 3e-3,
        "train.eval_every": 150,
        "train.checkpoint_every": 150,
        "data.protocol": "plain",
    }
    made = configure(TINY | POOLED | changes | {"data.cache_dir": str(cache)})
    train.train(made, tmp_path, silent)
    curve = losses(tmp_path)
    assert np.mean(curve[-10:]) < 0.75 * np.mean(curve[:5])


@pytest.mark.long
def test_loss_curve_is_the_same_on_1_2_and_4_devices(configure, cache, tmp_path):
    curves, held_out = [], []
    for devices in (1, 2, 4):
        # 7 pairs to evaluate on divide by no number of devices.
        changes = {"train.devices": devices, "train.eval_pairs": 7, "data.cache_dir": str(cache)}
        train.train(configure(TINY | POOLED | changes), tmp_path / str(devices), silent)
        curves.append(losses(tmp_path / str(devices)))
        held_out.append(losses(tmp_path / str(devices), "valid_shape_db"))
    assert len(held_out[0]) == 2
    for curve, errors in zip(curves[1:], held_out[1:], strict=True):
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)
        np.testing.assert_allclose(errors, held_out[0], rtol=1e-5)


def test_stopping_between_checkpoints_resumes_bitwise(configure, cache, tmp_path, monkeypatch):
    # Lines of the record, every 3 steps, are means over steps of both sides of the break at 2.
    changes = {"data.cache_dir": str(cache), "model.dropout": 0.2, "train.log_every": 3}
    made = configure(TINY | POOLED | changes)
    train.train(made, tmp_path / "whole", silent)
    real_add = record.Log.add

    def stop_at_third(log, step, terms, waited):
        if step == 2:
            raise RuntimeError("the machine went away")
        real_add(log, step, terms, waited)

    monkeypatch.setattr(record.Log, "add", stop_at_third)
    with pytest.raises(RuntimeError, match="went away"):
        train.train(made, tmp_path / "cut", silent)
    monkeypatch.setattr(record.Log, "add", real_add)
    lines = []
    train.train(made, tmp_path / "cut", lines.append)
    assert any("resumed at step 2" in line for line in lines)
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_finished_run_is_recognised_at_once(configure, cache, tmp_path, monkeypatch):
    made = configure(TINY | POOLED | {"data.cache_dir": str(cache), "train.steps": 2})
    train.train(made, tmp_path, silent)
    monkeypatch.setattr(batches, "make_source", None)  # would be called if it went on
    lines = []
    train.train(made, tmp_path, lines.append)
    assert lines[-1] == f"finished: {tmp_path}"


def test_other_settings_on_a_workdir_are_refused_with_the_keys(configure, cache, tmp_path):
    made = TINY | POOLED | {"data.cache_dir": str(cache), "train.steps": 2}
    train.train(configure(made), tmp_path, silent)
    with pytest.raises(config.ConfigError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        train.train(configure(made | {"train.learning_rate": 0.5}), tmp_path, silent)


def test_other_recordings_than_it_began_with_are_refused(configure, bursts, tmp_path, monkeypatch):
    """Else a talker that the best checkpoint was chosen by might now be trained on."""
    for talker in range(12):
        (tmp_path / f"talk/t{talker}").mkdir(parents=True)
        file = tmp_path / f"talk/t{talker}/a.wav"
        soundfile.write(file, 0.1 * bursts(talker, 6.0, 16000), 16000)
    own = {"data.sources": (f"folder:{tmp_path / 'talk'}",), "data.sample_rate": 16000}
    own |= {"data.cache_dir": str(tmp_path / "cache"), "data.dev_share": 0.0}
    made = configure(TINY | POOLED | own | {"train.devices": 1})

    def stop_at_4(line: str) -> None:
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(made, tmp_path / "run", stop_at_4)
    (tmp_path / "talk/t5").rename(tmp_path / "t5")
    with pytest.raises(config.ConfigError, match=r"other recordings \(.*digest: \w+ -> \w+"):
        train.train(made, tmp_path / "run", silent)
    (tmp_path / "t5").rename(tmp_path / "talk/t5")
    lines: list[str] = []
    train.train(made, tmp_path / "run", lines.append)
    assert "resumed at step 2 of 6" in lines
    # Of several processes all see the same.
    answers = iter([np.array([1, 1]), np.array([1, 2])])
    monkeypatch.setattr(train.processes, "gathered", lambda number: next(answers))
    with pytest.raises(config.ConfigError, match="the processes see different recordings in fold"):
        train.train(made, tmp_path / "other", silent)


def test_a_loss_that_is_not_finite_stops_with_the_step(configure, cache, tmp_path, monkeypatch):
    made = configure(TINY | POOLED | {"data.cache_dir": str(cache)})
    real = objective.pair_terms

    def poisoned(settings, prediction, label_KP, weights):
        terms = real(settings, prediction, label_KP, weights)
        # The label of example 8 * 4 + 1 (step 4) makes the loss NaN.
        return terms._replace(loss=jax.numpy.where(label_KP[0, 0] == poison, np.nan, terms.loss))

    recordings = corpus.open_corpus(made.data, "train", silent)
    index, _ = pairs.build_index(recordings, 1.0, made.data.min_loudness_lufs)
    poison = pairs.draw(made.seed, 8 * 4 + 1, index, protocol="mixed").label_KP[0, 0]
    monkeypatch.setattr(objective, "pair_terms", poisoned)
    with pytest.raises(FloatingPointError, match="nan at step 4"):
        train.train(made, tmp_path, silent)
    assert checkpoint.load(tmp_path, which="last").step == 4


@pytest.mark.long
def test_kill_9_and_the_same_command_end_bitwise_equal(cache, tmp_path):
    changes = {"train.steps": 300, "train.checkpoint_every": 20, "train.eval_every": 100}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole, cache, changes), check=True, capture_output=True, timeout=400)
    for steps in (40, 150):
        victim = subprocess.Popen(command(cut, cache, changes), stdout=subprocess.DEVNULL)
        wait_for_step(cut, steps, victim)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(60) == -signal.SIGKILL
    subprocess.run(command(cut, cache, changes), check=True, capture_output=True, timeout=400)
    assert_bitwise_equal(whole, cut)


@pytest.mark.long
def test_sigterm_saves_and_exits_75_and_the_command_resumes(cache, tmp_path):
    # So many steps that it cannot be over; a checkpoint is never due by itself.
    changes = {"train.steps": 100000, "train.checkpoint_every": 100000, "train.eval_every": 100000}
    victim = subprocess.Popen(
        command(tmp_path, cache, changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(tmp_path, 5, victim)
    victim.send_signal(signal.SIGTERM)
    output, _ = victim.communicate(timeout=120)
    assert victim.returncode == train.EXIT_INTERRUPTED, output
    assert "SIGTERM: saved at step" in output and "Traceback" not in output
    assert checkpoint.load(tmp_path, which="last").step >= 5


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run's record has reached a step."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        try:
            last = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
            if json.loads(last)["step"] >= step:
                return
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


def test_the_command_says_a_mistake_in_one_line(tmp_path):
    wrong = command(tmp_path, tmp_path, {"data.sources": "('folder:/nowhere',)"})
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("eqst.train: /nowhere is not a folder")
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_the_line_end_to_end_by_its_commands(cache, tmp_path, repo):
    """train -> evaluate -> match -> triples, as a person would, and every file is there."""
    run, pair = tmp_path / "run", tmp_path / "pair"
    subprocess.run(command(run, cache, {}), check=True, capture_output=True, timeout=300)
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}

    def module(name: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"eqst.{name}", *words],
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
            cwd=repo,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "results"
    words = [f"--workdir={run}", f"--output={out}", "--seconds=1", "--pairs=16"]
    text = module("evaluate", *words, "--baselines=false")
    assert "shape RMSE in dB, plain" in text
    results = json.loads((out / "results.json").read_text())
    assert results["figures"]["coloured"]["1 s"]["model"]["shape_rmse_db"]["pairs"] == 16
    assert results["properties"]["level_change_rms_db"] < 1e-3
    assert (out / "error_seconds.png").stat().st_size > 10_000

    pair.mkdir()
    for seed, name in enumerate(("ex1_input", "ex1_reference", "ex1_estimated")):
        noise = np.random.default_rng(seed).standard_normal((66150, 1)) * 0.05
        soundfile.write(pair / f"{name}.wav", noise, 44100)
    module(
        "match",
        f"--workdir={run}",
        f"--input={pair / 'ex1_input.wav'}",
        f"--reference={pair / 'ex1_reference.wav'}",
        f"--output={tmp_path / 'matched.wav'}",
        f"--settings={tmp_path / 'eq.json'}",
        f"--picture={tmp_path / 'eq.png'}",
    )
    assert len(json.loads((tmp_path / "eq.json").read_text())["bands"]) == 4
    assert soundfile.info(tmp_path / "matched.wav").frames == 66150
    module("triples", f"--workdir={run}", f"--data={pair}", f"--output={tmp_path / 'demo'}")
    sets = json.loads((tmp_path / "demo" / "triples.json").read_text())["sets"]
    # White noise against white noise: nothing to do, so untouched is the nearest of them.
    assert sets["ex"]["third_octave"]["untouched"] < 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.data.sorces=x"], "sources"),
        (["--config.train.steps=-3"], "train.steps is -3; it lies between 1 and"),
        (["--config=configs/none.py"], "configs/none.py"),
    ],
)
def test_a_wrong_setting_is_one_line(words, said, tmp_path):
    usual = [] if words[0].startswith("--config=") else [f"--config={CONFIGS[0]}"]
    done = subprocess.run(
        [sys.executable, "-m", "eqst.train", *usual, f"--workdir={tmp_path}", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_is_not_finite_is_seen():
    tree = {"a": {"b": np.ones(3, np.float32)}, "c": np.zeros((2, 2), np.float32)}
    assert bool(learner.all_finite(tree))
    for bad in (np.nan, np.inf):
        tree["c"][1, 0] = bad
        assert not bool(learner.all_finite(tree))


def test_a_signal_between_the_stages_of_the_start_is_obeyed_there():
    with stopping.Signals() as signals:
        signals.stop_early()  # nothing has come
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(train.Interrupted, match="SIGTERM"):
            signals.stop_early()
