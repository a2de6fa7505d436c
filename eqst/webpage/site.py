"""The folder of the page: every file of it, written beside the place and renamed into it."""

from __future__ import annotations

import base64
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import soundfile

from eqst import files
from eqst.files import AudioError
from eqst.webpage import page
from eqst.webpage.examples import Example

INDEX = "index.html"


def write_site(
    output: pathlib.Path,
    text: str,
    every: Sequence[Example],
    *,
    figures: Mapping[str, Mapping[str, Any]],
    overwrite: bool,
) -> int:
    """Writes the site into a folder beside `output` and renames it into place; its size in bytes.

    Args:
      output: the folder.
      text: the page.
      every: the examples whose audio goes with it.
      figures: what goes with it as data/NAME.json.
      overwrite: whether a page that is there may be replaced.

    Raises:
      AudioError: as `check_output`.
      OSError: the disk is full; what was there is as it was.
    """
    check_output(output, overwrite=overwrite)
    try:
        made = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise AudioError(
            f"{str(output)!r} cannot be made ({error.strerror}): name another folder"
        ) from None
    try:
        made.chmod(0o755)
        for name, content in _files(text, every, figures):
            path = made / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        check_output(output, overwrite=overwrite)  # again: that took a while
        if output.exists():
            old = made.with_name(made.name + "-old")
            os.replace(output, old)
            os.replace(made, output)
            shutil.rmtree(old)
        else:
            os.replace(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return size


def _files(
    text: str, every: Sequence[Example], figures: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, bytes]]:
    yield INDEX, text.encode()
    for name, content in figures.items():
        yield f"data/{name}.json", files.json_text(content).encode()
    for name in ("page.css", "page.js"):
        yield name, page.asset(name).encode()
    shipped: set[str] = set()
    takes = [one for example in every for one in example.takes]
    # What an equaliser made of a clip the page makes again itself: only the clip is sent twice.
    scripted = {one.clip.name for one in takes if one.made_from is None}
    for one in takes:
        clip = one.clip
        if clip.name in shipped:
            continue
        shipped.add(clip.name)
        encoded = io.BytesIO()
        soundfile.write(encoded, clip.samples_T, clip.sample_rate, format="FLAC", subtype="PCM_16")
        yield f"audio/{clip.name}.flac", encoded.getvalue()
        if clip.name in scripted:
            words = base64.b64encode(encoded.getvalue()).decode("ascii")
            yield f"data/{clip.name}.js", f'EQST.put("{clip.name}","{words}");\n'.encode()


def check_output(output: pathlib.Path, *, overwrite: bool) -> None:
    """Raises AudioError where the site may not be written: before work starts, not after it.

    Only a page of this command, or an empty folder, is ever replaced.
    """
    name = repr(str(output))
    if not output.parent.is_dir():
        raise AudioError(f"{name} cannot be made: no folder {str(output.parent)!r}: create it")
    if output.exists() and not output.is_dir():
        raise AudioError(f"{name} is a file: name a folder for the page")
    if output.is_dir() and any(output.iterdir()):
        index = output / INDEX
        ours = index.is_file() and f'content="{page.GENERATOR}"' in index.read_text(
            errors="replace"
        )
        if not ours:
            raise AudioError(f"{name} holds files that are not such a page: name another folder")
        if not overwrite:
            raise AudioError(
                f"{name} exists already: choose another name or allow overwriting (--overwrite)"
            )
