"""The training loop: `python -m eqst.train --config=FILE --workdir=DIR [--config.key=value]`.

The same command again resumes exactly: example k is a pure function of (seed, k), dropout keys of
(seed, step), and everything else is in the checkpoint. SIGTERM and SIGINT save and leave with exit
code 75; a non-finite loss stops with the step and leaves the last good checkpoint as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from ml_collections import config_flags

from eqst import (
    batches,
    checkpoint,
    command,
    corpus,
    eq,
    mesh,
    objective,
    pairs,
    predictor,
)
from eqst.config import Config, ConfigError, as_dict, from_card, validate
from eqst.record import Record, clock

EXIT_INTERRUPTED = 75
# Settings that may differ between two runs on one workdir without changing a result.
FREE_KEYS = ("train.devices", "train.log_every", "train.tensorboard", "data.cache_dir")


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived and the state is saved."""


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


def _batch_terms(
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
        terms_B = _batch_terms(config, params, normalisation, seen, key)
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
    terms_B = _batch_terms(config, params, normalisation, valid.seen, None)
    return jnp.sum(valid.weight_B * terms_B.shape_db)


# --- the loop ------------------------------------------------------------------------------------


def differing_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Settings that differ between two configs, as 'key: old -> new'."""
    lines = []
    for key in sorted(set(old) | set(new)):
        path = f"{prefix}{key}"
        a, b = old[key] if key in old else None, new[key] if key in new else None
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing_keys(a, b, f"{path}.")
        elif path not in FREE_KEYS and json.dumps(a) != json.dumps(b):
            lines.append(f"{path}: {a} -> {b}")
    return lines


class _Signals:
    """Remembers SIGTERM and SIGINT; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_early(self) -> None:
        """Between the stages of the start: leaves if any process was told to; nothing is new."""
        if mesh.gathered(int(self.received is not None)).any():
            raise Interrupted(f"{self.name()}: stopped before training; the same command goes on")

    def name(self) -> str:
        """What this process was told to stop by; it may have been another that was."""
        return self.received or "another process was stopped"

    def _remember(self, number: int, _: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if number == signal.SIGINT and os.isatty(2):  # a person waits, for a compilation perhaps
            os.write(2, b"SIGINT: saving after this step; once more ends at once\n")


def train(config: Config, workdir: str | os.PathLike, say: Callable[[str], None] = print) -> State:
    """Trains, or goes on where the workdir's newest checkpoint is.

    Args:
      config: checked settings.
      workdir: the run's folder, or its address in a bucket (gs://..); its only state.
      say: called with each line of progress.

    Returns:
      the final state.

    Raises:
      ConfigError: the workdir belongs to a run with other settings.
      FloatingPointError: the loss is not finite; the message has the step.
      Interrupted: SIGTERM or SIGINT; everything is saved.
    """
    workdir = epath.Path(workdir)
    if jax.process_index() > 0:
        say = _nothing
    plain = json.loads(json.dumps(as_dict(config)))  # as the card has it
    if len(set(mesh.gathered(zlib.crc32(json.dumps(plain).encode()) >> 1))) > 1:
        raise ConfigError("the processes were started with different settings: give all the same")
    card = checkpoint.find_card(workdir)
    if card is not None:
        old = as_dict(from_card(card["config"]))
        changed = differing_keys(json.loads(json.dumps(old)), plain)
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with other settings ({'; '.join(changed)}); "
                "take them back or choose another --workdir, which "
                f"--config.train.init_from={workdir} starts from this run's weights"
            )
    with checkpoint.Checkpoints(workdir) as saved, _Signals() as signals:
        return _run(config, workdir, saved, signals, say)


def _run(
    config: Config,
    workdir: epath.Path,
    saved: checkpoint.Checkpoints,
    signals: _Signals,
    say: Callable[[str], None],
) -> State:
    devices = mesh.make_mesh(config.train.devices or None)
    rules = mesh.Shardings.of(devices)
    # Refuses a batch that does not divide by the devices before any work is done.
    mesh.process_slice(devices, config.train.batch_size)
    start = None
    if config.train.init_from:
        loaded = checkpoint.load(config.train.init_from, which="best")
        predictor.check_params(config, loaded.params, config.train.init_from)
        start = loaded.params["network"]
    # The key is an argument, so that runs of other seeds find this compiled.
    make_state = functools.partial(
        jax.jit(functools.partial(init_state, config, start), out_shardings=rules.params),
        key=jax.random.key(config.seed),
    )
    resumed = _restore(config, saved, make_state, rules)
    if resumed is not None:
        state, normalisation = resumed
        say(f"resumed at step {int(state.step)} of {config.train.steps}")
        if int(state.step) >= config.train.steps:
            say(f"finished: {workdir}")
            return state
    recordings, choosing = mesh.together(
        lambda: tuple(corpus.open_corpus(config.data, split, say) for split in ("train", "valid")),
        ValueError,
        OSError,
    )
    say(
        f"train: {len(recordings.talker_R)} recordings, {recordings.seconds() / 60:.1f} min; "
        f"{devices.size} {devices.devices.flat[0].platform} device(s)"
    )
    signals.stop_early()
    # Before anything is written: the held-out talkers' recordings may give no pair.
    pairs.build_index(choosing, config.data.segment_seconds[0], config.data.min_loudness_lufs)
    supply = batches.make_source(config, recordings, devices, say)
    if resumed is None:
        normalisation = batches.measure_normalisation(config, supply)
        facts = {name: np.asarray(x).tolist() for name, x in normalisation._asdict().items()}
        table = dataclasses.asdict(eq.table(config.eq_table))
        card = {"config": as_dict(config), "normalisation": facts, "band_table": table}
        checkpoint.write_card(workdir, card)
        state, normalisation = make_state(), mesh.copied(devices, normalisation)
        saved.save(0, _saved_tree(state, normalisation))
    signals.stop_early()
    held_out = not set(choosing.talker_R) & set(recordings.talker_R)
    valid = batches.valid_pairs(config, choosing, devices)
    say(f"valid: {config.train.eval_pairs} pairs of {'held-out' if held_out else 'TRAIN'} talkers")
    record = Record(workdir, int(state.step), config.train.tensorboard, say)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    say(f"network: {count:,} parameters")

    # That some process was told to stop comes out of the step as its loss does: the same for all.
    @functools.partial(
        jax.jit,
        static_argnums=5,
        donate_argnums=0,
        out_shardings=(rules.params, rules.metrics, rules.metrics),
    )
    def step_once(
        state: State, normalisation: Any, batch: Any, constants: Any, flag: Any, which: int
    ) -> tuple[State, objective.Terms, jax.Array]:
        seen = supply.see(batch, constants, which)
        return *train_step(config, state, normalisation, seen), jnp.any(flag)

    evaluate = jax.jit(functools.partial(held_out_error_db, config), out_shardings=rules.metrics)

    name = "valid_shape_db" if held_out else "train_exact_shape_db"
    start_step, lengths = int(state.step), len(config.data.segment_seconds)
    stream = supply.stream(start_step)
    # Steps not yet in a line of the record; at first those from before an interruption.
    unlogged: Any = saved.notes["unlogged"] if "unlogged" in saved.notes else []
    pending: list[tuple[int, Any]] = [
        (step, objective.Terms(*map(jnp.float32, terms))) for step, terms in unlogged
    ]
    flags, asked = mesh.flags(devices), np.asarray(False)
    waited, since, done_since = 0.0, time.monotonic(), 0
    began, first_step = time.monotonic(), start_step
    for step in range(start_step, config.train.steps):
        before = time.monotonic()
        batch = next(stream)
        waited += time.monotonic() - before
        which = step % lengths
        asked_before, flag = asked, flags[signals.received is not None]
        state, terms, asked = step_once(state, normalisation, batch, supply.constants, flag, which)
        # The step before is read while this one runs.
        if pending:
            _check_finite(*pending[-1])
        leaving = bool(asked_before)
        pending.append((step, terms))
        done = step + 1
        done_since += 1
        if done == start_step + lengths:  # compilation is no measure of the time left
            jax.block_until_ready(state)
            began, first_step = time.monotonic(), done
        last = done == config.train.steps
        if done % config.train.log_every == 0 or last:
            _check_finite(step, terms)
            means = jax.tree.map(
                lambda *x: float(np.mean(np.asarray(x, np.float32))),
                *(terms for _, terms in pending),
            )
            now = time.monotonic()
            rate = done_since * config.train.batch_size / (now - since)
            left = (config.train.steps - done) * (now - began) / max(done - first_step, 1)
            share = waited / (now - since)
            values = {**means._asdict(), "learning_rate": float(learning_rate(config)(step))}
            record.write(done, {**values, "pairs_per_s": rate, "input_wait": share})
            record.say(
                f"step {done}/{config.train.steps}  loss {means.loss:.3f}  shape "
                f"{means.shape_db:.3f} dB  {rate:,.0f} pairs/s  input wait {share:.0%}  "
                f"left {clock(left)}"
            )
            pending, waited, since, done_since = [], 0.0, now, 0
        if done % config.train.eval_every == 0 or last:
            _check_finite(step, terms)
            error = float(evaluate(state.ema, normalisation, valid))
            record.write(done, {name: error})
            record.say(f"step {done}  {name} {error:.3f}")
            saved.save_best(done, _saved_tree(state, normalisation)["params"], error)
        if done % config.train.checkpoint_every == 0 or last or leaving:
            _check_finite(step, terms)
            if not all_finite(state.params):
                raise FloatingPointError(_diverged("a parameter is not finite", step))
            record.flush()
            unlogged = [[step, [float(x) for x in terms]] for step, terms in pending]
            saved.save(done, _saved_tree(state, normalisation), {"unlogged": unlogged})
        if leaving and not last:
            raise Interrupted(f"{signals.name()}: saved at step {done}; the same command resumes")
    say(f"finished: {workdir}")
    return state


def _nothing(_: str) -> None:
    """Says nothing: what every process but the first does with its progress."""


def _saved_tree(state: State, normalisation: predictor.Normalisation) -> dict[str, Any]:
    """What a checkpoint holds; `params` is what `checkpoint.load` finds in it."""
    params = {"network": state.ema, "normalisation": normalisation._asdict()}
    return {"params": params, "state": state._replace(ema={})}


def _restore(
    config: Config, saved: checkpoint.Checkpoints, make_state: Callable, rules: mesh.Shardings
) -> tuple[State, predictor.Normalisation] | None:
    """The newest intact checkpoint, or None."""
    state = jax.eval_shape(make_state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.params),
        _saved_tree(state, predictor.normalisation_shape(config)),
    )
    found = saved.restore(abstract)
    if found is None:
        return None
    _, tree = found
    normalisation = predictor.Normalisation(**tree["params"]["normalisation"])
    return tree["state"]._replace(ema=tree["params"]["network"]), normalisation


def _check_finite(step: int, terms: objective.Terms) -> None:
    loss = float(terms.loss)
    if not np.isfinite(loss):
        raise FloatingPointError(_diverged(f"loss is {loss}", step))


def _diverged(what: str, step: int) -> str:
    return (
        f"{what} at step {step}; the last checkpoint is from before it; lower train.learning_rate "
        "or train.clip_norm and take another --workdir (--config.train.init_from=THIS_ONE starts "
        "from its best weights)"
    )


@jax.jit
def all_finite(params: predictor.Params) -> jax.Array:
    """[] whether every number of a tree is finite."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(leaves))


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    config_flags.DEFINE_config_file("config", None, "Config file; --config.key=value changes it.")
    flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes.")
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """The command."""
    mesh.join()
    try:
        config = validate(flags.FLAGS.config)
        train(config, flags.FLAGS.workdir, functools.partial(print, flush=True))
    except Interrupted as event:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what there was to save is saved
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BaseException as error:
        mesh.part()
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise OSError(
                f"another process is gone ({str(error)[:120]}): start all of them again, "
                "they go on from the last checkpoint"
            ) from None
        raise


if __name__ == "__main__":
    command.start("eqst.train", define_flags, main)
