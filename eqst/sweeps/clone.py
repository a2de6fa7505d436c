"""This clone as an archive, for machines that have none: its files as they are now."""

from __future__ import annotations

import hashlib
import io
import pathlib
import subprocess
import tarfile


def archive(root: pathlib.Path, path: pathlib.Path) -> str:
    """Writes what git tracks or would track, as it stands in the working tree, as a .tar.gz.

    Args:
      root: of the clone.
      path: of the archive.

    Returns:
      a name for its content, 12 hexadecimal digits.

    Raises:
      ValueError: `root` is no clone.
    """
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run([*listing, "--exclude-standard"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{root} is no git clone: start the sweep from one") from None
    names = sorted({name for name in done.stdout.decode().split("\0") if name})
    total = hashlib.sha256()
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            file = root / name
            if not file.is_file():  # removed, and not yet for git
                continue
            data = file.read_bytes()
            total.update(f"{name}\0{len(data)}\0".encode() + data)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), file.stat().st_mode & 0o777
            tar.addfile(entry, io.BytesIO(data))
    return total.hexdigest()[:12]
