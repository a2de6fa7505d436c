"""What one step of training is: state, optimiser, update, and the error on held-out pairs.

Pure functions of arrays; `eqst.train` has the loop, the files and the signals.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from eqst import batches, objective, predictor
from eqst.config import Config


class State(NamedTuple):
    """All that training changes; a plain tree, saved whole."""

    step: jax.Array
    params: predictor.Params
    opt_state: optax.OptState
    ema: predictor.Params


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    train = config.train
    warmup = min(train.warmup_steps, train.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, warmup, train.steps, 0.01 * train.learning_rate
    )


def optimiser(config: Config) -> optax.GradientTransformation:
    """AdamW with clipped gradients; matrices alone are decayed."""
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            learning_rate(config),
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def init_state(
    config: Config, start: predictor.Params | None = None, key: jax.Array | None = None
) -> State:
    """The state before step 0: fresh parameters (of `key`; by default the seed's), or `start`."""
    params = start
    if params is None:
        params = predictor.init(config, jax.random.key(config.seed) if key is None else key)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, optimiser(config).init(params), jax.tree.map(jnp.copy, params))


def batch_terms(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    seen: batches.Seen,
    key: jax.Array | None,
) -> objective.Terms:
    """Terms of every pair, leaves [B]."""

    def one(
        input_XM: jax.Array, reference_XM: jax.Array, label_KP: jax.Array, b: jax.Array
    ) -> objective.Terms:
        own = None if key is None else jax.random.fold_in(key, b)
        seen_as = predictor.apply(config, params, normalisation, input_XM, reference_XM, own)
        return objective.pair_terms(config, seen_as, label_KP)

    return jax.vmap(one)(*seen, jnp.arange(len(seen.label_BKP)))


def train_step(
    config: Config, state: State, normalisation: predictor.Normalisation, seen: batches.Seen
) -> tuple[State, objective.Terms]:
    """One update. Pure; `config` is static. Returns the new state and the batch's mean terms."""
    # A stream of its own, apart from the one that draws pairs. Without dropout nothing is drawn,
    # and the seed is no part of the compiled step.
    dropout = config.model.dropout > 0
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step) if dropout else None

    def loss(params: predictor.Params) -> tuple[jax.Array, objective.Terms]:
        terms_B = batch_terms(config, params, normalisation, seen, key)
        terms = jax.tree.map(jnp.mean, terms_B)
        return terms.loss, terms

    (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimiser(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The average starts short, so that early checkpoints are not the initial weights.
    decay = jnp.minimum(config.train.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
    return State(state.step + 1, params, opt_state, ema), terms


def held_out_error_db(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    valid: batches.Weighed,
) -> jax.Array:
    """[] mean shape error over the pairs that count, whatever fills up the devices."""
    terms_B = batch_terms(config, params, normalisation, valid.seen, None)
    return jnp.sum(valid.weight_B * terms_B.shape_db)


@jax.jit
def all_finite(params: predictor.Params) -> jax.Array:
    """[] whether every number of a tree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(leaves))
