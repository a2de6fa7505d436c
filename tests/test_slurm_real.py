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
        wait_for(folder / "log.txt", r"^step 15/60")
        os.kill(json.loads((folder / "turn.json").read_text())["process"], signal.SIGKILL)
        stdout, stderr = sweep.communicate(timeout=1800)
    assert sweep.returncode == 1, stdout + stderr
    assert stderr == (
        "launch/sweep.py: 1 of 3 runs failed: broken/broken/0; --retry submits them again\n"
    )
    log = (folder / "slurm.log").read_text()
    events = [line.split(maxsplit=2)[2] for line in log.splitlines()]
    assert [x.partition(" on ")[0] for x in events] == ["start 0", "end 137", "start 1", "end 0"]
    text = (folder / "log.txt").read_text()
    assert re.search(r"^resumed at step [1-5]0 of 60$", text, re.MULTILINE)
    # The failure was tried twice, each in a submission of its own; nobody else was in the second.
    record = json.loads((work / "slurm.json").read_text())
    assert [len(entry["members"]) for entry in record] == [3, 3, 1] and record[0]["job"] == ""
    assert record[2]["members"] == ["broken/broken/0"]
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
