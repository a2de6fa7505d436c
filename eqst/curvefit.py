"""From a curve in dB to the settings of bands: bounded least squares in the unit cube.

Pure JAX with static shapes. `eq.fit_curve` is the function to call; the space comes in as a
function `decode` from the cube to settings, so that this module knows no ranges.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import biquad

LIBRARY = 1024  # random settings among which first guesses are looked for
ATOMS = (11, 11, 8)  # frequencies, gains and Qs at which each band of a guess is tried
ROUNDS = (
    (10, 3),
    (25, 1),
)  # (trial steps, guesses kept): all guesses a little, the best to the end
CHUNK = 32  # curves fitted at once: their Jacobians stay in cache

_FIRST_DAMPING = 1e-2
_EASE, _STIFFEN = 0.3, 4.0  # of the damping, after a step that helped and after one that did not
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1e3
_FLOOR = 1e-3  # dB^2 per unit^2, damps parameters that have no effect at all


class Problem(NamedTuple):
    """What every curve of a batch shares."""

    decode: Callable  # [..., K, 3] in the unit cube -> (freq_hz, gain_db, q), each [..., K]
    kinds: tuple[str, ...]
    freq_hz_F: jax.Array
    weight_F: jax.Array  # of squared errors; sums to 1
    gain_weight: jax.Array  # of the mean square gain, against the mean square error
    sample_rate: float


def search(
    problem: Problem, curve_nF: jax.Array, given_nSP: jax.Array, *, starts: int
) -> jax.Array:
    """Points [n, 3 K] of the cube whose responses have the shapes of curves [n, F].

    First guesses are the `starts` nearest of a fixed library of random settings. In each, every
    band in turn is replaced by the best of a grid of its own, the others held: bands add in dB, so
    that is one product of matrices. They and the guesses given, [n, S, 3 K], go through `ROUNDS`.
    """
    bands, points = len(problem.kinds), 3 * len(problem.kinds)
    library_LKP = np.random.default_rng(0).random((LIBRARY, bands, 3))
    axes = np.meshgrid(*(np.linspace(0.0, 1.0, size) for size in ATOMS), indexing="ij")
    atom_AP = np.stack(axes, axis=-1).reshape(-1, 3)
    # The barrier keeps XLA from working out the responses of these constants while it compiles.
    library_LKP, atom_AP = jax.lax.optimization_barrier(
        (jnp.asarray(library_LKP, curve_nF.dtype), jnp.asarray(atom_AP, curve_nF.dtype))
    )
    library_LKR = _band_rows(problem, library_LKP)
    atom_AKR = _band_rows(problem, jnp.repeat(atom_AP[:, None], bands, axis=1))

    def one(curve_and_given):
        curve_F, given_SP = curve_and_given
        target_R = jnp.concatenate([_shape(problem, curve_F), jnp.zeros(bands, curve_F.dtype)])
        nearest_S = jax.lax.top_k(-_distance(library_LKR.sum(axis=1), target_R), starts)[1]
        guess_SKP, guess_SKR = library_LKP[nearest_S], library_LKR[nearest_S]
        for k in reversed(range(bands)):
            rest_SR = target_R[None] - guess_SKR.sum(axis=1) + guess_SKR[:, k]
            best_S = jnp.argmin(_distance(atom_AKR[:, k], rest_SR), axis=-1)
            guess_SKP = guess_SKP.at[:, k].set(atom_AP[best_S])
            guess_SKR = guess_SKR.at[:, k].set(atom_AKR[best_S, k])
        guess_SP = jnp.concatenate([given_SP, guess_SKP.reshape(starts, points)])

        def model(point_P):
            value_R, jacobian_PR = _model(problem, point_P)
            return value_R - target_R, jacobian_PR

        for steps, kept in ROUNDS:
            guess_SP, cost_S = jax.vmap(lambda guess_P, n=steps: minimise(model, guess_P, n))(
                guess_SP
            )
            guess_SP = guess_SP[jax.lax.top_k(-cost_S, min(kept, len(cost_S)))[1]]
        return guess_SP[0]

    return jax.lax.map(one, (curve_nF, given_nSP), batch_size=CHUNK)


def _shape(problem: Problem, curve_XF: jax.Array) -> jax.Array:
    """Curves less their mean, so scaled that a sum of squares is the weighted mean square."""
    weight_F = problem.weight_F.reshape((1,) * (curve_XF.ndim - 1) + (-1,))
    level = jnp.sum(curve_XF * weight_F, axis=-1, keepdims=True)
    return (curve_XF - level) * jnp.sqrt(weight_F)


def _gain_scale(problem: Problem) -> jax.Array:
    return jnp.sqrt(problem.gain_weight / len(problem.kinds))


def _band_rows(problem: Problem, unit_XKP: jax.Array) -> jax.Array:
    """[X, K, F + K]: what each band adds to the residuals, its shape and its own gain."""
    freq_hz, gain_db, q = problem.decode(unit_XKP)

    def one(freq_hz_K, gain_db_K, q_K):
        curve_KF = biquad.bands_db(
            problem.freq_hz_F,
            freq_hz_K,
            gain_db_K,
            q_K,
            kinds=problem.kinds,
            sample_rate=problem.sample_rate,
        )
        gains_KK = jnp.diag(gain_db_K * _gain_scale(problem))
        return jnp.concatenate([_shape(problem, curve_KF), gains_KK], axis=-1)

    return jax.vmap(one)(freq_hz, gain_db, q)


def _distance(row_XR: jax.Array, target_R: jax.Array) -> jax.Array:
    """Squared distances of rows [X, R] to targets [R] or [S, R], less the targets' own squares."""
    square_X = jnp.sum(row_XR**2, axis=-1).reshape((1,) * (target_R.ndim - 1) + (-1,))
    return square_X - 2.0 * _product(target_R, row_XR.T)


def _model(problem: Problem, point_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Residuals [F + K] of a point, the target not yet taken off, and their Jacobian [P, F + K]."""
    unit_KP = point_P.reshape(-1, 3)
    # Every setting depends on its own coordinate alone: one directional derivative has them all.
    settings, slopes = jax.jvp(problem.decode, (unit_KP,), (jnp.ones_like(unit_KP),))
    value_F, jacobian_KPF = biquad.cascade_jacobian_db(
        problem.freq_hz_F, *settings, kinds=problem.kinds, sample_rate=problem.sample_rate
    )
    jacobian_KPF = jacobian_KPF * jnp.stack(slopes, axis=-1)[:, :, None]
    _, gain_db_K, _ = settings
    _, gain_slope_K, _ = slopes
    scale, nothing = _gain_scale(problem), jnp.zeros((len(gain_db_K),) * 2, value_F.dtype)
    gains_KPK = jnp.stack([nothing, jnp.diag(gain_slope_K * scale), nothing], axis=1)
    value_R = jnp.concatenate([_shape(problem, value_F), gain_db_K * scale])
    jacobian_KPR = jnp.concatenate([_shape(problem, jacobian_KPF), gains_KPK], axis=-1)
    return value_R, jacobian_KPR.reshape(point_P.size, -1)


def minimise(
    model: Callable[[jax.Array], tuple[jax.Array, jax.Array]], start_P: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """The point of the unit cube near a start where a sum of squares is least.

    Levenberg-Marquardt, damped by the diagonal. Bounds by projection: what sits on a bound and
    would leave it is held for the step.

    Args:
      model: [P] -> (residuals [R], their Jacobian [P, R]).
      start_P: [P], each in 0 .. 1.
      steps: trial steps, static.

    Returns:
      ([P] the best point met, [] its sum of squares): never worse than the start.

    Source: Marquardt, An algorithm for least-squares estimation of nonlinear parameters, 1963.
    """

    def step(state, _):
        # The trial point is evaluated first, so that the model is compiled once.
        trial_P, point_P, residual_R, jacobian_PR, cost, damping = state
        trial_R, trial_PR = model(trial_P)
        trial_cost = jnp.sum(trial_R**2)
        better = trial_cost < cost  # false for a NaN, too
        point_P = jnp.where(better, trial_P, point_P)
        residual_R = jnp.where(better, trial_R, residual_R)
        jacobian_PR = jnp.where(better, trial_PR, jacobian_PR)
        cost = jnp.where(better, trial_cost, cost)
        damping = damping * jnp.where(better, _EASE, _STIFFEN)
        damping = jnp.clip(damping, _LEAST_DAMPING, _MOST_DAMPING)

        gradient_P = _product(jacobian_PR, residual_R)
        leaving_P = ((point_P <= 0) & (gradient_P > 0)) | ((point_P >= 1) & (gradient_P < 0))
        free_P = jnp.where(leaving_P, 0.0, 1.0).astype(point_P.dtype)
        free_PR = jacobian_PR * free_P[:, None]
        normal_PP = _product(free_PR, free_PR.T)
        diagonal_P = damping * (jnp.diagonal(normal_PP) + _FLOOR) + (1.0 - free_P)
        factor = jax.scipy.linalg.cho_factor(normal_PP + jnp.diag(diagonal_P), lower=True)
        move_P = jax.scipy.linalg.cho_solve(factor, gradient_P * free_P)
        trial_P = jnp.clip(point_P - move_P, 0.0, 1.0)
        return (trial_P, point_P, residual_R, jacobian_PR, cost, damping), None

    residual, jacobian = jax.eval_shape(model, start_P)
    first = (
        start_P,
        start_P,
        jnp.zeros(residual.shape, residual.dtype),
        jnp.zeros(jacobian.shape, jacobian.dtype),
        jnp.asarray(jnp.inf, residual.dtype),
        jnp.asarray(_FIRST_DAMPING / _EASE, residual.dtype),
    )
    (_, point_P, _, _, cost, _), _ = jax.lax.scan(step, first, length=steps + 1)
    return point_P, cost


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
