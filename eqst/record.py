"""What a run tells: metrics.jsonl, TensorBoard if asked for, and its lines on the screen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from eqst.card import MAKE_ROOM, METRICS_NAME, read_metrics, to_json, write_whole
from eqst.config import ConfigError

# What is in a bucket cannot be appended to, and may be written once a second.
FLUSH_SECONDS = 30.0

SUMMARY_NAME = "summary.json"


class Record:
    """A run's record; only the first process writes and speaks."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        step: int,
        tensorboard: bool,
        say: Callable[[str], None],
    ):
        """Takes up the record at `step`: what was written past it will be written again."""
        self._path = epath.Path(workdir) / METRICS_NAME
        self._appends = "://" not in os.fspath(self._path)
        self._lines: list[str] = []  # in a bucket: the whole record, of which some is not there yet
        self._flushed = time.monotonic()
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "config: train.tensorboard needs the extra: pip install 'eqst[tensorboard]'"
                ) from None
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        if self._path.exists():
            rows, strange = read_metrics(self._path)
            if strange:
                say(f"{self._path}: dropped {strange} line(s) that are no record of a step")
            self._lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
            self._rewrite()
        if tensorboard:
            self._board = SummaryWriter(str(self._path.parent / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl: the step, and what was measured there."""
        if not self._writes:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if self._appends:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise OSError(
                    f"{self._path} cannot be written ({error.strerror}): {MAKE_ROOM}; the same "
                    "command goes on from the last checkpoint"
                ) from None
        else:
            self._lines.append(line)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self, summary: dict[str, Any]) -> None:
        """Writes what the finished run took beside its record: summary.json."""
        if self._writes:
            self.flush()
            write_whole(self._path.parent / SUMMARY_NAME, to_json(summary))

    def flush(self) -> None:
        """Has everything written so far stand in the file; before each checkpoint, which counts
        on the lines before it."""
        if self._writes and not self._appends:
            self._rewrite()

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(self._lines))
        self._flushed = time.monotonic()


class Log:
    """What the steps of one program give, for the records of its members and the screen.

    Terms are NamedTuples of [steps] of a call, or of [steps, members] where there are several.
    """

    def __init__(
        self,
        records: list[Record],
        rates: list[Callable[[int], Any]],
        steps: int,
        batch_size: int,
        kind: Callable,
        say: Callable[[str], None],
    ) -> None:
        """`rates` are the members' learning rates by step, `steps` how many there are to do, `kind`
        is the terms' type."""
        self._records, self._rates, self._say = records, rates, say
        self._steps, self._batch_size = steps, batch_size
        self.going = list(range(len(records)))  # members that are still trained
        self.pending: list[tuple[int, Any]] = []  # calls not yet in a line, by their first step
        self._kind = kind
        self._waited, self._done, self._since = 0.0, 0, time.monotonic()
        self._clock = (time.monotonic(), 0)

    def resume(self, unlogged: list[list]) -> None:
        """Takes up what `unlogged` gave for each member before an interruption."""
        for rows in zip(*unlogged, strict=True):
            columns = zip(*(numbers for _, numbers in rows), strict=True)
            terms = self._kind(*(np.array([x], np.float32) for x in columns))
            self.pending.append((rows[0][0], terms))

    def unlogged(self, member: int) -> list:
        """JSON of the pending steps, for a checkpoint's notes."""
        return [
            [first + i, [float(x[i, member]) for x in table]]
            for first, table in ((first, self._table(terms)) for first, terms in self.pending)
            for i in range(len(table[0]))
        ]

    def _table(self, terms: Any) -> list[np.ndarray]:
        """Each term of a call as [steps, members]."""
        return [np.asarray(x).reshape(-1, len(self._records)) for x in terms]

    def start_clock(self, done: int) -> None:
        """From here on, with so many steps done, steps tell the time that is left."""
        self._clock = (time.monotonic(), done)

    def add(self, step: int, terms: Any, waited: float) -> None:
        """The terms of a call from this step on, which may still be on their way, and the seconds
        its batch kept it."""
        self.pending.append((step, terms))
        self._waited += waited
        self._done += len(terms[0])

    def drop(self, member: int) -> None:
        """A member is trained no more."""
        self.going.remove(member)

    def write(self, done: int) -> None:
        """The means of the pending steps, a line of every member's record and one on the screen."""
        now = time.monotonic()
        rate = self._done * self._batch_size / (now - self._since)
        share = self._waited / (now - self._since)
        tables = [self._table(terms) for _, terms in self.pending]
        columns = [np.concatenate(parts) for parts in zip(*tables, strict=True)]
        losses, shapes = [], []
        for member in self.going:
            means = self._kind(
                *(float(np.mean(np.asarray(column[:, member], np.float32))) for column in columns)
            )
            now_rate = float(self._rates[member](done - 1))  # of the last step that was done
            values = {**means._asdict(), "learning_rate": now_rate}
            self._records[member].write(done, {**values, "pairs_per_s": rate, "input_wait": share})
            losses.append(means.loss)
            shapes.append(means.shape_db)
        began, first = self._clock
        left = (self._steps - done) * (now - began) / max(done - first, 1)
        self._say(
            f"step {done}/{self._steps}  loss {_spread(losses)}  shape {_spread(shapes)} dB  "
            f"{rate:,.0f} pairs/s  input wait {share:.0%}  left {clock(left)}"
        )
        self.pending, self._waited, self._since, self._done = [], 0.0, now, 0

    def write_errors(self, done: int, name: str, errors: np.ndarray) -> None:
        """A line of every member's record with an error [members] of that name, and one here."""
        for member in self.going:
            self._records[member].write(done, {name: float(errors[member])})
        self._say(f"step {done}  {name} {_spread([float(errors[i]) for i in self.going])}")


def _spread(numbers: list[float]) -> str:
    """The number, or of several members the least and the most."""
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    return f"{min(numbers):.3f} .. {max(numbers):.3f}"


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
