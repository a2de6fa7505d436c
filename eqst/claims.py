"""The page's five take-home claims on latents, each as statistics of whole sets of pairs.

`measure` takes runs of the paper's three variants, `verdicts` judges what it found by the rules of
`eqst.verdict`. A run that was trained on
features as they are (normalisation of mean 0 and scale 1) counts as *raw* and is judged by itself:
a network is never fed inputs that it was not trained on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import batches, corpus, eq, latents, latentstats, linear, metrics, predictor, trials
from eqst.config import Config
from eqst.verdict import VARIANTS, verdicts

__all__ = ["Heard", "curves_of_fed", "hear", "is_normalised", "measure", "variant", "verdicts"]

# Scale of the features and comparison, of each of VARIANTS.
_MADE_OF = (("linear", "subtract"), ("db", "subtract"), ("db", "learned"))
# Share of fed coefficients replaced by their mean on train in `error_half_db`.
REPLACED = 0.5


class Heard(NamedTuple):
    """A model's latents of n pairs, with what is true of the pairs.

    Attributes:
      latents: [n, L] each.
      curve_nF: the labels' curves in dB, level removed.
      talker_n: recording numbers of the inputs.
    """

    latents: latents.Latents
    curve_nF: np.ndarray
    talker_n: np.ndarray


def variant(config: Config) -> str:
    """Which of the paper's variants these settings are, or "other"."""
    key = (config.features.scale, config.model.comparison)
    known = config.features.kind == "mel" and key in _MADE_OF
    return VARIANTS[_MADE_OF.index(key)] if known else "other"


def measure(
    runs: dict[str, trials.Run],
    recordings: corpus.Corpus,
    tuning: corpus.Corpus,
    *,
    pairs: int,
    seconds: float,
    protocol: str,
    seed: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Statistics of what each run extracts and feeds, over all test pairs.

    Args:
      runs: by name; several of one variant (seeds) are judged together. See `variant`.
      recordings: of talkers that were not trained on: `pairs` pairs of seed `seed`.
      tuning: of training talkers, for deviations and the linear probe: as many, of seed + 1.
      pairs: at least 8.
      seconds, protocol: of every pair, as in `trials.run_trial`.
      say: takes lines of progress.

    Returns:
      JSON-ready: the arguments, and `models`: for each run its `variant`, `normalised`, `step`,
      `extracted` and `fed` (`_vector_figures`; fed also has `norm_ratio`, its norm over the root
      mean square of both extracted ones) and `predictor` (`_predictor_figures`); and
      `proposed_less_baseline`. Figures of single pairs are {"mean", "low", "high"}, a bootstrap
      interval over talkers and pairs.

    Raises:
      ValueError: fewer than 8 pairs; PairsError: recordings too short.
    """
    if pairs < 8:
        raise ValueError(f"pairs={pairs}: statistics need 8 pairs or more")
    began = time.monotonic()
    models: dict[str, dict[str, Any]] = {}
    by_pair: list[tuple[str, bool, dict[str, np.ndarray]]] = []
    listen = functools.partial(hear, seconds=seconds, protocol=protocol, count=pairs)
    for done, (name, run) in enumerate(runs.items()):
        test, train = listen(run, recordings, seed=seed), listen(run, tuning, seed=seed + 1)
        model = _model_figures(run, test, train, seed)
        models[name] = model
        by_pair.append((model["variant"], model["normalised"], _pair_figures(run, test, train)))
        left = (time.monotonic() - began) / (done + 1) * (len(runs) - done - 1)
        say(f"latents of {name}: {_line(model)}; left {left / 60:.0f} min")
    return {
        "pairs": pairs,
        "train_pairs": pairs,
        "seconds": seconds,
        "protocol": protocol,
        "seed": seed,
        "talkers": int(len(np.unique(test.talker_n))) if runs else 0,
        "nullified_below": latentstats.NULLIFIED,
        "nullified_by_chance": latentstats.GAUSSIAN_NULLIFIED,
        "models": models,
        "proposed_less_baseline": _differences(by_pair, test.talker_n, seed) if runs else [],
    }


def _model_figures(run: trials.Run, test: Heard, train: Heard, seed: int) -> dict[str, Any]:
    """Everything `measure` tells of one run."""
    interval = functools.partial(_interval, seed=seed)
    extracted_2nL, train_2nL = (np.concatenate(heard.latents[:2]) for heard in (test, train))
    size_2n = latentstats.norms(extracted_2nL).reshape(2, -1)
    size_n = np.maximum(np.sqrt(np.mean(size_2n**2, axis=0)), np.finfo(float).tiny)
    fed = _vector_figures(test.latents.fed_L, train.latents.fed_L, test.talker_n, interval)
    fed["norm_ratio"] = interval(latentstats.norms(test.latents.fed_L) / size_n, test.talker_n)
    return {
        "variant": variant(run.config),
        "normalised": is_normalised(run.normalisation),
        "step": run.step,
        "extracted": _vector_figures(extracted_2nL, train_2nL, np.tile(test.talker_n, 2), interval),
        "fed": fed,
        "predictor": _predictor_figures(run, test, train, interval, seed),
    }


def _pair_figures(run: trials.Run, test: Heard, train: Heard) -> dict[str, np.ndarray]:
    """[n] error and share of nullified fed coefficients, for paired comparisons."""
    fed_nL, std_L = test.latents.fed_L, latentstats.spread(train.latents.fed_L).std_L
    return {
        "error_db": linear.shape_rmse(curves_of_fed(run, fed_nL), test.curve_nF),
        "nullified": latentstats.nullified(fed_nL, std_L),
    }


def _differences(
    by_pair: list[tuple[str, bool, dict[str, np.ndarray]]], talker_n: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """db_mel_pm less db_mel_bl, pair by pair, means over the runs of each; raw runs apart."""
    rows = []
    for normalised in (True, False):
        groups = [
            [figures for name, kind, figures in by_pair if (name, kind) == (wanted, normalised)]
            for wanted in ("db_mel_pm", "db_mel_bl")
        ]
        if all(groups):
            row: dict[str, Any] = {"normalised": normalised}
            for key in ("error_db", "nullified"):
                proposed_n, baseline_n = (np.mean([x[key] for x in g], axis=0) for g in groups)
                row[key] = _interval(proposed_n - baseline_n, talker_n, seed=seed)
            rows.append(row)
    return rows


def curves_of_fed(run: trials.Run, fed_nL: np.ndarray) -> np.ndarray:
    """[n, F] curves in dB, level removed, on `eq.curve_grid_hz`: what is predicted from fed."""
    said = _settings_of_all(run.config, run.params, fed_nL)
    return eq.remove_level(linear.settings_curve(said, run.config.data.sample_rate))


@functools.partial(jax.jit, static_argnums=0)
def _settings_of_all(config: Config, params: predictor.Params, fed_nL: jax.Array) -> eq.EqParams:
    return jax.vmap(functools.partial(predictor.settings_of_fed, config, params))(fed_nL)


def _line(model: dict[str, Any]) -> str:
    fed, reader = model["fed"], model["predictor"]
    return (
        f"{100 * fed['nullified']['mean']:.2f}% nullified, norm {fed['norm']['mean']:.3g} "
        f"({fed['norm_ratio']['mean']:.2f} of extracted), error {reader['error_db']['mean']:.2f} dB"
    )


def is_normalised(normalisation: predictor.Normalisation) -> bool:
    """Whether the run's features are centred and scaled at all."""
    return not (np.all(normalisation.mean == 0.0) and np.all(normalisation.scale == 1.0))


def hear(
    run: trials.Run,
    recordings: corpus.Corpus,
    *,
    seconds: float,
    protocol: str,
    count: int,
    seed: int,
) -> Heard:
    """Latents of fixed pairs (those that `evaluate` takes for this seed), filtered exactly."""
    found, labels, talkers = [], [], []
    for plan, sounds in batches.rendered_chunks(
        run.config, recordings, seconds=seconds, protocol=protocol, count=count, seed=seed
    ):
        found.append(latents.extract_batch(run, *sounds))
        labels.append(plan.label_KP)
        talkers.append(plan.input_recording)
    unit_nKP = np.concatenate(labels)[:count].astype(np.float64)
    true = eq.from_unit(eq.table(run.config.eq_table), unit_nKP)
    curve_nF = eq.remove_level(linear.settings_curve(true, run.config.data.sample_rate))
    joined = latents.Latents(*(np.concatenate(x)[:count] for x in zip(*found, strict=True)))
    return Heard(joined, curve_nF, np.concatenate(talkers)[:count])


def _interval(values_n: np.ndarray, talker_n: np.ndarray, *, seed: int) -> dict[str, float]:
    found = metrics.summarise(values_n, talker_n, seed)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _vector_figures(
    rows_nL: np.ndarray, train_nL: np.ndarray, talker_n: np.ndarray, interval: Callable
) -> dict[str, Any]:
    """Of extracted (both recordings' rows) or fed vectors.

    `nullified`: by each coefficient's own deviation on train; `nullified_whole`: by the deviation
    on train of all coefficients taken together; `sparsity`: Hoyer's; `norm`; `range`;
    `dimensions`: participation ratio; `mean_share`: of the energy, in the mean over pairs.
    """
    moved = latentstats.spread(train_nL)
    whole_L = np.full_like(moved.std_L, np.std(train_nL, dtype=np.float64))
    return {
        "coefficients": int(rows_nL.shape[1]),
        "nullified": interval(latentstats.nullified(rows_nL, moved.std_L), talker_n),
        "nullified_whole": interval(latentstats.nullified(rows_nL, whole_L), talker_n),
        "constant_on_train": float(np.mean(moved.std_L == 0.0)),
        "sparsity": interval(latentstats.sparsity(rows_nL), talker_n),
        "norm": interval(latentstats.norms(rows_nL), talker_n),
        "range": latentstats.numeric_range(rows_nL),
        "dimensions": latentstats.participation_ratio(rows_nL),
        "mean_share": latentstats.mean_share(rows_nL),
    }


def _predictor_figures(
    run: trials.Run, test: Heard, train: Heard, interval: Callable, seed: int
) -> dict[str, Any]:
    """What the predictor makes of what it is fed; errors are shape RMSE in dB.

    `error_db`: as it is; `error_centred_db`: fed without its mean on train; `error_mean_db`: fed
    replaced by that mean; `error_shuffled_db`: fed of another pair; `error_half_db`: a random half
    of the coefficients at their mean. `percent_db`, `spread_db`: `latentstats.Sensitivity`.
    R^2 of the label's curve: `r_squared` of the model itself, `probe_fed` and `probe_difference` of
    a linear readout of what is fed, and of reference minus input as extracted.
    """
    fed_nL, moved = test.latents.fed_L, latentstats.spread(train.latents.fed_L)
    mean_L = moved.mean_L.astype(np.float32)
    rate = run.config.data.sample_rate
    settings = functools.partial(predictor.settings_of_fed, run.config, run.params)
    curves = functools.partial(curves_of_fed, run)

    def error(rows_nL: np.ndarray) -> dict[str, float]:
        return interval(linear.shape_rmse(curves(rows_nL), test.curve_nF), test.talker_n)

    rng = np.random.default_rng(seed)
    away_nL = rng.random(fed_nL.shape) < REPLACED
    # Recordings come in turn, so the pair after is of another talker, if there is one.
    feeds = {
        "error_db": fed_nL,
        "error_centred_db": fed_nL - mean_L[None, :],
        "error_mean_db": np.broadcast_to(mean_L, fed_nL.shape),
        "error_shuffled_db": np.roll(fed_nL, 1, axis=0),
        "error_half_db": np.where(away_nL, mean_L[None, :], fed_nL),
    }
    freq_hz_F = eq.curve_grid_hz(rate)
    slopes = latentstats.sensitivity(
        lambda fed_L: jnp.concatenate(settings(fed_L)),
        lambda said_P: eq.response_db(
            eq.EqParams(*jnp.split(said_P, len(eq.PARAMETERS))), freq_hz_F, sample_rate=rate
        ),
        fed_nL,
        moved.std_L,
    )
    probe = functools.partial(latentstats.linear_probe, train_nF=train.curve_nF)
    difference = [x.latents.reference_L - x.latents.input_L for x in (train, test)]
    return {
        **{name: error(rows_nL) for name, rows_nL in feeds.items()},
        "percent_db": interval(slopes.percent_db_n, test.talker_n),
        "spread_db": interval(slopes.spread_db_n, test.talker_n),
        "r_squared": latentstats.r_squared(
            curves(fed_nL), test.curve_nF, train.curve_nF.mean(axis=0)
        ),
        "probe_fed": probe(train.latents.fed_L, test_mL=fed_nL, test_mF=test.curve_nF),
        "probe_difference": probe(difference[0], test_mL=difference[1], test_mF=test.curve_nF),
    }
