"""Where recordings come from: synthetic talkers, folders of audio, TFDS sets; and their splits.

A recording is all the audio of one talker (or track), joined (design section 3). Sources are
brought into a store once (see `eqst.store`), but for sets that `eqst.build` has made: these are
read where they lie (see `eqst.shards`), unless they have another rate.

`tfds:NAME` is a set in TFDS's own folder ($TFDS_DATA_DIR, or ~/tensorflow_datasets), such as
`tfds:vctk/mic1`; `tfds:/path/to/NAME/1.0.0` (or gs://..) is the set of that folder. A public set
has to be prepared as ArrayRecord: `tfds build vctk --file_format=array_record`. Its feature
`audio`, or else its one audio feature, is what is heard; `speaker` or `speaker_id` tells the
talkers apart, and without either each example is a talker of its own.
"""

from __future__ import annotations

import csv
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

from eqst import audio, config, parallel, shards, synthetic, talkers
from eqst.store import HOPS_PER_SECOND, Corpus, CorpusError, Recording, load_store, make_store

__all__ = ["HOPS_PER_SECOND", "Corpus", "CorpusError", "open_corpus", "open_folds"]

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".rf64")


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
    """A source: its recordings, the talker of each, and the talkers' splits where given."""

    corpus: Corpus
    talker_R: tuple[str, ...]
    official: dict[str, str] | None


def _open_source(source: str, data: config.Data, split: str, progress: Callable) -> Corpus:
    if source == "synthetic":
        whole = load_store(_synthetic_store(data, progress), source)
        opened = _Opened(whole, whole.talker_R, None)
    elif source.startswith("folder:"):
        store, official = _folder_store(pathlib.Path(source[7:]).expanduser(), data, progress)
        whole = load_store(store, source)
        opened = _Opened(whole, whole.talker_R, official)
    else:
        opened = _open_tfds(source[5:], data, progress)
    if split in ("train", "all"):  # once a run, also where the store was made by an earlier one
        for line in opened.corpus.skipped:
            progress(f"left out {line}")
    keep = _split(opened.talker_R, split, data, opened.official, source)
    return opened.corpus.select(keep)


def by_hash(talkers: Iterable[str]) -> list[str]:
    """Every talker once, in an order that is the same wherever they come from."""
    return sorted(set(talkers), key=lambda name: hashlib.sha256(name.encode()).digest())


def held_out(order: list[str], share: float) -> list[str]:
    """The talkers nothing is trained on: a share of `by_hash`, at least one, but never all."""
    return order[: min(max(1, round(share * len(order))), len(order) - 1)]


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
        there = (
            f" (the manifest has {', '.join(sorted(set(official.values())))})" if official else ""
        )
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


class Listed(NamedTuple):
    """A manifest's row: the split of a file, and its talker ("" where it does not say)."""

    split: str
    talker: str


def read_manifest(manifest: pathlib.Path, permissive_only: bool) -> dict[pathlib.Path, Listed]:
    """Every file that a manifest lists, by its resolved path.

    Raises:
      CorpusError: it is missing, no CSV, or lacks a column or a value.
    """
    if not manifest.is_file():
        raise CorpusError(f"{manifest}: no such manifest; give a CSV file with path and split")
    wanted = ["path", "split"] + ["permissive"] * permissive_only
    listed: dict[pathlib.Path, Listed] = {}
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [column for column in wanted if column not in (rows.fieldnames or ())]
            if missing:
                raise CorpusError(f"{manifest}: no column {', '.join(missing)}; add it")
            for row in rows:
                empty = [column for column in wanted if not row[column]]
                if empty:
                    raise CorpusError(
                        f"{manifest}: line {rows.line_num} has no {', '.join(empty)}; fill it in"
                    )
                if permissive_only and row["permissive"] != "yes":
                    continue
                path = (manifest.parent / row["path"]).resolve()
                listed[path] = Listed(row["split"], row.get("talker") or "")
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorpusError(
            f"{manifest} is not a CSV in UTF-8 ({error}); write path and split columns"
        ) from None
    return listed


def one_split(official: dict[str, str], talker: str, split: str, manifest: object) -> None:
    """Notes a talker's split. Raises CorpusError where another one stands there."""
    if official.setdefault(talker, split) != split:
        raise CorpusError(
            f"{manifest}: talker {talker} is in {official[talker]!r} and in "
            f"{split!r}; a talker has one split, so that none is trained and tested on"
        )


def audio_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file that is audio by its name, sorted. Raises CorpusError: it is no folder."""
    if not root.is_dir():
        raise CorpusError(f"{root} is not a folder; give a folder of audio files")
    return [x for x in sorted(root.rglob("*")) if x.suffix.lower() in EXTENSIONS and x.is_file()]


def folder_talker(inside: pathlib.PurePath) -> str:
    """The talker of a file by its place in the folder; one straight in it is one of its own."""
    return str(inside.parent) if len(inside.parts) > 1 else inside.stem


def _folder_files(
    root: pathlib.Path, data: config.Data
) -> tuple[dict[str, list[pathlib.Path]], dict[str, str] | None]:
    """Files by talker, and the talkers' official splits where a manifest gives them."""
    paths = audio_files(root)
    listed: dict[pathlib.Path, Listed] = {}
    if data.manifest:
        listed = read_manifest(pathlib.Path(data.manifest).expanduser(), data.permissive_only)
    talkers: dict[str, list[pathlib.Path]] = {}
    official: dict[str, str] = {}
    for path in paths:
        if data.manifest and path.resolve() not in listed:
            continue
        talker = folder_talker(path.relative_to(root))
        talkers.setdefault(talker, []).append(path)
        if data.manifest:
            one_split(official, talker, listed[path.resolve()].split, data.manifest)
    if not talkers:
        listing = f" that {data.manifest} lists" if data.manifest else ""
        raise CorpusError(
            f"{root}: no audio file ({', '.join(EXTENSIONS)}) in it{listing}; give another folder"
        )
    return talkers, official if data.manifest else None


def read_mono(path: str | os.PathLike, sample_rate: int) -> np.ndarray:
    """[T] float32: a whole file, mono, at a rate. Raises AudioError as `audio.read`."""
    sound = audio.read(path)
    mono_T = audio.to_mono(sound.samples_TC)
    return audio.resample(mono_T, sound.sample_rate, sample_rate).astype(np.float32)


def folder_recording(task: tuple[str, list[str], int]) -> Recording | str:
    """All files of one talker, mono, at the store's rate, joined; or why it is left out."""
    talker, paths, sample_rate = task
    pieces, reasons = [], []
    for path in paths:
        try:
            pieces.append(read_mono(path, sample_rate))
        except audio.AudioError as error:
            reasons.append(str(error))
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
    make = lambda: parallel.results(folder_recording, tasks, f"reading {root.name}", progress)  # noqa: E731
    store = make_store(data, "folder", facts, make)
    if official is not None:
        official = {f"folder/{talker}": split for talker, split in official.items()}
    return store, official


def _open_tfds(name: str, data: config.Data, progress: Callable) -> _Opened:
    """A set that `eqst.build` made, read where it lies, or any TFDS audio set through a store."""
    place = epath.Path(name).expanduser() if _is_path(name) else _builder(name).data_path
    if not shards.is_set(place):
        store = _tfds_store(name, data, progress)
        whole = load_store(store, f"tfds:{name}")
        return _Opened(whole, whole.talker_R, None)
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
    return name.startswith(("/", "~", ".")) or "://" in name


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


def _tfds_store(name: str, data: config.Data, progress: Callable) -> pathlib.Path:
    """Any prepared TFDS audio set stored as ArrayRecord."""
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
    voice = next((x for x in ("speaker", "speaker_id") if x in features), None)
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

    facts = [builder.info.full_name, str(builder.data_dir), len(source)]
    return make_store(data, "tfds", facts, recordings)
