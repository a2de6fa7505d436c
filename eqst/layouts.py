"""How folders of audio are laid out: which file is whose, in which condition.

`folder`: a folder for each talker. `daps`: TALKER_scriptN_CONDITION in a folder for each condition.
`musdb`: a folder for each track, with the mixture and its stems. `vctk`: wav48/TALKER/ files, with
_micN for each of several microphones. `librispeech`: TALKER/CHAPTER/TALKER-CHAPTER-NUMBER, at any
depth; LibriTTS and Multilingual LibriSpeech, with _ for -, are laid out so too.
"""

from __future__ import annotations

import csv
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from eqst.store import CorpusError

EXTENSIONS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".rf64")

STEMS = ("mixture", "bass", "drums", "other", "vocals")
# What these folders of a set of tracks are for: nothing of `test` is trained on.
_MUSDB_SPLITS = {"train": "train", "test": "dev"}


class Place(NamedTuple):
    """Whose file it is. A recording is the files of one talker (or track) in one condition."""

    talker: str
    condition: str = ""
    split: str = ""

    @property
    def recording(self) -> str:
        return f"{self.talker}/{self.condition}" if self.condition else self.talker


class Reject(NamedTuple):
    """A file or recording that is left out: which, one word why, and one line."""

    name: str
    kind: str
    reason: str


class Found(NamedTuple):
    """What is under a folder: paths relative to it by their place, and what is left out.

    `doubt` is one line on talkers that may be another's as well; "" where there is none.
    """

    layout: str
    files: dict[Place, list[pathlib.Path]]
    rejected: list[Reject]
    doubt: str


def _folder(inside: pathlib.PurePath) -> Place | None:
    # One straight in the folder is a talker of its own.
    return Place(str(inside.parent) if len(inside.parts) > 1 else inside.stem)


def _daps(inside: pathlib.PurePath) -> Place | None:
    named = re.fullmatch(r"([^_]+)_script\d+(?:_(.+))?", inside.stem)
    if named is None:
        return None
    condition = inside.parent.name if len(inside.parts) > 1 else named[2]
    return Place(named[1], condition or "")


def _musdb(inside: pathlib.PurePath) -> Place | None:
    if inside.stem.lower() not in STEMS or len(inside.parts) < 2:
        return None
    # The folder given may be one too high, or more: of those above the track the nearest says it.
    above = [part.lower() for part in reversed(inside.parts[:-2])]
    split = next((_MUSDB_SPLITS[part] for part in above if part in _MUSDB_SPLITS), "")
    return Place(str(inside.parent), inside.stem.lower(), split)


def _vctk(inside: pathlib.PurePath) -> Place | None:
    roots = [i for i, part in enumerate(inside.parts[:-2]) if re.match(r"wav\d+", part)]
    if not roots:
        return None
    microphone = re.search(r"_(mic\d+)$", inside.stem)
    return Place(inside.parts[roots[0] + 1], microphone[1] if microphone else "")


def _librispeech(inside: pathlib.PurePath) -> Place | None:
    if len(inside.parts) < 3:
        return None
    speaker, chapter = (re.escape(part) for part in inside.parts[-3:-1])
    named = re.match(rf"{speaker}([-_]){chapter}\1", inside.stem)
    return Place(inside.parts[-3]) if named else None


LAYOUTS: dict[str, Callable[[pathlib.PurePath], Place | None]] = {
    "daps": _daps,
    "musdb": _musdb,
    "vctk": _vctk,
    "librispeech": _librispeech,
    "folder": _folder,  # the last, as anything fits it
}
_EXPECTED = {
    "daps": "TALKER_scriptN_CONDITION",
    "musdb": f"TRACK/STEM with one of {', '.join(STEMS)}",
    "vctk": "wav48/TALKER/FILE",
    "librispeech": "TALKER/CHAPTER/TALKER-CHAPTER-NUMBER",
    "folder": "TALKER/FILE",
}


# ---- what there is


def audio_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file that is audio by its name, sorted; links are followed, what is hidden is not seen.

    Raises:
      CorpusError: it is no folder, or a link in it leads nowhere.
      OSError: a folder in it cannot be looked into.
    """
    if not root.is_dir():
        raise CorpusError(f"{root} is not a folder; give a folder of audio files")
    found = []
    for path in _walk(root):
        kind = path.suffix.lower()
        if kind in ("", *EXTENSIONS) and path.is_symlink() and not path.exists():
            raise CorpusError(f"{path} is a link that leads nowhere: mend it, or remove it")
        if kind in EXTENSIONS and path.is_file():
            found.append(path)
    return sorted(found)


def _walk(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """All in a folder but folders. One that several names lead to is looked into once.

    By the name without links, if there is one. A link to a folder that holds `root` is passed over.
    """
    seen = set(root.resolve().parents)
    waiting = [root]
    while waiting:
        links = []
        for start in waiting:
            for place, folders, names in os.walk(start, onerror=_raise):
                here = pathlib.Path(place)
                real = here.resolve()
                folders[:] = sorted(
                    x for x in folders if not x.startswith(".") and real not in seen
                )
                if real in seen:
                    continue
                seen.add(real)
                links += [here / name for name in folders if (here / name).is_symlink()]
                yield from (here / name for name in names if not name.startswith("."))
        waiting = links


def _raise(error: OSError) -> None:
    raise error


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


def text(name: object) -> str:
    """A file's name as text; bytes that are none become escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def guess(files: list[pathlib.Path]) -> str:
    """The first layout that half of the files fit, by their paths inside the folder."""
    return next(
        name
        for name, place in LAYOUTS.items()
        if 2 * sum(place(path) is not None for path in files) >= len(files)
    )


def _doubt(root: pathlib.Path, files: list[pathlib.Path]) -> str:
    """Of nested folders says that the inner ones count as talkers, and what if they are not."""
    inner: dict[str, pathlib.Path] = {}
    for path in files:
        if len(path.parts) > 1 and inner.setdefault(path.parts[0], path.parent) != path.parent:
            one, other = text(inner[path.parts[0]]), text(path.parent)
            return (
                f"{root}: {one} and {other} count as two talkers, of whom one may be held out and "
                "the other trained on: if they are one, say so in a manifest (path, split, talker)"
            )
    return ""


def find(
    root: pathlib.Path,
    *,
    layout: str | None,
    stems: tuple[str, ...],
    manifest: pathlib.Path | None,
    permissive_only: bool,
) -> Found:
    """The audio files under a folder by talker and condition, in an order of their own.

    Args:
      root: the folder; hidden files and folders in it are passed over.
      layout: one of `LAYOUTS`, or None to guess.
      stems: which of a track's files, under "musdb".
      manifest: a CSV with the columns path and split, and perhaps talker: files it does not list
        are passed over, as is what it lists elsewhere; it goes before what the layout says.
      permissive_only: take the manifest's files with "yes" in the column permissive.

    Raises:
      CorpusError: no folder, no file, or a talker in two splits.
    """
    paths = [path.relative_to(root) for path in audio_files(root)]
    rejected, listed = [], None
    if manifest is not None:
        listed = read_manifest(manifest, permissive_only)
        there = {(root / path).resolve(): path for path in paths}
        base = root.resolve()
        rejected = [
            Reject(text(path.relative_to(base)), "absent", f"{manifest.name} lists it")
            for path in listed
            if path not in there and path.is_relative_to(base)
        ]
        paths = [path for resolved, path in there.items() if resolved in listed]
    if not paths:
        beside = f" that {manifest} lists" if manifest else ""
        kinds = ", ".join(EXTENSIONS)
        raise CorpusError(f"{root}: no audio file ({kinds}) in it{beside}; give another folder")
    doubt = ""
    if not layout:
        layout = guess(paths)
        doubt = _doubt(root, paths) if layout == "folder" and not manifest else ""
    files: dict[Place, list[pathlib.Path]] = {}
    official: dict[str, str] = {}
    for path in paths:
        row = listed[(root / path).resolve()] if listed is not None else Listed("", "")
        if listed is not None and row.split not in ("train", "dev"):
            reason = f"split {row.split!r} in {manifest and manifest.name} is not train or dev"
            rejected.append(Reject(text(path), "split", reason))
            continue
        place = LAYOUTS[layout](path)
        if place is None and row.talker:
            place = Place(row.talker)
        if place is None:
            reason = f"not {_EXPECTED[layout]} ({layout})"
            rejected.append(Reject(text(path), "layout", reason))
            continue
        if layout == "musdb" and place.condition not in stems:
            continue
        talker, condition = text(row.talker or place.talker), text(place.condition)
        place = Place(talker, condition, row.split or place.split)
        if place.split:
            one_split(official, place.talker, place.split, manifest or root)
        files.setdefault(place, []).append(path)
    if not files and rejected and all(x.kind in ("split", "absent") for x in rejected):
        splits = ", ".join(sorted({row.split for row in (listed or {}).values()}))
        raise CorpusError(
            f"{manifest}: no file of {root} has the split train or dev (its splits: {splits}): "
            "training needs train, evaluation dev"
        )
    if not files:
        asked = f" of --stems={','.join(stems)}" if layout == "musdb" else ""
        raise CorpusError(
            f"{root}: no file{asked} in the layout {layout} (looked for "
            f"{_EXPECTED[layout]}): choose another --layout of eqst.build"
        )
    ordered = dict(sorted(files.items(), key=lambda item: item[0].recording))
    return Found(layout, ordered, rejected, doubt)
