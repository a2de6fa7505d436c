"""eqst.sweeps.local with shells for runs: which GPU each of them is given, and how they end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eqst.stopping import Interrupted
from eqst.sweeps import local

# A run says what it sees; the first of several ends at once, the others when the last has begun.
RUN = """
echo "${CUDA_VISIBLE_DEVICES-all} ${XLA_PYTHON_CLIENT_PREALLOCATE-unset}" >$1/$2/seen.tmp
mv $1/$2/seen.tmp $1/$2/seen
[ $2 = $3 ] || while [ ! -e $1/$4/seen ]; do sleep 0.05; done
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A sweep remembers signals; a test's process goes on to mind them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that puts an nvidia-smi on PATH, which has none without it."""
    for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "mv", "sleep"):
        found = next(x for x in os.environ["PATH"].split(":") if os.access(f"{x}/{name}", os.X_OK))
        (programs / name).symlink_to(f"{found}/{name}")
    monkeypatch.setenv("PATH", str(programs))

    def install(body: str) -> None:
        path = programs / "nvidia-smi"
        path.write_text(f'#!{programs}/bash\n[ "$*" = "{WORDS}" ] || exit 9\n{body}\n')
        path.chmod(0o755)

    return install


WORDS = "--query-gpu=index --format=csv,noheader"


def seen(workdir: Path, names: str, *, jobs: int, first: str = "") -> dict[str, str]:
    """What runs of one letter each saw of GPUs and of the memory's setting."""
    runs: list[Any] = [SimpleNamespace(name=name) for name in names]
    failed = local.run_all(
        workdir,
        [[run] for run in runs],
        lambda run: (workdir / run.name / "seen").exists(),
        lambda unit: ["bash", "-c", RUN, "run", str(workdir), unit[0].name, first, names[-1]],
        jobs=jobs,
        minutes=0.0,
    )
    assert failed == []
    return {name: (workdir / name / "seen").read_text().strip() for name in names}


def test_each_run_has_a_gpu_of_its_own(smi, tmp_path: Path) -> None:
    smi("echo 0; echo 1; echo 2; echo 3")
    # a, which ends first, gives its GPU to the last; as many go at a time as there are GPUs.
    assert seen(tmp_path / "w", "abcde", jobs=4, first="a") == {
        **{"a": "0 unset", "b": "1 unset", "c": "2 unset", "d": "3 unset"},
        "e": "0 unset",
    }


def test_the_last_run_gets_the_gpu_that_is_free(smi, tmp_path: Path) -> None:
    smi("echo 0; echo 1; echo 2")
    assert seen(tmp_path / "w", "abcd", jobs=3, first="b")["d"] == "1 unset"


def test_more_runs_than_gpus_share_them(
    smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("echo 0; echo 1")
    assert seen(tmp_path / "w", "abc", jobs=8) == {
        "a": "0 false", "b": "1 false", "c": "0 false",
    }  # fmt: skip
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # the user's prevails
    assert seen(tmp_path / "v", "abc", jobs=3)["c"] == "0 true"


def test_the_gpus_are_those_the_user_names(
    smi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("echo 0; echo 1; echo 2; echo 3; echo 4; echo 5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8932f937")
    assert seen(tmp_path / "w", "ab", jobs=2) == {"a": "5 unset", "b": "GPU-8932f937 unset"}
    for nothing in ("", "-1"):  # hidden by the user: none is given
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        folder = tmp_path / f"none{nothing}"
        assert seen(folder, "ab", jobs=2) == dict.fromkeys("ab", f"{nothing} false".strip())


def test_a_run_that_goes_alone_sees_all(smi, tmp_path: Path) -> None:
    smi("echo 0; echo 1")
    assert seen(tmp_path / "w", "ab", jobs=1, first="a") == dict.fromkeys("ab", "all unset")


@pytest.mark.parametrize(
    "body", [None, "echo NVIDIA-SMI has failed; exit 9", "echo No devices were found; exit 6"]
)
def test_without_nvidias_gpus_nothing_changes(smi, tmp_path: Path, body: str | None) -> None:
    if body:
        smi(body)
    assert seen(tmp_path / "w", "ab", jobs=2) == dict.fromkeys("ab", "all false")


def test_a_run_that_does_not_save_in_time_is_killed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(local, "SAVING_SECONDS", 1.0)
    words = {"deaf": "trap '' TERM; while :; do sleep 0.1; done", "quick": "exec sleep 60"}
    runs: list[Any] = [SimpleNamespace(name=name) for name in words]
    with pytest.raises(Interrupted, match="minutes are over: 0 of 2 done"):
        local.run_all(
            tmp_path,
            [[run] for run in runs],
            lambda run: False,
            lambda unit: ["bash", "-c", words[unit[0].name]],
            jobs=2,
            minutes=0.02,
        )
    line = "deaf: had not saved after 1 s and was killed; it goes on from its last checkpoint\n"
    assert capfd.readouterr().out == line


def swept(workdir: Path, units: list[str], body: str) -> list[str]:
    """What has failed of units of runs of one letter each; `body` is given the unit's, in $1."""
    runs: list[Any] = [[SimpleNamespace(name=name) for name in unit] for unit in units]
    return local.run_all(
        workdir,
        runs,
        lambda run: (workdir / run.name / "done").exists(),
        lambda unit: ["bash", "-c", f"cd {workdir}; {body}", "run", "".join(x.name for x in unit)],
        jobs=1,
        minutes=0.0,
    )


def test_what_a_program_leaves_undone_is_tried_again_run_by_run(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """a alone is at fault: its program ends before b is done, and so does a by itself."""
    body = """
        echo $1 >>began; mkdir -p a b c d
        case $1 in *c*) touch c/done;; esac
        case $1 in *a*) echo a is bad; exit 1;; esac
        touch $1/done
    """
    assert swept(tmp_path, ["abc", "d"], body) == ["a"]
    assert (tmp_path / "began").read_text().split() == ["abc", "d", "a", "b"]
    lines = [re.sub(r"  \d+ s  left .*", "", x) for x in capfd.readouterr().out.splitlines()]
    assert lines == [
        "1/4  c",
        *(f"{name}: failed (a is bad); once more later" for name in "ab"),
        "2/4  d",
        "a: FAILED (a is bad)",
        "3/4  b",
    ]


def test_a_program_that_is_done_counts_all_of_its_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert swept(tmp_path, ["ab"], "mkdir b; touch a/done b/done") == []
    assert capfd.readouterr().out.startswith("2/2  a and 1 more  ")


def test_what_was_killed_is_said_to_be(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert swept(tmp_path, ["a"], "echo step 110; kill -9 $$") == ["a"]
    why = "killed by SIGKILL; its last line: step 110"
    assert capfd.readouterr().out == f"a: failed ({why}); once more later\na: FAILED ({why})\n"


WATCHED = """
import signal, sys, time
from eqst.sweeps import local
signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to leave"))
local.leave_with_parent()
time.sleep(float(sys.argv[1]))
print("stayed")
"""


def test_only_what_a_sweep_has_started_leaves_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a person has started outlives the shell that it came from."""
    shell = ["bash", "-c", '"$@" &', "shell", sys.executable, "-c", WATCHED]  # which ends at once
    monkeypatch.delenv(local.PARENT, raising=False)
    with open(tmp_path / "alone", "w") as out:
        subprocess.run([*shell, "4"], check=True, stdout=out, stderr=out)
    # Of a sweep: its parent is named, and has another number by now.
    monkeypatch.setenv(local.PARENT, str(os.getpid()))
    with open(tmp_path / "child", "w") as out:
        subprocess.run([*shell, "60"], check=True, stdout=out, stderr=out)
    wait_for(lambda: (tmp_path / "child").read_text() == "told to leave\n")
    wait_for(lambda: (tmp_path / "alone").read_text() == "stayed\n")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_is_told_whose_it_is(tmp_path: Path) -> None:
    assert swept(tmp_path, ["a"], "echo $EQST_PARENT >a/done") == []
    assert (tmp_path / "a/done").read_text() == f"{os.getpid()}\n"
