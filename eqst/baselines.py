"""What a trained model has to beat: classical answers from the same pairs, tuned on the same train.

Every method sees two recordings only as `evidence.Evidence` (averaged band spectra) and answers
with a response curve on `eq.curve_grid_hz`. `fit` tunes everything for one segment length and one
protocol by cross-validation over training talkers; `predict` answers for a batch of pairs.

    do_nothing    a flat curve
    mean_setting  the middle of the training settings
    ltas          difference of the average spectra, four bands fitted to it by least squares
    ltas_shrunk   the same, smoothed and scaled down first, as far as helps on train
    ridge         linear map of the geometric-mean (mean dB) difference to the curve
    wiener        posterior mean if the curve were Gaussian: closed form, both spectra
    bayes         posterior mean under the table's own prior, sampled: `eqst.bayes`
    bayes_blind   the same without listening to the input: the average talker instead
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from eqst import bayes, eq
from eqst.evidence import Evidence, band_hz
from eqst.linear import (
    Gaussian,
    curve_prior,
    difference,
    folds,
    settings_curve,
    shape_rmse,
    tune_gaussian,
    tune_ridge,
)

METHODS = (
    *("do_nothing", "mean_setting", "ltas", "ltas_shrunk"),
    *("ridge", "wiener", "bayes", "bayes_blind"),
)
FITTED_PAIRS = 128  # pairs used where a choice needs a least-squares fit of each
SMOOTHINGS_OCTAVES = (0.0, 0.5, 1.0)
SCALES = (0.7, 0.5, 0.35, 0.25)
BLOCK = 64  # curves fitted at once: one compiled shape


class TrainSet(NamedTuple):
    """Training pairs of one length and protocol; row i of every field is the same pair.

    Evidence is [n, M]. `plain_*` are the same (or other) segments of that talker without the EQ
    to be found; under the coloured protocol with the colour. `params` is [n, K].
    """

    evidence_input: Evidence
    evidence_reference: Evidence
    plain_input: Evidence
    plain_reference: Evidence
    params: eq.EqParams
    talker_n: np.ndarray


class Fitted(NamedTuple):
    """Everything `predict` needs, and `choices`: what was tuned, for the record."""

    mean_unit_KP: np.ndarray
    smoothing_octaves: float
    scale: float
    ridge_FM: np.ndarray
    ridge_projected: bool
    pair: Gaussian
    pair_projected: bool
    blind: Gaussian
    choices: dict[str, float]


class Prediction(NamedTuple):
    """One method's answers: curves [n, F] in dB, settings where it has them, and extras [n]."""

    curve_db_nF: np.ndarray
    params: eq.EqParams | None
    extra: dict[str, np.ndarray]


# --- pieces --------------------------------------------------------------------------------------


def smooth(curve_nM: np.ndarray, freq_hz_M: np.ndarray, width_octaves: float) -> np.ndarray:
    """Gaussian smoothing along log frequency, edges renormalised; `width_octaves` is its sigma."""
    if width_octaves == 0.0:
        return curve_nM
    octave_M = np.log2(freq_hz_M)
    weight_MM = np.exp(-0.5 * ((octave_M[:, None] - octave_M[None, :]) / width_octaves) ** 2)
    return curve_nM @ (weight_MM / weight_MM.sum(axis=1, keepdims=True)).T


def project(
    curve_nX: np.ndarray, freq_hz_X: np.ndarray, *, table: eq.EqTable, sample_rate: float
) -> tuple[np.ndarray, eq.EqParams]:
    """The table's best settings for free curves, and the curves of those settings."""
    parts = []
    for start in range(0, len(curve_nX), BLOCK):
        block_nX = curve_nX[start : start + BLOCK]
        padded_nX = np.pad(block_nX, ((0, BLOCK - len(block_nX)), (0, 0)), mode="edge")
        fitted = eq.fit_curve(padded_nX, freq_hz_X, table=table, sample_rate=sample_rate)
        parts.append([np.asarray(field, float)[: len(block_nX)] for field in fitted])
    params = eq.EqParams(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return settings_curve(params, sample_rate), params


# --- fit and predict -----------------------------------------------------------------------------


def fit(train: TrainSet, *, table: eq.EqTable, sample_rate: float, seed: int) -> Fitted:
    """Tune every method on training pairs of one length and protocol.

    Args:
      train: some hundred pairs or more, of at least five talkers.
      table: the EQ space the pairs were drawn from.
      sample_rate: in Hz.
      seed: of the folds and of the subset on which least-squares choices are made.

    Raises:
      ValueError: with too few talkers, or evidence not made at this sample rate.
    """
    freq_hz_M = band_hz(sample_rate)
    _check_bands(train.evidence_input, freq_hz_M, sample_rate)
    true_nF = eq.remove_level(settings_curve(train.params, sample_rate))
    fold_n = folds(train.talker_n, seed)
    prior = curve_prior(table, sample_rate)
    options: dict[str, Any] = {"table": table, "sample_rate": sample_rate}

    seen_nD = difference(train.evidence_reference, train.evidence_input)
    residual_nD = difference(train.plain_reference, train.plain_input)
    pair, wiener_nF, pair_choice = tune_gaussian(
        prior, residual_nD, seen_nD, true_nF, fold_n, centred=True, **options
    )
    nothing = Evidence(*(np.zeros_like(field) for field in train.plain_reference))
    blind, _, blind_choice = tune_gaussian(
        prior,
        difference(train.plain_reference, nothing),
        difference(train.evidence_reference, nothing),
        true_nF,
        fold_n,
        centred=False,
        **options,
    )
    ridge_FM, ridge_nF, ridge_choice = tune_ridge(
        eq.remove_level(seen_nD[:, len(freq_hz_M) :]), true_nF, fold_n
    )

    rows = np.random.default_rng(seed).permutation(len(true_nF))[:FITTED_PAIRS]
    grid_hz_F = eq.curve_grid_hz(sample_rate)
    wiener_fit = project(wiener_nF[rows], grid_hz_F, **options)[0]
    ridge_fit = project(ridge_nF[rows], grid_hz_F, **options)[0]
    ltas_nM = eq.remove_level(seen_nD[rows, : len(freq_hz_M)])
    ltas_errors = {}

    def ltas_error(width, scale):
        if (width, scale) not in ltas_errors:
            curve_nM = scale * smooth(ltas_nM, freq_hz_M, width)
            fitted_nF = project(curve_nM, freq_hz_M, **options)[0]
            ltas_errors[width, scale] = float(shape_rmse(fitted_nF, true_nF[rows]).mean())
        return ltas_errors[width, scale]

    plain_error = ltas_error(0.0, 1.0)
    # one choice after the other: a fit of every pair for each of all combinations is slow
    scale = min(SCALES, key=lambda s: ltas_error(SMOOTHINGS_OCTAVES[1], s))
    smoothing = min(SMOOTHINGS_OCTAVES, key=lambda w: ltas_error(w, scale))

    def better(fitted_nF, free_nF):
        errors = [shape_rmse(c, true_nF[rows]).mean() for c in (fitted_nF, free_nF[rows])]
        return bool(errors[0] < errors[1])

    choices = {f"pair_{name}": value for name, value in pair_choice.items()}
    choices |= {f"blind_{name}": value for name, value in blind_choice.items()} | ridge_choice
    choices |= {
        "ltas_smoothing_octaves": smoothing,
        "ltas_scale": scale,
        "ltas_shrunk_rmse_db": ltas_errors[smoothing, scale],
        "ltas_rmse_db": plain_error,
    }
    return Fitted(
        mean_unit_KP=np.asarray(eq.to_unit(table, _host(train.params))).mean(axis=0),
        smoothing_octaves=smoothing,
        scale=scale,
        ridge_FM=ridge_FM,
        ridge_projected=better(ridge_fit, ridge_nF),
        pair=pair,
        pair_projected=better(wiener_fit, wiener_nF),
        blind=blind,
        choices=choices,
    )


def predict(
    fitted: Fitted,
    evidence_input: Evidence,
    evidence_reference: Evidence,
    *,
    table: eq.EqTable,
    sample_rate: float,
    seed: int,
    plan: bayes.Plan = bayes.PLAN,
    names: Collection[str] = METHODS,
) -> dict[str, Prediction]:
    """The methods' answers to n pairs, by name; see the module's list.

    Curves are what is scored. Where a method gives a free curve, its `params` are the settings
    fitted to that curve, for the errors of settings. `bayes` and `bayes_blind` carry `ess` (the
    effective sample size), `spread_db` (the posterior's own idea of its error) and `acceptance`.
    A pair's answer does not depend on which other pairs are asked.

    Args:
      evidence_input, evidence_reference: [n, M] each, of the length and rate `fitted` is for.
      seed: of the sampler.
      plan: how long the sampler runs.
      names: which methods to ask.
    """
    freq_hz_M, grid_hz_F = band_hz(sample_rate), eq.curve_grid_hz(sample_rate)
    _check_bands(evidence_input, freq_hz_M, sample_rate)
    options: dict[str, Any] = {"table": table, "sample_rate": sample_rate}
    seen_nD = difference(evidence_reference, evidence_input)
    pairs, bands = len(seen_nD), len(freq_hz_M)

    def constant(unit_KP):
        params = eq.from_unit(table, np.broadcast_to(unit_KP, (pairs, *unit_KP.shape)))
        return Prediction(settings_curve(params, sample_rate), params, {})

    def free(curve_nF, projected, **extra):
        projected_nF, params = project(curve_nF, grid_hz_F, **options)
        return Prediction(projected_nF if projected else curve_nF, params, extra)

    def posterior(model: Gaussian, difference_nD: np.ndarray, runs: int) -> Prediction:
        result = bayes.sample_posterior(
            bayes.reduce_noise(model.noise, bands=bands, temperature=model.temperature),
            difference_nD,
            freq_hz_M=freq_hz_M,
            seed=seed,
            plan=plan._replace(runs=runs),
            **options,
        )
        extra = result._asdict()
        return free(extra.pop("curve_db_nF"), False, **extra)

    def blind() -> Prediction:
        nothing = Evidence(*(np.zeros_like(field) for field in evidence_reference))
        # the blind posterior is wide and easily sampled: half the runs are plenty
        return posterior(
            fitted.blind, difference(evidence_reference, nothing), (plan.runs + 1) // 2
        )

    ltas_nM = eq.remove_level(seen_nD[:, :bands])
    geometric_nM = eq.remove_level(seen_nD[:, bands:])
    methods = {
        "do_nothing": lambda: constant(np.full_like(fitted.mean_unit_KP, 0.5)),
        "mean_setting": lambda: constant(fitted.mean_unit_KP),
        "ltas": lambda: Prediction(*project(ltas_nM, freq_hz_M, **options), {}),
        "ltas_shrunk": lambda: Prediction(
            *project(
                fitted.scale * smooth(ltas_nM, freq_hz_M, fitted.smoothing_octaves),
                freq_hz_M,
                **options,
            ),
            {},
        ),
        "ridge": lambda: free(geometric_nM @ fitted.ridge_FM.T, fitted.ridge_projected),
        "wiener": lambda: free(seen_nD @ fitted.pair.curve_FD.T, fitted.pair_projected),
        "bayes": lambda: posterior(fitted.pair, seen_nD, plan.runs),
        "bayes_blind": blind,
    }
    return {name: methods[name]() for name in METHODS if name in names}


def oracle(
    true_params: eq.EqParams, *, table: eq.EqTable, sample_rate: float
) -> dict[str, Prediction]:
    """What the band layout allows: `oracle`, the best fit to the true curve, and `oracle_grid`.

    The fit is given the true level-free curve and nothing else, so its error is that of the
    search. `oracle_grid` rounds the true settings to the table's grid, parameter by parameter.
    """
    true_params = _host(true_params)
    curve_nF = settings_curve(true_params, sample_rate)
    best = project(curve_nF, eq.curve_grid_hz(sample_rate), table=table, sample_rate=sample_rate)
    rounded = eq.from_grid_index(table, eq.to_grid_index(table, true_params))
    return {
        "oracle": Prediction(*best, {}),
        "oracle_grid": Prediction(settings_curve(rounded, sample_rate), rounded, {}),
    }


def _host(params: eq.EqParams) -> eq.EqParams:
    return eq.EqParams(*(np.asarray(field, float) for field in params))


def _check_bands(item: Evidence, freq_hz_M: np.ndarray, sample_rate: float) -> None:
    if np.ndim(item.power_db) != 2 or np.shape(item.power_db)[1] != len(freq_hz_M):
        raise ValueError(
            f"evidence of shape {np.shape(item.power_db)} is not [n, {len(freq_hz_M)}], the bands "
            f"at {sample_rate} Hz: make it with evidence(audio, sample_rate) and stack it"
        )
