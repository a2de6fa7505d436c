"""What a build of a set does to one recording and to one shard, each in a process of its own.

A piece of work leaves its result under a temporary name, renames it when it is whole, and is done
where its JSON stands: a build that was killed leaves out what is done and repeats the rest.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import operator
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from eqst import audio, corpus, files, layouts, shards, store
from eqst.files import write_atomically, write_json
from eqst.layouts import Reject


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what is in a set, beside the files; named as the flags are."""

    name: str
    version: str
    layout: str
    stems: tuple[str, ...]
    manifest: str  # checksum of its content
    permissive_only: bool
    sample_rate: int
    chunk_seconds: float
    dev_share: float
    min_seconds: float
    min_lufs: float
    shard_mb: int

    @property
    def chunk(self) -> int:
        return round(self.chunk_seconds * self.sample_rate)


@dataclasses.dataclass(frozen=True)
class Task:
    """One recording to be made; its files lie in `root`, its results go to `folder`/`number`."""

    folder: pathlib.Path
    number: int
    name: str
    root: pathlib.Path
    files: tuple[pathlib.Path, ...]
    settings: Settings


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to be written, from pieces (recording's number, first chunk, last, its facts)."""

    work: pathlib.Path
    name: str
    pieces: tuple[tuple[int, int, int, dict[str, Any]], ...]
    chunk: int


# ---- recordings


def facts_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where it is written what became of a recording; where this is, the recording is done."""
    return folder / f"{number:06d}.json"


def make_recording(task: Task) -> None:
    """Decodes, joins and levels one recording; memory holds a part of one file at a time.

    Raises:
      CorpusError: one of its files cannot be read now.
      OSError: the disk is full, or takes no files.
    """
    try:
        _make_recording(task)
    except (OSError, audio.AudioError) as error:  # of writing: those of reading do not get here
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{task.folder} cannot be written ({error.strerror})"
        raise OSError(f"{reason}: make room there, and the same command goes on") from None


def _make_recording(task: Task) -> None:
    settings, rejected, end = task.settings, [], 0
    with tempfile.TemporaryFile(dir=task.folder) as spool:
        for path in task.files:
            try:
                end = corpus.tried_again(
                    functools.partial(_decode, task.root / path, settings.sample_rate, spool, end),
                    task.root / path,
                )
            except audio.AudioError as error:
                kind = "not finite" if isinstance(error, files.NotFiniteError) else "unreadable"
                # The set shall not know where the files lay.
                reason = str(error).replace(repr(os.fspath(task.root / path)), "it")
                rejected.append(Reject(layouts.text(path), kind, layouts.text(reason)))
        spool.truncate(end)  # what could not be decoded to its end is no part of it
        length = end // np.dtype(np.float32).itemsize
        facts: dict[str, Any] = {}
        try:
            facts = _level(task, spool, length) if length else {}
        except _Unusable as error:
            rejected.append(Reject(task.name, *error.args))
    write_json(facts_path(task.folder, task.number), {"rejected": rejected, **facts})


def _decode(path: pathlib.Path, sample_rate: int, spool: BinaryIO, begin: int) -> int:
    """Writes a file's samples from `begin` on, in bytes, and gives where they end."""
    spool.seek(begin)
    for mono_T in corpus.mono_blocks(path, sample_rate):
        spool.write(mono_T.tobytes())
    return spool.tell()


class _Unusable(Exception):
    """A recording that is left out: the kind, and one line."""


def _level(task: Task, spool: Any, length: int) -> dict[str, Any]:
    settings, seconds = task.settings, length / task.settings.sample_rate
    if seconds < settings.min_seconds:
        bound = f"less than --min_seconds={settings.min_seconds:g}"
        raise _Unusable("too short", f"{seconds:.2f} s, {bound}")
    samples_T = np.memmap(spool, np.float32, mode="r", shape=(length,))
    try:
        level = store.measure(samples_T, settings.sample_rate)
    except audio.AudioError as error:
        raise _Unusable("silent", str(error)) from None
    if level.lufs < settings.min_lufs:
        bound = f"under --min_lufs={settings.min_lufs:g}"
        raise _Unusable("too quiet", f"{level.lufs:.1f} LUFS, {bound}")

    def write(temporary: pathlib.Path) -> None:
        with open(temporary, "wb") as file:
            store.write_samples(file, samples_T, level)

    place = facts_path(task.folder, task.number)
    write_atomically(place.with_suffix(".int16"), write)
    write_atomically(place.with_suffix(".npy"), lambda x: np.save(x, level.power_J))
    return {"length": length, "gain": level.gain, "blocks": len(level.power_J)}


# ---- shards


def shard_tasks(
    work: pathlib.Path, settings: Settings, rows: list[dict[str, Any]]
) -> dict[str, list[ShardTask]]:
    """Which chunks go into which shard, by split: all shards of a split are of nearly one size."""
    most = max(1, settings.shard_mb * 2**20 // (2 * settings.chunk))
    tasks = {}
    for split in shards.SPLITS:
        part = [row for row in rows if row["split"] == split]
        total = sum(row["chunks"] for row in part)
        count = -(-total // most)
        if not count:
            continue
        edges = [total * number // count for number in range(count + 1)]
        tasks[split] = [
            ShardTask(
                work,
                shards.shard_name(settings.name, split, number, count),
                tuple(_pieces(part, begin, end)),
                settings.chunk,
            )
            for number, (begin, end) in enumerate(itertools.pairwise(edges))
        ]
    return tasks


def _pieces(rows: list[dict[str, Any]], begin: int, end: int) -> Iterator[tuple]:
    """The recordings' parts of a split's chunks `begin` .. `end` - 1."""
    first_chunk = operator.itemgetter("first_chunk")
    holding = bisect.bisect_right(rows, begin, key=first_chunk) - 1
    for row in itertools.takewhile(lambda row: first_chunk(row) < end, rows[holding:]):
        first = max(begin - row["first_chunk"], 0)
        last = min(end - row["first_chunk"], row["chunks"])
        facts = {key: row[key] for key in ("talker", "recording", "gain")}
        yield row["number"], first, last, facts


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Writes a shard, unless it is there; what `shards.write_shard` says of it, and its name."""
    done = task.work / "shards" / f"{task.name}.json"
    if done.exists():
        return json.loads(done.read_text())

    def examples() -> Iterator[dict[str, Any]]:
        for number, first, last, facts in task.pieces:
            path = facts_path(task.work / "recordings", number).with_suffix(".int16")
            samples_T = np.memmap(path, "<i2", mode="r")
            yield from shards.chunk_examples(samples_T, first, last, task.chunk, facts)

    # Not in the folder that becomes the set: a worker may outlive a build that was killed.
    temporary = task.work / "shards" / f"{os.getpid()}-{task.name}"
    written = {"name": task.name, **shards.write_shard(temporary, examples(), task.chunk)}
    os.replace(temporary, task.work / "set" / task.name)
    write_json(done, written)
    return written
