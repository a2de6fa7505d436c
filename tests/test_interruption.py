"""A run killed, stopped, starved of disk or damaged goes on to the same end, bit for bit."""

import dataclasses
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_train import POOLED, TINY, command, silent

from eqst import checkpoint, config, files, record, stopping, train
from eqst.checkpoint import CheckpointError, Checkpoints

KILLS = 20
# Saving is most of what it does, so most kills fall into it; the lines of the record (every 4th
# step) lie across the checkpoints (every 3rd).
OFTEN = {
    "train.steps": 400,
    "train.log_every": 4,
    "train.checkpoint_every": 3,
    "train.eval_every": 35,
    "model.dropout": 0.2,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def environment(cache) -> dict[str, str]:
    """For commands: what is compiled once is not compiled again."""
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache / "jax")}
    return os.environ | compiled | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def whole(cache, environment, tmp_path_factory) -> Path:
    """The run that nothing has happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(command(workdir, cache, OFTEN), environment)
    return workdir


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(words: list[str], environment: dict[str, str]) -> str:
    """Runs a command to its good end; what it said."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    return done.stdout


def refused(words: list[str], environment: dict[str, str]) -> str:
    """Runs a command that fails; the one line it says."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, (done.returncode, done.stderr[-3000:])
    assert len(done.stderr.splitlines()) == 1, done.stderr[-3000:]
    return done.stderr.strip()


def step_of(line: str) -> int:
    """12 of 'step 12/400  loss ..', -1 of any other line."""
    return int(line.split()[1].split("/")[0]) if line.startswith("step ") else -1


def figures(workdir: Path) -> list[dict]:
    """metrics.jsonl without its times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: x for key, x in row.items() if key not in ("pairs_per_s", "input_wait")}
        for row in rows
    ]


def sealed(workdir: Path) -> dict:
    """The checksum of every leaf of every checkpoint of a run, optimiser state included."""
    seals = sorted((workdir / "checkpoints").glob("*/*/eqst.json"))
    return {
        str(path.relative_to(workdir)): json.loads(path.read_text())["body"]["leaves"]
        for path in seals
    }


def assert_same_run(one: Path, other: Path) -> None:
    """Parameters, optimiser, best checkpoint, record and card: all bitwise."""
    assert figures(one) == figures(other)
    assert len(sealed(one)) == 3 and sealed(one) == sealed(other)
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


# Kills and signals


@pytest.mark.long
def test_kill_9_at_twenty_moments_ends_bitwise_equal(whole, cache, environment, tmp_path):
    workdir = tmp_path / "run"
    words = command(workdir, cache, OFTEN)
    draw = random.Random(4)
    reached = 0
    for kill in range(KILLS):
        process = start(words, environment)
        assert process.stdout is not None
        if kill % 4 == 3:  # anywhere in the start: imports, corpus, statistics, restoring
            time.sleep(draw.uniform(0.0, 4.0))
        else:  # some steps on, and then anywhere in a few steps and savings
            goal = reached + draw.randint(1, 12)
            for line in process.stdout:
                reached = max(reached, step_of(line))
                if reached >= goal:
                    break
            time.sleep(draw.uniform(0.0, 0.08))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and err == "", err
        reached = max([reached, *map(step_of, out.splitlines())])
    assert 40 < reached < 400
    assert "resumed at step" in finish(words, environment)
    assert_same_run(whole, workdir)
    steps = [path.name for path in (workdir / "checkpoints" / "last").iterdir()]
    assert len(steps) == 2, steps  # nothing half-written stays


def test_a_second_sigint_is_not_lost_in_a_callback_of_the_garbage_collector():
    """Where Python prints what is raised and goes on."""
    came = []

    def collected(phase: str, _: dict) -> None:
        if not came:
            came.append(phase)
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(collected)
    try:
        with pytest.raises(KeyboardInterrupt), stopping.Signals() as signals:
            signals.received = "SIGINT"
            gc.collect()
            assert came
            time.sleep(5)
    finally:
        gc.callbacks.remove(collected)


@pytest.mark.long
def test_sigterm_and_sigint_twice_end_bitwise_equal(whole, cache, environment, tmp_path):
    workdir = tmp_path / "run"
    words = command(workdir, cache, OFTEN)

    def stopped_by(after: str, *signals: int) -> tuple[int, str]:
        process = start(words, environment)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(after):
                break
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    # While it counts statistics: once is remembered for the end of that, twice ends it at once.
    # On a quick machine the end of that comes first, and the second may meet a process that goes.
    code, err = stopped_by("train: ", signal.SIGINT, signal.SIGINT)
    first = "SIGINT: stopped before training; the same command goes on\n"
    if err == first:
        assert code in (train.EXIT_INTERRUPTED, -signal.SIGINT)
    else:
        assert (code, err) == (1, "eqst.train: interrupted\n")
    code, err = stopped_by("train: ", signal.SIGTERM)
    assert code == train.EXIT_INTERRUPTED
    assert err == "SIGTERM: stopped before training; the same command goes on\n"
    for number in (signal.SIGTERM, signal.SIGINT):
        code, err = stopped_by("step ", number)
        name = signal.Signals(number).name
        assert code == train.EXIT_INTERRUPTED and err.startswith(f"{name}: saved at step "), err
        assert len(err.splitlines()) == 1
    finish(words, environment)
    assert_same_run(whole, workdir)


def small(configure: Callable, cache: Path, changes: dict) -> config.Config:
    return configure(TINY | POOLED | {"data.cache_dir": str(cache)} | changes)


@pytest.mark.long
def test_sigint_twice_in_training_and_a_record_across_checkpoints(configure, cache, tmp_path):
    """The second SIGINT leaves at once; a line's mean goes on over what came before."""
    changes = {"train.steps": 14, "train.log_every": 4, "train.checkpoint_every": 3}
    made = small(configure, cache, changes)
    train.train(made, tmp_path / "whole", silent)

    def interrupt_at_8(line: str) -> None:
        if step_of(line) == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.train(made, tmp_path / "cut", interrupt_at_8)
    assert signal.getsignal(signal.SIGINT) is before
    lines: list[str] = []
    train.train(made, tmp_path / "cut", lines.append)
    assert "resumed at step 6 of 14" in lines  # in the middle of the record's second line
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


# Damage


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def made(configure, cache) -> config.Config:
    return small(configure, cache, {"train.steps": 2})


@pytest.fixture(scope="module")
def done(made, tmp_path_factory) -> Path:
    """A short run that has ended; for copying."""
    workdir = tmp_path_factory.mktemp("done")
    train.train(made, workdir, silent)
    return workdir


@pytest.mark.long
def test_a_damaged_or_lost_card_comes_back_from_the_checkpoint(made, done, tmp_path, caplog):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    card = tmp_path / "config.json"
    good = card.read_bytes()
    # In a number of the config: still JSON, and only the checksum can tell.
    number = good.index(b'"steps": 2') + len(b'"steps": ')
    damages: list[Callable[[], None]] = [
        lambda: flip(card, number),
        lambda: flip(card, 0),
        lambda: card.write_bytes(b"\xff\xfe" + good),
        lambda: card.write_bytes(good[: len(good) // 2]),
        lambda: card.write_bytes(b""),
        card.unlink,
    ]
    for damage in damages:
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="eqst"):
            assert checkpoint.load(tmp_path, which="last").card == json.loads(good)
        (message,) = [x.getMessage() for x in caplog.records if x.name == "eqst"]
        assert str(card) in message or str(tmp_path) in message
        assert message.endswith("going on with that of step 2") and "\n" not in message
        lines: list[str] = []
        train.train(made, tmp_path, lines.append)  # it mends what it finds
        assert lines[-1] == f"finished: {tmp_path}"
        assert card.read_bytes() == good
    shutil.rmtree(tmp_path / "checkpoints")
    flip(card, number)
    with pytest.raises(CheckpointError, match="does not match its own checksum: restore it"):
        checkpoint.read_card(tmp_path)


def test_a_record_with_garbage_in_it_is_taken_up(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3)]
    garbage = [b"}", b'{"step": "x"}', b'{"loss": 1}', b"\xff\x00}", b"[1]", b'{"step": 4, "lo']
    lines = [good[0].encode(), *garbage[:4], good[1].encode(), good[2].encode(), *garbage[4:]]
    path.write_bytes(b"\n".join(lines))
    said: list[str] = []
    kept = record.Record(tmp_path, 2, False, said.append)
    assert said == [f"{path}: dropped 6 line(s) that are no record of a step"]
    kept.write(3, {"loss": 0.25})
    assert path.read_text().splitlines() == [*good[:2], json.dumps({"step": 3, "loss": 0.25})]


# Older runs, other settings, two at once


def test_a_setting_that_has_come_since_is_taken_at_its_default(made, done, tmp_path, caplog):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    card = checkpoint.read_card(tmp_path)
    older = {key: x for key, x in card.items() if key != "sha256"}  # as older versions wrote it
    del older["config"]["data"]["gate_share"], older["config"]["loss"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    lines: list[str] = []
    with caplog.at_level(logging.WARNING, logger="eqst"):
        train.train(made, tmp_path, lines.append)
    assert lines[-1] == f"finished: {tmp_path}"
    (message,) = [x.getMessage() for x in caplog.records if x.name == "eqst"]
    assert message == "the run has no data.gate_share, loss yet: taken at the default"
    gated = dataclasses.replace(made, data=dataclasses.replace(made.data, gate_share=0.5))
    with pytest.raises(config.ConfigError, match=r"data\.gate_share: 0\.0 -> 0\.5"):
        train.train(gated, tmp_path, silent)
    older["config"]["data"]["colour"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(config.ConfigError, match=r"no setting 'data\.colour'"):
        train.train(made, tmp_path, silent)


def test_a_refused_run_leaves_nothing_behind(configure, cache, tmp_path):
    bad = small(configure, cache, {"data.sources": (f"folder:{tmp_path}",)})
    with pytest.raises(ValueError, match="no audio file"):
        train.train(bad, tmp_path / "new" / "run", silent)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="no audio file"):
        train.train(bad, tmp_path / "mine", silent)
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.long
def test_the_second_of_two_runs_on_a_workdir_is_refused(cache, environment, tmp_path):
    with Checkpoints(tmp_path):
        line = refused(command(tmp_path, cache, {}), environment)
    assert line.startswith(f"eqst.train: {tmp_path}/checkpoints is in use by process {os.getpid()}")
    assert "choose another --workdir" in line


# Disks


@pytest.mark.long
def test_training_on_a_full_and_on_a_read_only_disk(whole, cache, environment, disk):
    """Room for the checkpoints to keep, not for another beside them; then none to write at all."""
    kept = sum(
        -(-path.stat().st_size // 4096) * 4  # KiB, in pages
        for path in (whole / "checkpoints" / "last").rglob("*")
    )
    folder = disk(f"size={kept + 100}k")
    words = command(folder / "run", cache, OFTEN)
    line = refused(words, environment)
    assert "(No space left on device): make room there" in line
    assert "the same command goes on from it" in line
    saved = checkpoint.load(folder / "run", which="last").step
    assert saved % 3 == 0
    assert "No space left on device" in refused(words, environment)  # and again
    assert checkpoint.load(folder / "run", which="last").step >= saved

    disk(f"size={kept + 100}k,ro")
    line = refused(words, environment)
    assert "(Read-only file system): make room there, or take a folder" in line
    other = refused(command(folder / "other", cache, OFTEN), environment)
    assert "other/checkpoints cannot be written (Read-only file system)" in other
    assert checkpoint.load(folder / "run", which="last").step >= saved

    disk("size=20m,rw")
    assert "resumed at step" in finish(words, environment)
    assert_same_run(whole, folder / "run")


def test_results_on_a_full_disk(disk, tmp_path):
    folder = disk("size=64k")
    content = {"figures": list(range(40000))}
    with pytest.raises(files.AudioError, match="results.json' cannot be written: No space left"):
        files.write_json(folder / "results.json", content)
    assert not list(folder.iterdir())


@pytest.mark.long
def test_matched_audio_on_a_full_and_on_a_read_only_disk(environment, disk, tmp_path):
    folder = disk("size=64k")
    sounds = []
    for seed in range(2):
        sounds.append(tmp_path / f"{seed}.wav")
        noise = np.random.default_rng(seed).standard_normal(88200) * 0.05
        soundfile.write(sounds[-1], noise, 44100)
    words = [sys.executable, "-m", "eqst.match", f"--input={sounds[0]}", f"--reference={sounds[1]}"]
    out = [f"--output={folder / 'out.wav'}"]
    said = refused([*words, *out], environment)
    assert "cannot write 1 channels at 44100 Hz" in said and " 0 MB are free there" in said
    assert not list(folder.iterdir())
    disk("size=64k,ro")
    assert "Read-only file system" in refused([*words, *out], environment)


# Other machines

ELSEWHERE = """
import sys
sys.modules["tensorflow"] = None
import jax, json
import numpy as np
from eqst import checkpoint, config, match, train
assert jax.device_count() == 1
workdir = sys.argv[1]
loaded = checkpoint.load(workdir)
print(loaded.step, sum(leaf.size for leaf in jax.tree.leaves(loaded.params["network"])))
made = config.from_card(checkpoint.read_card(workdir)["config"])
state = train.train(made, workdir)
print("ended", int(state.step))
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 66150)).astype(np.float32) * 0.05
print(len(match.Matcher.load(workdir).predict(a, b, 44100).bands))
"""


@pytest.mark.long
def test_saved_on_eight_devices_it_goes_on_on_one(cache, environment, tmp_path):
    """With the optimiser's state and without, with no config file and no tensorflow."""
    changes = {"train.steps": 40, "train.eval_every": 10, "train.log_every": 1}
    workdir = tmp_path / "run"
    process = start(command(workdir, cache, changes), environment | {"JAX_NUM_CPU_DEVICES": "8"})
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if step_of(line) >= 20:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == train.EXIT_INTERRUPTED, err
    assert any("8 cpu device(s)" in line for line in seen)

    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(workdir)],
        env=environment | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,  # anywhere but the clone
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step" in done.stdout and "1 cpu device(s)" in done.stdout
    assert "ended 40" in done.stdout and done.stdout.splitlines()[-1] == "4"
    # `command` starts from configs/pooled.py, whose other settings are the card's.
    values = checkpoint.read_card(workdir)["config"]
    made = config.from_card(values | {"train": values["train"] | {"devices": 1}})
    train.train(made, tmp_path / "one", silent)
    for left, right in zip(figures(tmp_path / "one"), figures(workdir), strict=True):
        for name, value in left.items():
            np.testing.assert_allclose(right[name], value, rtol=1e-5, err_msg=name)


def test_told_to_stop_while_statistics_are_made_it_leaves_with_the_next_line(
    configure, cache, tmp_path
):
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("statistics of "):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(stopping.Interrupted, match="SIGTERM: stopped before training; the same"):
        train.train(small(configure, cache, {}), tmp_path / "run", say)
    assert sum(line.startswith("statistics of ") for line in lines) <= 2
    assert not (tmp_path / "run" / "config.json").exists()
