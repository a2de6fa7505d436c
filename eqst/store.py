"""Recordings on disk, with random access.

A store is int16 samples of many recordings in a row at one rate, their loudness, and the K-weighted
power of every 100 ms. It lies in the cache folder under a name made from everything that went into
it, so a changed file makes a new store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from eqst import audio, config, files

FORMAT = 1
_STALE_SECONDS = 86_400.0  # without a write: whoever was building is gone
TARGET_LUFS = -23.0
HOPS_PER_SECOND = 10  # of the K-weighted powers, and of the starts a segment may have


class CorpusError(ValueError):
    """A source that cannot be used: one line with what, and the way out."""


class Samples(Protocol):
    """int16 samples in a row: a mapped file, or `shards.Chunks`."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


class Corpus(NamedTuple):
    """Recordings of one or several stores, all at one rate.

    Attributes:
      sample_rate: in Hz.
      talker_R: a name for each recording, unique.
      store_R: which of `samples` holds the recording.
      start_R, length_R: where it lies there, in samples.
      gain_R: factor that brings its int16 samples / 32768 to -23 LUFS.
      weight_R: probability of being drawn; sums to 1.
      power_R: for each recording its K-weighted mean square per 100 ms, at -23 LUFS.
      samples: the stores' int16 samples (memory-mapped, or read where they are sliced).
      skipped: recordings left out, with the reason.
    """

    sample_rate: int
    talker_R: tuple[str, ...]
    store_R: np.ndarray
    start_R: np.ndarray
    length_R: np.ndarray
    gain_R: np.ndarray
    weight_R: np.ndarray
    power_R: tuple[np.ndarray, ...]
    samples: tuple[Samples, ...]
    skipped: tuple[str, ...] = ()

    def scale(self, recording: int) -> np.float32:
        """What brings the stored integers to -23 LUFS."""
        return np.float32(self.gain_R[recording] / 32768.0)

    def stored(self, recording: int, start: int, length: int) -> np.ndarray:
        """[length] int16 as stored, from sample `start`; zeros outside the recording."""
        begin, end = max(start, 0), min(start + length, int(self.length_R[recording]))
        out_T = np.zeros(length, np.int16)
        if end > begin:
            offset = int(self.start_R[recording])
            source = self.samples[self.store_R[recording]]
            out_T[begin - start : end - start] = source[offset + begin : offset + end]
        return out_T

    def segment(self, recording: int, start: int, length: int) -> np.ndarray:
        """[length] float32 at -23 LUFS from sample `start`; zeros outside the recording."""
        return self.stored(recording, start, length) * self.scale(recording)

    def seconds(self) -> float:
        """Length of all recordings together."""
        return float(self.length_R.sum()) / self.sample_rate

    def select(self, keep: np.ndarray) -> Corpus:
        """The recordings with these indices; their weights are scaled to sum to 1."""
        weight_R = self.weight_R[keep]
        return self._replace(
            talker_R=tuple(self.talker_R[i] for i in keep),
            store_R=self.store_R[keep],
            start_R=self.start_R[keep],
            length_R=self.length_R[keep],
            gain_R=self.gain_R[keep],
            weight_R=weight_R / weight_R.sum(),
            power_R=tuple(self.power_R[i] for i in keep),
        )


class Level(NamedTuple):
    """How loud a recording is, and how it is stored.

    Attributes:
      lufs: its loudness.
      scale: its samples times this, rounded, are the integers that are stored.
      gain: brings those integers / 32768 to -23 LUFS.
      power_J: its K-weighted mean square per 100 ms at -23 LUFS, float32.
    """

    lufs: float
    scale: float
    gain: float
    power_J: np.ndarray


_BLOCK = 2**20  # samples looked at at a time: a recording may lie on disk


def _blocks(samples_T: np.ndarray) -> Iterator[np.ndarray]:
    return (samples_T[start : start + _BLOCK] for start in range(0, len(samples_T), _BLOCK))


def measure(samples_T: np.ndarray, sample_rate: int) -> Level:
    """The level of a mono recording, in memory or mapped, block by block.

    Raises:
      AudioError: it is too short to have one, silent, or nothing but an offset.
    """
    power_J = audio.k_weighted_power(samples_T[:, None], sample_rate)
    lufs = audio.gated_loudness_lufs(power_J)
    if not np.isfinite(lufs):
        raise audio.AudioError("silent")
    peak = max(float(np.abs(block_T).max()) for block_T in _blocks(samples_T))
    mean = sum(block_T.sum(dtype=float) for block_T in _blocks(samples_T)) / len(samples_T)
    squares = (np.square(block_T - mean, dtype=float).sum() for block_T in _blocks(samples_T))
    if audio.is_constant(sum(squares) / len(samples_T), mean):
        raise audio.AudioError("a constant offset (DC), no sound")
    gain, scale = 10.0 ** ((TARGET_LUFS - lufs) / 20.0), 32767.0 / peak
    return Level(lufs, scale, gain * 32768.0 / scale, (power_J * gain**2).astype(np.float32))


def write_samples(file: BinaryIO, samples_T: np.ndarray, level: Level) -> None:
    """Writes a recording as the integers of a store."""
    for block_T in _blocks(samples_T):
        file.write(np.round(block_T * level.scale).astype("<i2").tobytes())


class Recording(NamedTuple):
    """One recording on its way into a store: a name, [T] float32 samples, and what is missing."""

    talker: str
    samples_T: np.ndarray
    skipped: tuple[str, ...] = ()


def _cache_root(data: config.Data) -> pathlib.Path:
    if data.cache_dir:
        return pathlib.Path(data.cache_dir).expanduser()
    return files.cache_folder()


def make_store(
    data: config.Data,
    name: str,
    ingredients: Any,
    recordings: Callable[[], Iterator[Recording | str]],
) -> pathlib.Path:
    """The store made of `ingredients`, built by `recordings` if it is not there yet.

    It is built under a temporary name and renamed when whole: an interrupted or parallel build
    never leaves half a store behind.
    """
    facts = json.dumps([FORMAT, data.sample_rate, ingredients], sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    root = _cache_root(data)
    folder = root / f"{name}-{digest}"
    if (folder / "index.json").exists():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root, name)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise CorpusError(
            f"cache folder {root}: {error.strerror}; set --config.data.cache_dir"
        ) from None
    try:
        _write_store(temporary, data.sample_rate, name, recordings())
        try:
            temporary.rename(folder)
        except OSError:  # another process finished the same store first
            if not (folder / "index.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _sweep(root: pathlib.Path, name: str) -> None:
    """Removes what builds that were killed have left, a day after their last write."""
    for folder in root.glob(f".{name}-*"):
        with contextlib.suppress(OSError):  # its builder may be renaming it just now
            written = [folder, *folder.iterdir()]
            if time.time() - max(path.stat().st_mtime for path in written) > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _write_store(
    folder: pathlib.Path,
    sample_rate: int,
    name: str,
    recordings: Iterator[Recording | str],
) -> None:
    index: dict[str, Any] = {"sample_rate": sample_rate, "recordings": [], "skipped": []}
    powers, start = [], 0

    leave_out = index["skipped"].append

    with open(folder / "samples.int16", "wb") as file:
        for item in recordings:
            if isinstance(item, str):
                leave_out(item)
                continue
            for reason in item.skipped:
                leave_out(reason)
            try:
                level = measure(item.samples_T, sample_rate)
            except audio.AudioError as error:
                leave_out(f"{item.talker}: {error}")
                continue
            write_samples(file, item.samples_T, level)
            index["recordings"].append(
                {
                    "talker": item.talker,
                    "start": start,
                    "length": len(item.samples_T),
                    "gain": level.gain,
                    "blocks": len(level.power_J),
                }
            )
            start += len(item.samples_T)
            powers.append(level.power_J)
    if not powers:
        raise CorpusError(f"{name}: no usable audio; {'; '.join(index['skipped'][:3])}")
    np.save(folder / "power.npy", np.concatenate(powers))
    (folder / "index.json").write_text(json.dumps(index))


def weights(length_R: np.ndarray) -> np.ndarray:
    """Longer recordings hold more to learn from, but no talker may rule."""
    return np.sqrt(length_R.astype(float))


def load_store(folder: pathlib.Path, source: str) -> Corpus:
    """The recordings of a store that `make_store` made.

    Raises:
      CorpusError: a file of it is damaged or gone.
    """
    try:
        corpus = _load(folder, source)
        whole = len(corpus.samples[0]) == corpus.length_R.sum()
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CorpusError(f"{folder} in the cache is damaged: remove it, and it is made again")
    return corpus


def _load(folder: pathlib.Path, source: str) -> Corpus:
    index = json.loads((folder / "index.json").read_text())
    recordings = index["recordings"]
    power_V = np.load(folder / "power.npy")
    ends = np.cumsum([recording["blocks"] for recording in recordings])
    count = len(recordings)
    prefix = source.split(":")[0]
    return Corpus(
        sample_rate=index["sample_rate"],
        talker_R=tuple(f"{prefix}/{recording['talker']}" for recording in recordings),
        store_R=np.zeros(count, np.int32),
        start_R=np.array([recording["start"] for recording in recordings], np.int64),
        length_R=np.array([recording["length"] for recording in recordings], np.int64),
        gain_R=np.array([recording["gain"] for recording in recordings], np.float32),
        weight_R=weights(np.array([recording["length"] for recording in recordings])),
        power_R=tuple(np.split(power_V, ends[:-1])),
        samples=(np.memmap(folder / "samples.int16", "<i2", mode="r"),),
        skipped=tuple(index["skipped"]),
    )
