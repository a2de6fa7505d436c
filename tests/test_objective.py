"""Losses against numpy: level-free, finite where they are zero, right at their best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import sosfreqz

from eqst import biquad, eq, objective, predictor

TABLE = eq.PAPER


def prediction_of(unit_KP, logits=()):
    nothing = jnp.zeros(1)
    return predictor.Prediction(jnp.asarray(unit_KP), logits, nothing, nothing, nothing)


def scipy_curve_db(unit_KP, rate):
    settings = eq.from_unit(TABLE, np.asarray(unit_KP, np.float64))
    sections = biquad.sos(*eq.limit_to_rate(settings, rate)[0], kinds=eq.KINDS, sample_rate=rate)
    _, response_F = sosfreqz(sections, eq.curve_grid_hz(rate), fs=rate)
    return 20.0 * np.log10(np.abs(response_F))


@pytest.mark.parametrize("rate", [16000, 44100])
def test_shape_error_is_numpys(configure, rate):
    config = configure({"data.sample_rate": rate})
    rng = np.random.default_rng(0)
    for _ in range(5):
        guess, label = rng.uniform(size=(2, 4, 3)).astype(np.float32)
        terms = objective.pair_terms(config, prediction_of(guess), jnp.asarray(label))
        error_F = scipy_curve_db(guess, rate) - scipy_curve_db(label, rate)
        assert float(terms.shape_db) == pytest.approx(np.std(error_F), abs=2e-3)
        assert float(terms.parameters) == pytest.approx(np.mean((guess - label) ** 2), rel=1e-5)
        gain = eq.from_unit(TABLE, guess).gain_db
        assert float(terms.gain_db) == pytest.approx(np.sqrt(np.mean(gain**2)), rel=1e-4)


def test_shape_error_does_not_hear_level():
    rng = np.random.default_rng(1)
    a_F, b_F = rng.normal(size=(2, 50)).astype(np.float32)
    plain = objective.shape_error_db(jnp.asarray(a_F), jnp.asarray(b_F))
    louder = objective.shape_error_db(jnp.asarray(a_F + 30.0), jnp.asarray(b_F))
    assert float(louder) == pytest.approx(float(plain), abs=1e-4)


def test_gradient_is_finite_at_zero_error():
    curve_F = jnp.linspace(-5.0, 5.0, 20)
    value, gradient_F = jax.value_and_grad(objective.shape_error_db)(curve_F, curve_F)
    assert 0.0 < float(value) <= 1.1e-3 and np.all(np.isfinite(gradient_F))
    assert np.abs(gradient_F).max() == 0.0


@pytest.mark.parametrize("head", ["grid", "continuous"])
def test_gradient_of_the_loss_is_finite_everywhere(configure, head):
    config = configure({"model.head": head, "loss.gain": 0.1})

    @jax.jit
    @jax.grad
    def gradient(unit_KP, label_KP):
        logits = ()
        if head == "grid":
            sizes = eq.grid_sizes(TABLE)
            logits = tuple(unit_KP[:, p, None] * jnp.ones((4, n)) for p, n in enumerate(sizes))
        return objective.pair_terms(config, prediction_of(unit_KP, logits), label_KP).loss

    for fill in (0.0, 0.5, 1.0):
        unit_KP = jnp.full((4, 3), fill)
        assert np.all(np.isfinite(gradient(unit_KP, unit_KP)))


def test_weights_add_up(configure):
    unit_KP, label = jnp.full((4, 3), 0.4), jnp.full((4, 3), 0.7)
    weights = {"loss.parameters": 2.0, "loss.response": 3.0, "loss.gain": 5.0}
    terms = objective.pair_terms(configure(weights), prediction_of(unit_KP), label)
    expected = 2.0 * terms.parameters + 3.0 * terms.shape_db + 5.0 * terms.gain_db
    assert float(terms.loss) == pytest.approx(float(expected), rel=1e-6)


def targets(label_KP):
    """The cross-entropy's target, from its gradient: d CE / d logits = (softmax - target) / 12."""
    flat = tuple(jnp.zeros((4, n)) for n in eq.grid_sizes(TABLE))
    gradient = jax.grad(objective.grid_cross_entropy)(flat, jnp.asarray(label_KP), TABLE)
    return [1.0 / g.shape[-1] - 12.0 * np.asarray(g, np.float64) for g in gradient]


@pytest.mark.parametrize("fill", [None, 0.0, 1.0])
def test_target_is_two_neighbours_whose_expectation_is_the_label(fill):
    label_KP = np.random.default_rng(2).uniform(size=(4, 3)).astype(np.float32)
    if fill is not None:
        label_KP[:] = fill
    for p, (target_KG, grid_G) in enumerate(
        zip(targets(label_KP), eq.grid_units(TABLE), strict=True)
    ):
        np.testing.assert_allclose(target_KG.sum(axis=-1), 1.0, atol=1e-5)
        assert target_KG.min() > -1e-6
        assert np.all((target_KG > 1e-5).sum(axis=-1) <= 2)
        np.testing.assert_allclose(target_KG @ grid_G, label_KP[:, p], atol=1e-5)


def test_target_on_a_grid_point_is_that_point():
    index = np.array([[0, 0, 0], [20, 20, 13], [7, 10, 4], [13, 1, 12]])
    label_KP = eq.to_unit(TABLE, eq.from_grid_index(TABLE, index)).astype(np.float32)
    for p, target_KG in enumerate(targets(label_KP)):
        np.testing.assert_array_equal(target_KG.argmax(axis=-1), index[:, p])
        np.testing.assert_allclose(target_KG.max(axis=-1), 1.0, atol=1e-4)


def test_cross_entropy_against_numpy():
    rng = np.random.default_rng(3)
    label_KP = rng.uniform(size=(4, 3)).astype(np.float32)
    logits = [rng.normal(size=(4, n)).astype(np.float32) for n in eq.grid_sizes(TABLE)]
    got = objective.grid_cross_entropy(
        tuple(jnp.asarray(x) for x in logits), jnp.asarray(label_KP), TABLE
    )
    expected = []
    for p, (logit_KG, grid_G) in enumerate(zip(logits, eq.grid_units(TABLE), strict=True)):
        log_KG = logit_KG - np.log(np.exp(logit_KG).sum(axis=-1, keepdims=True))
        for k in range(4):
            # Hat functions of piecewise linear interpolation, one grid point at a time.
            weight_G = [np.interp(label_KP[k, p], grid_G, row) for row in np.eye(len(grid_G))]
            expected.append(-np.dot(weight_G, log_KG[k]))
    assert float(got) == pytest.approx(np.mean(expected), rel=1e-4)
