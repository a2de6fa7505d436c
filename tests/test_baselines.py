"""Baselines on pairs whose truth is made here: each must do what it is said to do."""

import jax
import numpy as np
import pytest

from eqst import baselines, bayes, eq, linear
from eqst.evidence import Evidence, band_hz

RATE = 44_100.0
FREQ_HZ_M = band_hz(RATE)
BANDS = len(FREQ_HZ_M)
OPTIONS = {"table": eq.PAPER, "sample_rate": RATE}
PLAN = bayes.Plan(runs=3, stages=8, kept=12)


def make_pairs(pairs: int, seed: int, talkers: int = 10, noise_db: float = 3.0):
    """A TrainSet from a model of talkers: tilt, smooth content noise in both spectra, a level."""
    rng = np.random.default_rng(seed)
    octave_M = np.log2(FREQ_HZ_M / 1000)
    smooth_MM = np.exp(-np.abs(octave_M[:, None] - octave_M[None, :]) / 0.3)
    root_MM = np.linalg.cholesky(smooth_MM)
    talker_n = np.arange(pairs) % talkers
    voice_nM = -4 * octave_M + 4 * (rng.normal(size=(talkers, BANDS)) @ root_MM.T)[talker_n]

    def segment():
        content_nM = rng.normal(size=(pairs, BANDS)) @ root_MM.T
        own_nM = rng.normal(size=(pairs, BANDS)) @ root_MM.T
        level_n1 = rng.uniform(-30, 0, (pairs, 1))
        return Evidence(
            voice_nM + noise_db * (content_nM + own_nM) + level_n1,
            voice_nM - 10 + noise_db * content_nM + level_n1,
        )

    params = eq.sample(eq.PAPER, jax.random.key(seed), (pairs,))
    curve_nM = np.asarray(bayes.response(params, FREQ_HZ_M, RATE), float)
    one, two = segment(), segment()
    equalised = Evidence(two.power_db + curve_nM, two.geometric_db + curve_nM)
    params = eq.EqParams(*(np.asarray(field) for field in params))
    return baselines.TrainSet(one, equalised, one, two, params, talker_n)


@pytest.fixture(scope="module")
def scored():
    """Fitted baselines, held-out pairs of other talkers, their answers and mean errors."""
    fitted = baselines.fit(make_pairs(200, 0), seed=0, **OPTIONS)
    held = make_pairs(48, 1)
    answers = baselines.predict(
        fitted, held.evidence_input, held.evidence_reference, seed=0, plan=PLAN, **OPTIONS
    )
    answers |= baselines.oracle(held.params, **OPTIONS)
    true_nF = linear.settings_curve(held.params, RATE)
    errors = {
        name: float(linear.shape_rmse(answer.curve_db_nF, true_nF).mean())
        for name, answer in answers.items()
    }
    return fitted, held, answers, errors


def test_folds_keep_talkers_together_and_need_enough_of_them():
    talker_n = np.array(["a", "b", "c", "d", "e", "f", "g"] * 3)
    fold_n = linear.folds(talker_n, 0)
    for talker in set(talker_n):
        assert len(set(fold_n[talker_n == talker])) == 1
    assert set(fold_n) == set(range(linear.FOLDS))
    with pytest.raises(ValueError, match="at least 5"):
        linear.folds(np.zeros(20), 0)


def test_smoothing_keeps_constants_and_spreads_a_spike_as_a_gaussian():
    np.testing.assert_allclose(
        baselines.smooth(np.full((1, BANDS), 3.0), FREQ_HZ_M, 0.5), 3.0, rtol=1e-12
    )
    spike_1M = np.zeros((1, BANDS))
    spike_1M[0, 26] = 1.0
    out_M = baselines.smooth(spike_1M, FREQ_HZ_M, 0.5)[0]
    assert out_M[32] / out_M[26] == pytest.approx(np.exp(-0.5 * (1 / 0.5) ** 2), rel=0.02)
    assert baselines.smooth(spike_1M, FREQ_HZ_M, 0.0) is spike_1M


def test_wiener_is_the_conditional_mean_of_the_joint_gaussian():
    # brute force: regress simulated curves on simulated data of the same joint distribution
    rng = np.random.default_rng(2)
    bands = 4
    prior = linear.Prior(np.diag([4.0, 3.0, 2.0, 1.0]), np.diag([4.0, 3.0, 2.0, 1.0]))
    noise = bayes.Noise(np.zeros(8), np.diag(np.linspace(1, 3, 8)))
    curve_nM = rng.normal(size=(100_000, bands)) * np.sqrt([4.0, 3.0, 2.0, 1.0])
    data_nD = np.tile(curve_nM, 2) + rng.normal(size=(100_000, 8)) * np.sqrt(np.linspace(1, 3, 8))
    seen_nD = data_nD - data_nD.mean(axis=1, keepdims=True)
    estimate_nM = data_nD @ linear.wiener(prior, noise, 1.0).T
    # the noise of the estimate's model is not level-free, so allow it 1 % over the least squares
    # that knows everything
    weight, *_ = np.linalg.lstsq(seen_nD, curve_nM, rcond=1e-6)
    best = np.mean((seen_nD @ weight - curve_nM) ** 2)
    assert np.mean((estimate_nM - curve_nM) ** 2) < 1.01 * best


def test_ridge_recovers_a_linear_map_as_the_penalty_vanishes():
    rng = np.random.default_rng(3)
    map_FM = rng.normal(size=(7, 5))
    feature_nM = rng.normal(size=(300, 5))
    target_nF = feature_nM @ map_FM.T
    fold_n = np.arange(300) % linear.FOLDS
    found_FM, held_nF, chosen = linear.tune_ridge(feature_nM, target_nF, fold_n)
    assert chosen["ridge_penalty"] == min(linear.RIDGES)
    np.testing.assert_allclose(found_FM, map_FM, atol=0.02)
    np.testing.assert_allclose(held_nF, target_nF, atol=0.1)


def test_curve_prior_has_the_moments_of_the_table():
    prior = linear.curve_prior(eq.PAPER, RATE)
    params = eq.sample(eq.PAPER, jax.random.key(77), (2000,))
    curve_nM = eq.remove_level(np.asarray(bayes.response(params, FREQ_HZ_M, RATE), float))
    scale = np.trace(prior.MM) / BANDS
    assert np.mean(curve_nM**2) == pytest.approx(scale, rel=0.05)
    np.testing.assert_allclose(prior.MM, curve_nM.T @ curve_nM / 2000, atol=0.15 * scale)


@pytest.mark.long
def test_every_method_answers_with_finite_curves_and_settings_of_the_table(scored):
    _, held, answers, _ = scored
    names = ["do_nothing", "mean_setting", "ltas", "ltas_shrunk", "ridge", "wiener"]
    names += ["bayes", "bayes_blind", "oracle", "oracle_grid"]
    assert list(answers) == names
    points = len(eq.curve_grid_hz(RATE))
    for answer in answers.values():
        assert answer.curve_db_nF.shape == (48, points)
        assert np.isfinite(answer.curve_db_nF).all()
        unit = np.asarray(eq.to_unit(eq.PAPER, answer.params))
        assert unit.shape == (48, 4, 3) and unit.min() > -1e-4 and unit.max() < 1 + 1e-4
    assert set(answers["bayes"].extra) == {"spread_db", "ess", "acceptance"}
    assert not answers["do_nothing"].curve_db_nF.any()


@pytest.mark.long
def test_oracles_are_near_the_truth_and_on_the_grid(scored):
    _, held, answers, errors = scored
    assert errors["oracle"] < 0.15
    assert errors["oracle_grid"] < 0.6
    index = eq.to_grid_index(eq.PAPER, answers["oracle_grid"].params)
    np.testing.assert_array_equal(index, eq.to_grid_index(eq.PAPER, held.params))
    units = eq.to_unit(eq.PAPER, answers["oracle_grid"].params)[..., 1] * 20
    np.testing.assert_allclose(units, np.round(units), atol=1e-9)


@pytest.mark.long
def test_methods_rank_as_their_knowledge_does(scored):
    fitted, _, answers, errors = scored
    # measured here: bayes 1.3, wiener 1.7, ridge 1.8, ltas 2.6, blind 2.7, nothing 3.6
    assert errors["bayes"] < errors["wiener"] < errors["ltas"]
    assert errors["bayes"] < 0.6 * errors["do_nothing"]
    assert errors["bayes"] < errors["bayes_blind"] < errors["do_nothing"]
    assert errors["ltas_shrunk"] < errors["ltas"] + 0.05
    # what the sampler believes of its error is near it
    spread = np.sqrt(np.mean(answers["bayes"].extra["spread_db"] ** 2))
    assert 0.6 < errors["bayes"] / spread < 1.3
    assert fitted.choices["pair_sampled_rmse_db"] < fitted.choices["pair_linear_rmse_db"]


@pytest.mark.long
def test_only_the_difference_of_shape_counts(scored):
    fitted, held, answers, _ = scored
    colour_1M = 6 * np.sin(np.arange(BANDS) / 5)[None]

    def changed(item, level_db):
        return Evidence(*(field[:4] + colour_1M + level_db for field in item))

    again = baselines.predict(
        fitted,
        changed(held.evidence_input, 5.0),
        changed(held.evidence_reference, -9.0),
        seed=0,
        plan=PLAN,
        **OPTIONS,
    )
    for name in ("ltas", "ltas_shrunk", "ridge", "wiener"):
        np.testing.assert_allclose(
            eq.remove_level(again[name].curve_db_nF),
            eq.remove_level(answers[name].curve_db_nF[:4]),
            atol=0.05,
        )
    blind = (again["bayes_blind"].curve_db_nF, answers["bayes_blind"].curve_db_nF[:4])
    assert np.abs(blind[0] - blind[1]).max() > 1.0  # the blind guess does hear the colour


@pytest.mark.long
def test_evidence_of_another_rate_is_refused(scored):
    fitted, held, _, _ = scored
    with pytest.raises(ValueError, match="bands at 8000"):
        baselines.predict(
            fitted,
            held.evidence_input,
            held.evidence_reference,
            table=eq.PAPER,
            sample_rate=8000.0,
            seed=0,
        )
