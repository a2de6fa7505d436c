"""Whose turn a run of a sweep is: who trains or evaluates it, said in its folder while it lasts.

The lock of a run's checkpoints keeps a second writer out where file systems have locks that reach
other machines, and only while it trains. A launcher that starts a run again, because it has lost
the machine on which it ran, may find the old process alive there. So a run's folder has turn.json:
host, process, the launcher's name for this attempt. Its holder touches the file every few seconds,
and ends at once when it finds another's name in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from eqst import files

TURN_NAME = "turn.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 90.0  # clocks of machines differ, shared file systems cache what files' times are
LEAVE_SECONDS = 4 * BEAT_SECONDS  # in which a holder on another machine has seen that it lost


class Turn(NamedTuple):
    """Who has a run.

    Attributes:
      host: of the process.
      process: its number there.
      attempt: the launcher's name for it, "slurm 1234_5 2"; "" for one started by hand.
      key: of this very turn, which no other has.
    """

    host: str
    process: int
    attempt: str
    key: str


def holder(folder: pathlib.Path) -> Turn | None:
    """Who has a run, as far as can be seen from here; None where that one is gone.

    The file has to be fresh, and a process on this machine to be there.
    """
    found = _read(folder)
    if found is None or _has_left(found):
        return None
    with contextlib.suppress(OSError):
        if time.time() - (folder / TURN_NAME).stat().st_mtime < STALE_SECONDS:
            return found
    return None


@contextlib.contextmanager
def taken(folder: pathlib.Path, attempt: str) -> Iterator[None]:
    """Has the turn for as long as the block lasts.

    An attempt of a launcher takes it from an earlier one of the same launcher, which ends when it
    sees that; this waits until it must have. A turn of anything else is respected.

    Args:
      folder: of the run; made if absent.
      attempt: the launcher's name for this attempt, its first word the launcher's; "" by hand.

    Raises:
      ValueError: somebody has it.
    """
    other = holder(folder)
    launcher = attempt.partition(" ")[0]
    if other is not None and not (launcher and other.attempt.partition(" ")[0] == launcher):
        raise ValueError(
            f"{folder} is in use by process {other.process} on {other.host}"
            f"{other.attempt and f' ({other.attempt})'}: wait for it, or stop it"
        )
    mine = Turn(socket.gethostname(), os.getpid(), attempt, secrets.token_hex(8))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / TURN_NAME, mine._asdict())
    if other is not None:
        print(f"taken over from process {other.process} on {other.host}", flush=True)
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline and not _has_left(other):
            time.sleep(0.2)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, mine, over), daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        if _read(folder) == mine:
            (folder / TURN_NAME).unlink(missing_ok=True)


def _beat(folder: pathlib.Path, mine: Turn, over: threading.Event) -> None:
    """Keeps the file fresh; ends the process when the turn is another's."""
    while not over.wait(BEAT_SECONDS):
        found = _read(folder)  # opened anew: that is when NFS asks its server
        if found is not None and found != mine:
            os.write(2, f"taken over by process {found.process} on {found.host}\n".encode())
            os._exit(1)  # at once: what it would save now is the other's to save
        with contextlib.suppress(OSError):
            os.utime(folder / TURN_NAME)


def _read(folder: pathlib.Path) -> Turn | None:
    try:
        return Turn(**json.loads((folder / TURN_NAME).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _has_left(other: Turn) -> bool:
    return other.host == socket.gethostname() and not _lives(other.process)
