"""eqst.sweeps.slurm with commands that only record: what is submitted, and what never twice."""

import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_slurm
import pytest
from fake_slurm import calls
from test_sweep import CONFIG, RATES, members_of

from eqst.sweeps import slurm

# Of the settings of any run.
ALIKE: dict[str, str] = collections.defaultdict(lambda: "hash")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands are on PATH, and answer what lies in this folder."""
    folder = tmp_path / "fake"
    programs = fake_slurm.install(folder)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def sweep_in(repo: Path, folder: Path, **changes: Any) -> slurm.Sweep:
    body = (repo / "launch" / "slurm_member.sh").read_text()
    made = slurm.Sweep(folder, ["python", "-u", "launch/sweep.py"], body, [], [], None, ALIKE)
    return made._replace(**changes)


class Done(set):
    """Names of members that are done."""

    def __call__(self, member) -> bool:
        return member.name in self


@pytest.fixture
def runs(tmp_path: Path) -> list:
    (tmp_path / "small.py").write_text(CONFIG)
    return members_of(tmp_path / "small.py")


def array(sweep: slurm.Sweep, runs: list, done: Done, *, retry: bool = False) -> slurm.Array:
    return slurm.Array(sweep, runs, done, lambda fresh: None, lambda text: None, retry=retry)


def test_one_array_over_what_is_left(fake: Path, repo: Path, tmp_path: Path, runs: list) -> None:
    prepared, done = [], Done({"head/grid/0"})
    sweep = sweep_in(
        repo, tmp_path / "w", sbatch=["--partition=gpu", "--signal=TERM@9"], srun=["-l"], jobs=2
    )
    said: list[str] = []
    made = slurm.Array(sweep, runs, done, prepared.extend, said.append, retry=False)
    assert made.submit() == []
    assert [x.name for x in prepared] == ["head/continuous/0", "head/grid/1", "head/continuous/1"]
    ((_, *words),) = calls(fake, "sbatch")
    assert "--array=0-2%2" in words and "--requeue" in words and "--parsable" in words
    assert words.index("--partition=gpu") > words.index("--requeue")  # the user's prevail
    assert words.index("--signal=TERM@9") > words.index(f"--signal={slurm.SIGNAL}")
    assert words[-1] == f"{tmp_path}/w/slurm-1.sh"
    text = Path(words[-1]).read_text()
    assert subprocess.run(["bash", "-n", words[-1]]).returncode == 0
    assert text.index("head/continuous/0") < text.index("head/grid/1") and "head/grid/0" not in text
    (entry,) = slurm.submissions(tmp_path / "w")
    assert entry.job == "100" and f"--job-name={entry.name}" in words
    assert entry.members == [x.name for x in prepared]
    assert said == [
        "corpora of 3 runs: stores that are not there are made",
        f"submitted 3 runs: job 100, {entry.name}",
    ]
    # Slurm was asked about just that, and nothing else.
    ((_, asked, *rest),) = calls(fake, "test-only")
    assert asked == "--test-only" and rest == words


def queue(fake: Path, *lines: str) -> None:
    (fake / "squeue.out").write_text("".join(line + "\n" for line in lines))


def test_nothing_is_submitted_twice(fake: Path, repo: Path, tmp_path: Path, runs: list) -> None:
    sweep, done = sweep_in(repo, tmp_path / "w"), Done()
    array(sweep, runs, done).submit()
    name = slurm.submissions(tmp_path / "w")[0].name
    states = ("PENDING|Resources", "RUNNING|None", "COMPLETING|None", "SUSPENDED|None")
    # The first line comes with SLURM_CLUSTERS.
    queue(fake, "CLUSTER: c2", *(f"{name}|100|{i}|{state}" for i, state in enumerate(states)))
    assert array(sweep, runs, done).submit() == []
    assert len(calls(fake, "sbatch")) == 1
    assert f"--name={name}" in calls(fake, "squeue")[-1]
    said = slurm.words(tmp_path / "w")
    assert [said[x.name] for x in runs] == [
        ("queued", "Resources"),
        ("running", ""),
        ("running", "ending"),
        ("suspended", ""),
    ]
    # One has ended without being done, another is done: the first alone goes again, as 0.
    queue(fake, f"{name}|100|0|NODE_FAIL|None", f"{name}|100|1|COMPLETED|None",
          f"{name}|100|2|RUNNING|None", f"{name}|100|3|PREEMPTED|None")  # fmt: skip
    done.update({runs[1].name})
    assert slurm.words(tmp_path / "w")[runs[3].name] == ("", "Slurm: preempted")
    array(sweep, runs, done).submit()
    assert slurm.submissions(tmp_path / "w")[1].members == [runs[0].name, runs[3].name]
    # The newest job of a run is what counts.
    second = slurm.submissions(tmp_path / "w")[1].name
    queue(fake, f"{second}|101|0|PENDING|Priority", f"{name}|100|0|NODE_FAIL|None",
          f"{second}|101|1|RUNNING|None", f"{name}|100|2|RUNNING|None")  # fmt: skip
    array(sweep, runs, done).submit()
    assert len(calls(fake, "sbatch")) == 2
    assert slurm.words(tmp_path / "w")[runs[0].name] == ("queued", "Priority")
    queue(fake, f"{second}|101|0|PENDING|Priority", f"{name}|100|2|RUNNING|None",
          f"{second}|101|1|CANCELLED|None")  # fmt: skip
    assert slurm.cancel(slurm.submissions(tmp_path / "w")) == ["100", "101"]
    assert calls(fake, "scancel") == [["scancel", "100", "101"]]


def test_an_element_of_several_runs(fake: Path, repo: Path, tmp_path: Path) -> None:
    """--replicas: runs that can share a program are one element, until one of them has failed."""
    (tmp_path / "rates.py").write_text(RATES)
    runs = members_of(tmp_path / "rates.py")
    sweep, done, work = sweep_in(repo, tmp_path / "w"), Done(), tmp_path / "w"
    said: list[str] = []

    def array() -> slurm.Array:
        return slurm.Array(sweep, runs, done, lambda x: None, said.append, retry=False, replicas=3)

    assert array().submit() == []
    first = "rate/0.001/0,rate/0.003/0,rate/0.001/1"
    (entry,) = slurm.submissions(work)
    assert entry.members == [first, "rate/0.003/1", "rate/continuous/0"]
    assert said[-1] == f"submitted 5 runs as 3 program(s): job 100, {entry.name}"
    assert "--array=0-2" in calls(fake, "sbatch")[0]
    assert f"members=(\n  {first}\n" in (work / "slurm-1.sh").read_text()
    # Slurm's word on the element is its word on each of its runs; none is submitted twice.
    queue(fake, f"{entry.name}|100|0|RUNNING|None", f"{entry.name}|100|1|PENDING|Priority",
          f"{entry.name}|100|2|COMPLETED|None")  # fmt: skip
    done.add("rate/continuous/0")
    assert array().submit() == [] and len(calls(fake, "sbatch")) == 1
    states = slurm.words(work)
    assert [states[x] for x in first.split(",")] == [("running", "")] * 3
    assert states["rate/0.003/1"] == ("queued", "Priority")
    # One is done, and the others have failed with the program: each goes again by itself; what
    # has only lost its node shares a program with whom it can.
    done.add("rate/0.001/0")
    for name in first.split(","):
        (work / name).mkdir(parents=True)
        (work / name / "slurm.log").write_text("t 100_0 start 0 vm\nt 100_0 failed 1\n")
    (work / "rate/0.001/0/log.txt").write_text("launch/sweep.py: no memory\n")
    queue(fake, f"{entry.name}|100|0|FAILED|NonZeroExitCode", f"{entry.name}|100|1|NODE_FAIL|None")
    assert slurm.words(work)["rate/0.003/0"] == ("failed", "no memory")
    assert array().submit() == []
    again = slurm.submissions(work)[1]
    assert again.members == ["rate/0.003/1", "rate/0.003/0", "rate/0.001/1"]
    assert slurm.cancel([entry, again]) == []


def test_killed_before_sbatch_answers(fake: Path, repo: Path, tmp_path: Path, runs: list) -> None:
    """The job is in the queue, its number nowhere: its name tells what it is."""
    sweep = sweep_in(repo, tmp_path / "w")
    (fake / "sbatch.code").write_text("1")
    (fake / "sbatch.err").write_text("sbatch: error: Socket timed out on send/recv operation\n")
    with pytest.raises(slurm.Silent, match="Slurm does not answer .*Socket timed out"):
        array(sweep, runs, Done()).submit()
    (entry,) = slurm.submissions(tmp_path / "w")
    assert entry.job == ""
    queue(fake, *(f"{entry.name}|100|{i}|PENDING|None" for i in range(4)))
    (fake / "sbatch.code").unlink()
    array(sweep, runs, Done()).submit()
    assert len(calls(fake, "sbatch")) == 1
    assert slurm.cancel(slurm.submissions(tmp_path / "w")) == ["100"]


def test_failures_are_tried_again_and_not_for_ever(
    fake: Path, repo: Path, tmp_path: Path, runs: list
) -> None:
    sweep, bad = sweep_in(repo, tmp_path / "w"), runs[2].name
    done = Done(x.name for x in runs if x.name != bad)
    log = tmp_path / "w" / bad / "slurm.log"
    log.parent.mkdir(parents=True)
    log.write_text("2026-01-01T00:00:00 100_2 start 0 vm\n2026-01-01T00:00:09 100_2 failed 1\n")
    (log.parent / "log.txt").write_text("launch/sweep.py: no pairs\nsrun: error: vm: task 0\n")
    assert array(sweep, runs, done).submit() == []
    assert slurm.words(tmp_path / "w")[bad] == ("failed", "no pairs")
    with log.open("a") as file:
        file.write("2026-01-01T00:01:09 101_0 failed 137, 3 times\n")
    assert array(sweep, runs, done).submit() == [bad]
    assert len(calls(fake, "sbatch")) == 1
    made = array(sweep, runs, done, retry=True)
    assert made.submit() == [] and len(calls(fake, "sbatch")) == 2
    # A command that follows its jobs submits each as often, whatever became of them, and ends.
    assert made.goes_on() is False and made.goes_on() is False
    assert len(calls(fake, "sbatch")) == 3


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "sbatch refuses (invalid partition specified: nope; Batch job submission failed: "
            "Invalid partition name specified): mend --sbatch, or take less by --only",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller "
            "(connect failure)\n",
            "sbatch: Slurm does not answer (Batch job submission failed: Unable to contact slurm "
            "controller (connect failure)): try the same command later; what is in the queue or "
            "runs is not affected",
        ),
    ],
)
@pytest.mark.parametrize("command", ["test-only", "sbatch"])
def test_a_refusal_is_one_line(
    fake: Path, repo: Path, tmp_path: Path, runs: list, said: str, line: str, command: str
) -> None:
    """And comes before anything is made, where Slurm knows it by then."""
    (fake / f"{command}.err").write_text(said)
    (fake / f"{command}.code").write_text("1")
    prepared: list = []
    made = slurm.Array(
        sweep_in(repo, tmp_path / "w"), runs, Done(), prepared.extend, prepared.append, retry=False
    )
    with pytest.raises(ValueError) as caught:
        made.submit()
    assert str(caught.value) == line
    early = command == "test-only"
    assert bool(prepared) != early and len(calls(fake, "sbatch")) == (0 if early else 1)
    if early:  # it was never submitted: the next command begins anew
        assert slurm.submissions(tmp_path / "w") == []


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("allocation failure: Requested node configuration is not available\n", False),
        ("allocation failure: Requested nodes are busy\n", False),
        ("allocation failure: Invalid job array specification\n", True),
    ],
)
def test_nodes_that_are_down_are_waited_for(
    fake: Path, repo: Path, tmp_path: Path, runs: list, said: str, refused: bool
) -> None:
    """`sbatch --test-only` refuses for nodes that are down what sbatch itself puts into the queue:
    its words as Slurm 22.05.8 says them (tests/slurm_lab.py)."""
    (fake / "test-only.err").write_text(said)
    (fake / "test-only.code").write_text("1")
    made = array(sweep_in(repo, tmp_path / "w"), runs, Done())
    if refused:
        with pytest.raises(ValueError, match="sbatch refuses .*Invalid job array"):
            made.submit()
    else:
        assert made.submit() == []
    assert len(calls(fake, "sbatch")) == (0 if refused else 1)


def test_a_node_that_there_is_not_is_a_mistake(fake: Path, tmp_path: Path) -> None:
    """And no sign of a Slurm that does not answer."""
    (fake / "sbatch.code").write_text("1")
    (fake / "sbatch.err").write_text(
        "sbatch: error: Memory specification can not be satisfied\n"
        "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    )
    with pytest.raises(ValueError, match="^sbatch refuses .Memory specification can") as caught:
        slurm.call(["sbatch"])
    assert not isinstance(caught.value, slurm.Silent)
    (fake / "sbatch.err").write_text("sbatch: fatal: Could not establish a configuration source\n")
    with pytest.raises(slurm.Silent, match="does not answer"):
        slurm.call(["sbatch"])


def test_without_slurm_and_with_wrong_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.Silent, match="there is no sbatch here: start --backend=slurm where"):
        slurm.call(["sbatch"])
    assert slurm.options("sbatch", "--gres=gpu:1 --comment='a b'") == [
        "--gres=gpu:1",
        "--comment=a b",
    ]
    for text in ("--array=0-3", "-a 0-3", "-J x", "-Jx", "--job-name=x", "'"):
        with pytest.raises(ValueError, match="^--sbatch="):
            slurm.options("sbatch", text)
    for text in ("--clusters=c2", "--cluster c2", "-M c2", "-Mc2"):
        with pytest.raises(ValueError, match="set SLURM_CLUSTERS"):
            slurm.options("sbatch", text)
    (tmp_path / slurm.RECORD_NAME).write_text("[{")
    with pytest.raises(ValueError, match="slurm.json cannot be read"):
        slurm.submissions(tmp_path)


# --- the batch script


@pytest.fixture
def element(fake: Path, repo: Path, tmp_path: Path):
    """A function that runs element 1 of a submission as Slurm would; gives its exit code."""
    sweep = sweep_in(repo, tmp_path / "with space", srun=["--mpi=none"])
    path = tmp_path / "script.sh"
    path.write_text(slurm.script(sweep, ["head/a/0", "head/b/0", "head/b/1,head/c/0,head/c/1"]))

    def start(restart: int = 0, background: bool = False, index: int = 1) -> Any:
        environment = {
            **os.environ,
            **{"SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(index)},
            "SLURM_JOB_ID": "107",
            "SLURM_CPUS_PER_TASK": "3",
        }
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        process = subprocess.Popen(["bash", str(path)], env=environment, cwd=tmp_path)
        return process if background else process.wait(60)

    return start


def test_an_element_that_is_done_or_fails(element, fake: Path, tmp_path: Path) -> None:
    (fake / "srun.run").write_text('echo "$EQST_ATTEMPT $SRUN_CPUS_PER_TASK"')
    assert element() == 0
    folder = tmp_path / "with space" / "head/b/0"
    assert (folder / "log.txt").read_text() == "slurm 100_1 0 3\n"
    (words,) = calls(fake, "srun")
    assert words == [
        *("srun", "--kill-on-bad-exit=1", "--mpi=none", "python", "-u", "launch/sweep.py"),
        *("--member=head/b/0", "--settings=hash"),
    ]
    assert slurm.failures(tmp_path / "with space", "head/b/0") == 0
    for code in (1, 2, 139):
        (fake / "srun.run").write_text(f"exit {code}")
        assert element() == 1  # a code that no cluster requeues
    assert slurm.failures(tmp_path / "with space", "head/b/0") == 3
    assert not calls(fake, "scontrol") and not calls(fake, "scancel")


def test_an_element_of_several_runs_writes_into_each_log(
    element, fake: Path, tmp_path: Path
) -> None:
    workdir, names = tmp_path / "with space", ["head/b/1", "head/c/0", "head/c/1"]
    (fake / "srun.run").write_text("echo once; exit 75")
    assert element(index=2) == 0
    assert calls(fake, "srun")[0][-2:] == [
        f"--member={','.join(names)}", "--settings=hash,hash,hash"
    ]  # fmt: skip
    assert calls(fake, "scontrol") == [["scontrol", "requeue", "100_2"]]
    assert [(workdir / x / "log.txt").exists() for x in names] == [True, False, False]
    (fake / "srun.run").write_text("exit 1")
    assert element(1, index=2) == 1
    logs = [(workdir / name / "slurm.log").read_text() for name in names]
    assert logs[0] == logs[1] == logs[2] and [slurm.failures(workdir, x) for x in names] == [1] * 3
    events = [line.split(maxsplit=2)[2].partition(" on ")[0] for line in logs[0].splitlines()]
    assert events == ["start 0", "end 75", "start 1", "end 1", "failed 1"]


def test_an_element_that_is_interrupted_or_crashes(element, fake: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "with space"
    for restart, code in enumerate((75, 143, 75)):
        (fake / "srun.run").write_text(f"exit {code}")
        assert element(restart) == 0
    assert calls(fake, "scontrol") == [["scontrol", "requeue", "100_1"]] * 3
    assert element(slurm.MAX_RESTARTS) == 1 and element(slurm.MAX_RESTARTS + 1) == 1
    assert len(calls(fake, "scontrol")) == 3 and slurm.failures(workdir, "head/b/0") == 2
    ends = []
    for code in (134, 137, 137):
        (fake / "srun.run").write_text(f"exit {code}")
        ends.append(element(4))
    assert ends == [0, 0, 1] and slurm.MAX_CRASHES == 2
    assert "failed 137, 3 times" in (workdir / "head/b/0/slurm.log").read_text()
    # Where scontrol may not, the code is the cluster's to judge (RequeueExit).
    (fake / "scontrol.code").write_text("1")
    (fake / "srun.run").write_text("exit 75")
    assert element(5) == 75


def test_what_slurm_itself_ends_is_not_requeued(element, fake: Path) -> None:
    """scontrol requeue would bring a cancelled job back."""
    (fake / "srun.run").write_text("exit 75")
    (fake / "squeue.out").write_text("COMPLETING   59:48   0   \n")
    assert element() == 1 and not calls(fake, "scontrol")
    assert "--jobs=100_1" in calls(fake, "squeue")[-1]
    (fake / "squeue.out").write_text("COMPLETING 0:00 0\n")  # its time was over before the save
    assert element() == 0 and len(calls(fake, "scontrol")) == 1
    (fake / "squeue.out").write_text("RUNNING 12:00 0\n")
    assert element() == 0 and len(calls(fake, "scontrol")) == 2


@pytest.mark.parametrize("code", [1, 75, 137])
def test_an_orphan_leaves_its_element_alone(element, fake: Path, tmp_path: Path, code: int) -> None:
    """Slurm lost its node and started the element again: requeueing would end that one."""
    (fake / "srun.run").write_text(f"exit {code}")
    (fake / "squeue.out").write_text("RUNNING 12:00 1\n")
    assert element() == 1
    assert not calls(fake, "scontrol") and not slurm.failures(tmp_path / "with space", "head/b/0")


def test_sigterm_is_forwarded_and_the_step_waited_for(element, fake: Path, tmp_path: Path) -> None:
    (fake / "srun.run").write_text(
        f"touch {tmp_path}/on; while [ ! -e {tmp_path}/told ]; do sleep 0.1; done; sleep 1; exit 75"
    )
    (fake / "scancel.run").write_text(f"touch {tmp_path}/told")
    process = element(background=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "on").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert calls(fake, "scancel") == [["scancel", "--quiet", "--signal=TERM", "100_1.0"]]
    assert calls(fake, "scontrol") == [["scontrol", "requeue", "100_1"]]


# --- the command


def test_the_command_says_what_it_would_do(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(CONFIG)
    words = [sys.executable, "launch/sweep.py", f"--config={tmp_path}/small.py"]
    words += [
        f"--workdir={tmp_path}/w",
        "--backend=slurm",
        "--sbatch=--partition=gpu --time=4:00:00",
    ]
    ran = subprocess.run(
        [*words, "--only=grid", "--jobs=8", "--dry_run"], cwd=repo, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "--array=0-1%8" in ran.stdout and "--partition=gpu --time=4:00:00" in ran.stdout
    assert "\nmembers=(\n  head/grid/0\n  head/grid/1\n)\n" in ran.stdout
    assert not (tmp_path / "w").exists() and "  --dry_run" not in ran.stdout
    bare = {**os.environ, "PATH": str(tmp_path)}
    ran = subprocess.run([*words, "--status"], cwd=repo, capture_output=True, text=True, env=bare)
    assert ran.returncode == 0 and ran.stdout.endswith("4 runs: 4 waiting\n"), ran.stderr
