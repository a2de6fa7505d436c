"""One writer at a time: a lock on a run's folder that no end of a process leaves behind."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import IO

from etils import epath

from eqst.card import CheckpointError

LOCK_NAME = "lock"
_FLOCK = "hhqqi0q"  # Linux's struct flock: type, whence, start, length, process


def hold(folder: epath.Path, option: str = "--workdir") -> IO[str] | None:
    """Locks a local folder until the file is closed or the process ends, however it ends.

    Args:
      folder: what one process may write to at a time.
      option: the command's, by which another folder can be chosen.

    Raises:
      CheckpointError: another process holds it.
    """
    if "://" in os.fspath(folder):
        return None  # buckets know no locks: there a launcher must see to it
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = open(folder / LOCK_NAME, "a+", encoding="utf-8")
    try:
        # A POSIX lock is not inherited by forked workers, which may outlive a killed trainer.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise CheckpointError(
            f"{folder} is in use by {holder or 'another process'}: "
            f"wait for it, stop it, or choose another {option}"
        ) from None
    except OSError:  # a file system without locks
        lock.close()
        return None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def is_held(folder: epath.Path) -> bool | None:
    """Whether some other process holds a folder's lock; asks, and never takes it.

    Returns:
      None where that cannot be told: a bucket, a file system or a platform without such locks.
    """
    if "://" in os.fspath(folder) or not sys.platform.startswith("linux"):
        return None
    import fcntl

    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with open(folder / LOCK_NAME, "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK
