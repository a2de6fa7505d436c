"""eqst.sweeps.local with shells for runs: which GPU each of them is given, and how they end."""

import os
import signal
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
        runs,
        lambda run: (workdir / run.name / "seen").exists(),
        lambda name: ["bash", "-c", RUN, "run", str(workdir), name, first, names[-1]],
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
            runs,
            lambda run: False,
            lambda name: ["bash", "-c", words[name]],
            jobs=2,
            minutes=0.02,
        )
    line = "deaf: had not saved after 1 s and was killed; it goes on from its last checkpoint\n"
    assert capfd.readouterr().out == line
