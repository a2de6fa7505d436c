"""What a run says of itself, and trained weights that travel with it; no Orbax here.

The card is the file config.json of a run's folder: format, resolved config, commit, packages, the
normalisation of the features and the table of bands. Beside it metrics.jsonl has a line of JSON for
every step at which something was measured. Packaged weights are a pair of files,
NAME.npz (arrays named by their slash-joined paths) and NAME.json (the card).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

FORMAT_VERSION = 1
CARD_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
MAKE_ROOM = "make room there, or take a folder that can be written"
# What a run has to say of itself; the rest of the card is filled in here.
CARD_KEYS = ("config", "normalisation", "band_table")
PACKAGES = ("eqst", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


class CheckpointError(ValueError):
    """A folder or file that cannot be used: one line with what is wrong and the way out."""


class DamagedCard(CheckpointError):
    """A card that is not as it was written, or is gone."""


class Loaded(NamedTuple):
    """A trained predictor as data.

    Attributes:
      card: its config.json.
      params: nested dict of numpy arrays.
      step: of training, that they are of.
      metrics: the rows of its metrics.jsonl, {"step": .., ..}; older exported weights have none.
    """

    card: dict[str, Any]
    params: dict[str, Any]
    step: int
    metrics: tuple[dict[str, Any], ...] = ()


def write_card(workdir: str | os.PathLike[str], card: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a run's config.json, replacing an older one in a single motion.

    Args:
      workdir: the run's folder, made if absent.
      card: JSON values (numpy ones too) under CARD_KEYS and any other key: `config` the resolved
        config, `normalisation` what the features subtract and divide by, `band_table` the bands.

    Returns:
      The card as written: with `format_version`, `commit`, `packages` and a checksum added.

    Raises:
      CheckpointError: a key of CARD_KEYS is missing, or a value is no finite JSON.
    """
    missing = [key for key in CARD_KEYS if key not in card]
    if missing:
        raise CheckpointError(f"the card of a run needs {missing}, it has {sorted(card)}")
    full = {
        "format_version": FORMAT_VERSION,
        **card,
        "commit": commit(),
        "packages": {"python": platform.python_version(), **versions()},
    }
    text = _with_checksum(full)
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CARD_NAME, text)
    return json.loads(text)


def _with_checksum(card: Mapping[str, Any]) -> str:
    """JSON text of a card; its `sha256` is that of the text without it."""
    bare = {key: value for key, value in card.items() if key != "sha256"}
    return to_json({**bare, "sha256": digest(to_json(bare))})


def read_card(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a run's config.json.

    Raises:
      CheckpointError: the folder is no run of EQST, or its format is not one this version reads.
      DamagedCard: its card is gone, or not as it was written.
    """
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give the --workdir of a training run")
    if not (folder / CARD_NAME).is_file():
        raise DamagedCard(
            f"{folder} has no {CARD_NAME}, so it is no run of EQST: "
            "give the folder that `python -m eqst.train --workdir=` wrote to"
        )
    return _parse_card((folder / CARD_NAME).read_bytes(), str(folder / CARD_NAME))


def _parse_card(text: bytes, source: str) -> dict[str, Any]:
    try:
        card = json.loads(text)
    except ValueError as error:  # of UTF-8 too
        raise DamagedCard(f"{source} is not JSON ({error}): restore it or train anew") from None
    if not isinstance(card, dict) or not isinstance(card.get("format_version"), int):
        raise DamagedCard(f"{source} names no format_version: EQST did not write it")
    version = card["format_version"]
    if version != FORMAT_VERSION:
        wanted = "a newer eqst" if version > FORMAT_VERSION else "the eqst that wrote it"
        raise CheckpointError(
            f"{source} has format_version {version}, this eqst reads {FORMAT_VERSION}: use {wanted}"
        )
    # Older cards have no checksum.
    if "sha256" in card and json.loads(_with_checksum(card)) != card:
        raise DamagedCard(f"{source} does not match its own checksum: restore it or train anew")
    absent = [key for key in CARD_KEYS if key not in card]
    if absent:
        raise DamagedCard(f"{source} lacks {absent}: restore it or train anew")
    return card


def read_metrics(path: pathlib.Path | epath.Path) -> tuple[list[dict], int]:
    """The rows of a metrics.jsonl, and how many of its lines are not what we write.

    A process killed while it writes leaves half a line, a bad disk anything at all.
    """
    rows = []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row and isinstance(row["step"], int):
            rows.append(row)
    return rows, len(lines) - len(rows)


def metrics_of(workdir: str | os.PathLike[str]) -> tuple[dict[str, Any], ...]:
    """The rows of a run's metrics.jsonl in order; none where it has no such file.

    Of exported weights those that went with them.
    """
    if is_exported(workdir):
        return _exported_metrics(card_of(workdir))
    path = epath.Path(workdir) / METRICS_NAME
    return tuple(read_metrics(path)[0]) if path.is_file() else ()


def versions() -> dict[str, str]:
    """Versions of `PACKAGES` as installed, "unknown" for what is not."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str:
    """The commit of this clone, with "+changes" where files differ from it, or "unknown".

    EQST_COMMIT says it where the clone was shipped without its history.
    """
    if os.environ.get("EQST_COMMIT"):
        return os.environ["EQST_COMMIT"]
    here = pathlib.Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's clone: only a tracked file counts.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_weights(
    loaded: Loaded, path_stem: str | os.PathLike[str], *, dtype: str = "float32"
) -> None:
    """Writes parameters as PATH_STEM.npz and their card as PATH_STEM.json.

    Args:
      loaded: from `eqst.checkpoint.load`.
      path_stem: where to, without the ending; folders are made.
      dtype: how floats are stored: "float32", or "float16" (half the size, 3 digits).

    Raises:
      CheckpointError: a value that `dtype` cannot hold.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={dtype!r}: choose 'float32' or 'float16'")
    arrays = {}
    for name, leaf in named_leaves(loaded.params).items():
        is_float = jax.dtypes.issubdtype(leaf.dtype, np.floating)
        with np.errstate(over="ignore"):
            arrays[name] = leaf.astype(dtype) if is_float else leaf
        if is_float and not np.isfinite(arrays[name]).all():
            raise CheckpointError(f"{name} is not finite in {dtype}: choose float32, or train anew")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    stem = epath.Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    weights = {"step": loaded.step, "dtype": dtype, "sha256": digest(buffer.getvalue())}
    weights["metrics"] = list(loaded.metrics)
    write_whole(stem.parent / f"{stem.name}.npz", buffer.getvalue())
    card = _with_checksum({**loaded.card, "weights": weights})
    write_whole(stem.parent / f"{stem.name}.json", card)


def is_exported(path_stem: str | os.PathLike[str]) -> bool:
    """Whether this is the path, without the ending, of weights that were exported."""
    stem = epath.Path(path_stem)
    return not stem.is_dir() and stem.with_name(f"{stem.name}.npz").is_file()


def exported_in(folder: str | os.PathLike[str]) -> list[epath.Path]:
    """The paths, without the ending, of the weights that were exported into a folder."""
    stems = sorted(path.with_suffix("") for path in epath.Path(folder).glob("*.npz"))
    return [stem for stem in stems if is_exported(stem)]


def card_of(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a run or of exported weights, whose arrays are not read for it.

    Raises:
      CheckpointError: as `read_card` and `load_weights`.
    """
    if not is_exported(workdir):
        return read_card(workdir)
    stem = epath.Path(workdir)
    return _exported_card(stem.with_name(f"{stem.name}.json"), _absent(workdir))


def _absent(path_stem: str | os.PathLike[str]) -> str:
    return f"{path_stem}.npz and .json are not there: eqst.checkpoint.export_weights makes them"


def _exported_card(path: Any, absent: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(absent)
    return _parse_card(path.read_bytes(), str(path))


def _exported_metrics(card: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The record that went with exported weights; older ones have none."""
    has = "weights" in card and "metrics" in card["weights"]
    return tuple(card["weights"]["metrics"]) if has else ()


def load_weights(path_stem: str | os.PathLike[str] | None = None) -> Loaded:
    """Loads exported weights, floats as float32; imports no Orbax.

    Args:
      path_stem: as given to `export_weights`; None takes those packaged with eqst.

    Raises:
      CheckpointError: a file is absent, damaged, or of a format this version does not read.
    """
    if path_stem is None:
        folder, name = importlib.resources.files("eqst") / "weights", "default"
        absent = "this eqst comes without weights: train, and give --workdir=DIR"
    else:
        folder, name = epath.Path(path_stem).parent, epath.Path(path_stem).name
        absent = _absent(path_stem)
    npz, card_file = folder / f"{name}.npz", folder / f"{name}.json"
    if not npz.is_file():
        raise CheckpointError(absent)
    card = _exported_card(card_file, absent)
    data = npz.read_bytes()
    if "weights" not in card or card["weights"]["sha256"] != digest(data):
        raise CheckpointError(f"{npz} is not what {card_file} describes: export both again")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        leaves = {name: arrays[name] for name in arrays.files}
    for name, leaf in leaves.items():
        if leaf.dtype == np.float16:
            leaves[name] = leaf.astype(np.float32)
    return Loaded(card, nested(leaves), card["weights"]["step"], _exported_metrics(card))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by slash-joined path, such as `params/encoder/kernel`, in the tree's order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    keystr = jax.tree_util.keystr
    leaves = {keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise ValueError("two leaves have the same slash-joined path: use no '/' in names")
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `named_leaves` for nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def to_json(value: Any) -> str:
    """JSON text of nested dicts and lists, numpy and JAX values included; NaN is refused."""

    def plain(other: Any) -> Any:
        if isinstance(other, np.ndarray | np.generic | jax.Array):
            return np.asarray(other).tolist()
        raise TypeError(f"a {type(other).__name__} is no JSON")

    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=plain) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"this cannot be written down: {error}") from None


def digest(data: str | bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def write_whole(path: epath.Path, data: str | bytes) -> None:
    """Writes a file so that at any moment it is absent, the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be written ({reason}): {MAKE_ROOM}") from error
