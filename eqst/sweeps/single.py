"""A unit of a sweep, from wherever it stopped to its runs' errors on held-out talkers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import jax
from etils import epath

from eqst import (
    card,
    checkpoint,
    command,
    config,
    corpus,
    evaluate,
    files,
    processes,
    saving,
    trials,
)
from eqst.sweeps import turn
from eqst.sweeps.members import Member
from eqst.train import check_same_run, train_together

# What ends a run in a line, and is its own.
OWN = (ValueError, OSError, FloatingPointError)


def prepare(members: list[Member], data: str, manifest: str) -> None:
    """Makes the stores of all corpora once, before many processes would each make their own."""
    seen = set()
    for member in members:
        selected, split = evaluate.select(member.config, data, manifest, "dev")
        for chosen, name in ((member.config.data, "train"), (selected, split)):
            key = dataclasses.replace(chosen, folds=0, fold=0)
            if key not in seen:
                seen.add(key)
                corpus.open_corpus(chosen, name, functools.partial(print, flush=True))


def run_unit(
    workdir: epath.Path, unit: list[Member], data: str, manifest: str, attempt: str = ""
) -> None:
    """Trains the members of a unit as one program and evaluates them, or what is left of that.

    One that fails takes no other down: where its folder is refused it is left out of the program,
    and each is evaluated by itself. Those that have no step in common to go on from, or whose
    program fails, are trained one after the other. Of several processes all evaluate, which keeps
    them together, and the first one writes.

    Args:
      workdir: of the sweep, a folder or in a bucket.
      unit: runs that can share a program.
      data: folder of held-out recordings, or "".
      manifest: of them, or "".
      attempt: the launcher's name for this attempt, as in `turn.taken`.

    Raises:
      ValueError: at the end, of several runs, which of them failed, and why. What a single run
        raises passes as it is.
    """
    say = processes.of_first(functools.partial(print, flush=True))
    failed: dict[str, str] = {}

    def note(runs: list[Member], error: Exception) -> None:
        """Keeps for the end what runs have failed of; not where there is nothing else to do."""
        if len(unit) == 1 or saving.away(error, os.fspath(workdir)) is not None:
            raise error
        for member in runs:
            failed[member.name] = command.said(error)
            say(f"{member.name}: {failed[member.name]}")

    with contextlib.ExitStack() as turns:
        for member in unit:
            try:
                _take(turns, workdir / member.name, member, attempt)
            except OWN as error:
                note([member], error)
        _train([member for member in unit if member.name not in failed], workdir, note, say)
        for member in unit:
            if member.name in failed:
                continue
            try:
                _judge(workdir / member.name, member, data, manifest, say)
            except OWN as error:  # of one process alone perhaps: the others have the same to do
                note([member], error)
    if failed:
        names: dict[str, list[str]] = {}
        for name, why in failed.items():
            names.setdefault(why, []).append(name)
        whole = "; ".join(f"{', '.join(own)}: {why}" for why, own in names.items())
        raise ValueError(f"{len(failed)} of {len(unit)} runs failed: {whole}")


def _take(turns: contextlib.ExitStack, folder: epath.Path, member: Member, attempt: str) -> None:
    """Has a run's turn for as long as `turns` lasts.

    Raises:
      ValueError, OSError: on every process; its folder is in use, of other settings, or cannot be
        written.
    """
    with contextlib.ExitStack() as own:

        def begin() -> None:
            if jax.process_index() == 0 and "://" not in os.fspath(folder):
                own.enter_context(turn.taken(pathlib.Path(folder), attempt))
            check_same_run(folder, member.config)

        processes.together(begin, ValueError, OSError)
        with checkpoint.Checkpoints(folder):  # as training will; nobody else does
            pass
        turns.enter_context(own.pop_all())


def _train(
    unit: list[Member],
    workdir: epath.Path,
    note: Callable[[list[Member], Exception], None],
    say: Callable[[str], None],
) -> None:
    """Trains runs as one program, or one after the other; `note` is told which have failed."""
    # Of several processes any other error may be one's alone, and the others would wait for it.
    alike = OWN if jax.process_count() == 1 else (config.ConfigError, FloatingPointError)
    folders = [workdir / member.name for member in unit]
    if not unit:
        return
    try:
        train_together([member.config for member in unit], folders, say)
        return
    except FloatingPointError as error:
        steps = [checkpoint.load(folder, which="last").step for folder in folders]
        behind = [x for x, step in zip(unit, steps, strict=True) if step < x.config.train.steps]
        note(behind, error)
        return
    except alike as error:
        if len(unit) == 1:
            note(unit, error)
            return
        why = command.said(error)  # the error itself would keep the program's arrays
    say(f"one after the other: {why}")
    for member in unit:
        _train([member], workdir, note, say)


def _judge(
    folder: epath.Path, member: Member, data: str, manifest: str, say: Callable[[str], None]
) -> None:
    """Evaluates a run that is trained, and writes what it comes to."""
    run = trials.open_run(folder)
    selected, split = evaluate.select(member.config, data, manifest, "dev")
    held_out = corpus.open_corpus(selected, split, say)
    results, errors = evaluate.evaluate(
        run, held_out, held_out, with_baselines=False, with_audio=False, say=say
    )
    facts = {"commit": run.commit, "step": run.step, "machine": evaluate.machine()}
    results = {**facts, "recordings": [data, manifest], **results}
    if jax.process_index() == 0:
        _write(folder / "heldout", files.json_text(results), evaluate.errors_text(errors))


def _write(folder: epath.Path, results: str, errors: str) -> None:
    """The errors come last: they are what makes the member count as done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "errors.csv").unlink(missing_ok=True)  # those of other recordings
    card.write_whole(folder / "results.json", results)
    card.write_whole(folder / "errors.csv", errors)
