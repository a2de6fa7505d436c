"""Where recordings come from: synthetic talkers, folders of audio, TFDS sets; and their splits.

Every source is brought into a store once (see `eqst.store`). A recording is all the audio of one
talker (or track), joined (design section 3).
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from eqst import audio, config, synthetic, talkers
from eqst.store import HOPS_PER_SECOND, Corpus, CorpusError, Recording, load_store, make_store

__all__ = ["HOPS_PER_SECOND", "Corpus", "CorpusError", "open_corpus"]

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


def _open_source(source: str, data: config.Data, split: str, progress: Callable) -> Corpus:
    if source == "synthetic":
        store = _synthetic_store(data, progress)
        official = None
    elif source.startswith("folder:"):
        store, official = _folder_store(pathlib.Path(source[7:]).expanduser(), data, progress)
    else:
        store, official = _tfds_store(source[5:], data, progress), None
    corpus = load_store(store, source)
    if split in ("train", "all"):  # once a run, also where the store was made by an earlier one
        for line in corpus.skipped:
            progress(f"left out {line}")
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
        there = (
            f" (the manifest has {', '.join(sorted(set(official.values())))})" if official else ""
        )
        raise CorpusError(
            f"{source}: no talker in split {split!r} of {len(talker_R)} talkers{there}: "
            "training needs train, evaluation dev"
        )
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


def parallel(
    function: Callable, tasks: list, name: str, progress: Callable, workers: int = 0
) -> Iterator:
    """Results in order from `workers` processes (0: one per core), with a line every tenth."""
    import joblib  # its workers, unlike multiprocessing's, do not import the caller's script

    # A worker whose memory has grown is replaced, and nothing is lost. Of that joblib warns, in the
    # thread that all others wait for: where warnings are errors, they would wait for ever.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    jobs = joblib.Parallel(
        n_jobs=min(workers or os.cpu_count() or 1, len(tasks)), return_as="generator"
    )
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
    make = lambda: parallel(_synthetic_recording, tasks, "synthetic talkers", progress)  # noqa: E731
    return make_store(data, "synthetic", facts, make)


def _manifest_splits(manifest: pathlib.Path, permissive_only: bool) -> dict[pathlib.Path, str]:
    """The split of every file that a manifest lists."""
    wanted = ["path", "split"] + ["permissive"] * permissive_only
    listed: dict[pathlib.Path, str] = {}
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
                listed[(manifest.parent / row["path"]).resolve()] = row["split"]
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorpusError(
            f"{manifest} is not a CSV in UTF-8 ({error}); write path and split columns"
        ) from None
    return listed


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
            raise CorpusError(f"{manifest}: no such manifest; give a CSV file with path and split")
        listed = _manifest_splits(manifest, data.permissive_only)
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
        listing = f" that {data.manifest} lists" if data.manifest else ""
        raise CorpusError(
            f"{root}: no audio file ({', '.join(EXTENSIONS)}) in it{listing}; give another folder"
        )
    return talkers, official if data.manifest else None


def folder_recording(task: tuple[str, list[str], int]) -> Recording | str:
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
    make = lambda: parallel(folder_recording, tasks, f"reading {root.name}", progress)  # noqa: E731
    store = make_store(data, "folder", facts, make)
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
    return make_store(data, "tfds", facts, recordings)
