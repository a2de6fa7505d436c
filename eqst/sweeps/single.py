"""One run of a sweep, from wherever it stopped to its errors on held-out talkers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

from eqst import corpus, evaluate, files, trials
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


def run_member(workdir: pathlib.Path, member: Member, data: str, manifest: str) -> None:
    """Trains and evaluates one member, or what is left of it."""
    say = functools.partial(print, flush=True)
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
    with files.result_folder(folder / "heldout", overwrite=True) as output:
        files.write_json(output / "results.json", results)
        # Last: it is what makes the member count as done.
        files.write_text(output / "errors.csv", evaluate.errors_text(errors))
