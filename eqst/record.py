"""What a run tells: metrics.jsonl, TensorBoard if asked for, and its lines on the screen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import jax
from etils import epath

from eqst.card import MAKE_ROOM, METRICS_NAME, read_metrics, write_whole
from eqst.config import ConfigError

# What is in a bucket cannot be appended to, and may be written once a second.
FLUSH_SECONDS = 30.0


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
        self._say = say
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

    def flush(self) -> None:
        """Has everything written so far stand in the file; before each checkpoint, which counts
        on the lines before it."""
        if self._writes and not self._appends:
            self._rewrite()

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(self._lines))
        self._flushed = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        self._say(text)


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
