"""Where recordings come from: synthetic talkers, folders of audio, TFDS sets; and their splits.

A recording is all the audio of one talker (or track), joined (design section 3). Sources are
brought into a store once (see `eqst.store`), but for sets that `eqst.build` has made: these are
read where they lie (see `eqst.shards`), unless they have another rate.

`tfds:NAME` is a set in TFDS's own folder ($TFDS_DATA_DIR, or ~/tensorflow_datasets), such as
`tfds:vctk/mic1`; `tfds:/path/to/NAME/1.0.0` (or gs://..) is the set of that folder. A public set
has to be prepared as ArrayRecord: `tfds build vctk --file_format=array_record`. Its feature
`audio`, or else its one audio feature, is what is heard; `speaker`, `speaker_id` or `client_id`
tells the talkers apart, and without any each example is a talker of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from eqst import audio, config, layouts, parallel, shards, synthetic, talkers
from eqst.store import HOPS_PER_SECOND, Corpus, CorpusError, Recording, load_store, make_store

__all__ = ["HOPS_PER_SECOND", "Corpus", "CorpusError", "open_corpus", "open_folds"]

_SPEAKERS = ("speaker", "speaker_id", "client_id")  # what TFDS's sets call who speaks


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


def open_folds(
    folds: Sequence[config.Data], progress: Callable[[str], None] = print
) -> tuple[Corpus, np.ndarray]:
    """The train recordings of several runs as one corpus.

    Args:
      folds: settings that differ in `fold` alone.
      progress: as in `open_corpus`.

    Returns:
      the corpus, and [runs, R] the probability that a run draws a recording: what `weight_R` is in
      the run's own corpus, 0 for those that it holds out.
    """
    if len(set(folds)) == 1:
        corpus = open_corpus(folds[0], "train", progress)
        return corpus, np.tile(corpus.weight_R, (len(folds), 1))
    corpus = open_corpus(dataclasses.replace(folds[0], folds=0, valid_share=0.0), "train", progress)
    place = {where: i for i, where in enumerate(zip(corpus.store_R, corpus.start_R, strict=True))}
    weight_NR = np.zeros((len(folds), len(place)), corpus.weight_R.dtype)
    opened = {data: open_corpus(data, "train", lambda _: None) for data in set(folds)}
    for weight_R, data in zip(weight_NR, folds, strict=True):
        own = opened[data]
        for where, weight in zip(
            zip(own.store_R, own.start_R, strict=True), own.weight_R, strict=True
        ):
            weight_R[place[where]] = weight
    return corpus, weight_NR


class _Opened(NamedTuple):
    """A source: its recordings, the talker of each, the talkers' splits where given, and notes."""

    corpus: Corpus
    talker_R: tuple[str, ...]
    official: dict[str, str] | None
    notes: tuple[str, ...] = ()


def _open_source(source: str, data: config.Data, split: str, progress: Callable) -> Corpus:
    if source == "synthetic":
        whole = load_store(_synthetic_store(data, progress), source)
        opened = _Opened(whole, whole.talker_R, None)
    elif source.startswith("folder:"):
        opened = _open_folder(source, data, progress)
    else:
        opened = _open_tfds(source[5:], data, progress)
    if split in ("train", "all"):  # once a run, also where the store was made by an earlier one
        for line in (*opened.notes, *(f"left out {x}" for x in opened.corpus.skipped)):
            progress(line)
    keep = _split(opened.talker_R, split, data, opened.official, source)
    return opened.corpus.select(keep)


def by_hash(talkers: Iterable[str]) -> list[str]:
    """Every talker once, in an order that is the same wherever they come from."""
    return sorted(set(talkers), key=lambda name: hashlib.sha256(name.encode()).digest())


def held_out(order: list[str], share: float) -> list[str]:
    """The talkers nothing is trained on: a share of `by_hash`, at least one, but never all."""
    return order[: min(max(1, round(share * len(order))), len(order) - 1)]


def talker_splits(found: layouts.Found, dev_share: float) -> dict[str, str]:
    """The split of every talker: as the manifest or layout says, else a share by hash is dev."""
    official = {place.talker: place.split for place in found.files if place.split}
    free = {shards.hashed_name(x.talker): x.talker for x in found.files}
    order = [name for name in by_hash(free) if free[name] not in official]
    dev = set(held_out(order, dev_share)) if dev_share and len(order) > 1 else set()
    return official | {free[name]: "dev" if name in dev else "train" for name in order}


def _split(
    talker_R: tuple[str, ...],
    split: str,
    data: config.Data,
    official: dict[str, str] | None,
    source: str,
) -> np.ndarray:
    """Indices of the split's recordings: by talker, from the manifest or a share by hash."""
    order = by_hash(talker_R)
    if split == "all":
        return np.arange(len(talker_R))
    if official is not None:
        train = [name for name in order if official[name] == "train"]
        dev = [name for name in order if official[name] == "dev"]
    else:
        if len(order) < 2:
            raise CorpusError(
                f"{source}: one talker only ({talker_R[0]}); training needs 2 or more, one held "
                "out: put each talker's files into a folder of their own"
            )
        dev = held_out(order, data.dev_share)
        train = order[len(dev) :]
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
    train = [name for name in train if name not in set(valid)]
    chosen = set({"train": train, "valid": valid or train, "dev": dev}[split])
    if not chosen:
        there = f" (all are {', '.join(sorted(set(official.values())))})" if official else ""
        raise CorpusError(
            f"{source}: no talker in split {split!r} of {len(order)} talkers{there}: "
            "training needs train, evaluation dev"
        )
    return np.array([i for i, name in enumerate(talker_R) if name in chosen])


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


def _synthetic_recording(task: tuple[int, int, float, int]) -> Recording:
    seed, talker, seconds, sample_rate = task
    samples_T = synthetic.synthesise(seed, talker, seconds, sample_rate=sample_rate)
    return Recording(f"{talker:05d}", samples_T)


def _synthetic_store(data: config.Data, progress: Callable) -> pathlib.Path:
    code = inspect.getsource(synthetic) + inspect.getsource(talkers)
    seed, seconds = data.synthetic_seed, data.synthetic_seconds
    facts = [hashlib.sha256(code.encode()).hexdigest(), seed, data.synthetic_talkers, seconds]
    tasks = [(seed, talker, seconds, data.sample_rate) for talker in range(data.synthetic_talkers)]
    make = lambda: parallel.results(_synthetic_recording, tasks, "synthetic talkers", progress)  # noqa: E731
    return make_store(data, "synthetic", facts, make)


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes.

    Raises:
      CorpusError: they cannot be read, which says nothing of what they are.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(
            f"{os.fspath(path)!r} cannot be read ({error.strerror}): mend that, and the same "
            "command goes on"
        ) from None


def mono_blocks(path: str | os.PathLike, sample_rate: int) -> Iterator[np.ndarray]:
    """A whole file, mono, at a rate, as consecutive [t] float32; some of it is in memory at a time.

    Raises:
      AudioError: as `audio.read`.
    """
    header = audio.info(path)
    blocks = audio.stream(path)
    if header.channels > 1:  # what makes it mono depends on all of it
        weights_C = audio.scan(path).mono_weights_C.astype(np.float32)
        mono = (audio.weighted_sum(block_TC, weights_C) for block_TC in blocks)
    else:
        mono = (block_TC[:, 0] for block_TC in blocks)
    if header.sample_rate == sample_rate:
        yield from mono
        return
    import soxr

    # Its blocks are those of `audio.resample` of the whole, to the bit.
    resampler = soxr.ResampleStream(header.sample_rate, sample_rate, 1, "float32", "VHQ")
    taken = given = 0
    for mono_T in mono:
        out_T = resampler.resample_chunk(mono_T)
        taken, given = taken + len(mono_T), given + len(out_T)
        yield out_T
    rest_T = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    left = round(taken * sample_rate / header.sample_rate) - given
    yield np.pad(rest_T, (0, max(left - len(rest_T), 0)))[:left]


def tried_again(read: Callable[[], Any], path: str | os.PathLike) -> Any:
    """What `read` gives, which takes audio from a file.

    What failed once is tried again: the file may have been away for that moment, and what is left
    out is missing for good.

    Raises:
      AudioError: its content is at fault.
      CorpusError: it cannot be read now.
    """
    try:
        return read()
    except audio.AudioError:
        checksum(path)
        return read()


def _read_mono(path: str, sample_rate: int) -> np.ndarray:
    return tried_again(lambda: np.concatenate(list(mono_blocks(path, sample_rate))), path)


def folder_recording(task: tuple[str, list[str], int]) -> Recording | str:
    """All files of one talker, mono, at the store's rate, joined; or why it is left out."""
    talker, paths, sample_rate = task
    pieces, reasons = [], []
    for path in paths:
        try:
            pieces.append(_read_mono(path, sample_rate))
        except audio.AudioError as error:
            reasons.append(str(error))
    if not pieces:
        return f"{talker}: {reasons[0]}"
    return Recording(talker, np.concatenate(pieces), tuple(reasons))


def _open_folder(source: str, data: config.Data, progress: Callable) -> _Opened:
    """A folder through a store: a recording for each talker (or track) in each condition."""
    root = pathlib.Path(source[7:]).expanduser()
    manifest = pathlib.Path(data.manifest).expanduser() if data.manifest else None
    found = layouts.find(
        root, layout=None, stems=("mixture",), manifest=manifest,
        permissive_only=data.permissive_only,
    )  # fmt: skip
    # A store has always had the order of the files, and what is drawn depends on it.
    ordered = sorted(found.files.items(), key=lambda item: item[1][0])
    facts = [
        [place.recording, [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]]]
        for place, paths in ordered
        for path in (root / x for x in paths)
    ]
    tasks = [
        (place.recording, [str(root / x) for x in paths], data.sample_rate)
        for place, paths in ordered
    ]
    make = lambda: parallel.results(folder_recording, tasks, f"reading {root.name}", progress)  # noqa: E731
    whole = load_store(make_store(data, "folder", facts, make), source)
    talker = {f"folder/{x.recording}": shards.hashed_name(x.talker) for x in found.files}
    official = None
    if any(place.split for place in found.files):
        splits = talker_splits(found, data.dev_share)
        official = {shards.hashed_name(name): split for name, split in splits.items()}
    notes = [found.doubt] if found.doubt else []
    if found.layout != "folder":
        notes.append(f"{source} has the layout {found.layout}: {len(set(talker.values()))} talkers")
    loose = sum(paths == [pathlib.Path(paths[0].name)] for _, paths in ordered)
    if loose > 1 and manifest is None:
        notes.append(f"{source}: {loose} files lie straight in it: each counts as a talker")
    for kind, count in collections.Counter(x.kind for x in found.rejected).items():
        first = next(x for x in found.rejected if x.kind == kind)
        notes.append(f"left out {count} for this: {first.name}: {first.reason}")
    return _Opened(
        whole,
        tuple(talker[name] for name in whole.talker_R),
        official,
        tuple(notes),
    )


def _open_tfds(name: str, data: config.Data, progress: Callable) -> _Opened:
    """A set that `eqst.build` made, read where it lies, or any TFDS audio set through a store."""
    place = epath.Path(name).expanduser() if _is_path(name) else _builder(name).data_path
    if not shards.is_set(place):
        store, notes = _tfds_store(name, data, progress)
        whole = load_store(store, f"tfds:{name}")
        return _Opened(whole, whole.talker_R, None, notes)
    built = shards.load(place)
    opened = _Opened(built.corpus, built.talker_R, built.official)
    if built.corpus.sample_rate == data.sample_rate:
        return opened
    progress(f"tfds:{name} has {built.corpus.sample_rate} Hz: brought to {data.sample_rate} Hz")
    recordings = functools.partial(_resampled, built.corpus, data.sample_rate)
    whole = load_store(make_store(data, "tfds", [built.digest], recordings), "tfds")
    talker = dict(zip(built.corpus.talker_R, built.talker_R, strict=True))
    return _Opened(whole, tuple(talker[x] for x in whole.talker_R), built.official)


def _is_path(name: str) -> bool:
    """Whether it names a folder, and not a set of TFDS's."""
    return name.startswith(("/", "~", ".")) or "://" in name or shards.is_set(name)


def _resampled(corpus: Corpus, sample_rate: int) -> Iterator[Recording]:
    for number, name in enumerate(corpus.talker_R):
        samples_T = corpus.segment(number, 0, int(corpus.length_R[number]))
        resampled_T = audio.resample(samples_T, corpus.sample_rate, sample_rate)
        yield Recording(name.removeprefix("tfds/"), resampled_T)


def _builder(name: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise CorpusError(f"tfds:{name} needs the extra [data]: pip install 'eqst[data]'") from None
    try:
        return tfds.builder_from_directory(name) if _is_path(name) else tfds.builder(name)
    except Exception as error:  # TFDS raises many kinds; each means that there is no such set
        raise CorpusError(
            f"tfds:{name} cannot be opened ({_reason(error)}); prepare it with "
            "file_format='array_record', or name the folder of one version: tfds:/path/NAME/1.0.0"
        ) from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _tfds_store(
    name: str, data: config.Data, progress: Callable
) -> tuple[pathlib.Path, tuple[str, ...]]:
    """Any prepared TFDS audio set stored as ArrayRecord, and what is to be said of it."""
    builder = _builder(name)
    try:
        source = builder.as_data_source("train")
    except Exception as error:  # of many kinds again; each means: not ArrayRecord, or not prepared
        raise CorpusError(
            f"tfds:{name} cannot be opened with random access ({_reason(error)}); prepare it with "
            f"file_format='array_record'"
        ) from None
    features = builder.info.features
    heard = [x for x, kind in features.items() if type(kind).__name__ == "Audio"]
    if "audio" not in features and len(heard) != 1:
        raise CorpusError(
            f"tfds:{name} has no feature 'audio', nor just one of audio "
            f"(it has {', '.join(features)})"
        )
    column = "audio" if "audio" in features else heard[0]
    voice = next((x for x in _SPEAKERS if x in features), None)
    rate = getattr(features[column], "sample_rate", None) or data.sample_rate

    def recordings() -> Iterator[Recording]:
        progress(f"tfds:{name}: making a store of {len(source)} examples, once")
        speakers: dict[str, list[int]] = {}
        for position in range(len(source)):  # each is decoded whole for it: only where it is made
            label = source[position][voice] if voice else position
            label = label.decode() if isinstance(label, bytes) else str(label)
            speakers.setdefault(label, []).append(position)
        for label, positions in speakers.items():
            pieces = []
            for position in positions:
                samples = np.asarray(source[position][column])
                scale = 32768.0 if np.issubdtype(samples.dtype, np.integer) else 1.0
                mono_T = samples.reshape(len(samples), -1).mean(axis=1) / scale
                pieces.append(audio.resample(mono_T.astype(np.float32), rate, data.sample_rate))
            yield Recording(label, np.concatenate(pieces))

    facts = [builder.info.full_name, str(builder.data_dir), len(source), voice]
    said = (
        f"tfds:{name} has no feature {', '.join(_SPEAKERS)}: each of its {len(source)} examples "
        "counts as a talker of its own"
    )
    return make_store(data, "tfds", facts, recordings), () if voice else (said,)
