"""Storage that is slow, fails or is damaged under a run, and processes that go while it writes."""

import contextlib
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_interruption import figures, sealed, step_of
from test_processes import ends, started, train_words, wait_for_line
from test_train import POOLED, TINY, silent

from eqst import arrays, saving, seal, train
from eqst.checkpoint import CheckpointError, Checkpoints
from eqst.config import ConfigError
from eqst.processes import START_AGAIN
from eqst.seal import complete_steps


def tree_of(number: float) -> dict[str, Any]:
    return {"params": {"w": jnp.full((64, 3), number)}, "step": jnp.int32(number)}


def steps_in(workdir: Path, which: str = "last") -> list[int]:
    return complete_steps(workdir / "checkpoints" / which)


# Saving while the loop goes on


class Gate:
    """Holds back the end of every write until it is opened, or has it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = {"last": threading.Event(), "best": threading.Event()}
        self.errors: dict[str, Exception] = {}
        begin_write = arrays.begin_write

        def held_back(folder: Any, tree: Any) -> Callable[[], None]:
            finish, which = begin_write(folder, tree), folder.parent.name

            def later() -> None:
                assert self.opened[which].wait(60)
                finish()
                if which in self.errors:
                    raise self.errors[which]

            return later

        monkeypatch.setattr(arrays, "begin_write", held_back)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


def test_a_save_under_way_counts_when_it_is_complete_and_the_next_waits_for_it(gate, tmp_path):
    with Checkpoints(tmp_path) as run:
        assert run.save(1, tree_of(1), {"seen": 1}, wait=False)
        run.check()
        assert steps_in(tmp_path) == []
        threading.Timer(0.3, gate.opened["last"].set).start()
        before = time.monotonic()
        assert run.save(2, tree_of(2), wait=False)  # one at a time
        assert time.monotonic() - before > 0.2 and steps_in(tmp_path)[0] == 1
    assert steps_in(tmp_path) == [1, 2]  # the end of the block waits
    with Checkpoints(tmp_path) as run:
        step, tree = run.restore(tree_of(0))
    assert step == 2 and tree["step"] == 2


def test_a_last_checkpoint_never_counts_before_the_best_of_its_step(gate, tmp_path):
    """Else a kill in between would lose a best one that nobody makes again."""
    gate.opened["last"].set()
    with Checkpoints(tmp_path) as run:
        run.save_best(1, tree_of(1)["params"], 0.5, wait=False)
        run.save(1, tree_of(1), wait=False)
        time.sleep(0.5)
        assert steps_in(tmp_path) == steps_in(tmp_path, "best") == []
        assert run.best_metric() == 0.5
        assert not run.save_best(2, tree_of(2)["params"], 0.6, wait=False)
        gate.opened["best"].set()
        run.wait()
        assert steps_in(tmp_path) == steps_in(tmp_path, "best") == [1]


def test_an_error_meanwhile_is_told_at_the_next_look_and_nothing_after_it_counts(gate, tmp_path):
    for event in gate.opened.values():
        event.set()
    said = r"best/2 cannot be saved \(No space left on device\): make room there.*goes on from"
    with pytest.raises(CheckpointError, match=said), Checkpoints(tmp_path) as run:
        run.save(1, tree_of(1))
        gate.errors["best"] = OSError(28, "No space left on device")
        run.save_best(2, tree_of(2)["params"], 0.5, wait=False)
        run.save(2, tree_of(2), wait=False)
        with pytest.raises(CheckpointError, match=said) as caught:
            for _ in range(200):
                run.check()
                time.sleep(0.05)
        assert "\n" not in str(caught.value)
        for act in (run.wait, lambda: run.save(3, tree_of(3), wait=False)):
            with pytest.raises(CheckpointError, match=said):
                act()
        run.check()
    assert steps_in(tmp_path) == [1] and steps_in(tmp_path, "best") == []
    gate.errors.clear()
    with Checkpoints(tmp_path) as run:
        restored = run.restore(tree_of(0))
        assert restored is not None and restored[1]["step"] == 1
        assert run.save(2, tree_of(2)) and run.save_best(2, tree_of(2)["params"], 0.5)


def test_an_error_that_nobody_has_asked_for_is_told_at_the_end(gate, tmp_path):
    gate.opened["last"].set()
    gate.errors["last"] = OSError(30, "Read-only file system")
    with pytest.raises(CheckpointError, match="last/1 cannot be saved .Read-only file system"):
        with Checkpoints(tmp_path) as run:
            run.save(1, tree_of(1), wait=False)
    with pytest.raises(FloatingPointError, match="mine"):  # which is what to tell
        with Checkpoints(tmp_path) as run:
            run.save(1, tree_of(1), wait=False)
            raise FloatingPointError("mine")


def test_arrays_that_the_next_step_is_given_are_saved_as_they_were(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"params": {"w": jnp.arange(2_000_000, dtype=jnp.float32)}, "key": jax.random.key(7)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    scalar = np.ones((), np.float32)
    with Checkpoints(tmp_path) as run:
        run.save(1, tree | {"scalar": scalar}, wait=False)
        weights = overwrite({"w": tree["params"]["w"]})
        scalar += 1
        weights["w"].block_until_ready()
        assert tree["params"]["w"].is_deleted()
        run.wait()
        step, found = run.restore(like | {"scalar": scalar})
    np.testing.assert_array_equal(found["params"]["w"], np.arange(2_000_000, dtype=np.float32))
    assert found["scalar"] == 1.0
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(jax.random.key(7))).all()


# Which checkpoints stay


def test_the_newest_and_every_so_many_steps_stay(tmp_path):
    with Checkpoints(tmp_path, keep=3, keep_every=20) as run:
        run.save_best(5, tree_of(5)["params"], 0.5)
        for step in range(0, 75, 5):
            run.save(step, tree_of(step))
        run.save(73, tree_of(73))  # of a signal
    assert steps_in(tmp_path) == [20, 40, 60, 65, 70, 73]
    assert steps_in(tmp_path, "best") == [5]
    with Checkpoints(tmp_path, keep=2, keep_every=40) as run:  # a policy counts from now on
        run.save(75, tree_of(75))
    assert steps_in(tmp_path) == [40, 73, 75]


def test_what_a_run_that_fell_back_has_saved_stays_beside_newer_ones(tmp_path):
    """Members of one program go on from the newest step that all have."""
    with Checkpoints(tmp_path, keep=2) as run:
        for step in (10, 20, 30):
            run.save(step, tree_of(step))
        restored = run.restore(tree_of(0), at_most=20)
        assert restored is not None and restored[0] == 20
        run.save(24, tree_of(24))
        assert 24 in steps_in(tmp_path)


@pytest.mark.long
def test_a_run_keeps_what_its_settings_say(configure, tmp_path):
    changes = {"train.steps": 12, "train.checkpoint_every": 2, "train.eval_every": 12}
    changes |= {"train.keep_newest": 3, "train.keep_every": 4}
    made = configure(TINY | POOLED | changes | {"data.cache_dir": str(tmp_path / "cache")})
    train.train(made, tmp_path / "run", silent)
    assert steps_in(tmp_path / "run") == [4, 8, 10, 12]
    assert steps_in(tmp_path / "run", "best") == [12]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.keep_newest": 1}, "train.keep_newest is 1; it lies between 2 and"),
        ({"train.keep_every": -1}, "train.keep_every is -1; it lies between 0 and"),
        (
            {"train.keep_every": 700},
            r"keep_every is 700; take 0 or a multiple of checkpoint_every \(500\)",
        ),
    ],
)
def test_policies_that_would_not_hold_are_refused(changes, said, configure):
    with pytest.raises(ConfigError, match=said):
        configure(changes)


# A bucket that fails


def assert_intact(workdir: Path) -> None:
    """Whatever counts as a checkpoint is one."""
    for which in ("last", "best"):
        for step in steps_in(workdir, which):
            seal.read_seal(epath.Path(workdir / "checkpoints" / which / str(step)))


@pytest.mark.long
def test_a_bucket_that_fails_at_any_moment_loses_nothing(bucket, configure, tmp_path):
    made = configure(TINY | POOLED | {"data.cache_dir": str(tmp_path / "cache")})
    train.train(made, "gs://b/whole", silent)
    counts = dict(bucket.count)
    draw = random.Random(11)
    cases = [(kind, draw.randint(1, counts[kind])) for kind in ("change", "read") for _ in range(5)]
    resumed = 0
    for case, (kind, number) in enumerate(cases):
        address, folder = f"gs://b/{case}", bucket.folder / f"b/{case}"
        bucket.count.update(change=0, read=0)
        bucket.fail_at = {kind: number}
        with pytest.raises((OSError, ValueError)) as caught:
            train.train(made, address, silent)
        said = saving.away(caught.value, address) or caught.value
        assert "\n" not in str(said) and "503" in str(said) and address in str(said), str(said)
        assert "the same command goes on" in str(said) or "make room" in str(said), str(said)
        bucket.fail_at = {}
        assert_intact(folder)
        before = steps_in(folder)
        lines: list[str] = []
        train.train(made, address, lines.append)
        if before:
            assert lines[0] in (f"resumed at step {before[-1]} of 6", f"finished: {address}")
            resumed += 1
        assert figures(folder) == figures(bucket.folder / "b/whole"), (kind, number)
        # Where it failed while an old checkpoint was removed, that one is still there.
        wanted, found = sealed(bucket.folder / "b/whole"), sealed(folder)
        assert {name: found[name] for name in wanted} == wanted, (kind, number)
    assert resumed > len(cases) // 2


def test_a_bucket_that_is_away_is_no_damage(bucket):
    """Nothing is set aside, and none but the newest is taken."""
    with Checkpoints("gs://b/run") as run:
        run.save(1, tree_of(1))
        run.save(2, tree_of(2))
    before = sorted(bucket.folder.rglob("*"))
    restored = None
    number = 0
    while restored is None:
        number += 1
        bucket.count["read"], bucket.fail_at = 0, {"read": number}
        try:
            with Checkpoints("gs://b/run") as run:
                restored = run.restore(tree_of(0))
        except OSError as error:
            assert "503" in str(error)
            restored = None
        bucket.fail_at = {}
        assert sorted(bucket.folder.rglob("*")) == before
        assert restored is None or restored[0] == 2
    assert restored is not None


class Unavailable(Exception):
    """As TensorFlow's, which is no OSError."""


Unavailable.__module__ = "tensorflow.python.framework.errors_impl"


def test_errors_of_the_libraries_for_buckets_become_a_line():
    error = Unavailable("Error executing an HTTP request:\n HTTP response code 503")
    said = saving.away(error, "gs://b/run")
    assert str(said).startswith(
        "gs://b/run cannot be used now (Unavailable: Error executing an HTTP"
    )
    assert "\n" not in str(said)
    assert saving.away(error, "/runs/a") is None
    assert saving.away(OSError(5, "x", "gs://b/run/config.json"), "gs://b/run") is None
    assert saving.away(RuntimeError("a mistake of ours"), "gs://b/run") is None


# Two processes

TWO = POOLED | {
    "train.steps": 200,
    "train.log_every": 4,
    "train.checkpoint_every": 3,
    "train.eval_every": 35,
    "model.dropout": 0.2,
}
KILLS = 20
# After one is killed the other would find out by itself; a scheduler does not wait for that.
ALONE_SECONDS = 1.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Path:
    """The run of two processes that nothing has happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish_two(workdir, cache)
    return workdir


def finish_two(workdir: Path, cache: Path) -> str:
    """Runs two processes to their good end; what they said."""
    with started(train_words(workdir, cache, TWO), cache) as processes:
        results = ends(processes)
    assert [(code, err) for code, _, err in results] == [(0, "")] * 2, results
    return results[0][1]


def assert_same_run(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    assert len(sealed(one)) == 3 and sealed(one) == sealed(other)
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def kill_one(workdir: Path, cache: Path, draw: random.Random, reached: int, early: bool) -> int:
    """Starts two, kills one of them at some moment, then the other; the step that was reached."""
    with started(train_words(workdir, cache, TWO), cache) as processes:
        told = processes[0]
        assert told.stdout is not None
        if early:  # anywhere in the start: imports, finding each other, statistics, restoring
            time.sleep(draw.uniform(0.0, 6.0))
        else:  # some steps on, and then anywhere in a few steps and savings
            goal = reached + draw.randint(1, 9)
            for line in told.stdout:
                reached = max(reached, step_of(line))
                if reached >= goal:
                    break
            time.sleep(draw.uniform(0.0, 0.15))
        victim, other = draw.sample(processes, 2)
        assert victim.poll() is None, "it ended before it was killed"
        victim.send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(ALONE_SECONDS)
        assert other.returncode != 0
        other.kill()
        out, _ = told.communicate(timeout=60)
        return max([reached, *map(step_of, out.splitlines())])


@pytest.mark.long
def test_kill_9_of_one_of_two_at_twenty_moments_ends_bitwise_equal(whole, cache, tmp_path):
    workdir = tmp_path / "run"
    draw = random.Random(7)
    reached = 0
    for kill in range(KILLS):
        reached = kill_one(workdir, cache, draw, reached, early=kill % 4 == 3)
        assert_intact(workdir)
    assert 30 < reached < 200
    assert "resumed at step" in finish_two(workdir, cache)
    assert_same_run(whole, workdir)
    folder = workdir / "checkpoints" / "last"
    assert len(list(folder.iterdir())) == 2  # nothing half-written stays


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_killed_in_training_ends_the_other_in_a_line(killed, cache, tmp_path):
    """Whatever finds out first: JAX, gloo, or our own look at who is there."""
    with started(train_words(tmp_path / "run", cache, TWO), cache) as processes:
        wait_for_line(processes[0], "step 20/")
        processes[killed].kill()
        _, err = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode == train.EXIT_INTERRUPTED, err
    assert err.splitlines()[-1].endswith(f": {START_AGAIN}"), err


@pytest.mark.long
def test_sigterm_to_one_of_two_stops_both_and_ends_bitwise_equal(whole, cache, tmp_path):
    workdir = tmp_path / "run"
    for told, goal in ((0, 20), (1, 60)):
        with started(train_words(workdir, cache, TWO), cache) as processes:
            wait_for_line(processes[0], f"step {goal}/")
            processes[told].send_signal(signal.SIGTERM)
            results = ends(processes)
        assert [code for code, _, _ in results] == [train.EXIT_INTERRUPTED] * 2, results
        saved = steps_in(workdir)[-1]
        assert saved >= goal
        names = ["another process was stopped"] * 2
        names[told] = "SIGTERM"
        for (_, _, err), name in zip(results, names, strict=True):
            assert err == f"{name}: saved at step {saved}; the same command resumes\n"
    assert f"resumed at step {saved} of 200" in finish_two(workdir, cache)
    assert_same_run(whole, workdir)


@pytest.mark.long
def test_two_on_a_full_disk_end_in_a_line_each_and_go_on_when_there_is_room(whole, cache, disk):
    kept = sum(
        -(-path.stat().st_size // 4096) * 4  # KiB, in pages
        for path in (whole / "checkpoints" / "last").rglob("*")
    )
    folder = disk(f"size={kept + 100}k")
    with started(train_words(folder / "run", cache, TWO), cache) as processes:
        results = ends(processes)
    assert all(code == 1 and len(err.splitlines()) == 1 for code, _, err in results), results
    errors = [err for _, _, err in results]
    assert any("(No space left on device): make room there" in err for err in errors), errors
    assert_intact(folder / "run")
    saved = steps_in(folder / "run")[-1]
    assert saved % 3 == 0
    disk("size=20m")
    assert f"resumed at step {saved} of 200" in finish_two(folder / "run", cache)
    assert_same_run(whole, folder / "run")
