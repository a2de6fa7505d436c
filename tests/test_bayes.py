"""The posterior sampler against brute force, its own claims, and the algebra it rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqst import bayes, eq
from eqst.evidence import band_hz

RATE = 44_100.0
FREQ_HZ_M = band_hz(RATE)
BANDS = len(FREQ_HZ_M)
PLAN = bayes.Plan(runs=4, walkers=32, stride=8, stages=12, settle=4, kept=12)


def toy_noise(deviation_db: float) -> bayes.Noise:
    """Correlated along frequency and between the two spectra, as real evidence is."""
    octave_M = np.log2(FREQ_HZ_M)
    along_MM = np.exp(-np.abs(octave_M[:, None] - octave_M[None, :]) / 0.4)
    between = np.array([[1.5, 0.6], [0.6, 1.0]])
    covariance_DD = np.kron(between, along_MM) + 0.1 * np.eye(2 * BANDS)
    return bayes.Noise(np.zeros(2 * BANDS), deviation_db**2 * covariance_DD)


def simulate(noise: bayes.Noise, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences [n, D] drawn from the model itself, levels included, and their true curves."""
    rng = np.random.default_rng(seed)
    params = eq.sample(eq.PAPER, jax.random.key(seed), (pairs,))
    band_nM = np.asarray(bayes.response(params, FREQ_HZ_M, RATE), float)
    noise_nD = rng.multivariate_normal(noise.mean_D, noise.covariance_DD, size=pairs)
    level_n1 = rng.uniform(-20, 20, (pairs, 1))
    true_nF = np.asarray(bayes.response(params, eq.curve_grid_hz(RATE), RATE), float)
    return np.tile(band_nM, 2) + noise_nD + level_n1, eq.remove_level(true_nF)


def sample(noise: bayes.Noise, difference_nD, *, seed: int = 0, plan=PLAN) -> bayes.Posterior:
    return bayes.sample_posterior(
        bayes.reduce_noise(noise, bands=BANDS),
        difference_nD,
        freq_hz_M=FREQ_HZ_M,
        table=eq.PAPER,
        sample_rate=RATE,
        seed=seed,
        plan=plan,
    )


def test_reduced_likelihood_is_the_full_one_with_the_best_level():
    noise = toy_noise(2.0)
    noise = noise._replace(mean_D=np.linspace(-3, 3, 2 * BANDS))
    rng = np.random.default_rng(0)
    difference_D, curve_2M = rng.normal(size=2 * BANDS), rng.normal(size=(2, BANDS))
    inverse_DD = np.linalg.inv(noise.covariance_DD * 1.7)

    def full(curve_M):
        residual_D = difference_D - noise.mean_D - np.tile(curve_M, 2)
        ones_D = np.ones(2 * BANDS)
        level = ones_D @ inverse_DD @ residual_D / (ones_D @ inverse_DD @ ones_D)
        return (residual_D - level) @ inverse_DD @ (residual_D - level)

    likelihood = bayes.reduce_noise(noise, bands=BANDS, temperature=1.7)
    y_R = likelihood.data_RD @ (difference_D - noise.mean_D)

    def reduced(curve_M):
        return np.sum((y_R - likelihood.model_RM @ curve_M) ** 2)

    # equal up to a constant of the data; and blind to the level of the curve
    assert reduced(curve_2M[0]) - reduced(curve_2M[1]) == pytest.approx(
        full(curve_2M[0]) - full(curve_2M[1]), rel=1e-9
    )
    assert reduced(curve_2M[0] + 5.0) == pytest.approx(reduced(curve_2M[0]), rel=1e-9)


def test_moves_keep_the_uniform_distribution_of_a_cube():
    # With no data the chains must stay uniform: two moments of every parameter, and correlations.
    # The other half is correlated, as in a sharp posterior: steps reflected at the walls fail this.
    key = jax.random.key(5)
    unit = jax.random.uniform(key, (1, 4000, 4, 3))
    along = jax.random.uniform(jax.random.key(6), (1, 4000, 1, 1))
    other = jnp.broadcast_to(along, unit.shape)
    for step in range(20):
        proposal, _ = bayes._propose(jax.random.key(step), unit, other)
        unit = proposal
    flat = np.asarray(unit).reshape(4000, 12)
    np.testing.assert_allclose(flat.mean(axis=0), 0.5, atol=5 * np.sqrt(1 / 12 / 4000))
    np.testing.assert_allclose(flat.var(axis=0), 1 / 12, atol=0.006)
    apart = np.corrcoef(flat.T) - np.eye(12)
    assert np.abs(apart).max() < 5 / np.sqrt(4000)


def test_noise_covariance_is_the_samples_and_shrinks_to_its_diagonal():
    truth = toy_noise(2.0).covariance_DD
    rng = np.random.default_rng(1)
    draws_nD = rng.multivariate_normal(np.zeros(2 * BANDS), truth, size=20_000)
    level_DD = np.eye(2 * BANDS) - 1 / (2 * BANDS)
    expected_DD = level_DD @ truth @ level_DD
    found = bayes.fit_noise(draws_nD + 9.0, shrink=0.0, centred=True)
    np.testing.assert_allclose(found.covariance_DD, expected_DD, atol=0.35)  # 5 sd of 20 000
    assert not found.mean_D.any()
    shrunk = bayes.fit_noise(draws_nD, shrink=0.5, centred=True).covariance_DD
    np.testing.assert_allclose(np.diag(shrunk), np.diag(found.covariance_DD), rtol=1e-9)
    np.testing.assert_allclose(shrunk[0, 1:], 0.5 * found.covariance_DD[0, 1:], atol=1e-9)
    offset_D = np.linspace(-1, 1, 2 * BANDS)
    moved = bayes.fit_noise(draws_nD + offset_D, shrink=0.0, centred=False)
    np.testing.assert_allclose(moved.mean_D, offset_D, atol=0.1)


@pytest.mark.long
def test_posterior_mean_is_that_of_brute_force_importance_sampling():
    # Noise wide enough that plain prior draws still give an effective sample of hundreds.
    noise = toy_noise(20.0)
    difference_nD, _ = simulate(noise, 5, seed=2)
    found = sample(noise, difference_nD)
    params = eq.sample(eq.PAPER, jax.random.key(99), (10_000,))
    grid_BF = eq.remove_level(
        np.asarray(bayes.response(params, eq.curve_grid_hz(RATE), RATE), float)
    )
    band_BM = np.asarray(bayes.response(params, FREQ_HZ_M, RATE), float)
    inverse_DD = np.linalg.inv(noise.covariance_DD)
    for row, difference_D in enumerate(difference_nD):
        residual_BD = difference_D - np.tile(band_BM, 2)
        toward_D = inverse_DD.sum(axis=1)
        residual_BD -= (residual_BD @ toward_D / toward_D.sum())[:, None]
        misfit_B = np.einsum("bd,bd->b", residual_BD @ inverse_DD, residual_BD)
        weight_B = np.exp(-0.5 * (misfit_B - misfit_B.min()))
        weight_B /= weight_B.sum()
        size = 1 / (weight_B**2).sum()
        assert size > 100
        mean_F = weight_B @ grid_BF
        variance_F = weight_B @ (grid_BF - mean_F) ** 2
        error_db = np.sqrt(np.mean((found.curve_db_nF[row] - mean_F) ** 2))
        # both are estimates, with these standard errors
        expected_db = found.spread_db[row] * np.sqrt(1 / found.ess[row] + 1 / size)
        assert error_db < 2.5 * expected_db
        assert found.spread_db[row] == pytest.approx(np.sqrt(variance_F.mean()), rel=0.2)


@pytest.fixture(scope="module")
def sharp():
    """64 pairs with noise as of 10 s of speech, sampled with two seeds."""
    noise = toy_noise(2.0)
    difference_nD, true_nF = simulate(noise, 64, seed=3)
    return difference_nD, true_nF, [sample(noise, difference_nD, seed=s) for s in (0, 1)]


@pytest.mark.long
def test_posterior_is_calibrated_and_beats_the_prior(sharp):
    _, true_nF, (found, _) = sharp
    error_n = np.std(found.curve_db_nF - true_nF, axis=1)
    # the deviation of 64 root mean squares is some 10 % of their size
    ratio = np.sqrt(np.mean(error_n**2) / np.mean(found.spread_db**2))
    assert 0.75 < ratio < 1.3
    assert error_n.mean() < 0.5 * np.std(true_nF, axis=1).mean()


@pytest.mark.long
def test_effective_sample_size_predicts_the_difference_of_two_runs(sharp):
    _, _, (one, two) = sharp
    apart_n = np.mean((one.curve_db_nF - two.curve_db_nF) ** 2, axis=1)
    claimed_n = one.spread_db**2 / one.ess + two.spread_db**2 / two.ess
    # runs of one seed share the bank of prior draws, runs of two seeds do not, so somewhat above 1
    assert 0.4 < apart_n.mean() / claimed_n.mean() < 2.0
    assert (one.acceptance > 0.1).all() and (one.acceptance < 0.9).all()


@pytest.mark.long
def test_default_plan_reaches_a_hundred_effective_samples_for_nine_pairs_in_ten(sharp):
    difference_nD, _, _ = sharp
    found = sample(toy_noise(2.0), difference_nD, plan=bayes.PLAN)
    assert np.mean(found.ess >= 100) >= 0.9


@pytest.mark.long
def test_a_pairs_answer_depends_on_nothing_but_the_pair_and_the_seed(sharp):
    difference_nD, _, (found, other) = sharp
    alone = sample(toy_noise(2.0), difference_nD[17:18])  # at another place in the batch
    np.testing.assert_array_equal(alone.curve_db_nF[0], found.curve_db_nF[17])
    louder = sample(toy_noise(2.0), difference_nD[:2] + 6.0)
    np.testing.assert_allclose(louder.curve_db_nF.mean(axis=1), 0.0, atol=1e-4)
    assert not np.array_equal(found.curve_db_nF, other.curve_db_nF)
