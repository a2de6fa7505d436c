"""A unit of a sweep, from wherever it stopped to its runs' errors on held-out talkers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from etils import epath

from eqst import card, checkpoint, config, corpus, evaluate, files, processes, trials
from eqst.sweeps.members import Member
from eqst.train import train, train_together


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


def run_unit(workdir: epath.Path, unit: list[Member], data: str, manifest: str) -> None:
    """Trains the members of a unit as one program and evaluates them, or what is left of that.

    Those that have no step in common to go on from are trained one after the other. Of several
    processes all evaluate, which keeps them together, and the first one writes.

    Raises:
      FloatingPointError: at the end, for members whose loss was not finite.
    """
    say = processes.of_first(functools.partial(print, flush=True))
    folders = [workdir / member.name for member in unit]
    failure: FloatingPointError | None = None
    try:
        train_together([member.config for member in unit], folders, say)
    except FloatingPointError as error:
        failure = error
    except config.ConfigError as error:
        if len(unit) == 1:
            raise
        say(f"one after the other: {error}")
        for member, folder in zip(unit, folders, strict=True):
            try:
                train(member.config, folder, say)
            except FloatingPointError as diverged:
                failure = diverged
    for member, folder in zip(unit, folders, strict=True):
        if failure and checkpoint.load(folder, which="last").step < member.config.train.steps:
            continue
        _judge(folder, member, data, manifest, say)
    if failure:
        raise failure


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
