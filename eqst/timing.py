"""Timing things in turns, and what a comparison is made of; `eqst.benchmark` uses it."""

from __future__ import annotations

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


def process(command_line: list[str], environment: dict[str, str]) -> Spent:
    """Wall time, CPU time and largest memory of a process of its own."""
    start = time.perf_counter()
    child = subprocess.Popen(
        command_line,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    with child.stderr:
        said = child.stderr.read().decode(errors="replace")
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        last = " ".join(said.split())[-300:]
        raise ValueError(f"{' '.join(command_line)[:80]} failed: {last}")
    kilobytes = used.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return Spent(seconds, used.ru_utime + used.ru_stime, kilobytes / 1024)
