"""The training loop: steps, their record, evaluation, checkpoints, and the end of all that.

One program trains one run, or several that differ in `learner.KNOBS` alone. A call of it is a step,
or `train.steps_per_call` of them, in one compiled loop that makes its examples as it goes.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from eqst import batches, checkpoint, cost, learner, mesh, objective, predictor
from eqst.config import Config
from eqst.record import Log, Record
from eqst.stopping import Interrupted, Signals


class Member(NamedTuple):
    """One of the runs that a program trains."""

    config: Config
    workdir: epath.Path
    saved: checkpoint.Checkpoints


class Ready(NamedTuple):
    """What the loop works with, beside the state.

    Attributes:
      devices, rules, where: the mesh, its shardings, those of the state.
      supply, valid: examples to train on, and fixed ones to judge by.
      held_out: whether the latter are of other talkers.
      take: (tree, i) -> the part of member i of a stacked tree.
      began: when this command did, by time.monotonic().
    """

    devices: jax.sharding.Mesh
    rules: mesh.Shardings
    where: Any
    supply: batches.Source
    valid: batches.Weighed
    held_out: bool
    take: Callable[[Any, int], Any]
    began: float


def run(
    members: list[Member],
    signals: Signals,
    say: Callable[[str], None],
    ready: Ready,
    state: learner.State,
    normalisation: Any,
) -> learner.State:
    """Trains from where the state is to the end; `eqst.train` says what it raises.

    Args:
      members: the runs, in the order of the state's first axis where they are several.
      signals: what this process is told meanwhile.
      say: called with each line of progress.
      ready: what the loop works with.
      state, normalisation: as they were begun or restored.

    Returns:
      the final state.
    """
    config, stacked = members[0].config, len(members) > 1
    steps, lengths = config.train.steps, len(config.data.segment_seconds)
    start_step = step_of(state)
    knobs = mesh.placed(ready.rules.own, learner.stacked_knobs([x.config for x in members]))

    apart = learner.apart(config, ready.devices)
    several = functools.partial(learner.over_members, apart=apart)

    # That some process was told to stop comes out of the step as its loss does: the same for all.
    @functools.partial(
        jax.jit,
        static_argnums=(6, 7),
        donate_argnums=0,
        out_shardings=(ready.where, ready.rules.copied, ready.rules.copied),
    )
    def call_once(
        state: learner.State,
        normalisation: Any,
        batch: Any,
        constants: Any,
        knobs: learner.Knobs,
        flag: Any,
        which: int,
        count: int,
    ) -> tuple[learner.State, objective.Terms, jax.Array]:
        def step_once(state: learner.State, batch: Any, which: int) -> tuple:
            seen = ready.supply.see(batch, constants, which)
            step = functools.partial(learner.train_step, config)
            # A single run's numbers are constants of its program.
            return (
                several(step)(state, normalisation, seen, knobs)
                if stacked
                else step(state, normalisation, seen)
            )

        def turn(state: learner.State, first: jax.Array) -> tuple:
            """A step of every length."""
            state = jax.lax.with_sharding_constraint(state, ready.where)
            each = []
            for which in range(lengths):
                state, terms = step_once(state, first + which, which)
                each.append(terms)
            return state, jax.tree.map(lambda *x: jnp.stack(x), *each)

        if count == 1:
            state, terms = step_once(state, batch, which)
        else:
            state, terms = jax.lax.scan(turn, state, batch + jnp.arange(0, count, lengths))
        members = (len(knobs.seed),) if stacked else ()
        terms = jax.tree.map(lambda x: x.reshape(count, *members), terms)
        return state, terms, jnp.any(flag)

    judge = functools.partial(learner.held_out_error_db, config)
    evaluate = jax.jit(several(judge) if stacked else judge, out_shardings=ready.rules.copied)
    finite = jax.jit(
        jax.vmap(learner.all_finite) if stacked else learner.all_finite,
        out_shardings=ready.rules.copied,
    )

    records = [Record(x.workdir, start_step, config.train.tensorboard, say) for x in members]
    rates = [learner.learning_rate(config, x.config.train.learning_rate) for x in members]
    log = Log(records, rates, steps, config.train.batch_size, objective.Terms, say)
    # Steps not yet in a line of the record; at first those from before an interruption.
    log.resume([unlogged(member) for member in members])
    name = "valid_shape_db" if ready.held_out else "train_exact_shape_db"
    left_behind: dict[int, str] = {}

    def check(step: int, losses: Any, what: str = "loss is {}") -> None:
        """Leaves members behind whose number is not finite, in this step or those after it in
        `losses`; the last of them ends the run."""
        for number, row in enumerate(np.asarray(losses).reshape(-1, len(members)), step):
            for i, value in enumerate(row):
                if not np.isfinite(value) and i not in left_behind:
                    left_behind[i] = _diverged(what.format(value), number)
                    if stacked:
                        say(f"{members[i].workdir}: left behind, {left_behind[i]}")
                    log.drop(i)
        if len(left_behind) == len(members):
            raise FloatingPointError(next(iter(left_behind.values())))

    notes = members[0].saved.notes
    spent = cost.Spent(**notes["spent"]) if "spent" in notes else cost.Spent()
    # One for each segment length, or for calls of several steps.
    programs: dict[tuple[int, int], jax.stages.Compiled] = {}
    compiled = _compiled(start_step, config.train.steps_per_call, lengths)
    profile = _Profile(members[0].workdir, config.train.profile_steps, say)
    flags, asked = mesh.flags(ready.devices), np.asarray(False)
    stream = ready.supply.stream(start_step)
    accounted = ready.began
    aside = time.monotonic() - ready.began
    for step, count in _calls(start_step, steps, config.train.steps_per_call):
        before = time.monotonic()
        # In a call of several steps the first's number is enough: the others' follow from it.
        batch, *_ = itertools.islice(stream, count)
        waited = time.monotonic() - before
        which = step % lengths
        asked_before, flag = asked, flags[signals.received is not None]
        given = (state, normalisation, batch, ready.supply.constants, knobs, flag)
        if (which, count) not in programs:
            compiling = time.monotonic()
            programs[which, count] = call_once.lower(*given, which, count).compile()
            step_cost = cost.of_step(programs[which, count], 1 if count == 1 else lengths)
            say(cost.step_line(step_cost, time.monotonic() - compiling))
            aside += time.monotonic() - compiling
        profile.before(step - compiled)
        state, terms, asked = programs[which, count](*given)
        # The call before is read while this one runs.
        if log.pending:
            check(log.pending[-1][0], log.pending[-1][1].loss)
        # A process alone has nobody to agree with first.
        told = signals.received is not None and jax.process_count() == 1
        leaving = told or bool(asked_before)
        log.add(step, terms, waited)
        done = step + count
        if done == compiled:  # compilation is no measure of the time left
            jax.block_until_ready(state)
            log.start_clock(done)
        last = done == steps
        profile.after(done - compiled, state)
        for member in members:  # what is being saved may have failed meanwhile
            member.saved.check()
        if done % config.train.log_every == 0 or last:
            check(step, terms.loss)
            log.write(done)
        judged = done % config.train.eval_every == 0 or last
        saves = done % config.train.checkpoint_every == 0 or last or leaving
        if judged or saves:  # else these would wait for the step
            jax.block_until_ready(state)
        now = time.monotonic()
        spent = spent.plus(now - accounted, ready.devices.size / len(members), waited, count, aside)
        accounted, aside = now, 0.0
        if judged:
            check(step, terms.loss)
            errors = np.atleast_1d(evaluate(state.ema, normalisation, ready.valid))
            log.write_errors(done, name, errors)
            for i in log.going:
                tree = saved_tree(ready.take(state, i), ready.take(normalisation, i))
                members[i].saved.save_best(done, tree["params"], float(errors[i]), wait=False)
        if saves:
            check(step, terms.loss)
            ok = np.where(np.atleast_1d(finite(state.params)), 0.0, np.nan)
            check(step, ok, "a parameter is not finite")
            if last:  # before the checkpoint that makes it the last
                summary = cost.summary(
                    spent, step_cost, config.train.batch_size, list(ready.devices.devices.flat)
                )
                for i in log.going:
                    records[i].close(summary)
            for i in log.going:  # none is ever more than one checkpoint ahead of another
                members[i].saved.wait("last")
            for i in log.going:
                records[i].flush()
                tree = saved_tree(ready.take(state, i), ready.take(normalisation, i))
                facts = {"unlogged": log.unlogged(i), "spent": spent._asdict()}
                members[i].saved.save(done, tree, facts, wait=False)
        if last or leaving:
            for i in log.going:
                members[i].saved.wait()
        aside += time.monotonic() - accounted
        if last or leaving:
            profile.close(state)
        if leaving and not last:
            raise Interrupted(f"{signals.name()}: saved at step {done}; the same command resumes")
    say(cost.summary_line(summary))
    say(finished([members[i] for i in log.going]))
    if left_behind:
        raise FloatingPointError(
            f"{len(left_behind)} of {len(members)} were left behind: "
            + "; ".join(f"{members[i].workdir}: {why}" for i, why in left_behind.items())
        )
    return state


def _calls(first: int, steps: int, ahead: int) -> Iterator[tuple[int, int]]:
    """(step, how many from it on) of every call: so many as are asked for at a time, but for the
    steps up to a multiple of that, where an interruption was between two."""
    while first < steps:
        count = 1 if first % ahead else ahead
        yield first, count
        first += count


def _compiled(first: int, ahead: int, lengths: int) -> int:
    """The step before which every program has run once."""
    return first + lengths if ahead == 1 else first + -first % ahead + ahead


class _Profile:
    """A trace of some of the first steps, once compiled ones, for TensorBoard or XProf."""

    def __init__(self, workdir: epath.Path, steps: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = workdir / "profile", say
        self._steps = steps if jax.process_index() == 0 else 0  # 0: nothing is left to do
        self._traced: int | None = None  # steps, once it is under way

    def before(self, number: int) -> None:
        """Before the step of this number, counted from the first without compilation."""
        if self._steps and number == 0:
            jax.profiler.start_trace(self._folder)
            self._traced = 0

    def after(self, count: int, state: learner.State) -> None:
        """After so many of them; a call's last one counts for all."""
        if self._traced is not None:
            self._traced = count
        if count >= self._steps > 0:
            self.close(state)

    def close(self, state: learner.State) -> None:
        """At the end of the run, or of the steps that were asked for."""
        if self._steps and not self._traced:
            self._say("no profile: this run had no step left once all was compiled")
        elif self._steps:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._say(f"profile of {self._traced} steps: {self._folder} (tensorboard, or xprof)")
        self._steps = 0


def saved_tree(state: learner.State, normalisation: predictor.Normalisation) -> dict[str, Any]:
    """What a checkpoint holds; `params` is what `checkpoint.load` finds in it."""
    params = {"network": state.ema, "normalisation": normalisation._asdict()}
    return {"params": params, "state": state._replace(ema={})}


def unlogged(member: Member) -> list:
    """Of a restored checkpoint what `Log.unlogged` gave for it: steps in no line of the record."""
    notes = member.saved.notes
    return notes["unlogged"] if "unlogged" in notes else []


def step_of(state: learner.State) -> int:
    """Steps that a state, stacked or not, has behind it."""
    # Of members that lie on other processes' devices, which are no further, only those here.
    return int(np.asarray(state.step.addressable_data(0)).flat[0])


def finished(members: list[Member]) -> str:
    """The last line of a run."""
    return f"finished: {', '.join(str(member.workdir) for member in members)}"


def _diverged(what: str, step: int) -> str:
    return (
        f"{what} at step {step}; the last checkpoint is from before it; lower train.learning_rate "
        "or train.clip_norm and take another --workdir (--config.train.init_from=THIS_ONE starts "
        "from its best weights)"
    )
