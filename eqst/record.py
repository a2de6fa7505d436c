"""What a run tells: metrics.jsonl, TensorBoard if asked for, and its lines on the screen."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from eqst.card import MAKE_ROOM, METRICS_NAME, read_metrics, to_json, write_whole
from eqst.config import ConfigError
from eqst.files import write_text

SUMMARY_NAME = "summary.json"


class Record:
    """A run's record; only the first process writes and speaks."""

    def __init__(
        self, workdir: pathlib.Path, step: int, tensorboard: bool, say: Callable[[str], None]
    ):
        """Takes up the record at `step`: what was written past it will be written again."""
        self._path = workdir / METRICS_NAME
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
            kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
            write_text(self._path, kept, overwrite=True)
        if tensorboard:
            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl: the step, and what was measured there."""
        if not self._writes:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written ({error.strerror}): {MAKE_ROOM}; the same command "
                "goes on from the last checkpoint"
            ) from None
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self, summary: dict[str, Any]) -> None:
        """Writes what the finished run took beside its record: summary.json."""
        if self._writes:
            write_whole(epath.Path(self._path).parent / SUMMARY_NAME, to_json(summary))

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        self._say(text)


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
