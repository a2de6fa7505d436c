"""How far a sweep is, read from its runs' folders alone, beside whatever runs there.

A run is, in this order:

- done: trained and evaluated (`members.done`).
- running: its turn is taken (`turn.holder`: the process is there, or, of another machine, has said
  so in the last 90 s), or another process holds the lock of its checkpoints (a training started by
  hand). In a bucket, which has neither: metrics.jsonl has changed in the last 10 minutes and since
  the log told of a failure, so that a run there shows as running for so long after it was stopped,
  and as waiting while it compiles.
- failed: it has ended with a message or a traceback, which is the last of its log: log.txt, or on
  Cloud TPU those that the hosts of its newest attempt left in logs/.
- interrupted: it has begun and is at none of these: the same command goes on with it.
- waiting: nothing of it is there.

A backend may know better (queued, preempted), and says so by `told`.
"""

from __future__ import annotations

import collections
import os
import pathlib
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from eqst import card, lock
from eqst.processes import START_AGAIN
from eqst.record import clock
from eqst.sweeps import members, turn
from eqst.sweeps.members import Member

STATES = ("done", "running", "queued", "interrupted", "failed", "waiting")  # "queued" by told
FRESH_SECONDS = 600.0  # of metrics.jsonl in a bucket
RATES = 10  # of the newest lines of a record: one line may have an evaluation in it
ERRORS = ("valid_shape_db", "train_exact_shape_db")
LAUNCHERS = ("srun:", "slurmstepd", "scancel:")  # what they add to a log says nothing of the run
MESSAGE = "launch/sweep.py: "  # how `eqst.command` ends a run
BEGINNINGS = ("train: ", "resumed at step")  # of another attempt


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
      name: of the run.
      state: one of STATES, or a backend's word.
      step: the last one in its record.
      steps: that it has to take.
      batch_size: pairs in a step.
      pairs_per_s: lately; None where nothing says so.
      best_db: the best error on held-out train talkers so far, None before the first.
      note: what a failed run said last, or what a backend adds.
    """

    name: str
    state: str
    step: int
    steps: int
    batch_size: int
    pairs_per_s: float | None
    best_db: float | None
    note: str = ""

    def pairs_left(self) -> int:
        """What it has still to train."""
        return 0 if self.state == "done" else (self.steps - self.step) * self.batch_size

    def seconds_left(self) -> float | None:
        """Of training at its rate, for one that runs; its evaluation comes on top."""
        if self.state != "running" or not self.pairs_per_s:
            return None
        return self.pairs_left() / self.pairs_per_s


def read(workdir: epath.Path, member: Member, data: str = "", manifest: str = "") -> Progress:
    """How far one member is; writes nothing and disturbs nobody."""
    folder = workdir / member.name
    rows = card.metrics_of(folder) if folder.is_dir() else ()
    rates = [row["pairs_per_s"] for row in rows if "pairs_per_s" in row][-RATES:]
    errors = [row[name] for row in rows for name in ERRORS if name in row]
    state, note = _state(workdir, member, data, manifest)
    return Progress(
        member.name,
        state,
        max((row["step"] for row in rows), default=0),
        member.config.train.steps,
        member.config.train.batch_size,
        statistics.median(rates) if rates else None,
        min(errors, default=None),
        note,
    )


def _state(workdir: epath.Path, member: Member, data: str, manifest: str) -> tuple[str, str]:
    folder = workdir / member.name
    if members.done(workdir, member, data, manifest):
        return "done", ""
    if not folder.is_dir():
        return "waiting", ""
    logs = _logs(folder)
    said = _last_words(logs)
    if _runs(folder, max((log.stat().mtime for log in logs), default=0) if said else 0):
        return "running", ""
    if said:
        return "failed", said
    begun = logs or any((folder / name).exists() for name in (card.CARD_NAME, "checkpoints"))
    return ("interrupted" if begun else "waiting"), ""


def _runs(folder: epath.Path, failed_at: float) -> bool:
    """Whether one runs whose log told of a failure at `failed_at`, 0 for none."""
    if "://" not in str(folder):
        own = pathlib.Path(folder)
        return turn.holder(own) is not None or bool(lock.is_held(folder / "checkpoints"))
    record = folder / card.METRICS_NAME
    written = record.stat().mtime if record.exists() else 0
    return time.time() - written < FRESH_SECONDS and written > failed_at


def last_words(folder: str | os.PathLike[str]) -> str:
    """What a run said that failed, by the end of its log; '' where that is no failure."""
    return _last_words(_logs(epath.Path(folder)))


def _logs(folder: epath.Path) -> list[epath.Path]:
    """Those of the newest attempt: log.txt, or logs/JOB-HOST.txt of each host of a Cloud TPU."""
    hosts = folder / "logs"
    paths = list(hosts.iterdir()) if hosts.is_dir() else []
    if (folder / "log.txt").exists():
        paths.append(folder / "log.txt")
    jobs = {path: path.name.partition("-")[0] for path in paths}
    newest = max(paths, key=lambda path: path.stat().mtime, default=None)
    return sorted(path for path in paths if newest and jobs[path] == jobs[newest])


def _last_words(logs: list[epath.Path]) -> str:
    """The first of them that tells of a failure: the other hosts only say that one is gone."""
    return next(filter(None, map(_failure, logs)), "")


def _failure(log: epath.Path) -> str:
    """What the end of a log says of a failure; '' where it is none."""
    lines = [line for line in _tail(log).splitlines() if line.strip()]
    lines = [x for x in lines if not x.startswith(LAUNCHERS) and START_AGAIN not in x]
    if not lines:
        return ""
    if lines[-1].startswith(MESSAGE):
        return lines[-1].removeprefix(MESSAGE)[:200]
    trace = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    if trace and not any(line.startswith(BEGINNINGS) for line in lines[trace[-1] :]):
        return lines[-1][:200]
    return ""


def _tail(path: Any, size: int = 20_000) -> str:
    """The end of a text, which may be long."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size))
        return file.read().decode("utf-8", errors="replace")


def told(rows: Iterable[Progress], words: Mapping[str, tuple[str, str]]) -> list[Progress]:
    """Progress, with what a backend says of some members: by name, a state ('' leaves it) and a
    note ('' leaves it)."""
    changed = []
    for row in rows:
        state, note = words[row.name] if row.name in words else ("", "")
        outdated = row.state == "running" and state == "failed"  # it was started elsewhere since
        if row.state != "done" and not outdated:
            row = row._replace(state=state or row.state, note=note or row.note)
        changed.append(row)
    return changed


def table(rows: list[Progress]) -> str:
    """Aligned text: a line for each member, and `summary`."""
    cells = [("run", "state", "step", "pairs/s", "left", "best dB", "")]
    for row in rows:
        left = row.seconds_left()
        cells.append(
            (
                row.name,
                row.state,
                f"{row.step:,}/{row.steps:,}",
                "-" if row.pairs_per_s is None else f"{row.pairs_per_s:,.0f}",
                "-" if left is None else clock(left),
                "-" if row.best_db is None else f"{row.best_db:.3f}",
                row.note,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, state, *numbers, note in cells:
        right = (x.rjust(width) for x, width in zip(numbers, widths[2:], strict=False))
        words = [name.ljust(widths[0]), state.ljust(widths[1]), *right, note]
        lines.append("  ".join(words).rstrip())
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: list[Progress]) -> str:
    """How many are in which state, and the time left: of what has not failed, at the rate of all
    that run now."""
    counts = collections.Counter(row.state for row in rows)
    order = [*(state for state in STATES if state in counts), *sorted(set(counts) - set(STATES))]
    text = f"{len(rows)} runs: " + ", ".join(f"{counts[state]} {state}" for state in order)
    rate = sum(row.pairs_per_s or 0.0 for row in rows if row.state == "running")
    pairs = sum(row.pairs_left() for row in rows if row.state != "failed")
    if rate and pairs:
        text += f"; left {clock(pairs / rate)} at {rate:,.0f} pairs/s"
    return text
