"""Recordings with random access: synthetic talkers, folders of audio, TFDS sets.

Every source is brought into one store, once: int16 samples of all its recordings in a row at one
rate, their loudness, and the K-weighted power of every 100 ms. A store lives in the cache folder
under a name made from everything that went into it, so a changed file makes a new store.
A recording is all the audio of one talker (or track), joined (design section 3).
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from eqst import audio, config, synthetic, talkers

FORMAT = 1
TARGET_LUFS = -23.0
HOPS_PER_SECOND = 10  # of the K-weighted powers, and of the starts a segment may have
EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".rf64")


class CorpusError(ValueError):
    """A source that cannot be used: one line with what, and the way out."""


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
      samples: the stores' int16 samples (memory-mapped).
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
    samples: tuple[np.ndarray, ...]
    skipped: tuple[str, ...] = ()

    def segment(self, recording: int, start: int, length: int) -> np.ndarray:
        """[length] float32 at -23 LUFS from sample `start`; zeros outside the recording."""
        begin, end = max(start, 0), min(start + length, int(self.length_R[recording]))
        out_T = np.zeros(length, np.float32)
        if end > begin:
            offset = int(self.start_R[recording])
            source = self.samples[self.store_R[recording]]
            piece = source[offset + begin : offset + end].astype(np.float32)
            out_T[begin - start : end - start] = piece * (self.gain_R[recording] / 32768.0)
        return out_T

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


def open_corpus(data: config.Data, split: str, progress: Callable[[str], None] = print) -> Corpus:
    """The recordings of all sources of one split.

    Args:
      data: the settings; `folds`/`fold` cut the train split for cross-validation.
      split: "train", "valid" (train talkers held out for choosing; the train talkers themselves
        where none are), "dev" (never seen in training) or "all".
      progress: called with a line of text during long work.

    Raises:
      CorpusError: a source is missing, empty, or has too few talkers to hold any out.
    """
    parts = []
    for source, weight in zip(data.sources, data.source_weights, strict=True):
        if weight > 0:
            parts.append((_open_source(source, data, split, progress), weight))
    return _join(parts)


def _open_source(source: str, data: config.Data, split: str, progress: Callable) -> Corpus:
    if source == "synthetic":
        store = _synthetic_store(data, progress)
        official = None
    elif source.startswith("folder:"):
        store, official = _folder_store(pathlib.Path(source[7:]).expanduser(), data, progress)
    else:
        store, official = _tfds_store(source[5:], data, progress), None
    corpus = _load_store(store, source)
    keep = _split(corpus.talker_R, split, data, official, source)
    return corpus.select(keep)


def _split(
    talker_R: tuple[str, ...],
    split: str,
    data: config.Data,
    official: dict[str, str] | None,
    source: str,
) -> np.ndarray:
    """Indices of the split's talkers: from the manifest, else a fixed share by hash of the name."""
    order = sorted(
        range(len(talker_R)), key=lambda i: hashlib.sha256(talker_R[i].encode()).digest()
    )
    if split == "all":
        return np.arange(len(talker_R))
    if official is not None:
        train = [i for i in order if official[talker_R[i]] == "train"]
        dev = [i for i in order if official[talker_R[i]] == "dev"]
    else:
        if len(talker_R) < 2:
            raise CorpusError(
                f"{source}: one talker only ({talker_R[0]}); training needs 2 or more, one held "
                "out: put each talker's files into a folder of their own"
            )
        held = min(max(1, round(data.dev_share * len(order))), len(order) - 1)
        dev, train = order[:held], order[held:]
    if data.folds:
        if data.folds > len(train):
            raise CorpusError(
                f"{source}: {data.folds} folds of {len(train)} train talkers; set data.folds to "
                f"{len(train)} or less"
            )
        valid = train[data.fold :: data.folds]
    else:
        # A share above 0 holds out one talker at least, and leaves one to train on.
        share = round(data.valid_share * len(train))
        valid = train[: min(max(share, int(data.valid_share > 0)), max(len(train) - 1, 0))]
    train = [i for i in train if i not in set(valid)]
    chosen = sorted({"train": train, "valid": valid or train, "dev": dev}[split])
    if not chosen:
        raise CorpusError(f"{source}: no talker in split {split!r} of {len(talker_R)} talkers")
    return np.array(chosen)


def _join(parts: list[tuple[Corpus, float]]) -> Corpus:
    total = sum(weight for _, weight in parts)
    first = parts[0][0]
    stores = np.cumsum([0] + [len(corpus.samples) for corpus, _ in parts])
    return first._replace(
        talker_R=tuple(name for corpus, _ in parts for name in corpus.talker_R),
        store_R=np.concatenate([c.store_R + stores[i] for i, (c, _) in enumerate(parts)]),
        start_R=np.concatenate([corpus.start_R for corpus, _ in parts]),
        length_R=np.concatenate([corpus.length_R for corpus, _ in parts]),
        gain_R=np.concatenate([corpus.gain_R for corpus, _ in parts]),
        weight_R=np.concatenate([corpus.weight_R * (w / total) for corpus, w in parts]),
        power_R=tuple(power for corpus, _ in parts for power in corpus.power_R),
        samples=tuple(samples for corpus, _ in parts for samples in corpus.samples),
        skipped=tuple(line for corpus, _ in parts for line in corpus.skipped),
    )


# --- the store on disk ---------------------------------------------------------------------------


class Recording(NamedTuple):
    """One recording on its way into a store: a name, [T] float32 samples, and what is missing."""

    talker: str
    samples_T: np.ndarray
    skipped: tuple[str, ...] = ()


def _cache_root(data: config.Data) -> pathlib.Path:
    if data.cache_dir:
        return pathlib.Path(data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "eqst"


def _store(
    data: config.Data,
    name: str,
    ingredients: Any,
    recordings: Callable[[], Iterator[Recording | str]],
    progress: Callable[[str], None],
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
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise CorpusError(
            f"cache folder {root}: {error.strerror}; set --config.data.cache_dir"
        ) from None
    try:
        _write_store(temporary, data.sample_rate, name, recordings(), progress)
        try:
            temporary.rename(folder)
        except OSError:  # another process finished the same store first
            if not (folder / "index.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_store(
    folder: pathlib.Path,
    sample_rate: int,
    name: str,
    recordings: Iterator[Recording | str],
    progress: Callable[[str], None],
) -> None:
    index: dict[str, Any] = {"sample_rate": sample_rate, "recordings": [], "skipped": []}
    powers, start = [], 0

    def leave_out(reason: str) -> None:
        index["skipped"].append(reason)
        progress(f"{name}: left out {reason}")

    with open(folder / "samples.int16", "wb") as file:
        for item in recordings:
            if isinstance(item, str):
                leave_out(item)
                continue
            for reason in item.skipped:
                leave_out(reason)
            samples_T = item.samples_T
            peak = float(np.abs(samples_T).max(initial=0.0))
            power_J = audio.k_weighted_power(samples_T[:, None], sample_rate)
            try:
                loudness = audio.gated_loudness_lufs(power_J)
            except audio.AudioError as error:
                leave_out(f"{item.talker}: {error}")
                continue
            if not np.isfinite(loudness):
                leave_out(f"{item.talker}: silent")
                continue
            gain = 10.0 ** ((TARGET_LUFS - loudness) / 20.0)
            scale = 32767.0 / peak
            file.write(np.round(samples_T * scale).astype("<i2").tobytes())
            index["recordings"].append(
                {
                    "talker": item.talker,
                    "start": start,
                    "length": len(samples_T),
                    "gain": gain * 32768.0 / scale,
                    "blocks": len(power_J),
                }
            )
            start += len(samples_T)
            powers.append((power_J * gain**2).astype(np.float32))
    if not powers:
        raise CorpusError(f"{name}: no usable audio; {'; '.join(index['skipped'][:3])}")
    np.save(folder / "power.npy", np.concatenate(powers))
    (folder / "index.json").write_text(json.dumps(index))


def _load_store(folder: pathlib.Path, source: str) -> Corpus:
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
        # Longer recordings hold more to learn from, but no talker may rule.
        weight_R=np.sqrt([float(recording["length"]) for recording in recordings]),
        power_R=tuple(np.split(power_V, ends[:-1])),
        samples=(np.memmap(folder / "samples.int16", "<i2", mode="r"),),
        skipped=tuple(index["skipped"]),
    )


# --- the sources ---------------------------------------------------------------------------------


def _parallel(function: Callable, tasks: list, name: str, progress: Callable) -> Iterator:
    """Results in order from one process per core, with a line every tenth of the way."""
    import joblib  # its workers, unlike multiprocessing's, do not import the caller's script

    jobs = joblib.Parallel(n_jobs=min(os.cpu_count() or 1, len(tasks)), return_as="generator")
    results = jobs(joblib.delayed(function)(task) for task in tasks)
    for done, result in enumerate(results, start=1):
        if done % max(1, len(tasks) // 10) == 0 or done == len(tasks):
            progress(f"{name}: {done} of {len(tasks)} recordings")
        yield result


def _synthetic_recording(task: tuple[int, int, float, int]) -> Recording:
    seed, talker, seconds, sample_rate = task
    samples_T = synthetic.synthesise(seed, talker, seconds, sample_rate=sample_rate)
    return Recording(f"{talker:05d}", samples_T)


def _synthetic_store(data: config.Data, progress: Callable) -> pathlib.Path:
    code = inspect.getsource(synthetic) + inspect.getsource(talkers)
    seed, seconds = data.synthetic_seed, data.synthetic_seconds
    facts = [hashlib.sha256(code.encode()).hexdigest(), seed, data.synthetic_talkers, seconds]
    tasks = [(seed, talker, seconds, data.sample_rate) for talker in range(data.synthetic_talkers)]
    make = lambda: _parallel(_synthetic_recording, tasks, "synthetic talkers", progress)  # noqa: E731
    return _store(data, "synthetic", facts, make, progress)


def _folder_files(
    root: pathlib.Path, data: config.Data
) -> tuple[dict[str, list[pathlib.Path]], dict[str, str] | None]:
    """Files by talker, and the talkers' official splits where a manifest gives them."""
    if not root.is_dir():
        raise CorpusError(f"{root} is not a folder; give a folder of audio files")
    listed: dict[pathlib.Path, str] = {}
    if data.manifest:
        manifest = pathlib.Path(data.manifest).expanduser()
        if not manifest.is_file():
            raise CorpusError(f"{manifest}: no such manifest")
        wanted = ["path", "split"] + ["permissive"] * data.permissive_only
        with open(manifest, newline="") as file:
            rows = csv.DictReader(file)
            missing = [column for column in wanted if column not in (rows.fieldnames or ())]
            if missing:
                raise CorpusError(f"{manifest}: no column {', '.join(missing)}; add it")
            for row in rows:
                if data.permissive_only and row["permissive"] != "yes":
                    continue
                listed[(manifest.parent / row["path"]).resolve()] = row["split"]
    talkers: dict[str, list[pathlib.Path]] = {}
    official: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in EXTENSIONS or not path.is_file():
            continue
        if data.manifest and path.resolve() not in listed:
            continue
        inside = path.relative_to(root)
        # A file straight in the folder is a talker (or track) of its own.
        talker = str(inside.parent) if len(inside.parts) > 1 else inside.stem
        talkers.setdefault(talker, []).append(path)
        if data.manifest:
            split = listed[path.resolve()]
            if official.setdefault(talker, split) != split:
                raise CorpusError(
                    f"{data.manifest}: talker {talker} is in {official[talker]!r} and in "
                    f"{split!r}; a talker has one split, so that none is trained and tested on"
                )
    if not talkers:
        raise CorpusError(f"{root}: no audio file ({', '.join(EXTENSIONS)}) in it")
    return talkers, official if data.manifest else None


def _folder_recording(task: tuple[str, list[str], int]) -> Recording | str:
    """All files of one talker, mono, at the store's rate, joined; or why it is left out."""
    talker, paths, sample_rate = task
    pieces, reasons = [], []
    for path in paths:
        try:
            sound = audio.read(path)
        except audio.AudioError as error:
            reasons.append(str(error))
            continue
        mono_T = audio.to_mono(sound.samples_TC)
        pieces.append(audio.resample(mono_T, sound.sample_rate, sample_rate).astype(np.float32))
    if not pieces:
        return f"{talker}: {reasons[0]}"
    return Recording(talker, np.concatenate(pieces), tuple(reasons))


def _folder_store(
    root: pathlib.Path, data: config.Data, progress: Callable
) -> tuple[pathlib.Path, dict[str, str] | None]:
    talkers, official = _folder_files(root, data)
    facts = [
        [talker, [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]]]
        for talker, paths in talkers.items()
        for path in paths
    ]
    tasks = [
        (talker, [str(path) for path in paths], data.sample_rate)
        for talker, paths in talkers.items()
    ]
    make = lambda: _parallel(_folder_recording, tasks, f"reading {root.name}", progress)  # noqa: E731
    store = _store(data, "folder", facts, make, progress)
    if official is not None:
        official = {f"folder/{talker}": split for talker, split in official.items()}
    return store, official


def _tfds_store(name: str, data: config.Data, progress: Callable) -> pathlib.Path:
    """Any prepared TFDS audio set stored as ArrayRecord; talkers are its `speaker` feature."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise CorpusError(f"tfds:{name} needs the extra [data]: pip install 'eqst[data]'") from None
    try:
        builder = tfds.builder(name)
        source = builder.as_data_source("train")
    except Exception as error:  # TFDS raises many kinds; each means: not there or not ArrayRecord
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"tfds:{name} cannot be opened with random access ({reason[:160]}); prepare it with "
            f"file_format='array_record'"
        ) from None
    features = builder.info.features
    if "audio" not in features:
        raise CorpusError(f"tfds:{name} has no feature 'audio' (it has {', '.join(features)})")
    rate = getattr(features["audio"], "sample_rate", None) or data.sample_rate
    speakers: dict[str, list[int]] = {}
    for position in range(len(source)):
        example = source[position]
        label = example["speaker"] if "speaker" in example else position
        label = label.decode() if isinstance(label, bytes) else str(label)
        speakers.setdefault(label, []).append(position)

    def recordings() -> Iterator[Recording]:
        for label, positions in speakers.items():
            pieces = []
            for position in positions:
                samples = np.asarray(source[position]["audio"])
                scale = 32768.0 if np.issubdtype(samples.dtype, np.integer) else 1.0
                mono_T = samples.reshape(len(samples), -1).mean(axis=1) / scale
                pieces.append(audio.resample(mono_T.astype(np.float32), rate, data.sample_rate))
            yield Recording(label, np.concatenate(pieces))

    facts = [builder.info.full_name, str(builder.data_dir), len(source)]
    return _store(data, "tfds", facts, recordings, progress)
