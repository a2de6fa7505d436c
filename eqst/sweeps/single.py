"""One run of a sweep, from wherever it stopped to its errors on held-out talkers."""

from __future__ import annotations

import dataclasses
import functools

import jax
from etils import epath

from eqst import card, corpus, evaluate, files, trials
from eqst.sweeps.members import Member
from eqst.train import train


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


def run_member(workdir: epath.Path, member: Member, data: str, manifest: str) -> None:
    """Trains and evaluates one member, or what is left of it.

    Of several processes all evaluate, which keeps them together, and the first one writes.
    """
    first = jax.process_index() == 0
    say = functools.partial(print, flush=True) if first else _nothing
    folder = workdir / member.name
    train(member.config, folder, say)
    run = trials.open_run(folder)
    selected, split = evaluate.select(member.config, data, manifest, "dev")
    held_out = corpus.open_corpus(selected, split, say)
    results, errors = evaluate.evaluate(
        run, held_out, held_out, with_baselines=False, with_audio=False, say=say
    )
    facts = {"commit": run.commit, "step": run.step, "machine": evaluate.machine()}
    results = {**facts, "recordings": [data, manifest], **results}
    if first:
        _write(folder / "heldout", files.json_text(results), evaluate.errors_text(errors))


def _nothing(_: str) -> None:
    """Says nothing."""


def _write(folder: epath.Path, results: str, errors: str) -> None:
    """The errors come last: they are what makes the member count as done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "errors.csv").unlink(missing_ok=True)  # those of other recordings
    card.write_whole(folder / "results.json", results)
    card.write_whole(folder / "errors.csv", errors)
