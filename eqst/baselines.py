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

from typing import NamedTuple

import jax
import numpy as np

from eqst import bayes, eq
from eqst.evidence import Evidence, band_hz

FOLDS = 5
FITTED_PAIRS = 192  # pairs used where a choice needs a least-squares fit of each
SMOOTHINGS_OCTAVES = (0.0, 0.5, 1.0)
SCALES = (1.0, 0.7, 0.5, 0.35)
NOISE_SHRINKS = (0.1, 0.3, 0.5)
POWER_EXTRAS_DB2 = (0.0, 4.0, 16.0, 64.0)
TEMPERATURES = (0.7, 1.0, 1.5, 2.2, 3.3)
RIDGES = tuple(10.0 ** np.arange(-3.0, 2.6, 0.5))


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


class Gaussian(NamedTuple):
    """A tuned noise model and the linear estimate that goes with it.

    `curve_FD` maps an evidence difference less `noise.mean_D` to a level-free curve.
    """

    noise: bayes.Noise
    temperature: float
    curve_FD: np.ndarray


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


def difference(reference: Evidence, other: Evidence) -> np.ndarray:
    """Evidence difference [n, 2 M] in dB: average power first, geometric mean second."""
    return np.concatenate(
        [
            np.asarray(reference.power_db) - np.asarray(other.power_db),
            np.asarray(reference.geometric_db) - np.asarray(other.geometric_db),
        ],
        axis=1,
    )


def folds(talker_n: np.ndarray, seed: int) -> np.ndarray:
    """Cross-validation fold of each pair, [n] in 0 .. FOLDS - 1; a talker is in one fold only.

    Raises:
      ValueError: with fewer than FOLDS talkers.
    """
    talkers, index_n = np.unique(np.asarray(talker_n), return_inverse=True)
    if len(talkers) < FOLDS:
        raise ValueError(f"baselines need at least {FOLDS} training talkers, got {len(talkers)}")
    order = np.random.default_rng(seed).permutation(len(talkers))
    return order[index_n] % FOLDS


def shape_rmse(predicted_nF: np.ndarray, true_nF: np.ndarray) -> np.ndarray:
    """Level-free RMSE in dB per row, [n]."""
    return np.std(predicted_nF - true_nF, axis=1)


def smooth(curve_nM: np.ndarray, freq_hz_M: np.ndarray, width_octaves: float) -> np.ndarray:
    """Gaussian smoothing along log frequency, edges renormalised; `width_octaves` is its sigma."""
    if width_octaves == 0.0:
        return curve_nM
    octave_M = np.log2(freq_hz_M)
    weight_MM = np.exp(-0.5 * ((octave_M[:, None] - octave_M[None, :]) / width_octaves) ** 2)
    return curve_nM @ (weight_MM / weight_MM.sum(axis=1, keepdims=True)).T


def settings_curve(params: eq.EqParams, sample_rate: float) -> np.ndarray:
    """Curves [n, F] in dB (level kept) of settings [n, K] on `eq.curve_grid_hz`, float64."""
    settings = eq.EqParams(*(np.asarray(field, np.float32) for field in params))
    return np.asarray(bayes.response(settings, eq.curve_grid_hz(sample_rate), sample_rate), float)


def _project(
    curve_nX: np.ndarray, freq_hz_X: np.ndarray, *, table: eq.EqTable, sample_rate: float
) -> tuple[np.ndarray, eq.EqParams]:
    """The table's best settings for free curves, and the curves of those settings."""
    params = eq.fit_curve(curve_nX, freq_hz_X, table=table, sample_rate=sample_rate)
    return settings_curve(params, sample_rate), params


# --- the Gaussian family -------------------------------------------------------------------------


class _Prior(NamedTuple):
    """Second moments of level-free prior curves: bands with bands, grid with bands."""

    MM: np.ndarray
    FM: np.ndarray


def _prior(table: eq.EqTable, sample_rate: float, draws: int = 8192) -> _Prior:
    params = eq.sample(table, jax.random.key(1), (draws,))
    band_nM = np.asarray(bayes.response(params, band_hz(sample_rate), sample_rate), float)
    grid_nF = settings_curve(params, sample_rate)
    band_nM, grid_nF = eq.remove_level(band_nM), eq.remove_level(grid_nF)
    return _Prior(band_nM.T @ band_nM / draws, grid_nF.T @ band_nM / draws)


def _noise(residual_nD, *, shrink: float, power_extra_db2: float, centred: bool) -> bayes.Noise:
    """Noise with the average power trusted less: its errors are the less Gaussian of the two."""
    noise = bayes.fit_noise(residual_nD, shrink=shrink, centred=centred)
    extra_D = np.zeros(residual_nD.shape[1])
    extra_D[: len(extra_D) // 2] = power_extra_db2
    return noise._replace(covariance_DD=noise.covariance_DD + np.diag(extra_D))


def _wiener(prior: _Prior, noise: bayes.Noise, temperature: float) -> np.ndarray:
    """Best linear estimate of the level-free curve from an evidence difference, [F, D]."""
    bands = len(prior.MM)
    kinds = len(noise.mean_D) // bands
    stack_DM = np.tile(np.eye(bands), (kinds, 1))
    level_DD = np.eye(len(noise.mean_D)) - 1.0 / len(noise.mean_D)
    seen_DM = level_DD @ stack_DM
    covariance_DD = seen_DM @ prior.MM @ seen_DM.T + noise.covariance_DD * temperature
    return prior.FM @ seen_DM.T @ np.linalg.inv(covariance_DD) @ level_DD


def _tune_gaussian(
    prior: _Prior, residual_nD, seen_nD, true_nF, fold_n, *, centred: bool
) -> tuple[Gaussian, np.ndarray, dict[str, float]]:
    """Noise settings that minimise the linear estimate's error on held-out training talkers.

    Args:
      residual_nD: differences without EQ, whose spread is the noise.
      seen_nD: differences with the EQ; true_nF the curves behind them.
      centred: see `bayes.fit_noise`; where False `seen_nD` is taken relative to the noise mean.

    Returns:
      The model fitted on all, its out-of-fold curves [n, F], and what was chosen.
    """
    best, best_error, best_curve_nF = None, np.inf, np.zeros_like(true_nF)
    for shrink in NOISE_SHRINKS:
        for power_extra in POWER_EXTRAS_DB2:
            options = {"shrink": shrink, "power_extra_db2": power_extra, "centred": centred}
            noises = [_noise(residual_nD[fold_n != k], **options) for k in range(FOLDS)]
            for temperature in TEMPERATURES:
                curve_nF = np.zeros_like(true_nF)
                for k, noise in enumerate(noises):
                    rows = fold_n == k
                    curve_FD = _wiener(prior, noise, temperature)
                    curve_nF[rows] = (seen_nD[rows] - noise.mean_D) @ curve_FD.T
                error = float(shape_rmse(curve_nF, true_nF).mean())
                if error < best_error:
                    best, best_error, best_curve_nF = (options, temperature), error, curve_nF
    assert best is not None
    options, temperature = best
    noise = _noise(residual_nD, **options)
    chosen = {
        "noise_shrink": options["shrink"],
        "power_extra_db2": options["power_extra_db2"],
        "temperature": temperature,
        "linear_rmse_db": best_error,
    }
    model = Gaussian(noise, temperature, _wiener(prior, noise, temperature))
    return model, best_curve_nF, chosen


def _ridge(feature_nM, target_nF, penalty: float) -> np.ndarray:
    gram_MM = feature_nM.T @ feature_nM / len(feature_nM)
    scale = np.trace(gram_MM) / len(gram_MM)
    inverse_MM = np.linalg.inv(gram_MM + penalty * scale * np.eye(len(gram_MM)))
    return (inverse_MM @ feature_nM.T @ target_nF / len(feature_nM)).T


def _tune_ridge(feature_nM, true_nF, fold_n) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The ridge map [F, M] with the penalty of least held-out error, and its out-of-fold curves."""
    best_penalty, best_error, best_curve_nF = RIDGES[0], np.inf, np.zeros_like(true_nF)
    for penalty in RIDGES:
        curve_nF = np.zeros_like(true_nF)
        for k in range(FOLDS):
            rows = fold_n == k
            weight_FM = _ridge(feature_nM[~rows], true_nF[~rows], penalty)
            curve_nF[rows] = feature_nM[rows] @ weight_FM.T
        error = float(shape_rmse(curve_nF, true_nF).mean())
        if error < best_error:
            best_penalty, best_error, best_curve_nF = penalty, error, curve_nF
    chosen = {"ridge_penalty": best_penalty, "ridge_rmse_db": best_error}
    return _ridge(feature_nM, true_nF, best_penalty), best_curve_nF, chosen


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
    prior = _prior(table, sample_rate)

    seen_nD = difference(train.evidence_reference, train.evidence_input)
    residual_nD = difference(train.plain_reference, train.plain_input)
    pair, wiener_nF, pair_choice = _tune_gaussian(
        prior, residual_nD, seen_nD, true_nF, fold_n, centred=True
    )
    nothing = Evidence(*(np.zeros_like(field) for field in train.plain_reference))
    blind, _, blind_choice = _tune_gaussian(
        prior,
        difference(train.plain_reference, nothing),
        difference(train.evidence_reference, nothing),
        true_nF,
        fold_n,
        centred=False,
    )
    ridge_FM, ridge_nF, ridge_choice = _tune_ridge(
        eq.remove_level(seen_nD[:, len(freq_hz_M) :]), true_nF, fold_n
    )

    rows = np.random.default_rng(seed).permutation(len(true_nF))[:FITTED_PAIRS]
    grid_hz_F = eq.curve_grid_hz(sample_rate)
    options = {"table": table, "sample_rate": sample_rate}
    wiener_fit = _project(wiener_nF[rows], grid_hz_F, **options)[0]
    ridge_fit = _project(ridge_nF[rows], grid_hz_F, **options)[0]
    ltas_nM = eq.remove_level(seen_nD[rows, : len(freq_hz_M)])
    ltas_errors = {}
    for width in SMOOTHINGS_OCTAVES:
        for scale in SCALES:
            curve_nM = scale * smooth(ltas_nM, freq_hz_M, width)
            fitted_nF = _project(curve_nM, freq_hz_M, **options)[0]
            ltas_errors[width, scale] = float(shape_rmse(fitted_nF, true_nF[rows]).mean())
    smoothing, scale = min(ltas_errors, key=lambda choice: ltas_errors[choice])

    def better(fitted_nF, free_nF):
        errors = [shape_rmse(c, true_nF[rows]).mean() for c in (fitted_nF, free_nF[rows])]
        return bool(errors[0] < errors[1])

    choices = {f"pair_{name}": value for name, value in pair_choice.items()}
    choices |= {f"blind_{name}": value for name, value in blind_choice.items()} | ridge_choice
    choices |= {
        "ltas_smoothing_octaves": smoothing,
        "ltas_scale": scale,
        "ltas_shrunk_rmse_db": ltas_errors[smoothing, scale],
        "ltas_rmse_db": ltas_errors[SMOOTHINGS_OCTAVES[0], SCALES[0]],
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
) -> dict[str, Prediction]:
    """Every method's answer to n pairs, by name; see the module's list.

    Curves are what is scored. Where a method gives a free curve, its `params` are the settings
    fitted to that curve, for the errors of settings. `bayes` and `bayes_blind` carry `ess` (the
    effective sample size), `spread_db` (the posterior's own idea of its error) and `acceptance`.
    A pair's answer does not depend on which other pairs are asked.

    Args:
      evidence_input, evidence_reference: [n, M] each, of the length and rate `fitted` is for.
      seed: of the sampler.
      plan: how long the sampler runs.
    """
    freq_hz_M, grid_hz_F = band_hz(sample_rate), eq.curve_grid_hz(sample_rate)
    _check_bands(evidence_input, freq_hz_M, sample_rate)
    options = {"table": table, "sample_rate": sample_rate}
    seen_nD = difference(evidence_reference, evidence_input)
    pairs, bands = len(seen_nD), len(freq_hz_M)
    answers = {}

    def constant(unit_KP):
        params = eq.from_unit(table, np.broadcast_to(unit_KP, (pairs, *unit_KP.shape)))
        return Prediction(settings_curve(params, sample_rate), params, {})

    def free(curve_nF, projected, **extra):
        projected_nF, params = _project(curve_nF, grid_hz_F, **options)
        return Prediction(projected_nF if projected else curve_nF, params, extra)

    def posterior(model: Gaussian, difference_nD):
        result = bayes.sample_posterior(
            bayes.reduce_noise(model.noise, bands=bands, temperature=model.temperature),
            difference_nD,
            freq_hz_M=freq_hz_M,
            seed=seed,
            plan=plan,
            **options,
        )
        extra = result._asdict()
        return free(extra.pop("curve_db_nF"), False, **extra)

    answers["do_nothing"] = constant(np.full_like(fitted.mean_unit_KP, 0.5))
    answers["mean_setting"] = constant(fitted.mean_unit_KP)
    ltas_nM = eq.remove_level(seen_nD[:, :bands])
    answers["ltas"] = Prediction(*_project(ltas_nM, freq_hz_M, **options), {})
    shrunk_nM = fitted.scale * smooth(ltas_nM, freq_hz_M, fitted.smoothing_octaves)
    answers["ltas_shrunk"] = Prediction(*_project(shrunk_nM, freq_hz_M, **options), {})
    geometric_nM = eq.remove_level(seen_nD[:, bands:])
    answers["ridge"] = free(geometric_nM @ fitted.ridge_FM.T, fitted.ridge_projected)
    answers["wiener"] = free(seen_nD @ fitted.pair.curve_FD.T, fitted.pair_projected)
    answers["bayes"] = posterior(fitted.pair, seen_nD)
    nothing = Evidence(*(np.zeros_like(field) for field in evidence_reference))
    answers["bayes_blind"] = posterior(fitted.blind, difference(evidence_reference, nothing))
    return answers


def oracle(
    true_params: eq.EqParams, *, table: eq.EqTable, sample_rate: float
) -> dict[str, Prediction]:
    """What the band layout allows: `oracle`, the best fit to the true curve, and `oracle_grid`.

    The fit is given the true level-free curve and nothing else, so its error is that of the
    search. `oracle_grid` rounds the true settings to the table's grid, parameter by parameter.
    """
    true_params = _host(true_params)
    curve_nF = settings_curve(true_params, sample_rate)
    best = _project(curve_nF, eq.curve_grid_hz(sample_rate), table=table, sample_rate=sample_rate)
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
