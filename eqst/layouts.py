"""How folders of audio are laid out: which file is whose, in which condition.

`folder`: a folder for each talker. `daps`: TALKER_scriptN_CONDITION in a folder for each condition.
`musdb`: a folder for each track, with the mixture and its stems. `vctk`: wav48/TALKER/ files, with
_micN for each of several microphones.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from eqst import corpus
from eqst.store import CorpusError

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
    """What is under a folder: paths relative to it by their place, and what is left out."""

    layout: str
    files: dict[Place, list[pathlib.Path]]
    rejected: list[Reject]


def _folder(inside: pathlib.PurePath) -> Place | None:
    return Place(corpus.folder_talker(inside))


def _daps(inside: pathlib.PurePath) -> Place | None:
    named = re.fullmatch(r"([^_]+)_script\d+(?:_(.+))?", inside.stem)
    if named is None:
        return None
    condition = inside.parent.name if len(inside.parts) > 1 else named[2]
    return Place(named[1], condition or "")


def _musdb(inside: pathlib.PurePath) -> Place | None:
    if inside.stem.lower() not in STEMS or len(inside.parts) < 2:
        return None
    top = inside.parts[0].lower()
    split = _MUSDB_SPLITS[top] if len(inside.parts) > 2 and top in _MUSDB_SPLITS else ""
    return Place(str(inside.parent), inside.stem.lower(), split)


def _vctk(inside: pathlib.PurePath) -> Place | None:
    roots = [i for i, part in enumerate(inside.parts[:-2]) if re.match(r"wav\d+", part)]
    if not roots:
        return None
    microphone = re.search(r"_(mic\d+)$", inside.stem)
    return Place(inside.parts[roots[0] + 1], microphone[1] if microphone else "")


LAYOUTS: dict[str, Callable[[pathlib.PurePath], Place | None]] = {
    "daps": _daps,
    "musdb": _musdb,
    "vctk": _vctk,
    "folder": _folder,  # the last, as anything fits it
}
_EXPECTED = {
    "daps": "TALKER_scriptN_CONDITION",
    "musdb": f"TRACK/STEM with one of {', '.join(STEMS)}",
    "vctk": "wav48/TALKER/FILE",
    "folder": "TALKER/FILE",
}


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
    paths = [path.relative_to(root) for path in corpus.audio_files(root)]
    paths = [x for x in paths if not any(part.startswith(".") for part in x.parts)]
    rejected, listed = [], None
    if manifest is not None:
        listed = corpus.read_manifest(manifest, permissive_only)
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
        raise CorpusError(f"{root}: no audio file in it{beside}; give another folder")
    layout = layout or guess(paths)
    files: dict[Place, list[pathlib.Path]] = {}
    official: dict[str, str] = {}
    for path in paths:
        row = listed[(root / path).resolve()] if listed is not None else corpus.Listed("", "")
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
            corpus.one_split(official, place.talker, place.split, manifest or root)
        files.setdefault(place, []).append(path)
    if not files:
        asked = f" of --stems={','.join(stems)}" if layout == "musdb" else ""
        raise CorpusError(
            f"{root}: no file{asked} in the layout {layout} (looked for "
            f"{_EXPECTED[layout]}): choose another --layout"
        )
    ordered = dict(sorted(files.items(), key=lambda item: item[0].recording))
    return Found(layout, ordered, rejected)
