"""Posterior of an equaliser from noisy band spectra: Gaussian noise, the EQ table as prior.

The difference of two recordings' evidence is modelled as

    d = [c; c] + level * 1 + noise,    noise ~ Normal(mean, covariance),

with c the response of settings drawn uniformly from the unit cube of an `EqTable`, sampled at the
band centres, and a level about which nothing is known. Since c enters linearly, all that a pair
tells is one whitened vector, and the sampler sees a Gaussian likelihood of a few dozen dimensions.

Sampling is annealed importance resampling from a bank of prior draws, then differential-evolution
Markov chains (ter Braak, Statistics and Computing 16, 2006; two half ensembles moved by turns, as
in Goodman and Weare, CAMCoS 5, 2010, so that all walkers of a half move at once). Every pair uses
the same random numbers: pairs do not influence each other, and one pair's answer does not depend on
which others are in its batch.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eqst import eq

PRECISION = jax.lax.Precision.HIGHEST
BANK = 32_768  # prior draws the chains start from
BANK_SHARE = 1024.0  # how many of them must count: all runs share the bank and its errors
PAIRS_AT_ONCE = 64


class Noise(NamedTuple):
    """Gaussian model of an evidence difference [D]; D = J * M, J kinds of spectrum, M bands."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray


class Likelihood(NamedTuple):
    """`Noise` reduced to what the response can change: y = data_RD (d - mean), model_RM c."""

    mean_D: np.ndarray
    data_RD: np.ndarray
    model_RM: np.ndarray


class Plan(NamedTuple):
    """How long to sample: independent runs, walkers of a pair in each, then blocks of `stride`
    moves for annealing, settling and collecting; one state per collecting block is kept."""

    runs: int = 6
    walkers: int = 32
    stride: int = 8
    stages: int = 12
    settle: int = 4
    kept: int = 32


PLAN = Plan()


class Posterior(NamedTuple):
    """Posterior of n pairs.

    Attributes:
      curve_db_nF: mean curve in dB, level-free, on `eq.curve_grid_hz`.
      spread_db: [n] root mean square over the grid of the posterior deviation: what the shape
        RMSE of the mean curve should be if the model were true.
      ess: [n] effective sample size of the mean, from the disagreement of independent runs on
        the leading curve coefficients: known to some 30 %, and honest where walkers of one run
        are stuck together. NaN for a single run.
      acceptance: [n] share of accepted moves.
    """

    curve_db_nF: np.ndarray
    spread_db: np.ndarray
    ess: np.ndarray
    acceptance: np.ndarray


def fit_noise(difference_nD: np.ndarray, *, shrink: float, centred: bool) -> Noise:
    """Gaussian noise of evidence differences without EQ, level removed, shrunk to its diagonal.

    Args:
      difference_nD: [n, D] in dB. A common offset of all D is level and is removed.
      shrink: 0 keeps the sample covariance, 1 leaves a diagonal one.
      centred: True where swapping the two recordings is as likely (the mean is then 0 exactly).
    """
    difference_nD = difference_nD - difference_nD.mean(axis=1, keepdims=True)
    mean_D = np.zeros(difference_nD.shape[1]) if centred else difference_nD.mean(axis=0)
    residual_nD = difference_nD - mean_D
    sample_DD = residual_nD.T @ residual_nD / len(residual_nD)
    diagonal_DD = np.diag(np.diag(sample_DD))
    ridge_DD = 1e-3 * np.eye(len(mean_D))  # (0.03 dB)^2: bands at the floor never vary
    return Noise(mean_D, (1 - shrink) * sample_DD + shrink * diagonal_DD + ridge_DD)


def reduce_noise(noise: Noise, *, bands: int, temperature: float = 1.0) -> Likelihood:
    """The likelihood as whitened vectors, level projected out.

    With P the inverse covariance less its component along a common level, and H stacking the
    response once per kind of spectrum, -2 log L = (c - c0)' H'PH (c - c0) + const. H'PH is
    diagonalised and directions that carry under 1e-4 of a standard deviation per dB are dropped
    (the level is one of them).

    Args:
      noise: with D = J * bands dimensions.
      bands: M.
      temperature: multiplies the covariance; above 1 where the noise is not as Gaussian as assumed.
    """
    kinds = len(noise.mean_D) // bands
    inverse_DD = np.linalg.inv(noise.covariance_DD * temperature)
    toward_D = inverse_DD.sum(axis=1)
    projected_DD = inverse_DD - np.outer(toward_D, toward_D) / toward_D.sum()
    stack_DM = np.tile(np.eye(bands), (kinds, 1))
    weight_M, direction_MM = np.linalg.eigh(stack_DM.T @ projected_DD @ stack_DM)
    kept = weight_M > 1e-8
    scale_R, direction_MR = np.sqrt(weight_M[kept]), direction_MM[:, kept]
    return Likelihood(
        noise.mean_D,
        (direction_MR / scale_R).T @ stack_DM.T @ projected_DD,
        (direction_MR * scale_R).T,
    )


@lru_cache(maxsize=8)  # tuning asks for it again and again
def curve_basis(table: eq.EqTable, sample_rate: float, coefficients: int = 8) -> np.ndarray:
    """Leading principal directions [C, F] of level-free prior curves on `eq.curve_grid_hz`."""
    settings = eq.sample(table, jax.random.key(0), (2048,))
    curve_nF = np.asarray(response(settings, eq.curve_grid_hz(sample_rate), sample_rate), float)
    curve_nF -= curve_nF.mean(axis=1, keepdims=True)
    _, direction_FF = np.linalg.eigh(curve_nF.T @ curve_nF)
    return direction_FF[:, ::-1][:, :coefficients].T


def response(settings: eq.EqParams, freq_hz_F: ArrayLike, sample_rate: float) -> jax.Array:
    """`eq.response_db` of settings whose frequencies are first held to the rate."""
    limited, _ = eq.limit_to_rate(settings, sample_rate)
    return eq.response_db(limited, jnp.asarray(freq_hz_F, jnp.float32), sample_rate=sample_rate)


class _Problem(NamedTuple):
    """What a batch of pairs is sampled from: whitened data [n, R], their model, frequencies [M]."""

    y_nR: jax.Array
    model_RM: jax.Array
    freq_hz_M: jax.Array


class _Chain(NamedTuple):
    """Walkers of n pairs: unit-cube positions [n, W, K, P] and -2 log likelihood [n, W]."""

    unit: jax.Array
    misfit: jax.Array


def _misfit(problem: _Problem, unit: jax.Array, table: eq.EqTable, sample_rate: float) -> jax.Array:
    curve = response(eq.from_unit(table, unit), problem.freq_hz_M, sample_rate)
    model = jnp.einsum("nwm,rm->nwr", curve, problem.model_RM, precision=PRECISION)
    return jnp.sum((problem.y_nR[:, None, :] - model) ** 2, axis=-1)


def _propose(key: jax.Array, unit: jax.Array, other_unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Proposals for one half of the walkers along differences of the other half.

    Returns the proposals and the acceptance draws as misfits, [W]. The mixture of moves does not
    depend on the state and each of them is symmetric, or a draw from the (uniform) prior.
    """
    _, walkers, bands, parameters = unit.shape
    draw = jax.random.uniform(key, (walkers, 2 * bands * parameters + 6), minval=1e-12)
    jitter, mask = (
        draw[:, i * bands * parameters : (i + 1) * bands * parameters].reshape(
            1, walkers, bands, parameters
        )
        for i in range(2)
    )
    kind, which, length, pick, partner = (
        draw[:, -i].reshape(1, walkers, 1, 1) for i in range(1, 6)
    )
    first = (pick.ravel() * walkers).astype(jnp.int32)
    second = (first + 1 + (partner.ravel() * (walkers - 1)).astype(jnp.int32)) % walkers
    # which parameters move: all (15 %), those of one band (60 %), or a random half of them
    band = jnp.arange(bands).reshape(1, 1, bands, 1)
    one_band = jnp.broadcast_to(band == (which * bands).astype(jnp.int32), mask.shape)
    moving = jnp.where(kind < 0.15, True, jnp.where(kind < 0.75, one_band, mask < 0.5))
    redraw = (kind >= 0.5) & (kind < 0.75)  # a band afresh from the prior
    count = jnp.maximum(moving.sum((2, 3), keepdims=True), 1)
    size = 2.38 / jnp.sqrt(2.0 * count) * jnp.exp2(-length)
    size = jnp.where(kind < 0.07, 1.0, size)  # whole differences jump between modes
    difference = other_unit[:, first] - other_unit[:, second]
    # Wrapped round the cube, not reflected: differences are correlated between parameters, and a
    # reflected correlated step is no longer as likely as its reverse.
    moved = jnp.mod(unit + size * difference + 0.02 * (jitter - 0.5), 1.0)
    proposal = jnp.where(moving, jnp.where(redraw, jitter, moved), unit)
    return proposal, -2.0 * jnp.log(draw[:, -6])


@partial(jax.jit, static_argnames=("table", "sample_rate", "steps"))
def _advance(problem, chain, heat_n, key, *, table, sample_rate, steps):
    """`steps` moves of every walker at inverse temperature `heat_n`; -> (chain, accepted share)."""

    def move_half(halves, key):
        moving, still = halves
        proposal, slack_W = _propose(key, moving.unit, still.unit)
        misfit = _misfit(problem, proposal, table, sample_rate)
        accepted = heat_n[:, None] * (misfit - moving.misfit) <= slack_W[None, :]
        moved = _Chain(
            jnp.where(accepted[..., None, None], proposal, moving.unit),
            jnp.where(accepted, misfit, moving.misfit),
        )
        return (still, moved), accepted.mean(axis=1)

    half = chain.misfit.shape[1] // 2
    halves = tuple(jax.tree.map(lambda x, s=s: x[:, s], chain) for s in np.s_[:half, half:])
    (a, b), accepted = jax.lax.scan(move_half, halves, jax.random.split(key, 2 * steps))
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
    return joined, accepted.mean(axis=0)


def _heat_for(misfit_nW: jax.Array, heat_n: jax.Array, wanted: float) -> jax.Array:
    """The largest inverse temperature <= 1 whose weights keep an effective share of `wanted`."""

    def share(step_n):
        log_weight = -0.5 * step_n[:, None] * (misfit_nW - misfit_nW.min(axis=1, keepdims=True))
        weight = jnp.exp(log_weight)
        return weight.sum(axis=1) ** 2 / (weight**2).sum(axis=1)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = share(middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    whole = 1.0 - heat_n
    low, _ = jax.lax.fori_loop(0, 14, halve, (jnp.zeros_like(whole), whole))
    return jnp.where(share(whole) >= wanted, 1.0, heat_n + low)


def _resample(misfit_nW: jax.Array, step_n: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Systematic resampling in random order: [n, count] indices, weights exp(-step misfit / 2)."""
    offset_key, order_key = jax.random.split(key)
    log_weight = -0.5 * step_n[:, None] * (misfit_nW - misfit_nW.min(axis=1, keepdims=True))
    total = jnp.cumsum(jnp.exp(log_weight), axis=1)
    place = (jnp.arange(count) + jax.random.uniform(offset_key)) / count
    place = jax.random.permutation(order_key, place)
    found = jax.vmap(lambda row: jnp.searchsorted(row, place * row[-1]))(total)
    return jnp.minimum(found, misfit_nW.shape[1] - 1)


@partial(jax.jit, static_argnames=("table", "sample_rate", "walkers"))
def _start(problem, bank_unit, bank_model_BR, key, *, table, sample_rate, walkers):
    """Walkers resampled from prior draws, at the inverse temperature those can serve."""
    # |y - m|^2 over the bank, less |y|^2 which is common to a pair
    misfit_nB = jnp.sum(bank_model_BR**2, axis=1)[None, :] - 2.0 * jnp.matmul(
        problem.y_nR, bank_model_BR.T, precision=PRECISION
    )
    heat_n = _heat_for(misfit_nB, jnp.zeros(len(problem.y_nR)), BANK_SHARE)
    unit = bank_unit[_resample(misfit_nB, heat_n, key, walkers)]
    return _Chain(unit, _misfit(problem, unit, table, sample_rate)), heat_n


@jax.jit
def _anneal(chain, heat_n, key, last):
    """The next inverse temperature (1 at the last stage), the walkers resampled for it."""
    hotter_n = _heat_for(chain.misfit, heat_n, 0.5 * chain.misfit.shape[1])
    hotter_n = jnp.where(last, 1.0, hotter_n)
    picked = _resample(chain.misfit, hotter_n - heat_n, key, chain.misfit.shape[1])
    unit = jnp.take_along_axis(chain.unit, picked[..., None, None], axis=1)
    return _Chain(unit, jnp.take_along_axis(chain.misfit, picked, axis=1)), hotter_n


class _Sums(NamedTuple):
    """Sums over kept states: curves [n, F], their squares, coefficients [n, C], their squares."""

    curve: Any
    square: Any
    part: Any
    part_square: Any


@partial(jax.jit, static_argnames=("table", "sample_rate"))
def _collect(sums, unit, grid_hz_F, basis_CF, *, table, sample_rate):
    curve = eq.remove_level(response(eq.from_unit(table, unit), grid_hz_F, sample_rate))
    part = jnp.einsum("nwf,cf->nwc", curve, basis_CF, precision=PRECISION)
    added = (curve, curve**2, part, part**2)
    return _Sums(*(total + new.mean(axis=1) for total, new in zip(sums, added, strict=True)))


def _run(problem, bank_unit, bank_model_BR, basis_CF, grid_hz_F, key, *, table, sample_rate, plan):
    """Start, anneal, settle and collect once: averages over states, and the acceptance [n]."""
    common = {"table": table, "sample_rate": sample_rate}
    pairs = len(problem.y_nR)
    keys = iter(jax.random.split(key, 1 + 2 * plan.stages + plan.settle + plan.kept))
    advance = partial(_advance, problem, steps=plan.stride, **common)
    chain, heat_n = _start(
        problem, bank_unit, bank_model_BR, next(keys), walkers=plan.walkers, **common
    )
    for stage in range(plan.stages):
        chain, heat_n = _anneal(chain, heat_n, next(keys), stage == plan.stages - 1)
        chain, _ = advance(chain, heat_n, next(keys))
    for _ in range(plan.settle):
        chain, _ = advance(chain, heat_n, next(keys))
    coefficients, points = basis_CF.shape
    sums = _Sums(*(jnp.zeros((pairs, width)) for width in (points, points, *[coefficients] * 2)))
    moves_n = jnp.zeros(pairs)
    for _ in range(plan.kept):
        chain, accepted_n = advance(chain, heat_n, next(keys))
        sums = _collect(sums, chain.unit, grid_hz_F, basis_CF, **common)
        moves_n = moves_n + accepted_n
    averages = _Sums(*(np.asarray(total, float) / plan.kept for total in sums))
    return averages, np.asarray(moves_n, float) / plan.kept


def _pool(runs: list[tuple[_Sums, np.ndarray]]) -> Posterior:
    """Average independent runs, and let their disagreement say how many samples they are worth."""
    sums = _Sums(*(np.stack(column) for column in zip(*(run[0] for run in runs), strict=True)))
    curve_nF = sums.curve.mean(axis=0)
    variance_nF = np.maximum(sums.square.mean(axis=0) - curve_nF**2, 0.0)
    ess_n = np.full(len(curve_nF), np.nan)
    if len(runs) > 1:
        state_nC = sums.part_square.mean(axis=0) - sums.part.mean(axis=0) ** 2
        between_nC = np.var(sums.part, axis=0, ddof=1)
        ess_n = len(runs) / np.mean(between_nC / np.maximum(state_nC, 1e-12), axis=1)
    return Posterior(
        curve_nF,
        np.sqrt(variance_nF.mean(axis=1)),
        ess_n,
        np.mean([run[1] for run in runs], axis=0),
    )


@lru_cache(maxsize=4)
def _bank(
    table: eq.EqTable, seed: int, freq_hz_M: tuple[float, ...], sample_rate: float
) -> tuple[jax.Array, jax.Array]:
    """Prior draws in the unit cube [BANK, K, P], and their curves in dB [BANK, M]."""
    key = jax.random.split(jax.random.key(seed))[0]
    unit = jax.random.uniform(key, (BANK, len(table.bands), 3))
    bands_hz = jnp.asarray(freq_hz_M, jnp.float32)
    return unit, response(eq.from_unit(table, unit), bands_hz, sample_rate)


def sample_posterior(
    likelihood: Likelihood,
    difference_nD: np.ndarray,
    *,
    freq_hz_M: np.ndarray,
    table: eq.EqTable,
    sample_rate: float,
    seed: int,
    plan: Plan = PLAN,
) -> Posterior:
    """Posterior mean curves of n pairs, by Markov chains; see the module's description.

    Args:
      likelihood: from `reduce_noise`.
      difference_nD: [n, D] evidence differences in dB (any common level).
      freq_hz_M: band centres, [M] Hz.
      table: the prior, uniform in its unit cube.
      sample_rate: in Hz, of the settings.
      seed: of the chains; pairs share their random numbers.
      plan: how long to run.
    """
    grid_hz_F = jnp.asarray(eq.curve_grid_hz(sample_rate), jnp.float32)
    bands_hz = jnp.asarray(freq_hz_M, jnp.float32)
    # row by row, in one order, so that a pair's numbers do not depend on its neighbours'
    residual_nD = np.asarray(difference_nD, float) - likelihood.mean_D
    y_nR = np.einsum("nd,rd->nr", residual_nD, likelihood.data_RD, optimize=False)
    run_key = jax.random.split(jax.random.key(seed))[1]
    bank_unit, bank_curve_BM = _bank(table, seed, tuple(np.asarray(bands_hz).tolist()), sample_rate)
    model_RM = jnp.asarray(likelihood.model_RM, jnp.float32)
    bank_model_BR = jnp.matmul(bank_curve_BM, model_RM.T, precision=PRECISION)
    basis_CF = curve_basis(table, sample_rate).astype(np.float32)
    parts = []
    for start in range(0, len(y_nR), PAIRS_AT_ONCE):
        block_nR = y_nR[start : start + PAIRS_AT_ONCE]
        missing = PAIRS_AT_ONCE - len(block_nR)  # one compiled shape, one rounding
        padded_nR = np.pad(block_nR, ((0, missing), (0, 0)), mode="edge")
        problem = _Problem(jnp.asarray(padded_nR, jnp.float32), model_RM, bands_hz)
        runs = [
            _run(
                problem,
                bank_unit,
                bank_model_BR,
                basis_CF,
                grid_hz_F,
                one_key,
                table=table,
                sample_rate=sample_rate,
                plan=plan,
            )
            for one_key in jax.random.split(run_key, plan.runs)
        ]
        parts.append([array[: len(block_nR)] for array in _pool(runs)])
    return Posterior(*(np.concatenate(column) for column in zip(*parts, strict=True)))
