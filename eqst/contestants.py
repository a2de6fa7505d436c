"""Who answers the benchmark's pairs: trained models, outside programs, and the baselines.

Models and programs are asked pair by pair. The baselines (`eqst.baselines`) answer all pairs of a
task at once, and are tuned on pairs of the same kind, length and source, made of train talkers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import soundfile

from eqst import (
    audio,
    baselines,
    batches,
    bayes,
    card,
    checkpoint,
    config,
    corpus,
    eq,
    float64,
    linear,
    observe,
    pairs,
    predictor,
    settings,
    transfer,
    trials,
)
from eqst.evidence import Evidence, evidence, stack
from eqst.tasks import MIN_LUFS, SAMPLE_RATE, TABLE, TUNING_SEED, Pair, Task

ORACLES = ("oracle", "oracle_grid")
UNTUNED = ("do_nothing", *ORACLES)
BASELINES = (*baselines.METHODS, *ORACLES)
TUNING_PAIRS = 1000
# What the samples of a file were rounded to.
STEPS = {"PCM_S8": 2.0**-7, "PCM_U8": 2.0**-7, "PCM_16": 2.0**-15, "PCM_24": 2.0**-23}


class AnswerError(ValueError):
    """No answer to one pair; one line."""


class Answer(NamedTuple):
    """Of one pair: settings ([K] each), or a curve [F] in dB on `eq.curve_grid_hz`."""

    params: eq.EqParams | None
    curve_db_F: np.ndarray | None


class Listener(NamedTuple):
    """Who is asked pair by pair.

    Attributes:
      name: in the leaderboard.
      kind: "model" or "program".
      facts: what tells it from another of that name, for beside its scores.
      answer: raises AnswerError where a pair has none.
    """

    name: str
    kind: str
    facts: dict[str, Any]
    answer: Callable[[Pair, Task], Answer]


# ---- models


def packaged() -> Listener:
    """The weights that come with the package."""
    loaded = card.load_weights()
    run = trials.from_loaded(loaded)
    facts = {"trained_at": run.commit, "weights": loaded.card["weights"]["sha256"][:16]}
    return model("packaged", run, facts)


def of_workdir(name: str, workdir: str) -> Listener:
    """A run of `eqst.train`, by its best checkpoint; without a name it has its folder's."""
    loaded = checkpoint.load(workdir)
    run = trials.from_loaded(loaded, workdir)
    leaves = sorted(checkpoint.named_leaves(loaded.params).items())
    content = b"".join(np.ascontiguousarray(leaf, "<f4").tobytes() for _, leaf in leaves)
    facts = {"trained_at": run.commit, "step": run.step, "weights": card.digest(content)[:16]}
    return model(name or trials.name_of(workdir), run, facts)


def model(name: str, run: trials.Run, facts: dict[str, Any]) -> Listener:
    """A trained predictor. Raises ValueError where it is of another sample rate."""
    rate = run.config.data.sample_rate
    if rate != SAMPLE_RATE:
        raise ValueError(f"{name} hears {rate} Hz and the benchmark is at {SAMPLE_RATE} Hz")
    predict = jax.jit(
        functools.partial(predictor.predict_audio, run.config, run.params, run.normalisation)
    )

    def answer(pair: Pair, task: Task) -> Answer:
        if len(pair.input_T) < observe.least_samples(run.config):
            raise AnswerError(f"{task.seconds:g} s are less than a window of the model")
        sounds = (
            x.astype(np.float32) / np.float32(32768) for x in (pair.input_T, pair.reference_T)
        )
        return Answer(eq.EqParams(*(np.asarray(x, np.float64) for x in predict(*sounds))), None)

    return Listener(name, "model", facts, answer)


# ---- outside programs


def program(name: str, command: str, timeout_s: float) -> Listener:
    """A command line that is given two WAV files (16 bits, mono) and writes its answer.

    Args:
      name: in the leaderboard.
      command: words in which {input}, {reference} and {output} stand for paths; the answer is
        {output}.json (settings, as `eqst.settings`) or {output}.wav (the input, equalised: the
        curve is read from it by `transfer.curve_db`). {task} and {index} may stand in it too. No
        shell is started.
      timeout_s: for one pair.

    Raises:
      ValueError: the command lacks one of them, or names something else in braces.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--program={command}: {error}") from None
    named = set(re.findall(r"{(\w+)}", command))
    unknown = named - {"input", "reference", "output", "task", "index"}
    endings = set(re.findall(r"{output}\.(json|wav)\b", command))
    if unknown or not words:
        raise ValueError(
            f"--program={command}: {'{' + min(unknown) + '}' if unknown else 'nothing'} is no part "
            "of it: there are {input}, {reference}, {output}, {task} and {index}"
        )
    if len(endings) != 1:
        raise ValueError(
            f"--program={command}: say where the answer goes, as {{output}}.json (settings) or "
            "{output}.wav (the input, equalised)"
        )

    if shutil.which(words[0]) is None:
        raise ValueError(f"--program: {words[0]!r} is no program here: check its path")

    def answer(pair: Pair, task: Task) -> Answer:
        with tempfile.TemporaryDirectory(prefix="eqst-") as folder:
            paths = {key: f"{folder}/{key}.wav" for key in ("input", "reference")}
            soundfile.write(paths["input"], pair.input_T, SAMPLE_RATE, "PCM_16")
            soundfile.write(paths["reference"], pair.reference_T, SAMPLE_RATE, "PCM_16")
            paths |= {
                "output": f"{folder}/output",
                "task": task.name,
                "index": f"{pair.number:03d}",
            }
            filled = [re.sub(r"{(\w+)}", lambda found: paths[found[1]], word) for word in words]
            _call(filled, timeout_s)
            return _read(pathlib.Path(f"{folder}/output.{min(endings)}"), pair)

    return Listener(name, "program", {"program": command}, answer)


def _call(words: list[str], timeout_s: float) -> None:
    """Runs a program to its end; what it started ends with it."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise ValueError(
                f"--program: {words[0]!r} cannot be started: {error.strerror}"
            ) from None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AnswerError(f"no answer within {timeout_s:g} s (--timeout)") from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != 0:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise AnswerError(f"exit code {code}" + (f": {lines[-1][:200]}" if lines else ""))


def _read(path: pathlib.Path, pair: Pair) -> Answer:
    """What a program wrote."""
    if not path.is_file():
        raise AnswerError(f"it wrote no {path.name}")
    try:
        if path.suffix == ".json":
            found = settings.load(path)
            if found.sample_rate != SAMPLE_RATE:
                raise AnswerError(f"its settings are for {found.sample_rate} Hz, not {SAMPLE_RATE}")
            return Answer(found.params, None)
        sound, subtype = audio.read(path), audio.info(path).subtype
        if sound.sample_rate != SAMPLE_RATE:
            raise AnswerError(f"its audio is at {sound.sample_rate} Hz, not {SAMPLE_RATE}")
        curve_db_F = transfer.curve_db(
            pair.input_T / 32768.0,
            audio.to_mono(sound.samples_TC),
            SAMPLE_RATE,
            step=STEPS[subtype] if subtype in STEPS else 0.0,
        )
    except audio.AudioError as error:
        raise AnswerError(str(error).replace(os.fspath(path), path.name)) from None
    return Answer(None, curve_db_F)


# ---- baselines


def listen(samples_T: np.ndarray) -> Evidence:
    """What a baseline hears of int16 samples."""
    return evidence(samples_T.astype(np.float32) / np.float32(32768), SAMPLE_RATE)


def tune(
    task: Task, recordings: corpus.Corpus, *, count: int = TUNING_PAIRS, workers: int
) -> baselines.Fitted:
    """The baselines tuned for a task: same source, length, protocol and kind of reference.

    The pairs are drawn as the task's, of train talkers and of another seed, and rounded to 16 bits
    as well. A task without EQ has the tuning of the same task with EQ: nobody is told.

    Raises:
      PairsError, ValueError: too few train recordings for it.
    """
    usable, _ = pairs.build_index(recordings, task.seconds, MIN_LUFS)
    if len(usable.first_R) < linear.FOLDS:
        raise ValueError(
            f"they need {linear.FOLDS} train talkers at least, {len(usable.first_R)} give pairs"
        )
    heard: list[list[Evidence]] = [[], [], []]
    units, talker_n = [], []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for plan, sounds in batches.rendered_chunks(
            config.Config(),
            recordings,
            seconds=task.seconds,
            protocol=task.protocol,
            count=count,
            seed=TUNING_SEED,
            without_label=True,
            different_recordings=task.different,
        ):
            for mine, sound_BT in zip(heard, sounds, strict=True):
                mine += pool.map(listen, float64.to_int16(np.asarray(sound_BT, np.float64)))
            units.append(plan.label_KP)
            talker_n.append(plan.input_recording)
    input_n, reference_n, plain_n = (stack(mine[:count]) for mine in heard)
    unit_nKP = np.concatenate(units)[:count].astype(np.float64)
    train_set = baselines.TrainSet(
        input_n,
        reference_n,
        input_n,
        plain_n,
        eq.from_unit(TABLE, unit_nKP),
        np.concatenate(talker_n)[:count],
    )
    return baselines.fit(train_set, table=TABLE, sample_rate=SAMPLE_RATE, seed=TUNING_SEED)


def ask_baseline(
    name: str,
    fitted: baselines.Fitted | None,
    input_n: Evidence,
    reference_n: Evidence,
    true: eq.EqParams,
    *,
    plan: bayes.Plan = bayes.PLAN,
) -> baselines.Prediction:
    """One baseline's answers to n pairs; `true` settings [n, K] for the oracles alone."""
    options: dict[str, Any] = {"table": TABLE, "sample_rate": SAMPLE_RATE}
    if name in ORACLES:
        return baselines.oracle(true, **options)[name]
    if name == "do_nothing":
        return do_nothing(len(true.gain_db))
    assert fitted is not None
    return baselines.predict(
        fitted, input_n, reference_n, seed=TUNING_SEED, plan=plan, names=(name,), **options
    )[name]


def do_nothing(count: int) -> baselines.Prediction:
    """Flat settings for n pairs."""
    unit_nKP = np.full((count, len(eq.KINDS), len(eq.PARAMETERS)), 0.5)
    params = eq.from_unit(TABLE, unit_nKP)
    return baselines.Prediction(baselines.settings_curve(params, SAMPLE_RATE), params, {})


def gather(answers: list[Answer | None]) -> baselines.Prediction:
    """Answers to n pairs as one; a pair without an answer counts as one left as it is (flat)."""
    flat = do_nothing(1)
    assert flat.params is not None
    curves = []
    for answer in answers:
        params = flat.params if answer is None else answer.params
        if params is None:
            assert answer is not None and answer.curve_db_F is not None
            curves.append(answer.curve_db_F)
        else:
            one = eq.EqParams(*(np.asarray(x, np.float64).reshape(1, -1) for x in params))
            curves.append(baselines.settings_curve(one, SAMPLE_RATE)[0])
    curve_db_nF = np.stack(curves)
    if any(answer is not None and answer.params is None for answer in answers):
        return baselines.Prediction(curve_db_nF, None, {})
    rows = [
        eq.EqParams(*(x[0] for x in flat.params)) if x is None or x.params is None else x.params
        for x in answers
    ]
    params_n = eq.EqParams(*(np.stack(field) for field in zip(*rows, strict=True)))
    return baselines.Prediction(curve_db_nF, params_n, {})
