"""Held-out error beside the baselines: `python -m eqst.evaluate --workdir=DIR --output=DIR`.

Fixed, seeded pairs of talkers that were not trained on, for each protocol and length, on audio
filtered exactly. Every method gets the same pairs. Writes results.json, table.txt, errors.csv (the
shape error of every method for every pair) and error_seconds.png.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from eqst import (
    baselines,
    charts,
    command,
    corpus,
    eq,
    linear,
    metrics,
    observe,
    pairs,
    predictor,
)
from eqst.config import Config, Data, as_dict, from_dict
from eqst.files import result_folder, write_json, write_text
from eqst.trials import Run, Trial, open_run, run_trial

PROTOCOLS = ("plain", "coloured")
AUDIO_PAIRS = 200
RESULTS = ("results.json", "table.txt", "errors.csv", "error_seconds.png")


class ErrorRow(NamedTuple):
    """One row of errors.csv: the shape error of one method for one pair."""

    protocol: str
    seconds: float
    pair: int
    talker: str
    method: str
    shape_rmse_db: float


def errors_text(errors: list[ErrorRow]) -> str:
    """CSV of the rows, errors to 1e-4 dB."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ErrorRow._fields)
    for row in errors:
        error = f"{row.shape_rmse_db:.4f}"
        writer.writerow([row.protocol, f"{row.seconds:g}", row.pair, row.talker, row.method, error])
    return text.getvalue()


# --- figures -------------------------------------------------------------------------------------


def _figures(
    answer: baselines.Prediction, true: eq.EqParams, talker_n: np.ndarray, run: Run
) -> dict[str, Any]:
    """All response and parameter figures of one method."""
    rate, spec = run.config.data.sample_rate, run.config.evaluation
    true_nF = baselines.settings_curve(true, rate)
    errors = metrics.curve_errors(answer.curve_db_nF, true_nF)
    figures: dict[str, Any] = {
        name: metrics.summarise(values, talker_n, spec.seed, resamples=spec.bootstrap)._asdict()
        for name, values in errors.items()
    }
    shares = metrics.shares_within(errors["shape_rmse_db"])
    figures["share_within_db"] = {f"{bound:g}": share for bound, share in shares.items()}
    if answer.params is not None:
        for name, values_nK in metrics.parameter_errors(answer.params, true).items():
            with np.errstate(invalid="ignore"):
                figures[f"{name}_error"] = float(np.nanmean(values_nK))
    for name, values_n in answer.extra.items():
        if name == "ess":
            figures["ess_p10"] = float(np.percentile(values_n, 10))
    return figures


def _audio_figures(
    trial: Trial, methods: dict[str, baselines.Prediction], true: eq.EqParams, run: Run
) -> dict[str, Any]:
    """Against the truly equalised input: what a listener would compare."""
    rate = run.config.data.sample_rate
    filter_one = jax.jit(
        lambda x, params: pairs.filter_circular(
            jnp.pad(x, (rate, 0)), params, sample_rate=rate, context=rate
        )
    )

    def equalised(i: int, params: eq.EqParams) -> np.ndarray:
        settings = eq.EqParams(*(jnp.asarray(x[i], jnp.float32) for x in params))
        return np.asarray(filter_one(trial.audio[i][0], settings), np.float64)

    out: dict[str, Any] = {}
    targets = [equalised(i, true) for i in range(len(trial.audio))]
    for name, answer in methods.items():
        if answer.params is None or name not in ("model", "do_nothing", "ltas_shrunk", "bayes"):
            continue
        rows = []
        for i, target_T in enumerate(targets):
            guess_T = equalised(i, answer.params)
            guess_T = guess_T * np.sqrt(np.mean(target_T**2) / max(np.mean(guess_T**2), 1e-20))
            rows.append(
                (
                    metrics.stft_distance(guess_T, target_T, rate),
                    metrics.mel_distance_db(guess_T, target_T, rate),
                    abs(metrics.centroid_difference_hz(guess_T, target_T, rate)),
                )
            )
        names = ("stft_distance", "mel_distance_db", "centroid_error_hz")
        out[name] = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    return out


def properties(run: Run, trial: Trial) -> dict[str, float]:
    """Identity, swap and level on some of the trial's audio; root mean squares of curves in dB."""
    rate = run.config.data.sample_rate
    predict = jax.jit(
        functools.partial(predictor.predict_audio, run.config, run.params, run.normalisation)
    )

    def curves(asked: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        found = [predict(input_T, reference_T) for input_T, reference_T in asked]
        params = eq.EqParams(*map(np.stack, zip(*found, strict=True)))
        return np.asarray(eq.remove_level(baselines.settings_curve(params, rate)))

    def rms(curve_nF: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(curve_nF))))

    there = curves(trial.audio)
    back = curves([(b, a) for a, b in trial.audio])
    same = curves([(a, a) for a, _ in trial.audio])
    louder = curves([(10.0 * a, 0.1 * b) for a, b in trial.audio])
    return {
        "pairs": len(trial.audio),
        "prediction_rms_db": rms(there),
        "identity_rms_db": rms(same),
        "swap_sum_rms_db": rms(there + back),
        "level_change_rms_db": rms(there - louder),
    }


def evaluate(
    run: Run,
    held_out: corpus.Corpus,
    tuning: corpus.Corpus,
    *,
    with_baselines: bool = True,
    with_audio: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[ErrorRow]]:
    """All figures of a run.

    Args:
      run: the predictor.
      held_out: recordings of talkers it was not trained on.
      tuning: recordings of training talkers, on which the baselines are tuned, per length.
      with_baselines: False asks the model alone (for ablations).
      with_audio: False leaves out the measures on audio and the properties.
      say: progress lines.

    Returns:
      {"figures": {protocol: {seconds: {method: figures}}}, "audio": .., "properties": ..}, and
      every method's shape error for every pair.
    """
    spec, rate = run.config.evaluation, run.config.data.sample_rate
    table = eq.table(run.config.eq_table)
    out: dict[str, Any] = {"figures": {}, "audio": {}, "tuned": {}}
    errors: list[ErrorRow] = []
    jobs = [(protocol, seconds) for protocol in PROTOCOLS for seconds in spec.seconds]
    keep = min(AUDIO_PAIRS, spec.pairs) if with_audio else 0
    began = time.monotonic()
    for done, (protocol, seconds) in enumerate(jobs):
        label = f"{seconds:g} s"
        figures = out["figures"].setdefault(protocol, {})
        least = observe.least_samples(run.config) / rate
        try:
            if seconds < least:
                raise pairs.PairsError(f"this model needs {least:.2f} s at least")
            trial = run_trial(
                run,
                held_out,
                seconds=seconds,
                protocol=protocol,
                count=spec.pairs,
                seed=spec.seed,
                ask_model=True,
                with_evidence=with_baselines,
                keep_audio=keep if seconds == spec.seconds[0] else 0,
            )
        except pairs.PairsError as error:
            say(f"{protocol} {label}: left out, {error}")
            continue
        true = eq.from_unit(table, trial.unit_nKP.astype(np.float64))
        assert trial.predicted is not None
        curve_nF = baselines.settings_curve(trial.predicted, rate)
        methods = {"model": baselines.Prediction(curve_nF, trial.predicted, {})}
        if with_baselines:
            tuned = run_trial(
                run,
                tuning,
                seconds=seconds,
                protocol=protocol,
                count=spec.tune_pairs,
                seed=spec.seed + 1,
                ask_model=False,
            )
            assert tuned.input and tuned.reference and tuned.plain_reference
            assert trial.input and trial.reference
            train_set = baselines.TrainSet(
                tuned.input,
                tuned.reference,
                tuned.input,
                tuned.plain_reference,
                eq.from_unit(table, tuned.unit_nKP.astype(np.float64)),
                tuned.talker_n,
            )
            fitted = baselines.fit(train_set, table=table, sample_rate=rate, seed=spec.seed)
            out["tuned"].setdefault(protocol, {})[label] = fitted.choices
            methods |= baselines.predict(
                fitted, trial.input, trial.reference, table=table, sample_rate=rate, seed=spec.seed
            )
            methods |= baselines.oracle(true, table=table, sample_rate=rate)
        figures[label] = {
            "talkers": len(np.unique(trial.talker_n)),
            "pairs": len(trial.talker_n),
            **{
                name: _figures(answer, true, trial.talker_n, run)
                for name, answer in methods.items()
            },
        }
        true_nF = baselines.settings_curve(true, rate)
        for name, answer in methods.items():
            shape_n = metrics.curve_errors(answer.curve_db_nF, true_nF)["shape_rmse_db"]
            errors += [
                ErrorRow(protocol, seconds, pair, held_out.talker_R[talker], name, float(error))
                for pair, (talker, error) in enumerate(zip(trial.talker_n, shape_n, strict=True))
            ]
        if trial.audio:
            out["audio"][protocol] = _audio_figures(trial, methods, true, run)
            out["properties"] = properties(run, trial._replace(audio=trial.audio[:50]))
        left = (time.monotonic() - began) / (done + 1) * (len(jobs) - done - 1)
        mean = figures[label]["model"]["shape_rmse_db"]["mean"]
        say(f"{protocol} {label}: shape error {mean:.2f} dB; left {left / 60:.0f} min")
    return out, errors


def select(config: Config, folder: str, manifest: str, split: str) -> tuple[Data, str]:
    """Where held-out recordings come from: the run's own sources, or a folder of someone's.

    A folder the run was trained on is used by its split; of another folder without a manifest
    every talker is held out.
    """
    data = config.data
    if not folder:
        return data, split
    source = f"folder:{folder}"
    here = pathlib.Path(folder).expanduser().resolve()
    trained = [
        pathlib.Path(x[7:]).expanduser().resolve() for x in data.sources if x.startswith("folder:")
    ]
    own = manifest or (data.manifest if here in trained else "")
    new = dataclasses.replace(
        data, sources=(source,), source_weights=(1.0,), manifest=own, permissive_only=False
    )
    return new, split if (own or here in trained) else "all"


def machine() -> str:
    """This machine in a few words, for beside the figures."""
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{platform.machine()}, {os.cpu_count()} cores, JAX on {devices}"


def _seconds(words: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(
            f"--seconds={','.join(words)}: give numbers, as in --seconds=3,10"
        ) from None


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_string("workdir", None, "Folder of a trained run.")
    flags.DEFINE_string("output", None, "Folder for results.json, table.txt, error_seconds.png.")
    flags.DEFINE_string("data", "", "Folder of held-out recordings; default: the run's own split.")
    flags.DEFINE_string("manifest", "", "CSV (path, split) of --data; else all its talkers.")
    flags.DEFINE_string("split", "dev", "dev, or valid (train talkers held out for choosing).")
    flags.DEFINE_integer("pairs", 0, "Pairs per protocol and length; 0: the run's config.")
    flags.DEFINE_list("seconds", [], "Segment lengths; default: the run's config.")
    flags.DEFINE_bool("baselines", True, "Run the baselines beside the model.")
    flags.DEFINE_bool("overwrite", False, "Replace results that are already there.")
    flags.mark_flags_as_required(["workdir", "output"])


def main() -> None:
    """The command."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    if options.split not in ("dev", "valid"):
        raise ValueError(f"--split={options.split}: choose dev or valid")
    with result_folder(options.output, *RESULTS, overwrite=options.overwrite) as output:
        _evaluate_into(output, options, say)


def _evaluate_into(output: pathlib.Path, options: Any, say: Callable[[str], None]) -> None:
    run = open_run(options.workdir)
    spec = run.config.evaluation
    if options.pairs:
        spec = dataclasses.replace(spec, pairs=options.pairs)
    if options.seconds:
        spec = dataclasses.replace(spec, seconds=_seconds(options.seconds))
    changed = dataclasses.replace(run.config, evaluation=spec)
    run = run._replace(config=from_dict(as_dict(changed)))
    data, split = select(run.config, options.data, options.manifest, options.split)
    held_out = corpus.open_corpus(data, split, say)
    # Of a folder without a manifest every talker is held out: then tune on the run's own.
    tuned_on = data if (data.manifest or not options.data) else run.config.data
    tuning = corpus.open_corpus(tuned_on, "train", say)
    talkers = len(set(tuning.talker_R))
    with_baselines = options.baselines and talkers >= linear.FOLDS
    say(f"{len(held_out.talker_R)} held-out recordings, {held_out.seconds() / 60:.1f} min")
    if with_baselines:
        say(f"baselines tuned on {talkers} talkers of {', '.join(tuned_on.sources)}")
    elif options.baselines:
        say(f"no baselines: they are tuned on {linear.FOLDS} talkers or more, here are {talkers}")
    figures, errors = evaluate(run, held_out, tuning, with_baselines=with_baselines, say=say)
    results = {
        "command": command.line("eqst.evaluate"),
        "commit": run.commit,
        "step": run.step,
        "machine": machine(),
        "sources": list(data.sources),
        "split": split,
        "talkers": list(held_out.talker_R),
        "baselines_tuned_on": list(tuned_on.sources),
        **figures,
    }
    if not any(results["figures"].values()):
        lengths = ", ".join(f"{x:g}" for x in spec.seconds)
        raise ValueError(
            f"no pair of {lengths} s can be made of these recordings: shorten --seconds"
        )
    write_json(output / "results.json", results)
    write_text(output / "errors.csv", errors_text(errors))
    text = charts.table_text(results)
    write_text(output / "table.txt", text)
    say("\n" + text)
    try:
        charts.error_against_seconds(results, output / "error_seconds.png")
    except ImportError as error:
        say(f"note: no picture, {error}")
    say(f"results: {output}")


if __name__ == "__main__":
    command.start("eqst.evaluate", define_flags, main)
