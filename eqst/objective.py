"""Losses of one pair: on the parameters, on the level-free response, on gain. Pure functions."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import eq
from eqst.config import Config
from eqst.predictor import Prediction


class Terms(NamedTuple):
    """Scalars of one pair; `shape_db` is the headline error (design section 3)."""

    loss: jax.Array
    parameters: jax.Array
    shape_db: jax.Array
    gain_db: jax.Array


def shape_error_db(predicted_F: jax.Array, true_F: jax.Array) -> jax.Array:
    """RMS over frequency of the dB error, its mean over frequency removed.

    The square root is kept off zero by 1e-3 dB, so that its gradient is finite everywhere.
    """
    error_F = eq.remove_level(predicted_F - true_F)
    return jnp.sqrt(jnp.mean(error_F**2) + 1e-6)


def grid_cross_entropy(
    logits: tuple[jax.Array, ...], label_KP: jax.Array, table: eq.EqTable
) -> jax.Array:
    """Mean cross-entropy over bands and parameters against the two grid points round the label.

    The label is continuous: its mass is shared by the neighbours in proportion to nearness, so
    that the expectation under a perfect head is the label itself.
    """
    terms = []
    for p, (logit_KG, grid) in enumerate(zip(logits, eq.grid_units(table), strict=True)):
        ascending = np.asarray(grid, np.float32)
        order = np.argsort(ascending)
        grid_G = jnp.asarray(ascending[order])
        label_K = jnp.clip(label_KP[:, p], grid_G[0], grid_G[-1])
        right_K = jnp.clip(jnp.searchsorted(grid_G, label_K, side="right"), 1, len(grid) - 1)
        step_K = grid_G[right_K] - grid_G[right_K - 1]
        share_K = (label_K - grid_G[right_K - 1]) / step_K
        one_hot = functools.partial(jax.nn.one_hot, num_classes=len(grid), dtype=grid_G.dtype)
        target_KG = one_hot(right_K) * share_K[:, None]
        target_KG += one_hot(right_K - 1) * (1.0 - share_K)[:, None]
        log_KG = jax.nn.log_softmax(logit_KG, axis=-1)[:, order]
        terms.append(-jnp.sum(target_KG * log_KG, axis=-1))
    return jnp.mean(jnp.stack(terms))


class Weights(NamedTuple):
    """Of the terms of the objective: numbers, or traced [] ones."""

    parameters: Any
    response: Any
    gain: Any

    @classmethod
    def of(cls, config: Config) -> Weights:
        """A config's own."""
        return cls(config.loss.parameters, config.loss.response, config.loss.gain)


def pair_terms(
    config: Config, prediction: Prediction, label_KP: jax.Array, weights: Weights | None = None
) -> Terms:
    """The objective of one pair.

    Args:
      config: static.
      prediction: from `predictor.apply`.
      label_KP: [K, 3] true settings in the unit cube.
      weights: of the terms, numbers or traced; None takes those of `config.loss`.
    """
    table, rate = eq.table(config.eq_table), config.data.sample_rate
    weights = Weights.of(config) if weights is None else weights
    grid_hz_F = jnp.asarray(eq.curve_grid_hz(rate), jnp.float32)
    guess = eq.from_unit(table, prediction.unit_KP)
    curves = (
        eq.response_db(eq.limit_to_rate(settings, rate)[0], grid_hz_F, sample_rate=rate)
        for settings in (guess, eq.from_unit(table, label_KP))
    )
    shape_db = shape_error_db(*curves)
    if prediction.logits:
        parameters = grid_cross_entropy(prediction.logits, label_KP, table)
    else:
        parameters = jnp.mean((prediction.unit_KP - label_KP) ** 2)
    gain_db = jnp.sqrt(jnp.mean(guess.gain_db**2) + 1e-6)
    loss = weights.response * shape_db + weights.parameters * parameters + weights.gain * gain_db
    return Terms(loss, parameters, shape_db, gain_db)
