"""The fixed pairs of the open benchmark: which they are, what they are made from, their hashes.

A pair is (source, seed, index): `pairs.draw` says which segments and which EQ, `float64` renders
it, and it is rounded to int16, so that anyone makes the same samples. A *manifest* (JSON) belongs
to each source: the audio files with their SHA-256, talker and split, and the hash of every pair of
every task. No audio is stored. Sources are `synthetic` (talkers of a seed that training never
uses), and folders of recordings, of which manifests for speech and music come with the package.
"""

from __future__ import annotations

import concurrent.futures
import csv
import functools
import hashlib
import importlib.resources
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from eqst import config, corpus, eq, float64, pairs, parallel, store, synthetic, talkers

SAMPLE_RATE = 44_100
SEED = 20_200_504  # of every task's pairs: pair k has the same EQ in each of them
TUNING_SEED = SEED + 1  # of the pairs of train talkers that the baselines are tuned on
TABLE = eq.PAPER
CONTEXT_SECONDS = 2.0
MIN_LUFS = -35.0
STORED_PAIRS = 200  # of each task, whose hashes a manifest holds
HASH_DIGITS = 12  # of each pair's SHA-256, as a manifest holds it

# Talkers of the synthetic source: a seed of their own, the first for the pairs, others for tuning.
SYNTHETIC_SEED = 5_042_020
SYNTHETIC_SECONDS = 64.0
SYNTHETIC_TALKERS = {"dev": range(20), "train": range(1000, 1030)}

FORMAT = 1


class TasksError(ValueError):
    """A manifest or recordings that give no pairs; one line with the way out."""


class Task(NamedTuple):
    """One list of pairs.

    Attributes:
      source: whose recordings: "synthetic", "speech", "music", or the name of another manifest.
      seconds: of the input, and of the reference.
      protocol: "plain" (the input untouched) or "coloured" (one random EQ on both first).
      different: the reference is another talker (or track).
      equalised: False: there is no EQ between the two, and the true curve is flat.
    """

    source: str
    seconds: float
    protocol: str
    different: bool = False
    equalised: bool = True

    @property
    def name(self) -> str:
        """As on the command line and in tables."""
        kind = ("-different" if self.different else "") + ("" if self.equalised else "-flat")
        return f"{self.source}-{self.seconds:g}s-{self.protocol}{kind}"

    @property
    def about(self) -> str:
        """The same in words."""
        between = "two recordings" if self.different else "one recording"
        wanted = "" if self.equalised else ", no EQ between them"
        colour = {"plain": "input untouched", "coloured": "one EQ on both first"}[self.protocol]
        return f"{self.source}, {self.seconds:g} s, {colour}, {between}{wanted}"


# The first is the headline. Of music, only two tracks of the standard data last 20 s.
TASKS = (
    Task("speech", 3.0, "coloured"),
    Task("speech", 1.0, "coloured"),
    Task("speech", 10.0, "coloured"),
    Task("speech", 20.0, "coloured"),
    Task("speech", 30.0, "coloured"),
    Task("speech", 3.0, "plain"),
    Task("speech", 10.0, "plain"),
    Task("speech", 3.0, "coloured", different=True),
    Task("speech", 10.0, "coloured", different=True),
    Task("speech", 3.0, "coloured", equalised=False),
    Task("speech", 10.0, "coloured", equalised=False),
    Task("music", 3.0, "coloured"),
    Task("music", 3.0, "plain"),
    Task("music", 3.0, "coloured", different=True),
    Task("music", 3.0, "coloured", equalised=False),
    Task("synthetic", 3.0, "coloured"),
    Task("synthetic", 1.0, "coloured"),
    Task("synthetic", 10.0, "coloured"),
    Task("synthetic", 20.0, "coloured"),
    Task("synthetic", 30.0, "coloured"),
    Task("synthetic", 3.0, "plain"),
    Task("synthetic", 3.0, "coloured", different=True),
    Task("synthetic", 3.0, "coloured", equalised=False),
)
HEADLINE = TASKS[0]


class File(NamedTuple):
    """One audio file of a manifest; `path` is relative to the data folder, with slashes."""

    path: str
    sha256: str
    talker: str
    split: str


class Manifest(NamedTuple):
    """What a source is made of, and the hashes of its tasks' pairs, by task name."""

    source: str
    files: tuple[File, ...]
    hashes: dict[str, tuple[str, ...]]


class Pair(NamedTuple):
    """One pair: int16 [T] each, and the true settings at `unit_KP` of the table's unit cube."""

    number: int
    talker: str
    reference_talker: str
    unit_KP: np.ndarray
    input_T: np.ndarray
    reference_T: np.ndarray

    @property
    def sha256(self) -> str:
        """Of the samples (little-endian) and of the label (float32)."""
        hashed = hashlib.sha256()
        for array, kind in (
            (self.input_T, "<i2"),
            (self.reference_T, "<i2"),
            (self.unit_KP, "<f4"),
        ):
            hashed.update(np.ascontiguousarray(array, kind).tobytes())
        return hashed.hexdigest()


# ---- manifests


def standard(source: str) -> Manifest:
    """The manifest that comes with the package."""
    folder = importlib.resources.files("eqst") / "manifests"
    return _parse((folder / f"{source}.json").read_text(encoding="utf-8"), f"{source}.json")


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads a manifest. Raises TasksError where it cannot be read or is none."""
    name = os.fspath(path)
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise TasksError(f"{name!r} cannot be read ({reason}): check the path") from None
    return _parse(text, repr(name))


def _parse(text: str, name: str) -> Manifest:
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        rows = tuple(File(*(row[key] for key in File._fields)) for row in content["files"])
        hashes = {str(task): tuple(line.split()) for task, line in content["pairs"].items()}
        source = str(content["source"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TasksError(
            f"{name} is no manifest ({type(error).__name__}: {error}): make one by --new_manifest"
        ) from None
    return Manifest(source, rows, hashes)


def as_json(manifest: Manifest) -> dict[str, Any]:
    """The content of a manifest's file."""
    return {
        "format": FORMAT,
        "source": manifest.source,
        "sample_rate": SAMPLE_RATE,
        "files": [row._asdict() for row in manifest.files],
        "pairs": {task: " ".join(hashes) for task, hashes in manifest.hashes.items()},
    }


def list_files(source: str, folder: str, table: str) -> Manifest:
    """A manifest without hashes of the files that a CSV names.

    Args:
      source: the name of the manifest.
      folder: what the paths are relative to.
      table: CSV with the columns path, speaker and split ("dev" rows make the pairs, "train" rows
        tune the baselines), and corpus where one speaker's name stands for several people. If
        paths begin with `source`/, only those rows count.

    Raises:
      TasksError: no such file or column, or nothing listed.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            wanted = ("path", "speaker", "split")
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise TasksError(f"{table}: no column {', '.join(missing)}: add it")
            listed = list(reader)
        own = [row for row in listed if row["path"].startswith(f"{source}/")]
        rows = tuple(
            File(
                row["path"],
                _file_hash(pathlib.Path(folder, row["path"])),
                f"{row['corpus']}/{row['speaker']}" if "corpus" in row else row["speaker"],
                row["split"],
            )
            for row in own or listed
        )
    except OSError as error:
        raise TasksError(f"{error.filename!r}: {error.strerror}: check the path") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise TasksError(f"{table} is not a CSV in UTF-8 ({error})") from None
    if not any(row.split == "dev" for row in rows):
        raise TasksError(f"{table}: no row of split dev: the pairs are made of those")
    return Manifest(source, rows, {})


def _file_hash(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- recordings


def open_recordings(
    manifest: Manifest,
    split: str,
    *,
    folder: str = "",
    workers: int,
    say: Callable[[str], None] = print,
) -> corpus.Corpus:
    """The recordings of one split ("dev": what the pairs are made of; "train": for tuning).

    Raises:
      TasksError: a file is missing or another than the manifest's.
    """
    data = config.Data(sample_rate=SAMPLE_RATE)
    facts: list[Any]
    jobs: list[Any]
    if manifest.source == "synthetic":
        code = inspect.getsource(synthetic) + inspect.getsource(talkers)
        numbers = SYNTHETIC_TALKERS[split]
        jobs = [(SYNTHETIC_SEED, number, SYNTHETIC_SECONDS, SAMPLE_RATE) for number in numbers]
        facts = [hashlib.sha256(code.encode()).hexdigest(), jobs]
        work: Callable[[Any], Any] = _talker
    else:
        rows = [row for row in manifest.files if row.split == split]
        check_files(rows, folder)
        by_talker: dict[str, list[str]] = {}
        for row in rows:
            by_talker.setdefault(row.talker, []).append(str(pathlib.Path(folder, row.path)))
        if not by_talker:
            raise TasksError(f"manifest {manifest.source}: no file of split {split}")
        jobs = [(talker, paths, SAMPLE_RATE) for talker, paths in by_talker.items()]
        facts = [[row.talker, row.sha256] for row in rows]
        work = corpus.folder_recording
    name = f"benchmark-{manifest.source}"
    make = lambda: parallel.results(work, jobs, name, say, workers)  # noqa: E731
    return store.load_store(store.make_store(data, name, facts, make), manifest.source)


def _talker(job: tuple[int, int, float, int]) -> store.Recording:
    seed, number, seconds, rate = job
    samples_T = synthetic.synthesise(seed, number, seconds, sample_rate=rate, exact=True)
    return store.Recording(f"{number:05d}", samples_T)


def check_files(rows: list[File], folder: str) -> None:
    """Raises TasksError for the first file that is absent or not the manifest's."""
    for row in rows:
        path = pathlib.Path(folder, row.path)
        try:
            found = _file_hash(path)
        except OSError as error:
            raise TasksError(
                f"{str(path)!r}: {error.strerror}: --data names the folder that holds {row.path}"
            ) from None
        if found != row.sha256:
            raise TasksError(
                f"{str(path)!r} is not the manifest's (SHA-256 {found[:12]}, wanted "
                f"{row.sha256[:12]}): take the original, or make a manifest of your own"
            )


# ---- pairs


def make_pairs(
    task: Task, recordings: corpus.Corpus, count: int, *, workers: int
) -> Iterator[Pair]:
    """The first `count` pairs of a task, in order, rendered by so many threads.

    Raises:
      pairs.PairsError: the recordings are too short, too quiet or too few for it.
    """
    index, _ = pairs.build_index(recordings, task.seconds, MIN_LUFS)
    k_n = np.arange(count, dtype=np.int32)
    drawn = _draw(k_n, index, protocol=task.protocol, different=task.different)
    if not task.equalised:
        drawn = drawn._replace(label_KP=pairs.without_gain(drawn.label_KP))
    plans: Any = jax.tree.map(np.asarray, drawn)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for begin in range(0, count, 2 * workers):
            numbers = range(begin, min(begin + 2 * workers, count))
            yield from pool.map(lambda k: _render(task, recordings, plans, k), numbers)


@functools.partial(jax.jit, static_argnames=("protocol", "different"))
def _draw(k_n: Any, index: pairs.Index, *, protocol: str, different: bool) -> pairs.Plan:
    def one(k: jax.Array) -> pairs.Plan:
        return pairs.draw(
            SEED, k, index, protocol=protocol, different_recordings=different, turn=True
        )

    return jax.vmap(one)(k_n)


def _render(task: Task, recordings: corpus.Corpus, plans: Any, k: int) -> Pair:
    """Pair k of plans [n] (numpy)."""
    plan: Any = pairs.Plan(*(leaf[k] for leaf in plans))
    context, length = (round(x * SAMPLE_RATE) for x in (CONTEXT_SECONDS, task.seconds))
    # Float64 from the draws on.
    label, colour = (
        eq.limit_to_rate(eq.from_unit(TABLE, unit_KP.astype(np.float64)), SAMPLE_RATE)[0]
        for unit_KP in (plan.label_KP, plan.colour_KP)
    )
    if task.protocol == "plain":
        colour = eq.EqParams(*(field[:0] for field in colour))
    both = eq.EqParams(*(np.concatenate(x) for x in zip(colour, label, strict=True)))

    def side(recording: int, hop: int, params: eq.EqParams) -> np.ndarray:
        begin = pairs.first_sample(int(hop), SAMPLE_RATE) - context
        dry_T = recordings.stored(int(recording), begin, context + length)
        wet_T = float64.filter_circular(dry_T, params, sample_rate=SAMPLE_RATE, context=context)
        return float64.to_int16(wet_T)

    names = recordings.talker_R
    return Pair(
        number=k,
        talker=names[plan.input_recording],
        reference_talker=names[plan.reference_recording],
        unit_KP=plan.label_KP,
        input_T=side(plan.input_recording, plan.input_hop, colour),
        reference_T=side(plan.reference_recording, plan.reference_hop, both),
    )


def of_manifest(manifest: Manifest) -> list[Task]:
    """The tasks whose pairs a manifest lists."""
    return [task for task in _tasks_of(manifest.source) if task.name in manifest.hashes]


def _tasks_of(source: str) -> list[Task]:
    """A source's tasks: of one's own recordings those that speech has."""
    kind = source if source in {task.source for task in TASKS} else "speech"
    return [task._replace(source=source) for task in TASKS if task.source == kind]


def digest(hashes: tuple[str, ...] | list[str]) -> str:
    """One hash of several pairs' hashes, each cut to `HASH_DIGITS`."""
    return hashlib.sha256(" ".join(x[:HASH_DIGITS] for x in hashes).encode()).hexdigest()


def expected(manifest: Manifest, task: Task, count: int) -> str | None:
    """What `digest` gives for the first `count` pairs by the manifest; None where it lacks them."""
    stored = manifest.hashes[task.name] if task.name in manifest.hashes else ()
    return digest(stored[:count]) if len(stored) >= count else None


def hash_pairs(
    manifest: Manifest,
    recordings: corpus.Corpus,
    *,
    count: int,
    workers: int,
    say: Callable[[str], None] = print,
) -> Manifest:
    """The manifest with the hashes of its tasks' pairs; a task that gives none is left out."""
    hashes: dict[str, tuple[str, ...]] = {}
    for task in _tasks_of(manifest.source):
        try:
            made = make_pairs(task, recordings, count, workers=workers)
            hashes[task.name] = tuple(pair.sha256[:HASH_DIGITS] for pair in made)
            say(f"{task.name}: {count} pairs")
        except pairs.PairsError as error:
            say(f"{task.name}: left out, {error}")
    if not hashes:
        raise TasksError(f"{manifest.source}: its recordings give no pair of any task")
    return manifest._replace(hashes=hashes)
