"""`launch/sweep.py --backend=slurm` on a real Slurm of one machine (tests/slurm_lab.py)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import slurm_lab
from test_processes import assert_same_curve
from test_sweep import CONFIG

from eqst import checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

SWEEP = """

def sweep(argument=""):
    long = {"train.log_every": 5, "train.eval_every": 20, "train.checkpoint_every": 10}
    yield "length", "short", 0, {}
    yield "length", "long", 0, {"train.steps": 60, **long}
    yield "broken", "broken", 0, {"data.min_loudness_lufs": 0.0}
    yield "endless", "endless", 0, {"train.steps": 1_000_000, **long}
    for rate in (1e-3, 2e-3):  # as one program
        yield "rate", str(rate), 0, {"train.steps": 40, "train.learning_rate": rate, **long}
"""
PATIENCE_SECONDS = 900


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """A Slurm of this machine, alone; gives the environment of its clients."""
    missing = slurm_lab.missing()
    if missing:
        pytest.skip(f"needs Slurm: {missing}")
    with slurm_lab.cluster() as environment:
        yield environment


@pytest.fixture
def words(tmp_path: Path, repo: Path) -> list[str]:
    (tmp_path / "small.py").write_text(CONFIG + SWEEP)
    return [sys.executable, "launch/sweep.py", f"--config={tmp_path}/small.py"]


def wait_for(path: Path, pattern: str) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        text = path.read_text(errors="replace") if path.exists() else ""
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in {path}: {text[-2000:]}")


def queue(slurm: dict[str, str]) -> str:
    ask = ["squeue", "--noheader", "--array", "--format=%T"]
    return subprocess.run(ask, env=slurm, capture_output=True, text=True, check=True).stdout


def test_kill_9_and_a_failure_in_a_sweep(
    slurm: dict[str, str], words: list[str], repo: Path, tmp_path: Path
) -> None:
    """One run is killed, one fails on purpose: the others come out as if nothing had been."""

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*words, *more], cwd=repo, env=slurm, capture_output=True, text=True, timeout=1800
        )

    work = tmp_path / "w"
    on_slurm = [f"--workdir={work}", "--backend=slurm", "--only=length|broken"]
    refused = run(*on_slurm, "--sbatch=--partition=nope")
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert "sbatch refuses (invalid partition specified: nope" in refused.stderr
    with subprocess.Popen(
        [*words, *on_slurm, "--wait"],
        cwd=repo, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as sweep:  # fmt: skip
        folder = work / "length/long/0"
        # Saved every 10 steps while the loop goes on; the save at 20 waits for that at 10.
        wait_for(folder / "log.txt", r"^step 25/60")
        os.kill(json.loads((folder / "turn.json").read_text())["process"], signal.SIGKILL)
        stdout, stderr = sweep.communicate(timeout=1800)
    assert sweep.returncode == 1, stdout + stderr
    assert stderr == (
        "launch/sweep.py: 1 of 3 runs failed: broken/broken/0; --retry submits them again\n"
    )
    log = (folder / "slurm.log").read_text()
    events = [line.split(maxsplit=2)[2].partition(" on ")[0] for line in log.splitlines()]
    assert [x for x in events if x != "scontrol requeue refuses"] == [
        "start 0",
        "end 137",
        "start 1",
        "end 0",
    ]
    text = (folder / "log.txt").read_text()
    assert re.search(r"^resumed at step [1-5]0 of 60$", text, re.MULTILINE)
    # The failure was tried twice, each in a submission of its own; nobody else was in the second.
    record = json.loads((work / "slurm.json").read_text())
    # What Slurm had refused before was never submitted.
    assert [len(entry["members"]) for entry in record] == [3, 1]
    assert record[1]["members"] == ["broken/broken/0"]
    assert [m["name"] for m in json.loads((work / "sweep.json").read_text())["members"]] == [
        "length/short/0",
        "length/long/0",
    ]
    again = run(*on_slurm)
    assert again.returncode == 1 and "submitted" not in again.stdout
    assert json.loads((work / "slurm.json").read_text()) == record
    status = run(*on_slurm, "--status")
    assert status.returncode == 0 and "3 runs: 2 done, 1 failed" in status.stdout
    assert re.search(r"^broken/broken/0 +failed .*no pair of", status.stdout, re.MULTILINE)

    here = run(f"--workdir={tmp_path}/here", "--only=length")
    assert here.returncode == 0, here.stderr
    for name in ("length/short/0", "length/long/0"):
        mine, theirs = work / name, tmp_path / "here" / name
        errors = "heldout/errors.csv"
        assert (mine / errors).read_bytes() == (theirs / errors).read_bytes()
        for which in ("best", "last"):
            loaded = [checkpoint.load(path, which=which).params for path in (mine, theirs)]
            jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_told_to_stop_requeued_and_cancelled(
    slurm: dict[str, str], words: list[str], repo: Path, tmp_path: Path
) -> None:
    """SIGTERM to the step: saved, and on again; scancel: saved, and never again."""
    words = [*words, f"--workdir={tmp_path}/w", "--backend=slurm", "--only=endless"]
    folder = tmp_path / "w/endless/endless/0"

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*words, *more], cwd=repo, env=slurm, capture_output=True, text=True, timeout=1800
        )

    first = run()
    assert first.returncode == 0, first.stderr
    job = re.search(r"submitted 1 runs: job (\d+)", first.stdout)
    assert job is not None
    wait_for(folder / "log.txt", r"^step 5/")
    assert "submitted" not in run().stdout  # it runs
    subprocess.run(["scancel", "--signal=TERM", f"{job[1]}_0"], env=slurm, check=True)
    saved = wait_for(folder / "log.txt", r"saved at step \d+")
    wait_for(folder / "log.txt", f"^resumed{saved.removeprefix('saved')} of")
    wait_for(folder / "slurm.log", " start 1 on ")
    status = run("--status")
    assert "1 runs: 1 running" in status.stdout, status.stdout
    cancelled = run("--cancel")
    assert cancelled.stdout == f"cancelled: {job[1]}\n", cancelled.stderr
    deadline = time.monotonic() + PATIENCE_SECONDS
    while queue(slurm):
        assert time.monotonic() < deadline, queue(slurm)
        time.sleep(0.5)
    time.sleep(8)  # longer than a requeued one waits (cred_expire)
    assert queue(slurm) == "" and " start 2 on " not in (folder / "slurm.log").read_text()
    status = run("--status")
    assert "1 runs: 1 interrupted" in status.stdout, status.stdout


def test_several_runs_as_one_program_are_requeued_together(
    slurm: dict[str, str], words: list[str], repo: Path, tmp_path: Path
) -> None:
    """--replicas: one element, killed once, whose runs end as they do here undisturbed."""

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*words, *more], cwd=repo, env=slurm, capture_output=True, text=True, timeout=1800
        )

    names, work = ["rate/0.001/0", "rate/0.002/0"], tmp_path / "w"
    on_slurm = [f"--workdir={work}", "--backend=slurm", "--only=rate", "--replicas=4"]
    first = run(*on_slurm)
    assert first.returncode == 0, first.stderr
    assert "submitted 2 runs as 1 program(s): job" in first.stdout
    wait_for(work / names[0] / "log.txt", r"^step 15/40")
    status = run(*on_slurm, "--status")
    assert "2 runs: 2 running" in status.stdout, status.stdout
    assert "submitted" not in run(*on_slurm).stdout
    holders = {json.loads((work / x / "turn.json").read_text())["process"] for x in names}
    assert len(holders) == 1
    os.kill(holders.pop(), signal.SIGKILL)
    follow = run(*on_slurm, "--wait")
    assert follow.returncode == 0, follow.stdout + follow.stderr
    logs = [(work / name / "slurm.log").read_text() for name in names]
    events = [line.split(maxsplit=2)[2].partition(" on ")[0] for line in logs[0].splitlines()]
    # Seen once on a quick machine: scontrol says no, and Slurm has requeued it all the same.
    events = [x for x in events if x != "scontrol requeue refuses"]
    assert logs[0] == logs[1] and events == ["start 0", "end 137", "start 1", "end 0"]
    text = (work / names[0] / "log.txt").read_text()
    assert "2 of them in one program" in text and re.search(
        r"^resumed at step [1-3]0 of 40$", text, re.M
    )
    assert not (work / names[1] / "log.txt").exists()
    (entry,) = json.loads((work / "slurm.json").read_text())
    assert entry["members"] == [",".join(names)]
    here = run(f"--workdir={tmp_path}/here", "--only=rate", "--replicas=4")
    assert here.returncode == 0, here.stderr
    for name in names:
        mine, theirs = work / name, tmp_path / "here" / name
        errors = "heldout/errors.csv"
        assert (mine / errors).read_bytes() == (theirs / errors).read_bytes()
        loaded = [checkpoint.load(path, which="last").params for path in (mine, theirs)]
        jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_two_tasks_of_one_run_train_as_one_process_does(
    slurm: dict[str, str], words: list[str], repo: Path, tmp_path: Path
) -> None:
    """srun starts two processes, which find each other by what Slurm tells them."""
    words = [*words, "--only=rate/0.001"]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*words, *more], cwd=repo, env=slurm, capture_output=True, text=True, timeout=1800
        )

    two = run(f"--workdir={tmp_path}/two", "--backend=slurm", "--sbatch=--ntasks=2", "--wait")
    folder = tmp_path / "two/rate/0.001/0"
    text = (folder / "log.txt").read_text()
    assert two.returncode == 0, two.stdout + two.stderr + text[-2000:]
    assert "2 cpu device(s)" in text and text.count("step 40/40") == 1
    one = run(f"--workdir={tmp_path}/one")
    assert one.returncode == 0, one.stderr
    assert_same_curve(tmp_path / "one/rate/0.001/0", folder)
    errors = [
        np.loadtxt(tmp_path / name / "rate/0.001/0/heldout/errors.csv", str, delimiter=",")
        for name in ("one", "two")
    ]
    assert np.array_equal(errors[0][:, :-1], errors[1][:, :-1])
    shapes = [x[1:, -1].astype(float) for x in errors]
    np.testing.assert_allclose(*shapes, atol=1e-3)
