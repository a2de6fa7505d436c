"""The runs of a sweep on this machine: some processes at a time, each a run, or several as one."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from eqst.record import clock
from eqst.stopping import Interrupted
from eqst.sweeps.members import Member

TRIES = 2  # of a run that fails
SAVING_SECONDS = 60.0  # for a run that was told to save and leave
SMI_SECONDS = 60.0  # for the answer of nvidia-smi, which wakes a driver that sleeps
PARENT = "EQST_PARENT"  # the number of the sweep's process, to those that it starts


class _Child(NamedTuple):
    """What runs: its runs, their process, since when, and its GPU; None: it sees all there are."""

    unit: list[Member]
    process: subprocess.Popen
    since: float
    gpu: str | None


class Interruption:
    """Remembers that the sweep was told to stop: by a signal, or because its time is over."""

    def __init__(self, minutes: float) -> None:
        """From here on SIGTERM and SIGINT are remembered, and the minutes (0: none) count."""
        self._name, self._minutes, self._began = "", minutes, time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self._name = signal.Signals(number).name

    def why(self) -> str:
        """What it was told by; "" where it goes on."""
        if self._minutes > 0 and time.monotonic() - self._began > 60 * self._minutes:
            return f"the {self._minutes:g} minutes are over"
        return self._name

    def forget(self) -> None:
        """What `why` says now has been seen to; what comes later is said again."""
        if self.why() != self._name:
            self._minutes = 0.0
        self._name = ""


def visible_gpus() -> list[str]:
    """NVIDIA's GPUs that a child would see, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA takes those before the first that is none: of "" and "-1" nothing.
        return list(itertools.takewhile(lambda x: x not in ("", "-1", "NoDevFiles"), names))
    words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [x for x in done.stdout.split() if x.isdecimal()] if done.returncode == 0 else []


def run_all(
    workdir: pathlib.Path,
    units: Sequence[list[Member]],
    is_done: Callable[[Member], bool],
    words: Callable[[list[Member]], list[str]],
    *,
    jobs: int,
    minutes: float,
) -> list[str]:
    """Runs units of members, `jobs` processes at a time; the names of the members that failed.

    A unit is a process of its own. What one leaves undone is tried again at the end, run by run, so
    that a member that fails takes no other down. Where several units go at a time each has one GPU,
    and shares it if there are fewer. SIGTERM, SIGINT or the end of `minutes` (0: none) stop all of
    them, saved; so does the end of this process, whatever it is.

    Args:
      workdir: of the sweep.
      units: members that are one program, in this order.
      is_done: whether a member has left all that it should.
      words: the command that runs a unit.
      jobs: processes at a time.
      minutes: after which all stop; 0: never.

    Raises:
      Interrupted: stopped; the same command goes on.
    """
    running: dict[str, _Child] = {}
    try:
        return _run_all(workdir, list(units), running, is_done, words, jobs, minutes)
    finally:
        _end(running)


def _run_all(
    workdir: pathlib.Path,
    waiting: list[list[Member]],
    running: dict[str, _Child],
    is_done: Callable[[Member], bool],
    words: Callable[[list[Member]], list[str]],
    jobs: int,
    minutes: float,
) -> list[str]:
    every = sum(map(len, waiting))
    tries: collections.Counter[str] = collections.Counter()
    failed: list[str] = []
    finished, began = 0, time.monotonic()
    gpus = visible_gpus() if jobs > 1 else []  # one run at a time may use several
    shared = min(jobs, every) > max(len(gpus), 1)
    stop = Interruption(minutes)
    while waiting or running:
        if why := stop.why():
            raise Interrupted(f"{why}: {finished} of {every} done; the same command goes on")
        while waiting and len(running) < jobs:
            unit = waiting.pop(0)
            tries.update(member.name for member in unit)
            gpu = _least_used(gpus, running)
            process = _start(workdir, unit[0], words(unit), _environment(gpu, shared))
            running[unit[0].name] = _Child(unit, process, time.monotonic(), gpu)
        for name, (unit, process, since, _) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[name]
            undone = [member for member in unit if not is_done(member)]
            again = [member for member in undone if tries[member.name] < TRIES]
            waiting += [[member] for member in again]
            done = [member.name for member in unit if member not in undone]
            if done:
                finished += len(done)
                more = f" and {len(done) - 1} more" if len(done) > 1 else ""
                seconds, spent = time.monotonic() - since, time.monotonic() - began
                to_do = sum(map(len, waiting)) + sum(len(x.unit) for x in running.values())
                took = f"{seconds:.0f} s  left {clock(spent / finished * to_do)}"
                print(f"{finished}/{every}  {done[0]}{more}  {took}", flush=True)
            why = _why(workdir, unit[0], code) if undone else ""
            for member in undone:
                if member in again:
                    print(f"{member.name}: failed ({why}); once more later", flush=True)
                else:
                    print(f"{member.name}: FAILED ({why})", flush=True)
                    failed.append(member.name)
        time.sleep(0.2)
    return failed


def _least_used(gpus: list[str], running: dict[str, _Child]) -> str | None:
    """The GPU that the fewest runs have, the first of several; None where there is none."""
    used = collections.Counter(child.gpu for child in running.values())
    return min(gpus, key=lambda gpu: used[gpu], default=None)


def _environment(gpu: str | None, shared: bool) -> dict[str, str]:
    """A child's; `shared`: others may have their arrays on the same accelerator."""
    environment = os.environ | {PARENT: str(os.getpid())}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if shared:  # else the first would take three quarters of the memory
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return environment


def _start(
    workdir: pathlib.Path, member: Member, words: list[str], environment: dict[str, str]
) -> subprocess.Popen:
    folder = workdir / member.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which tells its children
        )


def leave_with_parent() -> None:
    """Has this process told to save and leave when the sweep that started it is gone.

    One that a person or another launcher has started may outlive the shell that it came from.
    """
    if PARENT not in os.environ:
        return
    parent = os.environ[PARENT]

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _end(running: dict[str, _Child]) -> None:
    """Tells every run to save and leave, and waits for them."""
    for child in running.values():
        child.process.terminate()
    deadline = time.monotonic() + SAVING_SECONDS
    for name, child in running.items():
        try:
            child.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
            late = f"had not saved after {SAVING_SECONDS:.0f} s and was killed"
            print(f"{name}: {late}; it goes on from its last checkpoint", flush=True)


def _why(workdir: pathlib.Path, first: Member, code: int) -> str:
    """What a process that failed said last, in the log of its first run; what killed it, if so."""
    text = (workdir / first.name / "log.txt").read_text(errors="replace").strip()
    said = text.splitlines()[-1][:200] if text else "no word"
    if code >= 0:
        return said
    names = {number.value: number.name for number in signal.Signals}
    name = names[-code] if -code in names else f"signal {-code}"
    return f"killed by {name}; its last line: {said}"
