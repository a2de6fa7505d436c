"""A run's checkpoints: Orbax (`eqst.arrays`) underneath, checksums and fallback on top.

A run's folder:

    config.json                 the card, see `eqst.card`
    metrics.jsonl               what was measured on the way, see `eqst.card`
    checkpoints/last/STEP/      an Orbax checkpoint of the whole training state (the newest ones)
    checkpoints/best/STEP/      an Orbax checkpoint of {"params": ..} (the best one)
    .../STEP/eqst.json          `eqst.seal`: a checksum for every file and every leaf, and the card

The seal is written last and in one motion, so it is also what makes a checkpoint count: whatever
a process killed at any moment leaves behind lacks it, is never read, and goes with the next save.
Checksums are there because Orbax may load a flipped byte as different weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from eqst import arrays
from eqst.card import (
    CARD_NAME,
    MAKE_ROOM,
    CheckpointError,
    Loaded,
    exported_in,
    is_exported,
    load_weights,
    metrics_of,
    named_leaves,
    nested,
    save_weights,
    write_card,
)
from eqst.config import Config, from_card
from eqst.lock import LOCK_NAME, hold
from eqst.processes import gathered, together, wait_for_all
from eqst.saving import Background
from eqst.seal import (
    DAMAGED_NAME,
    SEAL_NAME,
    Damaged,
    complete_steps,
    find_card,
    mend_card,
    newest_readable,
    read_card,
    read_seal,
)

# One import serves whoever keeps runs.
__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Loaded",
    "config_of",
    "export_weights",
    "find_card",
    "is_exported",
    "load",
    "load_all",
    "load_weights",
    "read_card",
    "write_card",
]

_log = logging.getLogger("eqst")


class Checkpoints:
    """The checkpoints of one run, for the process (or processes) that train it.

    Use it in a `with` block: it holds the folder against a second writer. Every method is called
    by all processes. A save returns when the checkpoint is complete on disk or, with `wait=False`,
    when the arrays are copied: then one of each kind may be under way (see `eqst.saving`), the
    next one waits for it, and so does the end of the block.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, keep: int = 2, keep_every: int = 0
    ) -> None:
        """Names the run's folder and which of the last checkpoints stay: the newest `keep`, and
        those of every `keep_every` steps (0: no others)."""
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint has to stay")
        self._workdir = _absolute(workdir)
        self._folder = self._workdir / "checkpoints"
        self._last = self._folder / "last"
        self._best = self._folder / "best"
        self._keep, self._keep_every = keep, keep_every
        self._saves = Background()
        self._best_metric: float | None = None
        self._lock: IO[str] | None = None
        self._made: list[epath.Path] = []
        self.notes: dict[str, Any] = {}  # of the checkpoint restored last

    def __enter__(self) -> Checkpoints:
        together(self._enter, CheckpointError, OSError)
        return self

    def _enter(self) -> None:
        if jax.process_index() != 0:
            return
        above = (self._folder, *self._folder.parents)
        self._made = (
            [] if "://" in os.fspath(self._folder) else [x for x in above if not x.exists()]
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self._folder)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"{self._folder} cannot be written ({reason}): {MAKE_ROOM}"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._saves.close(error)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is None:
            return
        # Of a run that was refused nothing stays. (A folder that is not empty is a ValueError.)
        with contextlib.suppress(OSError, ValueError):
            if self._made and [x.name for x in self._folder.iterdir()] == [LOCK_NAME]:
                (self._folder / LOCK_NAME).unlink()
                for folder in self._made:
                    folder.rmdir()  # while they are empty
        self._lock.close()
        self._lock = None

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        steps = complete_steps(self._last)
        return steps[-1] if steps else None

    def best_metric(self) -> float | None:
        """The metric that `save_best` last accepted; None without one, or where it is damaged."""
        if self._best_metric is None:  # once: it costs the reading of the whole checkpoint
            self._best_metric = self._read_best_metric()
        return self._best_metric

    def _read_best_metric(self) -> float | None:
        steps = complete_steps(self._best)
        if not steps:
            return None
        try:
            return float(read_seal(self._best / str(steps[-1]))["metric"])
        except Damaged as error:
            _log.warning("the best checkpoint in %s is damaged (%s)", self._best, error)
            return None

    def save(
        self,
        step: int,
        state_tree: Any,
        notes: Mapping[str, Any] | None = None,
        *,
        wait: bool = True,
    ) -> bool:
        """Saves the training state and drops the checkpoints that are not to stay.

        Args:
          step: steps done, >= 0.
          state_tree: any tree of arrays (numpy and Python scalars become 0-d arrays). What `load`
            shall find lies under the key or field `params`, as nested dicts.
          notes: JSON that goes with it; `self.notes` after it is restored.
          wait: until it is complete on disk.

        Returns:
          False where this step is already saved: a complete checkpoint is never written over.

        Raises:
          CheckpointError: it, or one that was under way, cannot be saved; what was saved is whole.
        """

        def stay(steps: list[int]) -> list[int]:
            # What has just been saved is what the run goes on from, newer ones there or not.
            for_good = [x for x in steps if self._keep_every and x and x % self._keep_every == 0]
            return [step, *steps[-self._keep :], *for_good]

        self._saves.wait(self._last.name)
        if (self._last / str(step) / SEAL_NAME).is_file():
            return False
        facts = {"metric": None, "notes": dict(notes or {})}
        self._saves.begin(self._last, step, state_tree, stay, **facts)
        if wait:
            self._saves.wait()
        return True

    def save_best(self, step: int, params_tree: Any, metric: float, *, wait: bool = True) -> bool:
        """Saves the parameters if `metric` is below that of the best so far.

        Args:
          step: steps done, >= 0.
          params_tree: nested dicts of arrays.
          metric: lower is better, the same on all processes; NaN is never best.
          wait: until they are complete on disk.

        Returns:
          Whether they are the best now.

        Raises:
          CheckpointError: as `save`.
        """
        best = self.best_metric()
        if not math.isfinite(metric) or (best is not None and metric >= best):
            return False
        self._saves.wait(self._best.name)
        if best is not None and (self._best / str(step) / SEAL_NAME).is_file():
            return False
        facts = {"metric": float(metric), "notes": {}}
        self._saves.begin(self._best, step, {"params": params_tree}, lambda _: [step], **facts)
        self._best_metric = float(metric)
        if wait:
            self._saves.wait()
        return True

    def check(self) -> None:
        """Raises what a save under way has failed of, if it has; for every step.

        Raises:
          CheckpointError: as `save`.
        """
        self._saves.check()

    def wait(self, which: str | None = None) -> None:
        """Waits until what is under way is complete on disk: "last", "best" or, as None, all.

        Raises:
          CheckpointError: as `save`.
        """
        self._saves.wait(*([which] if which else []))

    def restore(self, abstract_state: Any, *, at_most: int | None = None) -> tuple[int, Any] | None:
        """Restores the newest checkpoint whose content is what was saved.

        A damaged one is passed over, says so in one line, and is not offered again.

        Args:
          abstract_state: the tree that was saved, with jax.ShapeDtypeStruct leaves that carry a
            sharding, or real arrays in their places; numpy leaves come back as numpy.
          at_most: the newest step that will do; None takes any.

        Returns:
          (step, state), or None where nothing has been saved (up to `at_most`).

        Raises:
          CheckpointError: the tree is another one than was saved, or every checkpoint is damaged.
          OSError: the storage does not give them now.
          ValueError: a leaf has no sharding.
        """
        self._saves.wait()
        steps = complete_steps(self._last)
        if len(set(gathered(steps[-1] if steps else -1))) > 1:
            raise CheckpointError(
                f"the processes see different checkpoints in {self._last}: "
                "give a --workdir on storage that all of them share"
            )
        if not steps or (at_most is not None and steps[0] > at_most):
            return None
        targets = {
            name: arrays.target(name, leaf) for name, leaf in named_leaves(abstract_state).items()
        }
        target_tree = jax.tree.unflatten(jax.tree.structure(abstract_state), targets.values())

        def read(step: int) -> Any:
            seal = together(lambda: read_seal(self._last / str(step)), Damaged, OSError)
            arrays.check_same_tree(seal["leaves"], targets, self._last / str(step))
            folder = self._last / str(step)
            tree = together(lambda: arrays.read_tree(folder, target_tree), Damaged, OSError)
            found = arrays.facts_of(tree)
            together(lambda: arrays.compare(found, seal["leaves"]), Damaged)
            return tree, seal["notes"] if "notes" in seal else {}  # older ones have none

        step, (state, self.notes), damaged = newest_readable(self._last, read, at_most)
        if jax.process_index() == 0:
            mend_card(self._workdir)
            for bad in damaged:
                folder = self._last / str(bad)
                (folder / SEAL_NAME).replace(folder / DAMAGED_NAME)
        wait_for_all("eqst damaged checkpoints set aside")
        return step, state


def load(workdir: str | os.PathLike[str], *, which: str = "best") -> Loaded:
    """Loads a run's parameters on this machine, whatever machines it was trained on.

    Needs neither the config file of the run nor its optimiser.

    Args:
      workdir: the run's folder, in training still perhaps; or what `export_weights` wrote of one
        (its path without the ending), such as colab/weights/db_mel_pm.
      which: "best" (by the metric given to `save_best`; where none can be read, the last of a run
        that has trained, said in one line) or "last".

    Returns:
      its card, parameters (numpy), the step they are of, and the rows of its metrics.jsonl, of
      the steps after that one too; `config_of` gives its settings.

    Raises:
      CheckpointError: the folder is no run, has no such checkpoint, or all of them are damaged.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r}: choose 'best' or 'last'")
    if is_exported(workdir):
        return load_weights(workdir)
    card = read_card(workdir)
    folder = _absolute(workdir) / "checkpoints"
    try:
        step, params = _load_params(folder / which)
    except CheckpointError as error:
        if which == "last" or not any(complete_steps(folder / "last")):
            raise
        step, params = _load_params(folder / "last")
        _log.warning("%s; taking the last one, of step %d", str(error).partition(": ")[0], step)
    return Loaded(card, params, step, metrics_of(workdir))


def config_of(loaded: Loaded) -> Config:
    """The settings of what was loaded; what its card lacks, being older, is at its default.

    Raises:
      ConfigError: a setting that this version does not know, or takes no more.
    """
    return from_card(loaded.card["config"])


def load_all(folder: str | os.PathLike[str], *, which: str = "best") -> dict[str, Loaded]:
    """`load` for every run in a folder, such as a sweep's, however deep it lies.

    What is no run, or one that has nothing to load yet, is left out, in one line each.

    Args:
      folder: holds runs or exported weights; a run itself is taken too. Links in it are not
        followed.
      which: as in `load`.

    Returns:
      by path from the folder ("db_mel_pm/seed_0"; a run given itself by its own name), sorted.

    Raises:
      CheckpointError: there is no such folder, or no run in it that can be loaded.
    """
    top = _absolute(folder)
    if not top.is_dir():
        raise CheckpointError(f"there is no folder {top}: give the folder that holds the runs")
    found = {}
    for path in _runs_in(top):
        name = path.relative_to(top).as_posix() if path != top else top.name
        try:
            found[name] = load(path, which=which)
        except CheckpointError as error:
            _log.warning("left out %s: %s", name, error)
    if not found:
        raise CheckpointError(
            f"{top} has no run that can be loaded: give the folder that holds the workdirs"
        )
    return dict(sorted(found.items()))


def _is_run(folder: epath.Path) -> bool:
    """Whether training has begun there: its card may be lost, and its checkpoints have a copy."""
    return (folder / CARD_NAME).is_file() or (folder / "checkpoints").is_dir()


def _runs_in(folder: epath.Path) -> list[epath.Path]:
    """The folder where it is a run, or what is in and below it; says where there is nothing."""
    if _is_run(folder):
        return [folder]
    weights = exported_in(folder)
    inside = [x for x in folder.iterdir() if x.is_dir() and not x.name.startswith(".")]
    below = [x for x in inside if not os.path.islink(x)]
    if not below and not weights:
        _log.warning("left out %s: it holds no run of EQST", folder)
    return weights + [run for x in below for run in _runs_in(x)]


def _load_params(root: epath.Path) -> tuple[int, Any]:
    """(step, parameters) of the newest checkpoint of a folder that can be read."""
    if not complete_steps(root):
        raise CheckpointError(
            f"{root.parent.parent} has no {root.name} checkpoint: let it train for longer"
        )

    def read(step: int) -> Any:
        leaves = read_seal(root / str(step))["leaves"]
        wanted = {name: facts for name, facts in leaves.items() if name.startswith("params/")}
        if not wanted:
            raise CheckpointError(f"{root / str(step)} has no params: it is no training state")
        targets = {
            name: np.empty(facts["shape"], np.dtype(facts["dtype"]))
            for name, facts in wanted.items()
        }
        tree = arrays.read_tree(root / str(step), nested(targets), partial=True)
        arrays.compare(arrays.facts_of(tree, wanted), wanted)
        return tree

    step, tree, _ = newest_readable(root, read)
    return step, tree["params"]


def _absolute(workdir: str | os.PathLike[str]) -> epath.Path:
    """A run's folder as Orbax wants it: absolute, or a bucket's address."""
    path = epath.Path(workdir)
    return path if "://" in os.fspath(workdir) else epath.Path(os.path.abspath(path))


def export_weights(
    workdir: str | os.PathLike[str],
    path_stem: str | os.PathLike[str],
    *,
    which: str = "best",
    dtype: str = "float32",
) -> None:
    """`load`, then `eqst.card.save_weights`: PATH_STEM.npz and PATH_STEM.json of a run."""
    save_weights(load(workdir, which=which), path_stem, dtype=dtype)
