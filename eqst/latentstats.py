"""Statistics of latent vectors, and of what a predictor makes of them.

Rows are vectors: one for each pair (or recording) n, L coefficients each. Everything is float64 on
the host but the Jacobian, which JAX takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A coefficient counts as nullified below this share of a standard deviation.
NULLIFIED = 1e-3
# Of a coefficient with a Gaussian distribution round 0 this share of its values lies there.
GAUSSIAN_NULLIFIED = 7.9788e-4
# The dynamic range of a latent whose median is (nearly) 0.
MOST_DB = 240.0


class Spread(NamedTuple):
    """How vectors were spread on training pairs: mean and deviation of each coefficient."""

    mean_L: np.ndarray
    std_L: np.ndarray


def spread(rows_nL: np.ndarray) -> Spread:
    """Mean and standard deviation over the rows, coefficient by coefficient."""
    rows_nL = np.asarray(rows_nL, np.float64)
    return Spread(rows_nL.mean(axis=0), rows_nL.std(axis=0))


def nullified(rows_nL: np.ndarray, std_L: np.ndarray) -> np.ndarray:
    """[n] share of coefficients with |value| <= NULLIFIED times that coefficient's deviation.

    A coefficient that never moved (deviation 0) is nullified where it is 0, and not where it
    stands at another constant.
    """
    return (np.abs(rows_nL) <= NULLIFIED * std_L[None, :]).mean(axis=1)


def norms(rows_nL: np.ndarray) -> np.ndarray:
    """[n] Euclidean norms."""
    return np.linalg.norm(np.asarray(rows_nL, np.float64), axis=1)


def sparsity(rows_nL: np.ndarray) -> np.ndarray:
    """[n] Hoyer's sparsity, free of scale: 0 for equal magnitudes, 1 for a single coefficient (and
    for a row of zeros); about 0.2 for Gaussian ones.

    (sqrt(L) - |x|_1 / |x|_2) / (sqrt(L) - 1): Hoyer, JMLR 5, 2004, section 3.1.
    """
    rows_nL = np.asarray(rows_nL, np.float64)
    root = np.sqrt(rows_nL.shape[1])
    ratio_n = np.abs(rows_nL).sum(axis=1) / np.maximum(norms(rows_nL), np.finfo(float).tiny)
    return (root - np.maximum(ratio_n, 1.0)) / (root - 1.0)


def numeric_range(rows_nL: np.ndarray) -> dict[str, float]:
    """What values occur, over all rows and coefficients.

    Returns:
      min, max, p0.1, p50, p99.9 of the values, their rms, and `dynamic_range_db`: from the median
      magnitude to the 99.9th percentile of magnitudes (a Gaussian has 13.8 dB), MOST_DB at most.
    """
    rows_nL = np.asarray(rows_nL, np.float64)
    low, middle, high = np.percentile(rows_nL, (0.1, 50.0, 99.9))
    typical, large = np.percentile(np.abs(rows_nL), (50.0, 99.9))
    floor = 10.0 ** (-MOST_DB / 20.0) * large
    return {
        "min": float(rows_nL.min()),
        "p0.1": float(low),
        "p50": float(middle),
        "p99.9": float(high),
        "max": float(rows_nL.max()),
        "rms": float(np.sqrt(np.mean(rows_nL**2))),
        "dynamic_range_db": float(20.0 * np.log10(large / max(typical, floor))) if large else 0.0,
    }


def participation_ratio(rows_nL: np.ndarray) -> float:
    """Effective number of dimensions: (sum of the covariance's eigenvalues)^2 / sum of squares.

    At most min(n - 1, L); 0 where nothing varies. Few rows show fewer dimensions than there are.
    """
    centred_nL = np.asarray(rows_nL, np.float64)
    centred_nL = centred_nL - centred_nL.mean(axis=0, keepdims=True)
    if centred_nL.shape[0] > centred_nL.shape[1]:
        centred_nL = centred_nL.T  # the smaller Gram matrix has the same eigenvalues
    gram = centred_nL @ centred_nL.T
    squares = float(np.sum(gram**2))
    return float(np.trace(gram) ** 2 / squares) if squares > 0 else 0.0


def mean_share(rows_nL: np.ndarray) -> float:
    """Share of the rows' energy that lies in their mean: |E x|^2 / E |x|^2.

    Without the bias of a finite sample (which adds 1 / n of the rest), so it may be just below 0.
    """
    rows_nL = np.asarray(rows_nL, np.float64)
    count = len(rows_nL)
    energy = float(np.mean(np.sum(rows_nL**2, axis=1)))
    if energy == 0.0:
        return 0.0
    mean_energy = float(np.sum(rows_nL.mean(axis=0) ** 2))
    return (count * mean_energy - energy) / (count - 1) / energy


def r_squared(predicted_nF: np.ndarray, true_nF: np.ndarray, mean_F: np.ndarray) -> float:
    """Share of the true rows' variance round `mean_F` (of the training rows) that is predicted."""
    residual = np.sum((predicted_nF - true_nF) ** 2)
    return float(1.0 - residual / np.sum((true_nF - mean_F[None, :]) ** 2))


def linear_probe(
    train_nL: np.ndarray, train_nF: np.ndarray, test_mL: np.ndarray, test_mF: np.ndarray
) -> float:
    """R^2 on test rows of the best linear readout: ridge regression on standardised coefficients.

    The penalty is the one with the least leave-one-out error on the training rows (in closed form,
    from the eigenvalues of their Gram matrix). Coefficients that do not vary on train are left out.
    """
    moved = spread(train_nL)
    alive_L = moved.std_L > 1e-12 * max(float(moved.std_L.max()), 1e-300)
    mean_F = train_nF.mean(axis=0)
    if not alive_L.any():
        return r_squared(np.broadcast_to(mean_F, test_mF.shape), test_mF, mean_F)
    scale_L = moved.std_L[alive_L] * np.sqrt(alive_L.sum())
    train_nA, test_mA = (
        (np.asarray(x, np.float64)[:, alive_L] - moved.mean_L[alive_L][None, :]) / scale_L[None, :]
        for x in (train_nL, test_mL)
    )
    value_E, vector_nE = np.linalg.eigh(train_nA @ train_nA.T)
    value_E = np.maximum(value_E, 0.0)
    target_EF = vector_nE.T @ (train_nF - mean_F[None, :])

    def left_out_error(penalty: float) -> float:
        kept_E = value_E / (value_E + penalty)
        hat_n = np.sum(vector_nE**2 * kept_E[None, :], axis=1) + 1.0 / len(train_nF)
        fitted_nF = vector_nE @ (kept_E[:, None] * target_EF)
        residual_nF = train_nF - mean_F[None, :] - fitted_nF
        return float(np.mean((residual_nF / np.maximum(1.0 - hat_n, 1e-9)[:, None]) ** 2))

    penalty = min(value_E.max() * 10.0 ** np.arange(-8.0, 2.1, 0.5), key=left_out_error)
    dual_nF = vector_nE @ (target_EF / (value_E + penalty)[:, None])
    return r_squared(test_mA @ (train_nA.T @ dual_nF) + mean_F[None, :], test_mF, mean_F)


class Sensitivity(NamedTuple):
    """First-order changes of a predicted curve, RMS over frequency, one for each row.

    Attributes:
      percent_db_n: for a change of the vector by 1 % of its norm, in the mean square over all
        directions.
      spread_db_n: for a change of every coefficient by its own deviation on train, signs
        independent: the norm of the Jacobian scaled by those deviations.
    """

    percent_db_n: np.ndarray
    spread_db_n: np.ndarray


def sensitivity(
    settings: Callable[[jax.Array], jax.Array],
    curve: Callable[[jax.Array], jax.Array],
    fed_nL: np.ndarray,
    std_L: np.ndarray,
    *,
    at_once: int = 16,
) -> Sensitivity:
    """How strongly a predicted curve answers to what the predictor is fed.

    Args:
      settings: fed [L] -> a few numbers [P].
      curve: those [P] -> curve [F] in dB; its level does not count.
      fed_nL: where the Jacobian is taken.
      std_L: each coefficient's deviation on train.
      at_once: rows in memory at a time.
    """

    @jax.jit
    @jax.vmap
    def squares(fed_L: jax.Array) -> jax.Array:
        said_P = settings(fed_L)
        slope_FP = jax.jacrev(curve)(said_P)
        slope_FP = slope_FP - jnp.mean(slope_FP, axis=0, keepdims=True)
        slope_PL = jax.jacrev(settings)(fed_L)
        scaled_PL = slope_PL * jnp.asarray(std_L, jnp.float32)[None, :]

        def mean_square(rows_PL: jax.Array) -> jax.Array:
            precise = jax.lax.Precision.HIGHEST
            gram_PP = jnp.matmul(rows_PL, rows_PL.T, precision=precise)
            return jnp.mean(
                jnp.sum(jnp.matmul(slope_FP, gram_PP, precision=precise) * slope_FP, -1)
            )

        one_percent = 1e-4 * jnp.sum(fed_L**2) / fed_L.size
        return jnp.stack([mean_square(slope_PL) * one_percent, mean_square(scaled_PL)])

    count = len(fed_nL)
    # The last rows fill their batch up, so that one program serves all.
    filled_mL = np.pad(fed_nL, ((0, -count % at_once), (0, 0)), mode="edge").astype(np.float32)
    parts = [squares(filled_mL[i : i + at_once]) for i in range(0, len(filled_mL), at_once)]
    square_n2 = np.concatenate([np.asarray(part, np.float64) for part in parts])[:count]
    return Sensitivity(*np.sqrt(np.maximum(square_n2, 0.0)).T)
