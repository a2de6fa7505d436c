"""A bucket that is a folder: gs:// addresses as `etils.epath` sees them, without a network.

As in a bucket nothing is appended to, a folder is there only while something is in it, and no
folder is renamed. Orbax's own client for buckets (TensorStore) is not served: `arrays_in_npz` puts
a plain writer in the place of `eqst.arrays`.

As a program it runs a script with the bucket in place: python tests/bucket.py FOLDER SCRIPT WORD..
"""

import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils.epath import backend, gpath


class Bucket:
    """Calls of `epath` on gs:// addresses, in a folder.

    `fail_at` of an operation that changes something, or of one that reads, is its number; it and
    all after it raise `error`, as where a bucket is away for a while.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[str] = []
        self.error: Exception = OSError("503 Service Unavailable")
        self.fail_at: dict[str, int] = {}
        self.count = {"change": 0, "read": 0}

    def _is_there(self, kind: str) -> None:
        self.count[kind] += 1
        if kind in self.fail_at and self.count[kind] >= self.fail_at[kind]:
            raise self.error

    def at(self, path: Any) -> str:
        text = os.fspath(path)
        assert text.startswith("gs://"), text
        return str(self.folder / text.removeprefix("gs://"))

    def open(self, path, mode):
        if "a" in mode:
            raise OSError(f"{path}: what is in a bucket cannot be appended to")
        self._is_there("change" if "w" in mode else "read")
        if "w" in mode:
            self.written.append(os.fspath(path))
            Path(self.at(path)).parent.mkdir(parents=True, exist_ok=True)
        return backend.os_backend.open(self.at(path), mode)

    def exists(self, path):
        self._is_there("read")
        return self._exists(path)

    def _exists(self, path):
        return (
            backend.os_backend.isdir(self.at(path))
            and self._isdir(path)
            or os.path.isfile(self.at(path))
        )

    def isdir(self, path):
        self._is_there("read")
        return self._isdir(path)

    def _isdir(self, path):
        return any(files for _, _, files in os.walk(self.at(path)))

    def listdir(self, path):
        self._is_there("read")
        names = backend.os_backend.listdir(self.at(path))
        return [name for name in names if self._exists(f"{os.fspath(path)}/{name}")]

    def glob(self, path):
        self._is_there("read")
        found = backend.os_backend.glob(self.at(path))
        return [f"gs://{Path(name).relative_to(self.folder)}" for name in found]

    def makedirs(self, path, *, exist_ok=False, mode=None):
        """Nothing: folders are but the beginnings of names."""

    def mkdir(self, path, *, exist_ok=False, mode=None):
        """Nothing."""

    def rmtree(self, path):
        self._is_there("change")
        backend.os_backend.rmtree(self.at(path))

    def remove(self, path):
        self._is_there("change")
        backend.os_backend.remove(self.at(path))

    def rename(self, path, dst):
        self._is_there("change")
        assert not self._isdir(path), "a bucket renames no folders"
        backend.os_backend.rename(self.at(path), self.at(dst))

    def replace(self, path, dst):
        self._is_there("change")
        assert not self._isdir(path), "a bucket renames no folders"
        backend.os_backend.replace(self.at(path), self.at(dst))

    def copy(self, path, dst, overwrite):
        self._is_there("change")
        backend.os_backend.copy(self.at(path), self.at(dst), overwrite)

    def stat(self, path):
        self._is_there("read")
        return backend.os_backend.stat(self.at(path))


def install(folder: Path, put: Callable[[Any, Any, Any], None]) -> Bucket:
    """Has gs:// be a folder; `put` sets an attribute or item, as monkeypatch does.

    There is no public way to register a backend; TensorFlow's would be taken where it is installed.
    """
    bucket = Bucket(folder)
    put(gpath._PREFIX_TO_BACKEND, "gs", bucket)
    put(gpath, "_is_tf_installed", lambda: False)
    return bucket


def arrays_in_npz(put: Callable[[Any, Any, Any], None]) -> None:
    """Has checkpoints' arrays be written and read by numpy."""
    import jax
    import numpy as np

    from eqst import arrays, card

    def begin_write(folder, tree):
        def finish():
            buffer = io.BytesIO()
            np.savez(buffer, **{k: np.asarray(x) for k, x in card.named_leaves(tree).items()})
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "arrays.npz").write_bytes(buffer.getvalue())

        return finish

    def read_tree(folder, targets, *, partial=False):
        with np.load(io.BytesIO((folder / "arrays.npz").read_bytes())) as stored:
            found = {name: stored[name] for name in card.named_leaves(targets)}
        for name, target in card.named_leaves(targets).items():
            if isinstance(target, jax.ShapeDtypeStruct):
                found[name] = jax.device_put(found[name], target.sharding)
        return jax.tree.unflatten(jax.tree.structure(targets), found.values())

    put(arrays, "begin_write", begin_write)
    put(arrays, "read_tree", read_tree)


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


if __name__ == "__main__":
    install(Path(sys.argv[1]), _put)
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
