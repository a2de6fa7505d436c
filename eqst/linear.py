"""Linear estimates of a curve from evidence, and the tuning of what they share with `bayes`.

Two maps from an evidence difference to a level-free curve: the best linear one under a Gaussian
prior and a Gaussian noise (Wiener's), and ridge regression. Both are tuned by cross-validation in
which a talker is never on both sides.
"""

from typing import NamedTuple

import jax
import numpy as np

from eqst import bayes, eq
from eqst.evidence import Evidence, band_hz

FOLDS = 5
NOISE_SHRINKS = (0.1, 0.3, 0.5)
POWER_EXTRAS_DB2 = (0.0, 4.0, 16.0, 64.0)
TEMPERATURES = (0.7, 1.0, 1.5, 2.2, 3.3)
RIDGES = tuple(10.0 ** np.arange(-3.0, 2.6, 0.5))
SAMPLED_TEMPERATURES = (0.7, 1.0, 1.5, 2.2)
SAMPLED_FOLDS = 3
SAMPLED_PAIRS = bayes.PAIRS_AT_ONCE  # per fold, where a choice needs the sampler
SHORT_PLAN = bayes.Plan(runs=1, stages=8, kept=12)


class Gaussian(NamedTuple):
    """A tuned noise model and the linear estimate that goes with it.

    `curve_FD` maps an evidence difference less `noise.mean_D` to a level-free curve. The sampler
    has a temperature of its own: it knows the prior better and can trust the data more.
    """

    noise: bayes.Noise
    temperature: float
    curve_FD: np.ndarray


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


def settings_curve(params: eq.EqParams, sample_rate: float) -> np.ndarray:
    """Curves [n, F] in dB (level kept) of settings [n, K] on `eq.curve_grid_hz`, float64."""
    settings = eq.EqParams(*(np.asarray(field, np.float32) for field in params))
    return np.asarray(bayes.response(settings, eq.curve_grid_hz(sample_rate), sample_rate), float)


class Prior(NamedTuple):
    """Second moments of level-free prior curves: bands with bands, grid with bands."""

    MM: np.ndarray
    FM: np.ndarray


def curve_prior(table: eq.EqTable, sample_rate: float, draws: int = 8192) -> Prior:
    params = eq.sample(table, jax.random.key(1), (draws,))
    band_nM = np.asarray(bayes.response(params, band_hz(sample_rate), sample_rate), float)
    grid_nF = settings_curve(params, sample_rate)
    band_nM, grid_nF = eq.remove_level(band_nM), eq.remove_level(grid_nF)
    return Prior(band_nM.T @ band_nM / draws, grid_nF.T @ band_nM / draws)


def noise_model(
    residual_nD: np.ndarray, *, shrink: float, power_extra_db2: float, centred: bool
) -> bayes.Noise:
    """Noise with the average power trusted less: its errors are the less Gaussian of the two."""
    noise = bayes.fit_noise(residual_nD, shrink=shrink, centred=centred)
    extra_D = np.zeros(residual_nD.shape[1])
    extra_D[: len(extra_D) // 2] = power_extra_db2
    return noise._replace(covariance_DD=noise.covariance_DD + np.diag(extra_D))


class Factors(NamedTuple):
    """A linear estimate as curve_FE diag(1 / (signal_E + temperature)) data_ED: see below."""

    data_ED: np.ndarray
    signal_E: np.ndarray
    curve_FE: np.ndarray


def wiener_factors(prior: Prior, noise: bayes.Noise) -> Factors:
    """The best linear estimate of the level-free curve, for all temperatures at once.

    With G the level-free stack of the response once per kind of spectrum and N = L L' the noise,
    the estimate is prior.FM G' (G prior.MM G' + t N)^-1 data, and one eigendecomposition of
    L^-1 G prior.MM G' L^-T serves every temperature t.
    """
    bands = len(prior.MM)
    dimensions = len(noise.mean_D)
    level_DD = np.eye(dimensions) - 1.0 / dimensions
    seen_DM = level_DD @ np.tile(np.eye(bands), (dimensions // bands, 1))
    whiten_DD = np.linalg.inv(np.linalg.cholesky(noise.covariance_DD))
    white_DM = whiten_DD @ seen_DM
    signal_E, direction_DE = np.linalg.eigh(white_DM @ prior.MM @ white_DM.T)
    return Factors(
        direction_DE.T @ whiten_DD @ level_DD,
        np.maximum(signal_E, 0.0),
        prior.FM @ white_DM.T @ direction_DE,
    )


def wiener(prior: Prior, noise: bayes.Noise, temperature: float) -> np.ndarray:
    """Best linear estimate of the level-free curve from an evidence difference, [F, D]."""
    factors = wiener_factors(prior, noise)
    return (factors.curve_FE / (factors.signal_E + temperature)) @ factors.data_ED


def tune_gaussian(
    prior: Prior,
    residual_nD: np.ndarray,
    seen_nD: np.ndarray,
    true_nF: np.ndarray,
    fold_n: np.ndarray,
    *,
    centred: bool,
    table: eq.EqTable,
    sample_rate: float,
) -> tuple[Gaussian, np.ndarray, dict[str, float]]:
    """Noise settings of least error on held-out training talkers.

    Shrinkage and the trust in the average power are chosen with the linear estimate, which costs
    nothing; the temperature for each of the linear and the sampled estimate.

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
            options = {"shrink": shrink, "power_extra_db2": power_extra}
            curve_TnF = np.zeros((len(TEMPERATURES), *true_nF.shape))
            for k in range(FOLDS):
                noise = noise_model(residual_nD[fold_n != k], **options, centred=centred)
                estimate = wiener_factors(prior, noise)
                part_nD = (seen_nD[fold_n == k] - noise.mean_D) @ estimate.data_ED.T
                for index, temperature in enumerate(TEMPERATURES):
                    scaled_nD = part_nD / (estimate.signal_E + temperature)
                    curve_TnF[index, fold_n == k] = scaled_nD @ estimate.curve_FE.T
            for temperature, curve_nF in zip(TEMPERATURES, curve_TnF, strict=True):
                error = float(shape_rmse(curve_nF, true_nF).mean())
                if error < best_error:
                    best, best_error, best_curve_nF = (options, temperature), error, curve_nF
    assert best is not None
    options, temperature = best
    noise = noise_model(residual_nD, **options, centred=centred)
    chosen = {
        "noise_shrink": options["shrink"],
        "power_extra_db2": options["power_extra_db2"],
        "linear_temperature": temperature,
        "linear_rmse_db": best_error,
    }
    sampled_errors = {}
    for heat in SAMPLED_TEMPERATURES:
        errors = []
        for k in range(SAMPLED_FOLDS):
            rows = np.flatnonzero(fold_n == k)
            rows = rows[np.random.default_rng(k).permutation(len(rows))[:SAMPLED_PAIRS]]
            found = bayes.sample_posterior(
                bayes.reduce_noise(
                    noise_model(residual_nD[fold_n != k], **options, centred=centred),
                    bands=len(prior.MM),
                    temperature=heat,
                ),
                seen_nD[rows],
                freq_hz_M=band_hz(sample_rate),
                table=table,
                sample_rate=sample_rate,
                seed=k,
                plan=SHORT_PLAN,
            )
            errors.append(shape_rmse(found.curve_db_nF, true_nF[rows]))
        sampled_errors[heat] = float(np.concatenate(errors).mean())
    heat = min(sampled_errors, key=lambda choice: sampled_errors[choice])
    chosen |= {"temperature": heat, "sampled_rmse_db": sampled_errors[heat]}
    return Gaussian(noise, heat, wiener(prior, noise, temperature)), best_curve_nF, chosen


def _ridge(feature_nM: np.ndarray, target_nF: np.ndarray, penalty: float) -> np.ndarray:
    gram_MM = feature_nM.T @ feature_nM / len(feature_nM)
    scale = np.trace(gram_MM) / len(gram_MM)
    inverse_MM = np.linalg.inv(gram_MM + penalty * scale * np.eye(len(gram_MM)))
    return (inverse_MM @ feature_nM.T @ target_nF / len(feature_nM)).T


def tune_ridge(
    feature_nM: np.ndarray, true_nF: np.ndarray, fold_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
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
