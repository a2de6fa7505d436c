"""What one step of training is: state, optimiser, update, and the error on held-out pairs.

Pure functions of arrays; `eqst.train` has the loop, the files and the signals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqst import batches, mesh, objective, predictor
from eqst.config import Config


class State(NamedTuple):
    """All that training changes; a plain tree, saved whole."""

    step: jax.Array
    params: predictor.Params
    opt_state: optax.OptState
    ema: predictor.Params


class Knobs(NamedTuple):
    """The numbers that members which are trained as one program may differ in.

    Plain numbers are constants of the compiled step; traced ones ([], or [members] under vmap) let
    one program serve them all. `KNOBS` are their places in a config.
    """

    seed: Any
    learning_rate: Any
    weight_decay: Any
    clip_norm: Any
    ema_decay: Any
    weights: objective.Weights

    @classmethod
    def of(cls, config: Config) -> Knobs:
        """A config's own."""
        train = config.train
        return cls(
            config.seed,
            train.learning_rate,
            train.weight_decay,
            train.clip_norm,
            train.ema_decay,
            objective.Weights.of(config),
        )


# The fold that a run holds out is one too: members share the recordings, and weigh them otherwise.
KNOBS = (
    *(
        "seed",
        "data.fold",
        "train.learning_rate",
        "train.weight_decay",
        "train.clip_norm",
        "train.ema_decay",
    ),
    *("loss.parameters", "loss.response", "loss.gain"),
)


def program(plain: dict[str, Any]) -> dict[str, Any]:
    """Settings (`config.as_dict`) without the knobs: what members of one program have in common."""
    # A reference from another recording is drawn from a run's own list of them.
    own = ("data.fold",) if plain["data"]["different_recordings"] else ()
    knobs = set(KNOBS) - set(own)
    return {
        name: {key: x for key, x in value.items() if f"{name}.{key}" not in knobs}
        if isinstance(value, dict)
        else value
        for name, value in plain.items()
        if name not in knobs
    }


def stacked_knobs(configs: Sequence[Config]) -> Knobs:
    """Those of several configs, every number [members]."""

    def stack(*numbers: Any) -> np.ndarray:
        return np.array(numbers, np.int32 if isinstance(numbers[0], int) else np.float32)

    return jax.tree.map(stack, *(Knobs.of(config) for config in configs))


def learning_rate(config: Config, peak: Any) -> optax.Schedule:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    warmup = min(config.train.warmup_steps, config.train.steps - 1)
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, config.train.steps, 0.01)
    return lambda step: peak * share(step)


def optimiser(config: Config, knobs: Knobs) -> optax.GradientTransformation:
    """AdamW with clipped gradients; matrices alone are decayed."""
    return optax.chain(
        optax.clip_by_global_norm(knobs.clip_norm),
        optax.adamw(
            learning_rate(config, knobs.learning_rate),
            weight_decay=knobs.weight_decay,
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
    opt_state = optimiser(config, Knobs.of(config)).init(params)
    return State(zero, params, opt_state, jax.tree.map(jnp.copy, params))


def batch_terms(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    seen: batches.Seen,
    key: jax.Array | None = None,
    weights: objective.Weights | None = None,
    *,
    own_kernels: bool = False,
) -> objective.Terms:
    """Terms of every pair, leaves [B]; `key` for dropout, `weights` of the loss if not its own.

    `own_kernels` as in `predictor.apply`.
    """

    def one(
        input_XM: jax.Array, reference_XM: jax.Array, label_KP: jax.Array, b: jax.Array
    ) -> objective.Terms:
        own = None if key is None else jax.random.fold_in(key, b)
        seen_as = predictor.apply(
            config, params, normalisation, input_XM, reference_XM, own, own_kernels=own_kernels
        )
        return objective.pair_terms(config, seen_as, label_KP, weights)

    return jax.vmap(one)(*seen, jnp.arange(len(seen.label_BKP)))


def train_step(
    config: Config,
    state: State,
    normalisation: predictor.Normalisation,
    seen: batches.Seen,
    knobs: Knobs | None = None,
    *,
    own_kernels: bool = False,
) -> tuple[State, objective.Terms]:
    """One update. Pure; `config` is static. Returns the new state and the batch's mean terms.

    `knobs` stand for the config's own numbers where they are given; `own_kernels` as in
    `predictor.apply`.
    """
    knobs = Knobs.of(config) if knobs is None else knobs
    # A stream of its own, apart from the one that draws pairs. Without dropout nothing is drawn,
    # and the seed is no part of the compiled step.
    dropout = config.model.dropout > 0
    key = jax.random.fold_in(jax.random.key(knobs.seed + 1), state.step) if dropout else None

    def loss(params: predictor.Params) -> tuple[jax.Array, objective.Terms]:
        terms_B = batch_terms(
            config, params, normalisation, seen, key, knobs.weights, own_kernels=own_kernels
        )
        terms = jax.tree.map(jnp.mean, terms_B)
        return terms.loss, terms

    (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimiser(config, knobs).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The average starts short, so that early checkpoints are not the initial weights.
    decay = jnp.minimum(knobs.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
    return State(state.step + 1, params, opt_state, ema), terms


def held_out_error_db(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    valid: batches.Weighed,
    *,
    own_kernels: bool = False,
) -> jax.Array:
    """[] mean shape error over the pairs that count, whatever fills up the devices."""
    terms_B = batch_terms(config, params, normalisation, valid.seen, own_kernels=own_kernels)
    return jnp.sum(valid.weight_B * terms_B.shape_db)


@jax.jit
def all_finite(params: predictor.Params) -> jax.Array:
    """[] whether every number of a tree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(leaves))


def apart(config: Config, devices: jax.sharding.Mesh) -> bool:
    """Whether members are better off one by one: convolutional ones that share their devices."""
    return config.features.kind == "mel" and mesh.groups(devices) == 1


def over_members(function: Callable, *, apart: bool) -> Callable:
    """A function of one run's trees as that of several runs, stacked along a first axis.

    Args:
      function: of trees, and of `own_kernels`.
      apart: one member after the other in the program, with convolutions as a run alone has them,
        and not all by `vmap`, which makes products of patches of them (2 to 4 times as long).
    """
    if not apart:
        return jax.vmap(functools.partial(function, own_kernels=True))

    def one_by_one(*trees: Any) -> Any:
        count = len(jax.tree.leaves(trees)[0])
        parts = [function(*jax.tree.map(lambda x, i=i: x[i], trees)) for i in range(count)]
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    return one_by_one
