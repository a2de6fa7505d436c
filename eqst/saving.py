"""One checkpoint written while its process goes on: all or nothing, in order, with its errors kept.

`begin` copies the arrays on their devices, so that the next step may take their memory, and has
Orbax write them; what is left (waiting for Orbax, checksums, the seal, what becomes too old) is
done by a thread, after that of the save before: seals come in the order of the saves. Else a last
checkpoint could count before the best one of its step, which nobody would make again.
In the thread only Orbax waits for other processes, by barriers that no step can come between.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import jax
from etils import epath

from eqst import arrays
from eqst.card import MAKE_ROOM, CheckpointError, DamagedCard
from eqst.processes import gathered, wait_for_all
from eqst.seal import LATER, SEAL_NAME, complete_steps, find_card, write_seal

LOOK_SECONDS, LEAVE_SECONDS = 0.05, 10.0

# What `etils.epath` and Orbax reach buckets by; most have errors of their own.
_LIBRARIES = ("tensorflow", "fsspec", "gcsfs", "google", "aiohttp", "requests")


class Background:
    """The saves of one run that are under way; its methods are called by all processes alike."""

    def __init__(self) -> None:
        """With nothing under way."""
        self._under_way: dict[str, Future] = {}  # by the name of the folder they go to
        self._newest: Future | None = None
        self._failed: Exception | None = None

    def begin(
        self,
        root: epath.Path,
        step: int,
        tree: Any,
        keep: Callable[[list[int]], Iterable[int]],
        **facts: Any,
    ) -> None:
        """Begins to save a tree as ROOT/STEP, once the save before it into that folder is complete.

        Args:
          root: the folder of such checkpoints.
          step: steps done, >= 0.
          tree: any tree of arrays; they may be changed or given away once this returns.
          keep: (complete steps, this one among them) -> those that stay.
          **facts: JSON for the seal.

        Raises:
          CheckpointError: this save or one before it could not be made.
        """
        if step < 0:
            raise ValueError(f"step={step}: a step is 0 or more")
        self.wait(root.name)
        folder = root / str(step)
        try:
            # Without a seal this is what an interrupted save or a damaged checkpoint left.
            if jax.process_index() == 0 and folder.exists():
                folder.rmtree()
            wait_for_all(f"eqst may save {root.name} {step}")
            copied = arrays.snapshot(tree)
            whole = arrays.whole(copied)
            written = arrays.begin_write(folder, copied)
        except Exception as error:
            raise _failure(folder, error) from error

        def finish() -> None:
            try:
                written()
                if jax.process_index() == 0 and not self._failed:
                    _seal(folder, step=step, leaves=arrays.facts_of(whole), **facts)
                    prune(root, keep=keep(complete_steps(root)))
            except Exception as error:
                self._failed = self._failed or _failure(folder, error)
            if self._failed:  # or the save before it, without which it must not count
                raise self._failed

        self._newest = self._under_way[root.name] = _in_thread(finish, self._newest)

    def check(self) -> None:
        """Raises the error of a save that has failed meanwhile; waits for nothing.

        Raises:
          CheckpointError: the folder, what the system said, and the way out.
        """
        for job in self._under_way.values():
            if job.done():
                job.result()

    def wait(self, *names: str) -> None:
        """Waits until the saves into some folders, or all, are complete on disk.

        Raises:
          CheckpointError: as `check`.
        """
        for name in names or tuple(self._under_way):
            if name in self._under_way:
                _agree(self._under_way[name])
                del self._under_way[name]

    def close(self, error: BaseException | None) -> None:
        """Waits until nothing is under way any more, done or failed.

        Args:
          error: what the run has ended by. Of several processes it may be one's alone, and Orbax
            waits for one that is gone, so that they wait for LEAVE_SECONDS at most.

        Raises:
          CheckpointError: as `check`, where there is no other error to tell.
        """
        if error is None:
            self.wait()
        elif not isinstance(error, jax.errors.JaxRuntimeError):  # which says that one is gone
            alone = jax.process_count() == 1
            futures.wait(self._under_way.values(), None if alone else LEAVE_SECONDS)


def _agree(job: Future) -> None:
    """The end of a save, on all processes at once; who only waited for its own would wait minutes
    for one that is gone."""
    while jax.process_count() > 1:
        failed = job.done() and job.exception() is not None
        found = gathered(2 if failed else int(job.done()))
        if (found == 2).any() and not failed:
            raise CheckpointError(f"process {found.argmax()} cannot save and says why")
        if failed or found.all():
            break
        futures.wait([job], LOOK_SECONDS)
    job.result()


def _in_thread(act: Callable[[], None], before: Future | None) -> Future:
    """What will come of `act`, which a thread does after `before`.

    A thread of the executors in `concurrent.futures` would keep Python from ending.
    """
    promised: Future = Future()

    def run() -> None:
        futures.wait([before] if before else [])
        try:
            act()
        except Exception as error:
            promised.set_exception(error)
        else:
            promised.set_result(None)

    threading.Thread(target=run, name="eqst-save", daemon=True).start()
    return promised


def _seal(folder: epath.Path, **facts: Any) -> None:
    card = None
    with contextlib.suppress(DamagedCard):  # a lost card is no reason not to save
        card = find_card(folder.parent.parent.parent)
    write_seal(folder, card=card, **facts)


def _failure(folder: epath.Path, error: Exception) -> Exception:
    """What is said of a save that failed; what it left is removed as far as that goes."""
    if isinstance(error, jax.errors.JaxRuntimeError):  # of another process, which is gone
        return error
    with contextlib.suppress(Exception):  # of whichever library reaches the storage
        prune(folder.parent, keep=complete_steps(folder.parent))
    return CheckpointError(
        f"{folder} cannot be saved ({arrays.reason(error)}): {MAKE_ROOM}; what was saved "
        "before is whole, and the same command goes on from it"
    )


def prune(root: epath.Path, *, keep: Iterable[int]) -> None:
    """Removes everything under `root` but the checkpoints of the steps to keep."""
    if jax.process_index() != 0:
        return
    names = {str(step) for step in keep}
    for folder in root.iterdir():
        if folder.name not in names and folder.is_dir():
            # First what makes it count: half a removed checkpoint is no checkpoint.
            (folder / SEAL_NAME).unlink(missing_ok=True)
            folder.rmtree()


def away(error: BaseException, workdir: str) -> OSError | None:
    """What is said where the bucket that a run lives in has failed, by whichever library; or None.

    Args:
      error: what has come of a run.
      workdir: its folder or address.
    """
    ours = isinstance(error, ValueError) or workdir in str(error)  # says already what and where
    library = type(error).__module__.partition(".")[0] in _LIBRARIES
    if "://" not in workdir or ours or not (library or isinstance(error, OSError)):
        return None
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return OSError(f"{workdir} cannot be used now ({said}): {LATER}")
