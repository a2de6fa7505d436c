"""A tree of arrays in a folder, by Orbax: written, read, and compared with its checksums.

The only importer of Orbax, whose v1 API still moves.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from eqst.card import CheckpointError, named_leaves
from eqst.processes import on_host
from eqst.seal import LATER, Damaged, leaf_facts

# TensorStore's words for a bucket that is away or closed to us, which is no damage.
_AWAY = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED")


def snapshot(tree: Any) -> Any:
    """Copies of a tree's arrays, where they are; numpy and Python scalars become 0-d arrays.

    A step that is given the arrays to keep leaves the copies alone. Nothing is waited for.
    """
    leaves, structure = jax.tree.flatten(tree)
    on_device = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    copied = _copier(tuple(leaf.sharding for leaf in on_device.values()))(list(on_device.values()))
    # A numpy scalar as a leaf would make Orbax raise in a thread and then wait for minutes.
    found = [None if i in on_device else np.array(leaf) for i, leaf in enumerate(leaves)]
    for i, leaf in zip(on_device, copied, strict=True):
        found[i] = leaf
    return jax.tree.unflatten(structure, found)


@functools.cache
def _copier(shardings: tuple) -> Callable[[list], list]:
    def copies(leaves: list) -> list:
        return [jnp.copy(leaf) for leaf in leaves]

    return jax.jit(copies, out_shardings=list(shardings))


def whole(tree: Any) -> Any:
    """The tree with what is split over processes gathered; all of them call it."""

    def gather(leaf: Any) -> Any:
        split = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_replicated or leaf.is_fully_addressable
        )
        return on_host(leaf) if split else leaf

    return jax.tree.map(gather, tree)


def begin_write(folder: epath.Path, tree: Any) -> Callable[[], None]:
    """Begins to write a tree of arrays into a folder that does not exist.

    Args:
      folder: where to; it is there only once all has been written.
      tree: arrays that nobody changes or gives away meanwhile.

    Returns:
      what waits for the end; Orbax's errors pass, here and there.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_orbax())
        writing = orbax().save_async(folder, tree, checkpointable_name="state")
        quiet = stack.pop_all()

    def finish() -> None:
        with quiet:
            writing.result()

    return finish


def read_tree(folder: epath.Path, targets: Any, *, partial: bool = False) -> Any:
    """Reads `targets`, to be compared with `verify`; `partial`: the saved dict may have other keys.

    Raises:
      Damaged: Orbax cannot read them.
      OSError: the storage does not give them now.
    """
    ocp = orbax()
    try:
        with _quiet_orbax():
            if partial:
                saved = ocp.metadata(folder, checkpointable_name="state").metadata
                targets = jax.tree.map(lambda _: ocp.PLACEHOLDER, saved) | targets
            return ocp.load(folder, targets, checkpointable_name="state")
    except Exception as error:
        if _AWAY.search(str(error)):
            raise OSError(f"{folder} cannot be read now ({reason(error)}): {LATER}") from None
        raise Damaged(f"Orbax cannot read it: {type(error).__name__}") from error


def facts_of(tree: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """`leaf_facts` by name, of all leaves or some; where they are split over processes, all call it
    with the same names."""
    leaves = named_leaves(tree)
    return {name: leaf_facts(leaves[name]) for name in (leaves if names is None else names)}


def compare(found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Compares what was read with what was saved.

    Raises:
      Damaged: a leaf is not what its seal says.
    """
    for name, facts in saved.items():
        if found[name] != facts:
            raise Damaged(f"{name} does not match its checksum")


def check_same_tree(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: epath.Path
) -> None:
    """Refuses a state of another shape, which would look like damage further on."""

    def shape_of(name: str) -> str:
        return f"{saved[name]['dtype']}{saved[name]['shape']}"

    differing = sorted(set(saved) ^ set(wanted)) or [
        name
        for name, leaf in wanted.items()
        if [list(leaf.shape), str(leaf.dtype)] != [saved[name]["shape"], saved[name]["dtype"]]
    ]
    if differing:
        name = differing[0]
        there = shape_of(name) if name in saved else "absent"
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "absent"
        raise CheckpointError(
            f"{folder} holds another model: {name} is {there} there and {here} here "
            f"({len(differing)} such): use the run's own config, or another --workdir"
        )


def target(name: str, leaf: Any) -> Any:
    """What Orbax is to make of a leaf: an array with a sharding, or a numpy array."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    if leaf.sharding is None:
        raise ValueError(f"{name} has no sharding: set ShapeDtypeStruct(.., sharding=)")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def reason(error: BaseException) -> str:
    """What the system said, which Orbax wraps in pages."""
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return os.strerror(int(code[1])) if code else text


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps tracebacks of Orbax's threads off the screen: what they raise is raised to us too."""
    logger = logging.getLogger("absl")

    def nothing(_: logging.LogRecord) -> bool:  # one of its own for each that is under way
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def orbax() -> Any:
    """Orbax's v1 API, under either of its names; its import takes a second, so only on use."""
    try:
        from orbax.checkpoint import v1
    except ImportError:
        from orbax.checkpoint.experimental import v1
    return v1
