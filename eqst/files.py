"""Writing files so that they appear whole or not at all, and the one error users see."""

import contextlib
import json
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


class AudioError(ValueError):
    """Audio, or a place to write it, that cannot be used; the message is one line for the user."""


class NotFiniteError(AudioError):
    """Audio with samples that are no numbers."""


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


@contextlib.contextmanager
def result_folder(folder: str | os.PathLike[str], *names: str, overwrite: bool) -> Iterator[Path]:
    """A command's output folder, made if missing, and tried before the work starts.

    Where the work fails, the folders that were made for it go again, if nothing is in them.

    Args:
      folder: where results go.
      names: of the result files.
      overwrite: False refuses a folder that has one of them.

    Raises:
      AudioError: a result is there already (without overwrite); the folder cannot be made or
        takes no files.
    """
    made, name = Path(folder), repr(os.fspath(folder))
    missing = []
    try:
        missing = [path for path in (made, *made.parents) if not path.exists()]
        made.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=made).close()
    except FileExistsError:
        raise AudioError(f"{name} is a file: name a folder for the results") from None
    except OSError as error:
        raise AudioError(
            f"{name} cannot hold results ({error.strerror}): name another folder"
        ) from None
    try:
        for result in names:
            check_target(made / result, overwrite=overwrite)
        yield made
    except BaseException:
        for path in missing:  # the deepest first; one that is not empty ends it
            try:
                path.rmdir()
            except OSError:
                break
        raise


def native(path: str | os.PathLike) -> str | bytes:
    """A path as soundfile opens it whatever its bytes: it would take them for text."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


_MUTING = threading.Lock()


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """Drops what C libraries write to the process's stderr; Python's own writing as well."""
    with _MUTING:  # two at once could take the null device for the original
        try:
            original = os.dup(2)
        except OSError:  # closed: there is nothing to mute
            yield
            return
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(original, 2)
            os.close(original)
            os.close(null)


def check_target(path: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises AudioError where `path` may not be written: before work starts, not after it."""
    target, name = Path(os.path.realpath(path)), repr(os.fspath(path))
    try:
        target.exists()  # a name that is too long, say
    except OSError as error:
        raise AudioError(f"{name} cannot be written ({error.strerror}): name another") from None
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
    try:  # permissions say little: to root nothing, of a read-only disk nothing
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise AudioError(
            f"{name} cannot be written: folder {str(target.parent)!r} does not take files "
            f"({error.strerror}): choose another"
        ) from None


def write_json(path: str | os.PathLike, content: Any, *, overwrite: bool = True) -> None:
    """Writes `json_text` by `write_atomically`, with its errors."""
    write_text(path, json_text(content), overwrite=overwrite)


def json_text(content: Any) -> str:
    """JSON, indented and strict: no NaN."""
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(path: str | os.PathLike, text: str, *, overwrite: bool = True) -> None:
    """Writes UTF-8 text by `write_atomically`, with its errors."""
    write_atomically(
        path, lambda temporary: temporary.write_text(text, encoding="utf-8"), overwrite=overwrite
    )
