"""Full training steps from the resident corpus, for `eqst.speed`: pairs per second by batch size.

Meant for an accelerator. One program after the other is compiled and timed: what tunes kernels
while they are compiled wants the device for itself too, and each has told its figures before the
next begins. What a step costs is the compiler's count, as in a run's summary.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import batches, config, corpus, cost, learner, mesh, predictor, recipes
from eqst.timing import Say, Section, Size, target

# Pairs a second of 3 s that one H200 is asked for, at batches of 1,024 and more.
LEAST_PAIRS_PER_S, LARGE = 20_000, 1024
_CALL = 10
_EDGE = 10  # steps whose mean loss is told of the beginning and of the end


class _Case(NamedTuple):
    """A program to time: `members` runs of `batch` pairs each, with dotted changes."""

    what: str
    batch: int
    changes: dict[str, Any]
    members: int = 1
    steps: int = 1  # in one call


def _cases(size: Size) -> list[_Case]:
    small, large = size.device_batches[:2]
    bf16, exact = {"model.bfloat16": True}, {"data.rendering": "exact"}
    plain = {"data.warp": 1.0, "data.curve_share": 0.0, "data.noise_share": 0.0}
    cases = [_Case(f"db_mel_pm, batch {n}", n, {}) for n in size.device_batches]
    cases += [_Case(f"db_mel_pm, batch {large}, bf16 encoder", large, bf16)]
    cases += [_Case(f"db_mel_pm, batch {large}, exact rendering", large, plain | exact)]
    cases += [_Case(f"db_mel_pm, 8 members of batch {small}", small, {}, 8)]
    cases += [_Case(f"db_mel_pm, batch {small}, {_CALL} steps a call", small, {}, steps=_CALL)]
    cases += [_Case(f"pooled, batch {large}", large, _POOLED)]
    return [*cases, _Case(f"pooled, 8 members of batch {small}", small, _POOLED, 8)]


_POOLED = {
    "features.kind": "pooled",
    "model.comparison": "direct",
    "model.head": "continuous",
    "data.rendering": "pooled",
}


def device_steps(size: Size, say: Say) -> Section:
    """Step time, pairs per second and share of the chip's peak; features alone beside them."""
    raw = recipes.paper()
    raw.data.synthetic_talkers, raw.data.valid_share = size.talkers, 0.0
    base = config.validate(raw)
    recordings = corpus.open_corpus(base.data, "train", say)
    devices = mesh.make_mesh(1)
    rows = []
    for case in _cases(size):
        settings = raw.copy_and_resolve_references()
        settings.update_from_flattened_dict(case.changes | {"train.batch_size": case.batch})
        made = config.validate(settings)
        source = batches.make_source(made, recordings, devices, lambda _: None)
        began = time.perf_counter()
        programs = _compiled(made, source, case, recordings.weight_R)
        compiling = time.perf_counter() - began
        rows.append(_timed(case, *programs, size) | {"compile_s": compiling})
        said = f"{rows[-1]['pairs_per_s']:,.0f} pairs/s, {rows[-1]['milliseconds']:.1f} ms a step"
        say(f"{case.what}: {said}, compiled in {compiling:.0f} s")
    large = [
        row for row in rows if row["batch"] >= LARGE and row["what"].startswith("db_mel_pm, b")
    ]
    targets = [
        target(f"{row['what']}, pairs/s", row["pairs_per_s"], least=LEAST_PAIRS_PER_S)
        for row in large
    ]
    device = jax.devices()[0].device_kind
    about = f"full steps on 3 s pairs from a resident corpus of {size.talkers} talkers, {device}"
    return Section(about, rows, targets)


class _Program(NamedTuple):
    """A compiled step with what it is given."""

    step: Any
    state: Any
    number: Any  # of the next step
    constants: Any


def _compiled(
    made: config.Config, source: batches.Source, case: _Case, weight_R: np.ndarray
) -> tuple[_Program, _Program]:
    """The step, and the features alone."""
    shape = predictor.normalisation_shape(made).mean.shape
    normalisation = predictor.Normalisation(jnp.zeros(shape), jnp.full(shape, 15.0))
    state = learner.init_state(made)
    step: Any = functools.partial(learner.train_step, made)
    own: Any = None
    if case.members > 1:
        seeds = range(case.members)
        source = batches.of_members(
            [batches.of_member(source, seed, weight_R) for seed in seeds], jax.device_put
        )
        state, normalisation = jax.tree.map(
            lambda x: jnp.stack([x] * case.members), (state, normalisation)
        )
        own = learner.stacked_knobs([made] * case.members)
        step = learner.over_members(step, apart=learner.apart(made, mesh.make_mesh(1)))

    def see(number: jax.Array, constants: Any) -> batches.Seen:
        return source.see(number, constants, 0)

    def whole(state: Any, number: jax.Array, constants: Any) -> Any:
        def one(carry: Any, _: None) -> tuple[Any, jax.Array]:
            state, number = carry
            state, terms = step(state, normalisation, see(number, constants), own)
            return (state, number + 1), terms.loss

        if case.steps == 1:
            (state, number), losses = one((state, number), None)
        else:
            (state, number), losses = jax.lax.scan(one, (state, number), None, length=case.steps)
        return state, losses, number

    first = jnp.zeros((), jnp.int32)
    heard = jax.jit(see).lower(first, source.constants).compile()
    done = jax.jit(whole, donate_argnums=0).lower(state, first, source.constants).compile()
    return (
        _Program(done, state, first, source.constants),
        _Program(heard, None, first, source.constants),
    )


def _timed(case: _Case, program: _Program, heard: _Program, size: Size) -> dict[str, Any]:
    state, number = program.state, program.number
    losses = []
    for _ in range(2):  # the first calls load what was compiled
        state, loss, number = program.step(state, number, program.constants)
        losses.append(loss)
    jax.block_until_ready(state)
    steps, began = 0, time.perf_counter()
    while steps < size.device_steps and time.perf_counter() - began < size.device_seconds:
        state, loss, number = program.step(state, number, program.constants)
        losses.append(loss)
        steps += 1
        if steps % _EDGE == 0:
            jax.block_until_ready(loss)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / steps / case.steps
    jax.block_until_ready(heard.step(heard.number, heard.constants))
    began, count = time.perf_counter(), max(steps // 4, 1)
    for _ in range(count):
        seen = heard.step(heard.number, heard.constants)
    jax.block_until_ready(seen)
    hearing = (time.perf_counter() - began) / count
    # The compiler counts the body of a loop once.
    flops = cost.of_step(program.step).flops
    peak = cost.peak_flops(jax.devices()[0])
    value = np.array([np.mean(x) for x in losses])
    row = {
        "what": case.what,
        "batch": case.batch,
        "milliseconds": 1e3 * seconds,
        "features_milliseconds": 1e3 * hearing,
        "pairs_per_s": case.batch * case.members / seconds,
        "loss_first": float(value[:_EDGE].mean()),
        "loss_last": float(value[-_EDGE:].mean()),
        "steps": len(losses) * case.steps,
    }
    if flops is not None:
        row["tflop_per_s"] = flops / seconds / 1e12
    if flops is not None and peak is not None:
        row["share_of_peak"] = flops / seconds / peak
    return row
