"""How far a sweep is, read from folders made by hand; whose turn a run is."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bucket
import pytest
from etils import epath
from test_sweep import CONFIG, members_of, write_member

from eqst import lock, processes
from eqst.sweeps import progress, turn


@pytest.fixture
def member(tmp_path: Path):
    (tmp_path / "small.py").write_text(CONFIG)
    return members_of(tmp_path / "small.py")[0]


def state(workdir: Path, member) -> tuple[str, str]:
    row = progress.read(epath.Path(workdir), member)
    return row.state, row.note


def test_states(tmp_path: Path, member) -> None:
    folder = tmp_path / member.name
    assert state(tmp_path, member) == ("waiting", "")
    folder.mkdir(parents=True)
    assert state(tmp_path, member) == ("waiting", "")
    log = folder / "log.txt"
    log.write_text("train: 4 recordings\nstep 2/4  loss 1.0\n")
    assert state(tmp_path, member) == ("interrupted", "")  # kill -9 says nothing
    log.write_text("train: 4 recordings\nSIGTERM: saved at step 3; the same command resumes\n")
    assert state(tmp_path, member) == ("interrupted", "")
    log.write_text("train: 4 recordings\nlaunch/sweep.py: no pair\nsrun: error: vm: task 0\n")
    assert state(tmp_path, member) == ("failed", "no pair")
    trace = 'Traceback (most recent call last):\n  File "a"\nKeyError: 1\nof two lines\n'
    log.write_text(f"train: 4 recordings\n{trace}")
    assert state(tmp_path, member) == ("failed", "of two lines")
    log.write_text(f"train: 4 recordings\n{trace}resumed at step 2 of 4\nstep 4/4\n")
    assert state(tmp_path, member) == ("interrupted", "")
    log.write_text("x" * 50_000 + "\nlaunch/sweep.py: " + "long " * 99 + "\n")
    assert len(state(tmp_path, member)[1]) == 200
    write_member(folder, member, [1.0, 2.0], 2.0)
    assert state(tmp_path, member) == ("done", "")


def test_why_a_run_on_a_tpu_failed(tmp_path: Path, member, monkeypatch) -> None:
    """By the logs of its hosts in a bucket: of the newest attempt, whichever host says it."""

    def put(owner, name, value) -> None:
        setter = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
        setter(owner, name, value)

    bucket.install(tmp_path, put)
    folder = tmp_path / "b" / "w" / member.name
    (folder / "logs").mkdir(parents=True)

    def leave(job: str, host: str, text: str, seconds_ago: float) -> None:
        path = folder / "logs" / f"{job}-{host}.txt"
        path.write_text(f"train: 4 recordings\n{text}\n")
        os.utime(path, (time.time(), time.time() - seconds_ago))

    def now() -> tuple[str, str]:
        row = progress.read(epath.Path("gs://b/w"), member)
        return row.state, row.note

    leave("b.1", "w-0", f"process 1 has failed and says why: {processes.START_AGAIN}", 300)
    assert now() == ("interrupted", "")
    leave("b.1", "w-1", "launch/sweep.py: no space left", 310)
    assert now() == ("failed", "no space left")  # before it had any card
    (folder / "metrics.jsonl").write_text('{"step": 2}\n')
    os.utime(folder / "metrics.jsonl", (time.time(), time.time() - 400))
    assert now() == ("failed", "no space left")  # it was written to until shortly before
    os.utime(folder / "metrics.jsonl")
    assert now() == ("running", "")  # another attempt
    os.utime(folder / "metrics.jsonl", (time.time(), time.time() - 5000))
    leave("a.2", "w-0", "step 3/4", 100)
    assert now() == ("interrupted", "")
    leave("a.2", "w-0", "Traceback (most recent call last):\nKeyError: 1", 90)
    assert now() == ("failed", "KeyError: 1")
    row = progress.read(epath.Path("gs://b/w"), member)
    assert progress.table([row]).splitlines()[1].endswith("KeyError: 1")


def test_numbers(tmp_path: Path, member) -> None:
    folder = tmp_path / member.name
    folder.mkdir(parents=True)
    rates = [5.0, 100.0, 100.0, 2.0, 100.0]
    rows = [{"step": i + 1, "pairs_per_s": rate} for i, rate in enumerate(rates[:3])]
    rows += [{"step": 2, "valid_shape_db": 3.0}, {"step": 3, "valid_shape_db": 3.5}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')  # half a line is none
    row = progress.read(epath.Path(tmp_path), member)
    assert (row.step, row.steps, row.batch_size) == (3, 4, 4)
    assert row.pairs_per_s == 100.0 and row.best_db == 3.0
    assert row.seconds_left() is None  # it does not run
    assert row._replace(state="running").seconds_left() == pytest.approx(4 / 100)


def test_the_table(member) -> None:
    def row(name: str, state: str, step: int, rate: float | None, best_db: float | None):
        return progress.Progress(name, state, step, 1000, 10, rate, best_db)

    rows = [
        row("head/a/0", "done", 1000, 50.0, 2.0),
        row("head/a/1", "running", 500, 100.0, 2.125),
        row("a longer name/0", "interrupted", 0, None, None),
        row("head/b/0", "interrupted", 250, 20.0, 4.0),
    ]
    rows = progress.told(
        rows,
        {"head/a/0": ("failed", "no"), "head/b/0": ("failed", "x"), "head/a/1": ("failed", "old")},
    )
    rows = progress.told(rows, {"a longer name/0": ("queued", "Priority")})
    lines = progress.table(rows).splitlines()
    assert lines[0].split() == ["run", "state", "step", "pairs/s", "left", "best", "dB"]
    assert lines[1].split() == ["head/a/0", "done", "1,000/1,000", "50", "-", "2.000"]
    assert lines[2].split() == ["head/a/1", "running", "500/1,000", "100", "0:50", "2.125"]
    assert lines[3].startswith("a longer name/0  queued ") and lines[3].endswith("  Priority")
    assert lines[4].split()[1:3] == ["failed", "250/1,000"] and lines[4].endswith("  x")
    for name in ("1,000/1,000", "500/1,000", "0/1,000", "250/1,000"):  # one column, to the right
        line = next(x for x in lines[1:5] if f" {name} " in x)
        assert line.index(name) + len(name) == lines[0].index("step") + 4
    # 5,000 pairs of the one that runs and 10,000 of the queued one, at 100 a second.
    assert lines[-1] == "4 runs: 1 done, 1 running, 1 queued, 1 failed; left 2:30 at 100 pairs/s"
    assert progress.summary(rows[:1]) == "1 runs: 1 done"


HOLD = """
import sys, time
from etils import epath
from eqst import lock, processes
held = lock.hold(epath.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_held_lock_is_seen_and_not_disturbed(tmp_path: Path, member, repo: Path) -> None:
    folder = tmp_path / member.name / "checkpoints"
    assert lock.is_held(epath.Path(folder)) is False
    folder.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for _ in range(3):
            assert lock.is_held(epath.Path(folder)) is True
        assert state(tmp_path, member) == ("running", "")
        text = (folder / "lock").read_text()
        assert text == f"process {process.pid} on {socket.gethostname()}\n"
        process.kill()
    assert lock.is_held(epath.Path(folder)) is False
    assert state(tmp_path, member) == ("interrupted", "")
    assert lock.is_held(epath.Path("gs://no/such")) is None


TAKE = """
import pathlib, sys, time
from eqst.sweeps import turn
turn.BEAT_SECONDS = 0.2
with turn.taken(pathlib.Path(sys.argv[1]), sys.argv[2]):
    print("taken", flush=True)
    time.sleep(120)
"""


@contextlib.contextmanager
def holding(folder: Path, attempt: str, repo: Path) -> Iterator[subprocess.Popen]:
    """A process that has the turn."""
    with subprocess.Popen(
        [sys.executable, "-c", TAKE, str(folder), attempt],
        cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_later_attempt_takes_the_turn_from_an_orphan(tmp_path: Path, member, repo: Path) -> None:
    folder = tmp_path / member.name
    with holding(folder, "slurm 7_1 0", repo) as orphan:
        assert state(tmp_path, member) == ("running", "")
        with pytest.raises(ValueError, match=f"in use by process {orphan.pid} on .*slurm 7_1 0"):
            with turn.taken(folder, ""):  # one by hand has no right to it
                pass
        began = time.monotonic()
        with turn.taken(folder, "slurm 7_1 1"):
            # One that has ended but is not waited for is still there: the wait is the longest.
            assert time.monotonic() - began >= turn.LEAVE_SECONDS
            assert orphan.wait(30) == 1  # it has seen that it lost
            assert orphan.stderr is not None and "taken over by process" in orphan.stderr.read()
            found = turn.holder(folder)
            assert found is not None
            assert (found.attempt, found.process) == ("slurm 7_1 1", os.getpid())
        assert turn.holder(folder) is None and not (folder / turn.TURN_NAME).exists()


def test_a_turn_ends_with_its_process(tmp_path: Path, member, repo: Path) -> None:
    folder = tmp_path / member.name
    with holding(folder, "", repo) as killed:
        killed.kill()
        killed.wait()
        assert (folder / turn.TURN_NAME).exists() and turn.holder(folder) is None
        with turn.taken(folder, ""):
            pass


def test_a_turn_on_another_machine_counts_while_it_is_fresh(tmp_path: Path) -> None:
    path = tmp_path / turn.TURN_NAME
    other = turn.Turn("another", 1, "slurm 7_1 0", "key")
    path.write_text(json.dumps(other._asdict()))
    assert turn.holder(tmp_path) == other
    with pytest.raises(ValueError, match="process 1 on another"):
        with turn.taken(tmp_path, "elsewhere 3"):
            pass
    os.utime(path, (time.time(), time.time() - turn.STALE_SECONDS - 1))
    assert turn.holder(tmp_path) is None
    path.write_text("{")
    assert turn.holder(tmp_path) is None
