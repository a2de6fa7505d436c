"""The seal of a checkpoint: a file, written last, with checksums of all that lies beside it.

Without it a folder is no checkpoint; with it, damage to any file is found before anything is read
from them, and what is read can be compared with what was saved, leaf by leaf. It also has a copy of
the run's card, for when that is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from eqst import card as cards
from eqst import processes
from eqst.card import (
    CARD_NAME,
    FORMAT_VERSION,
    CheckpointError,
    DamagedCard,
    digest,
    to_json,
    write_whole,
)

SEAL_NAME = "eqst.json"
DAMAGED_NAME = "eqst.damaged.json"
LATER = "what was saved is as it was, and the same command goes on from it once it can be read"

_log = logging.getLogger("eqst")


class Damaged(Exception):
    """A checkpoint whose files are not what was saved."""


def write_seal(folder: epath.Path, **facts: Any) -> None:
    """Seals a folder: its files as they are now, and `facts` (JSON), in one motion."""
    files = {str(path.relative_to(folder)): digest(path.read_bytes()) for path in _files_in(folder)}
    body = {**facts, "files": files}
    seal = {"format_version": FORMAT_VERSION, "sha256": digest(to_json(body)), "body": body}
    write_whole(folder / SEAL_NAME, to_json(seal))


def read_seal(folder: epath.Path) -> dict[str, Any]:
    """What `write_seal` was given, once every file is found to be as it was then.

    The files come first because Orbax, given a damaged one, fills the screen before it gives up.

    Raises:
      Damaged: a file, or the seal itself, is not what it was.
      OSError: the storage does not give them now.
    """
    text = _read(folder, SEAL_NAME)
    try:
        seal = json.loads(text)
        intact = seal["sha256"] == digest(to_json(seal["body"]))
        files = seal["body"]["files"]
    except (ValueError, KeyError, TypeError) as error:  # bytes that are no UTF-8 are a ValueError
        raise Damaged(f"{SEAL_NAME} cannot be read: {type(error).__name__}") from error
    if not intact:
        raise Damaged(f"{SEAL_NAME} does not match its own checksum")
    for name, expected in files.items():
        if digest(_read(folder, name)) != expected:
            raise Damaged(f"{name} does not match its checksum")
    return seal["body"]


def _read(folder: epath.Path, name: str) -> bytes:
    """A file of a checkpoint; one that is gone, or lies on a bad piece of disk, is damage, and any
    other reason, such as a bucket's that is away, is none."""
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        lost = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        if lost or error.errno == errno.EIO:
            raise Damaged(f"{name} cannot be read: {type(error).__name__}") from error
        reason = error.strerror or " ".join(str(error).split())[:120]
        raise OSError(f"{folder / name} cannot be read now ({reason}): {LATER}") from None


def complete_steps(root: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    if not root.is_dir():
        return []
    names = [folder.name for folder in root.iterdir() if folder.name.isdecimal()]
    return sorted(int(name) for name in names if (root / name / SEAL_NAME).is_file())


def newest_readable(
    root: epath.Path, read: Callable[[int], Any], at_most: int | None = None
) -> tuple[int, Any, dict[int, str]]:
    """(step, tree, damaged) of the newest step that `read` does not find damaged."""
    every = complete_steps(root)
    steps = [step for step in every if at_most is None or step <= at_most]
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        try:
            tree = read(step)
        except Damaged as error:
            damaged[step] = str(error)
            continue
        if damaged:
            found = ", ".join(f"{bad} ({why})" for bad, why in damaged.items())
            _log.warning("damaged in %s: step %s; going on from step %d", root, found, step)
        return step, tree, damaged
    if complete_steps(root) != every:  # a training that is running has moved on meanwhile
        return newest_readable(root, read, at_most)
    found = ", ".join(f"step {bad}: {why}" for bad, why in damaged.items())
    raise CheckpointError(
        f"no checkpoint in {root} can be read ({found}): restore it from a copy, "
        "or move the folder away to start again"
    )


def read_card(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's card; where config.json is damaged, the copy its newest checkpoint has.

    Raises:
      CheckpointError: as `eqst.card.read_card`, where no checkpoint has one either.
    """
    try:
        return cards.read_card(workdir)
    except DamagedCard as error:
        for root in ("last", "best"):
            folder = epath.Path(workdir) / "checkpoints" / root
            for step in reversed(complete_steps(folder)):
                with contextlib.suppress(Damaged):
                    seal = read_seal(folder / str(step))
                    if "card" in seal and seal["card"] is not None:
                        _log.warning("%s; going on with that of step %d", error, step)
                        return seal["card"]
        raise


def find_card(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`read_card`, or None where nothing has been written yet."""
    folder = epath.Path(workdir)
    begun = (folder / CARD_NAME).is_file() or complete_steps(folder / "checkpoints" / "last")
    return read_card(folder) if begun else None


def mend_card(workdir: epath.Path) -> None:
    """Writes a damaged or lost card again, from the newest checkpoint."""
    try:
        cards.read_card(workdir)
    except DamagedCard:
        with contextlib.suppress(DamagedCard):  # checkpoints of an older format have no copy
            write_whole(workdir / CARD_NAME, to_json(read_card(workdir)))


def leaf_facts(leaf: Any) -> dict[str, Any]:
    """Shape, dtype and content checksum of a leaf, as they stand in eqst.json.

    One that is split over processes is gathered: all of them have to ask, in one order.
    """
    shape, dtype = list(leaf.shape), str(leaf.dtype)
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else processes.on_host(leaf)
    return {"shape": shape, "dtype": dtype, "sha256": digest(np.asarray(leaf).tobytes())}


def _files_in(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files_in(path) if path.is_dir() else [path]
