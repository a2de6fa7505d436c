"""The runs of a sweep on this machine: some processes at a time, each of them one run."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from eqst.record import clock
from eqst.stopping import Interrupted
from eqst.sweeps.members import Member

TRIES = 2  # of a run that fails
SAVING_SECONDS = 60.0  # for a run that was told to save and leave
SMI_SECONDS = 60.0  # for the answer of nvidia-smi, which wakes a driver that sleeps


class _Child(NamedTuple):
    """A run that runs: its process, since when, and its GPU; None where it sees all there are."""

    member: Member
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
    waiting: list[Member],
    is_done: Callable[[Member], bool],
    words: Callable[[str], list[str]],
    *,
    jobs: int,
    minutes: float,
) -> list[str]:
    """Runs members, `jobs` processes at a time; the names of those that failed.

    A member is a process of its own: one that fails is tried again at the end and takes no other
    down. Where several go at a time each has one GPU, and shares it if there are fewer. SIGTERM,
    SIGINT or the end of `minutes` (0: none) stop all of them, saved; so does the end of this
    process, whatever it is.

    Args:
      workdir: of the sweep.
      waiting: the members, in this order.
      is_done: whether one has left all that it should.
      words: the command that runs the member of a name.
      jobs: processes at a time.
      minutes: after which all stop; 0: never.

    Raises:
      Interrupted: stopped; the same command goes on.
    """
    running: dict[str, _Child] = {}
    try:
        return _run_all(workdir, list(waiting), running, is_done, words, jobs, minutes)
    finally:
        _end(running)


def _run_all(
    workdir: pathlib.Path,
    waiting: list[Member],
    running: dict[str, _Child],
    is_done: Callable[[Member], bool],
    words: Callable[[str], list[str]],
    jobs: int,
    minutes: float,
) -> list[str]:
    every = len(waiting)
    tries = dict.fromkeys((member.name for member in waiting), 0)
    failed: list[str] = []
    finished, began = 0, time.monotonic()
    gpus = visible_gpus() if jobs > 1 else []  # one run at a time may use several
    shared = min(jobs, every) > max(len(gpus), 1)
    stop = Interruption(minutes)
    while waiting or running:
        if why := stop.why():
            raise Interrupted(f"{why}: {finished} of {every} done; the same command goes on")
        while waiting and len(running) < jobs:
            member = waiting.pop(0)
            tries[member.name] += 1
            gpu = _least_used(gpus, running)
            process = _start(workdir, member, words(member.name), _environment(gpu, shared))
            running[member.name] = _Child(member, process, time.monotonic(), gpu)
        for name, (member, process, since, _) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[name]
            seconds = time.monotonic() - since
            if code == 0 and is_done(member):
                finished += 1
                spent = time.monotonic() - began
                left = spent / finished * (len(waiting) + len(running))
                line = f"{finished}/{every}  {name}  {seconds:.0f} s  left {clock(left)}"
                print(line, flush=True)
            elif tries[name] < TRIES:
                print(
                    f"{name}: failed ({_last_line(workdir, member)}); once more later", flush=True
                )
                waiting.append(member)
            else:
                print(f"{name}: FAILED ({_last_line(workdir, member)})", flush=True)
                failed.append(name)
        time.sleep(0.2)
    return failed


def _least_used(gpus: list[str], running: dict[str, _Child]) -> str | None:
    """The GPU that the fewest runs have, the first of several; None where there is none."""
    used = collections.Counter(child.gpu for child in running.values())
    return min(gpus, key=lambda gpu: used[gpu], default=None)


def _environment(gpu: str | None, shared: bool) -> dict[str, str]:
    """A child's; `shared`: others may have their arrays on the same accelerator."""
    environment = dict(os.environ)
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
    """Has this process told to save and leave when the sweep that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
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


def _last_line(workdir: pathlib.Path, member: Member) -> str:
    """What a failed run said last."""
    text = (workdir / member.name / "log.txt").read_text(errors="replace").strip()
    return text.splitlines()[-1][:200] if text else "no word"
