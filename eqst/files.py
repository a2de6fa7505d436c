"""Writing files so that they appear whole or not at all, and the one error users see."""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


class AudioError(ValueError):
    """Audio, or a place to write it, that cannot be used; the message is one line for the user."""


def write_atomically(
    path: str | os.PathLike, write: Callable[[Path], Result], *, overwrite: bool = True
) -> Result:
    """Writes a file so that it appears whole or not at all.

    `write` fills a temporary file in the same folder (same extension, hidden name), which then
    takes the place of `path` in one step. When anything fails the temporary file is removed and
    what was at `path` before is untouched. A symbolic link is followed, not replaced.

    Args:
      path: the file to be; its folder must exist.
      write: called with the temporary path, an empty file.
      overwrite: False refuses where `path` exists.

    Returns:
      What `write` returned.

    Raises:
      AudioError: path exists (without overwrite) or is no regular file; the folder is missing or
        not writable; the disk is full. Errors of `write` other than OSError pass unchanged.
    """
    target = Path(os.path.realpath(path))
    check_target(path, overwrite=overwrite)
    temporary = target.with_name(f".{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        # Not tempfile: its files are private to the user, and the finished file should not be.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise AudioError(
            f"{os.fspath(path)!r} cannot be written: folder {str(target.parent)!r} does not take "
            f"files ({error.strerror}): choose another"
        ) from None
    try:
        result = write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        check_target(path, overwrite=overwrite)  # again: writing may have taken minutes
        os.replace(temporary, target)
    except OSError as error:
        raise AudioError(f"{os.fspath(path)!r} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return result


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/eqst, or ~/.cache/eqst."""
    base = os.environ["XDG_CACHE_HOME"] if os.environ.get("XDG_CACHE_HOME") else "~/.cache"
    return Path(base).expanduser() / "eqst"


def result_folder(folder: str | os.PathLike[str], name: str, *, overwrite: bool) -> Path:
    """A command's output folder, made if missing; refused early if its result is there already.

    Raises:
      AudioError: `name` is in it and `overwrite` is false.
    """
    made = Path(folder)
    made.mkdir(parents=True, exist_ok=True)
    check_target(made / name, overwrite=overwrite)
    return made


def check_target(path: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises AudioError where `path` may not be written: before work starts, not after it."""
    target, name = Path(os.path.realpath(path)), repr(os.fspath(path))
    if not target.parent.is_dir():
        raise AudioError(f"{name} cannot be written: no folder {str(target.parent)!r}: create it")
    if target.is_dir():
        raise AudioError(f"{name} is a folder: name a file to write")
    if target.exists() and not target.is_file():
        raise AudioError(f"{name} is not a regular file: name a file to write")
    if target.exists() and not overwrite:
        raise AudioError(
            f"{name} exists already: choose another name or allow overwriting (--overwrite)"
        )


def write_json(path: str | os.PathLike, content: Any, *, overwrite: bool = True) -> None:
    """Writes JSON (indented, strict: no NaN) by `write_atomically`, with its errors."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(path, text, overwrite=overwrite)


def write_text(path: str | os.PathLike, text: str, *, overwrite: bool = True) -> None:
    """Writes UTF-8 text by `write_atomically`, with its errors."""
    write_atomically(
        path, lambda temporary: temporary.write_text(text, encoding="utf-8"), overwrite=overwrite
    )
