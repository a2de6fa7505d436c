"""Folders of audio as a TFDS set: `python -m eqst.build --data=DIR --output=DATA_DIR --name=NAME`.

All audio of one talker (or track) in one condition is joined to a recording, brought to one rate,
mono and -23 LUFS as training's own stores are, and cut into chunks of 10 s, int16. The set lies in
DATA_DIR/NAME/VERSION and is `tfds:NAME` ($TFDS_DATA_DIR=DATA_DIR) or `tfds:DATA_DIR/NAME/VERSION`.
Talkers are split into train and dev by a hash of their names, or by the manifest. The same command
goes on where it was interrupted. What is rejected is said, and stands in the set's info.json.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from eqst import chunking, command, config, corpus, layouts, lock, parallel, shards
from eqst.files import write_atomically, write_json
from eqst.layouts import Reject


class BuildError(ValueError):
    """A set that cannot be built as asked: one line with what, and the way out."""


def _duplicates(
    root: pathlib.Path, found: layouts.Found, workers: int, say: Callable
) -> list[Reject]:
    """Files with the bytes of an earlier one. Only files of equal size are read."""
    ordered = [path for paths in found.files.values() for path in paths]
    by_size = collections.defaultdict(list)
    for path in ordered:
        by_size[(root / path).stat().st_size].append(path)
    alike = [path for path in ordered if len(by_size[(root / path).stat().st_size]) > 1]
    first: dict[str, pathlib.Path] = {}
    rejected = []
    checksums = parallel.results(
        corpus.checksum, [root / x for x in alike], "comparing", say, workers, "files"
    )
    for path, checksum in zip(alike, checksums, strict=True):
        if first.setdefault(checksum, path) != path:
            reason = f"the same bytes as {layouts.text(first[checksum])}"
            rejected.append(Reject(layouts.text(path), "duplicate", reason))
    return rejected


def _write_shards(
    tasks: dict[str, list[chunking.ShardTask]], workers: int, say: Callable
) -> dict[str, list[dict[str, Any]]]:
    """Writes all shards; recordings go when the last of their chunks is in one."""
    flat = [task for part in tasks.values() for task in part]
    last = {piece[0]: i for i, task in enumerate(flat) for piece in task.pieces}
    written: dict[str, list[dict[str, Any]]] = {split: [] for split in tasks}
    results = parallel.results(chunking.write_shard, flat, "writing", say, workers, "shards")
    splits = [split for split, part in tasks.items() for _ in part]
    for i, (task, split, result) in enumerate(zip(flat, splits, results, strict=True)):
        written[split].append(result)
        for piece in task.pieces:
            if last[piece[0]] == i:
                place = chunking.facts_path(task.work / "recordings", piece[0])
                place.with_suffix(".int16").unlink(missing_ok=True)
    return written


# ---- the whole


def _plan(root: pathlib.Path, settings: chunking.Settings, found: layouts.Found) -> dict[str, Any]:
    """What must be the same for a build to go on, or to be the one that is finished."""
    listing = []
    for place, paths in found.files.items():
        for path in paths:
            status = (root / path).stat()
            listing.append([*place, layouts.text(path), status.st_size, status.st_mtime_ns])
    text = json.dumps(listing)
    flags_ = dataclasses.asdict(settings) | {"stems": list(settings.stems)}
    return {
        "format": shards.FORMAT,
        "flags": flags_,
        "files": len(listing),
        "files_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _same_plan(before: dict[str, Any], plan: dict[str, Any], folder: pathlib.Path) -> None:
    """Raises BuildError where a build stands in a folder that was begun otherwise."""
    way_out = f"choose another --version or --name, or remove {folder}"
    if before["format"] != plan["format"]:
        raise BuildError(f"{folder} was begun by another version of EQST: {way_out}")
    for flag, value in plan["flags"].items():
        if before["flags"][flag] != value:
            was = before["flags"][flag]
            raise BuildError(
                f"--{flag} is {value!r}, but {folder} was begun with {was!r}: {way_out}"
            )
    if before["files_sha256"] != plan["files_sha256"]:
        raise BuildError(
            f"the files under --data have changed since {folder} was begun ({before['files']} "
            f"then, {plan['files']} now, or other sizes or times): {way_out}"
        )


def build(
    root: pathlib.Path,
    data_dir: pathlib.Path,
    settings: chunking.Settings,
    found: layouts.Found,
    *,
    workers: int,
    say: Callable[[str], None],
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Builds a set, or goes on building it.

    Args:
      root: the folder of audio.
      data_dir: the set goes to data_dir/NAME/VERSION.
      settings: what it is to be.
      found: the files.
      workers: processes; 0 takes one per core. The set does not depend on it.
      say: takes lines of progress.

    Returns:
      the set's folder and its info.json.

    Raises:
      BuildError: the set, or a part of it, was begun with other settings or files; or nothing is
        usable.
    """
    final = data_dir / settings.name / settings.version
    work = final.with_name(f".{settings.version}.building")
    plan = _plan(root, settings, found)
    if shards.is_set(final):
        info = shards.read_info(final)
        _same_plan(info["plan"], plan, final)
        shutil.rmtree(work, ignore_errors=True)
        say(f"{final} is finished: nothing to do")
        return final, info
    if final.exists():
        raise BuildError(f"{final} is there and no set of eqst.build: choose another --version")
    for folder in ("recordings", "shards", "set"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    with lock.hold(epath.Path(work), "--version") or contextlib.nullcontext():
        if shards.is_set(final):  # another process had the lock until now
            raise BuildError(f"{final} has just been finished by another process")
        # What a build that was killed has left. A worker that outlived it renames in vain.
        for pattern in ("*/.*.tmp*", "shards/*.array_record-*-of-?????"):
            for leftover in work.glob(pattern):
                leftover.unlink(missing_ok=True)
        if (work / "plan.json").exists():
            begun = json.loads((work / "plan.json").read_text())
            _same_plan(begun["plan"], plan, work)
            duplicates = [Reject(*row) for row in begun["duplicates"]]
        else:
            duplicates = _duplicates(root, found, workers, say)
            write_json(work / "plan.json", {"plan": plan, "duplicates": duplicates})
        rows, rejected = _recordings(root, work, settings, found, duplicates, workers, say)
        if not rows:
            shutil.rmtree(work, ignore_errors=True)
            first = "; ".join(f"{x.name}: {x.reason}" for x in rejected[:3])
            raise BuildError(f"{root}: no usable audio: {first}")
        written = _write_shards(chunking.shard_tasks(work, settings, rows), workers, say)
        info = {
            "format": shards.FORMAT,
            "sample_rate": settings.sample_rate,
            "chunk": settings.chunk,
            "plan": plan,
            "shards": written,
            "recordings": [
                {key: x for key, x in row.items() if key not in ("number", "chunks")}
                for row in rows
            ],
            "rejected": [x._asdict() for x in rejected],
        }
        _finish(work, final, settings, rows, info)
    return final, info


def _recordings(
    root: pathlib.Path,
    work: pathlib.Path,
    settings: chunking.Settings,
    found: layouts.Found,
    duplicates: list[Reject],
    workers: int,
    say: Callable,
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Makes the recordings that are not made yet; a row for each that is usable, and the rest."""
    folder, twice = work / "recordings", {x.name for x in duplicates}
    tasks = []
    for number, (place, paths) in enumerate(found.files.items()):
        once = tuple(path for path in paths if layouts.text(path) not in twice)
        tasks.append(chunking.Task(folder, number, place.recording, root, once, settings))
    pending = [task for task in tasks if not chunking.facts_path(folder, task.number).exists()]
    if len(pending) < len(tasks):
        say(f"{len(tasks) - len(pending)} of {len(tasks)} recordings are made already")
    for _ in parallel.results(
        chunking.make_recording, pending, "reading", say, workers, "recordings"
    ):
        pass
    splits = corpus.talker_splits(found, settings.dev_share)
    rows, rejected = [], [*found.rejected, *duplicates]
    chunks = dict.fromkeys(shards.SPLITS, 0)
    for task, place in zip(tasks, found.files, strict=True):
        facts = json.loads(chunking.facts_path(folder, task.number).read_text())
        rejected += [Reject(*row) for row in facts.pop("rejected")]
        if not facts:
            continue
        split, count = splits[place.talker], -(-facts["length"] // settings.chunk)
        row: dict[str, Any] = {"recording": task.name, "talker": place.talker, "split": split}
        row |= {"first_chunk": chunks[split], "chunks": count, "number": task.number}
        rows.append(row | facts)
        chunks[split] += count
    return rows, rejected


def _finish(
    work: pathlib.Path,
    final: pathlib.Path,
    settings: chunking.Settings,
    rows: list[dict[str, Any]],
    info: dict[str, Any],
) -> None:
    """Completes the folder of shards and gives it its name in one step."""
    made = work / "set"
    names = {shard["name"] for written in info["shards"].values() for shard in written}
    for leftover in made.iterdir():  # of a build that was killed right here
        if leftover.name not in names:
            leftover.unlink()
    places = [
        chunking.facts_path(work / "recordings", row["number"]).with_suffix(".npy") for row in rows
    ]
    power_V = np.concatenate([np.load(place) for place in places])
    write_atomically(made / shards.POWER, lambda temporary: np.save(temporary, power_V))
    shards.write_metadata(
        made,
        settings.name,
        settings.version,
        settings.chunk,
        settings.sample_rate,
        info["shards"],
    )
    write_json(made / shards.INFO, info)
    os.replace(made, final)
    shutil.rmtree(work, ignore_errors=True)


def table_text(info: dict[str, Any]) -> str:
    """What is in a set by split, and what was rejected by kind, with the first of each."""
    lines = [f"{'':8}{'talkers':>10}{'recordings':>12}{'hours':>10}{'shards':>8}{'MB':>10}"]
    for split, written in info["shards"].items():
        rows = [row for row in info["recordings"] if row["split"] == split]
        hours = sum(row["length"] for row in rows) / info["sample_rate"] / 3600
        size = sum(shard["bytes"] for shard in written) / 1e6
        talkers = len({row["talker"] for row in rows})
        counts = f"{talkers:>10}{len(rows):>12}{hours:>10.2f}{len(written):>8}{size:>10.1f}"
        lines.append(f"{split:8}{counts}")
    kinds = collections.Counter(x["kind"] for x in info["rejected"])
    lines.append(f"rejected: {len(info['rejected'])}")
    for kind, count in sorted(kinds.items()):
        first = next(x for x in info["rejected"] if x["kind"] == kind)
        lines.append(f"  {kind:12}{count:>6}  {first['name']}: {first['reason']}"[:160])
    return "\n".join(lines)


# ---- the command


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_string("data", None, "Folder of audio.")
    flags.DEFINE_string("output", None, "TFDS's data folder: the set is OUTPUT/NAME/VERSION.")
    flags.DEFINE_string("name", None, "Of the set: lower-case letters, digits and _.")
    flags.DEFINE_string("version", "1.0.0", "Of the set.")
    flags.DEFINE_enum("layout", None, list(layouts.LAYOUTS), "Instead of the one that is guessed.")
    flags.DEFINE_list(
        "stems", ["mixture"], "Of musdb's tracks: mixture, or bass,drums,other,vocals."
    )
    flags.DEFINE_string("manifest", None, "CSV with columns path, split and perhaps talker.")
    flags.DEFINE_bool("permissive_only", False, "Take what the manifest calls permissive alone.")
    flags.DEFINE_integer("sample_rate", 44100, "In Hz.", 8000, 192000)
    flags.DEFINE_float("chunk_seconds", 10.0, "Length of an example.", 0.5, 600.0)
    share = config.Data().dev_share
    flags.DEFINE_float("dev_share", share, "Talkers held out, without a manifest.", 0.0, 0.9)
    flags.DEFINE_float("min_seconds", 1.0, "Shorter recordings are left out.", 0.4, 3600.0)
    flags.DEFINE_float("min_lufs", -60.0, "Quieter recordings are left out.", -70.0, 0.0)
    flags.DEFINE_integer("shard_mb", 256, "Most MiB of samples in a shard.", 1, 16384)
    flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", 0, 1024)
    flags.mark_flags_as_required(["data", "output", "name"])


def _manifest_checksum(path: pathlib.Path | None) -> str:
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _check_words(options: flags.FlagValues) -> None:
    """Raises BuildError for a flag that says what cannot be."""
    name, version, stems = options.name, options.version, options.stems
    for flag, value in (("data", options.data), ("output", options.output)):
        if "://" in value:
            raise BuildError(
                f"--{flag}={value} is no folder: build in one of this machine, and copy the set to "
                "the bucket when it is finished"
            )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise BuildError(f"--name={name}: take lower-case letters, digits and _, a letter first")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise BuildError(f"--version={version}: give three numbers, as in 1.0.0")
    wrong = [stem for stem in stems if stem not in layouts.STEMS]
    if wrong:
        raise BuildError(f"--stems={wrong[0]}: choose of {', '.join(layouts.STEMS)}")


def main() -> None:
    """The command."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    _check_words(options)
    shards.check_installed("eqst.build")
    root = pathlib.Path(options.data).expanduser()
    manifest = pathlib.Path(options.manifest).expanduser() if options.manifest else None
    stems = tuple(sorted(set(options.stems)))
    found = layouts.find(
        root,
        layout=options.layout,
        stems=stems,
        manifest=manifest,
        permissive_only=options.permissive_only,
    )
    asked: dict[str, Any] = {
        field.name: options[field.name].value
        for field in dataclasses.fields(chunking.Settings)
        if field.name not in ("layout", "stems", "manifest")
    }
    settings = chunking.Settings(
        layout=found.layout,
        stems=stems if found.layout == "musdb" else (),
        manifest=_manifest_checksum(manifest),
        **asked,
    )
    count = sum(map(len, found.files.values()))
    talkers = len({place.talker for place in found.files})
    guessed = "" if options.layout else "guessed; --layout= says another"
    say(
        f"layout {found.layout} ({guessed or 'given'}): {count} files, {talkers} talkers or "
        f"tracks, {len(found.files)} recordings"
    )
    if found.doubt:
        say(found.doubt)
    output = pathlib.Path(options.output).expanduser()
    final, info = build(root, output, settings, found, workers=options.workers, say=say)
    say(table_text(info))
    say(f"train with --config.data.sources=\"('tfds:{final.resolve()}',)\"")


if __name__ == "__main__":
    command.start("eqst.build", define_flags, main)
