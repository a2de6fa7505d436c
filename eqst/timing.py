"""Timing things in turns, and what a comparison is made of; `eqst.speed` uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Say = Callable[[str], None]
TURN = 10
SETTLE_SECONDS = 0.25


class Size(NamedTuple):
    """How much is measured; the command's sizes stand in `FULL`."""

    rounds: int = 5
    equalisers: int = 256
    batch: int = 32
    talkers: int = 32
    steps: int = 60
    file_seconds: float = 180.0
    hour_seconds: float = 3600.0
    devices: int = 8  # a power of 2
    members: int = 8
    device_batches: tuple[int, ...] = (64, 1024, 4096)
    device_steps: int = 300
    device_seconds: float = 3.0


FULL = Size()


class Section(NamedTuple):
    """A comparison.

    Attributes:
      about: what was measured.
      rows: {"what", "milliseconds" or another unit, "ratio" ..}, ours first.
      targets: {"what", "value", "bound", "kept"}.
    """

    about: str
    rows: list[dict[str, Any]]
    targets: list[dict[str, Any]]


def in_turns(
    functions: dict[str, Callable[[], Any]], rounds: int, *, settle_seconds: float = SETTLE_SECONDS
) -> dict[str, np.ndarray]:
    """Seconds [TURN rounds] of each function: in every round each has a turn of its own.

    Before a turn there is a pause, because threads of other libraries (OpenMP's, of PyTorch) go on
    spinning for a while after their work; then calls that are not counted for as long again, until
    caches and the processor's clock are what they are in steady work.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(settle_seconds)
            begin = time.perf_counter()
            function()
            while time.perf_counter() - begin < settle_seconds:
                function()
            for _ in range(TURN):
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def timings(seconds: dict[str, np.ndarray], **more: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of timings in milliseconds; the first is ours. `more`: columns by name of the row."""
    ours = np.median(next(iter(seconds.values())))
    made = []
    for name, values in seconds.items():
        low, middle, high = 1e3 * np.quantile(values, [0.1, 0.5, 0.9])
        row = {"what": name, "milliseconds": middle, "p10": low, "p90": high}
        row["ratio"] = 1e-3 * middle / ours
        made.append(row | {column: values[name] for column, values in more.items()})
    return made


def target(
    what: str, value: float, *, least: float = -np.inf, most: float = np.inf
) -> dict[str, Any]:
    """A row of `Section.targets`, with one of the two bounds."""
    bound = f"at most {most:g}" if most < np.inf else f"at least {least:g}"
    return {
        "what": what,
        "value": float(value),
        "bound": bound,
        "kept": bool(least <= value <= most),
    }


class Spent(NamedTuple):
    """What a process took: wall and CPU time, and the most memory it held."""

    seconds: float
    cpu_seconds: float
    megabytes: float


# Run in a small process of its own: a child begins with the memory of what started it.
_MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
megabytes = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
spent = [seconds, used.ru_utime + used.ru_stime, megabytes]
print(json.dumps([done.returncode, done.stderr[-300:], spent]))
"""


def process(command_line: list[str], environment: dict[str, str]) -> Spent:
    """Runs a command; its output is dropped.

    Raises:
      ValueError: it failed; the message has the end of what it said.
    """
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command_line],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    code, said, spent = json.loads(measured.stdout)
    if code:
        raise ValueError(f"{' '.join(command_line)[:80]} failed: {' '.join(said.split())}")
    return Spent(*spent)
