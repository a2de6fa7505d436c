"""Trials: a trained predictor, and held-out pairs for it and for the baselines to answer."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from eqst import batches, card, checkpoint, corpus, eq, predictor
from eqst.config import Config
from eqst.evidence import Evidence, evidence, stack


class Run(NamedTuple):
    """A trained predictor with its settings."""

    config: Config
    params: predictor.Params
    normalisation: predictor.Normalisation
    step: int
    commit: str


def open_run(workdir: str | os.PathLike[str]) -> Run:
    """A run's predictor (its best checkpoint), whatever machines it was trained on."""
    return from_loaded(checkpoint.load(workdir), os.fspath(workdir))


def from_loaded(loaded: card.Loaded, source: str = "packaged weights") -> Run:
    """The same from anything that was loaded (a run's checkpoint or packaged weights).

    Raises:
      ConfigError: settings that this version does not know.
      ValueError: the checkpoint is another model's than the settings describe; `source` says which.
    """
    config = checkpoint.config_of(loaded)
    predictor.check_params(config, loaded.params, source)
    normalisation = predictor.Normalisation(**loaded.params["normalisation"])
    commit = loaded.card["commit"] if "commit" in loaded.card else "unknown"
    return Run(config, loaded.params["network"], normalisation, loaded.step, commit)


def name_of(workdir: str | os.PathLike[str]) -> str:
    """What a run is called for people: its folder; with the two above it where that is a number,
    as the seeds of a sweep are (factor/level/seed)."""
    parts = pathlib.Path(workdir).resolve().parts
    return "/".join(parts[-3:] if parts[-1].isdecimal() else parts[-1:])


class Trial(NamedTuple):
    """What every method gets of n pairs, and the truth.

    Attributes:
      input, reference: evidence, [n, M], or None where no baseline is asked.
      plain_reference: evidence of the reference without the label's EQ, for tuning, or None.
      predicted: the model's settings [n, K], or None where no model was asked.
      unit_nKP: the true settings in the unit cube.
      talker_n: recording numbers.
      audio: some of the rendered (input, reference) pairs, for the audio measures.
    """

    input: Evidence | None
    reference: Evidence | None
    plain_reference: Evidence | None
    predicted: eq.EqParams | None
    unit_nKP: np.ndarray
    talker_n: np.ndarray
    audio: list[tuple[np.ndarray, np.ndarray]]


def _listen(items: list[np.ndarray], sample_rate: int) -> list[Evidence]:
    """Evidence of several segments, on all cores (the FFTs leave Python's lock)."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda samples_T: evidence(samples_T, sample_rate), items))


def run_trial(
    run: Run,
    recordings: corpus.Corpus,
    *,
    seconds: float,
    protocol: str,
    count: int,
    seed: int,
    ask_model: bool,
    with_evidence: bool = True,
    keep_audio: int = 0,
) -> Trial:
    """Renders the pairs, takes the evidence of the baselines, and asks the model.

    Where the model is asked, the pairs are a test, and `plain_reference` is not made.
    """
    # Parameters are arguments: other runs of the same settings find this compiled.
    predict = jax.jit(
        jax.vmap(functools.partial(predictor.predict_audio, run.config), in_axes=(None, None, 0, 0))
    )
    found: list[list[Evidence]] = [[], []] if ask_model else [[], [], []]
    answers, labels, talkers = [], [], []
    audio: list[tuple[np.ndarray, np.ndarray]] = []
    for plan, sounds in batches.rendered_chunks(
        run.config,
        recordings,
        seconds=seconds,
        protocol=protocol,
        count=count,
        seed=seed,
        without_label=not ask_model,
    ):
        for mine, sound_BT in zip(found, sounds, strict=True) if with_evidence else ():
            mine += _listen(list(sound_BT), recordings.sample_rate)
        if ask_model:
            answers.append(
                jax.tree.map(
                    np.asarray, predict(run.params, run.normalisation, sounds[0], sounds[1])
                )
            )
        labels.append(plan.label_KP)
        talkers.append(plan.input_recording)
        for input_T, reference_T in zip(sounds[0], sounds[1], strict=True):
            if len(audio) < keep_audio:
                audio.append((input_T, reference_T))
    predicted = None
    if ask_model:
        predicted = eq.EqParams(*(np.concatenate(x)[:count] for x in zip(*answers, strict=True)))
    heard = [stack(mine[:count]) if mine else None for mine in found]
    unit_nKP, talker_n = np.concatenate(labels)[:count], np.concatenate(talkers)[:count]
    plain = None if ask_model else heard[2]
    return Trial(heard[0], heard[1], plain, predicted, unit_nKP, talker_n, audio)
