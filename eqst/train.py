"""The training loop: `python -m eqst.train --config=FILE --workdir=DIR [--config.key=value]`.

The same command again resumes exactly: example k is a pure function of (seed, k), dropout keys of
(seed, step), and everything else is in the checkpoint. SIGTERM and SIGINT save and leave with exit
code 75; a non-finite loss stops with the step and leaves the last good checkpoint as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from eqst import (
    batches,
    card,
    checkpoint,
    command,
    corpus,
    eq,
    learner,
    loop,
    mesh,
    pairs,
    predictor,
    processes,
    saving,
)
from eqst.config import Config, ConfigError, as_dict, differing_keys, from_card, validate
from eqst.learner import (
    State,
    init_state,
)
from eqst.processes import EXIT_INTERRUPTED
from eqst.stopping import Interrupted, Signals

SEEN_SECONDS = 60.0  # until a file is seen on all machines: what NFS remembers of a folder


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
    return train_together([config], [workdir], say)


def train_together(
    configs: Sequence[Config],
    workdirs: Sequence[str | os.PathLike],
    say: Callable[[str], None] = print,
) -> State:
    """Trains runs that differ in `learner.KNOBS` alone as one program, each in its own workdir.

    A workdir is then what `train` would have made of it alone, but for rounding, and either can go
    on with what the other has begun. A member whose loss is not finite is left behind, with its
    last good checkpoint, and takes no other down.

    Returns:
      the final state; of several members every leaf has a first axis for them.

    Raises:
      ConfigError: as `train`; or they differ in more than that, do not train from the resident
        path, or have no step in common to go on from.
      FloatingPointError: at the end, for those left behind; at once if that is all of them.
      Interrupted: as `train`.
    """
    began = time.monotonic()
    say = processes.of_first(say)
    plain = [_as_card(config) for config in configs]
    _check_one_program(plain)
    folders = [epath.Path(workdir) for workdir in workdirs]
    if not processes.alike([plain, [os.fspath(folder) for folder in folders]]):
        raise ConfigError(
            "the processes were started with different settings or workdirs: give all the same"
        )
    for folder, config in zip(folders, configs, strict=True):
        check_same_run(folder, config)
    _check_shared(folders[0])
    with contextlib.ExitStack() as stack, Signals() as signals:
        members = [
            loop.Member(config, folder, stack.enter_context(_checkpoints(config, folder)))
            for config, folder in zip(configs, folders, strict=True)
        ]
        return _run(members, signals, say, began)


def _check_shared(folder: epath.Path) -> None:
    """Refuses a workdir that is another folder on another machine: Orbax would wait for minutes."""
    if jax.process_count() == 1:
        return
    mark = folder / f".seen-{processes.gathered(secrets.randbits(30))[0]}"

    def write() -> None:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text("")

    processes.together(write, OSError)
    late = time.monotonic() + SEEN_SECONDS
    while not mark.exists() and time.monotonic() < late:
        time.sleep(0.2)
    blind = np.flatnonzero(processes.gathered(int(not mark.exists())))
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if len(blind):
        raise ConfigError(
            f"process {blind[0]} does not see what process 0 writes in {folder}: give a --workdir "
            "on storage that all of them share"
        )


def _checkpoints(config: Config, folder: epath.Path) -> checkpoint.Checkpoints:
    keep, every = config.train.keep_newest, config.train.keep_every
    return checkpoint.Checkpoints(folder, keep=keep, keep_every=every)


def _check_one_program(plain: list[dict]) -> None:
    """Refuses members that cannot share a program."""
    for other in plain[1:]:
        strange = differing_keys(learner.program(plain[0]), learner.program(other))
        if strange:
            raise ConfigError(
                f"members of one program differ in {'; '.join(strange)}: they may in "
                f"{', '.join(learner.KNOBS)}; train the others by themselves"
            )
    if len(plain) > 1 and plain[0]["data"]["pipeline"] != "resident":
        raise ConfigError("members of one program need --config.data.pipeline=resident")


def _as_card(config: Config) -> dict:
    """The settings as a card has them."""
    return json.loads(json.dumps(as_dict(config)))


def check_same_run(workdir: epath.Path, config: Config) -> None:
    """Refuses a workdir of other settings.

    Raises:
      ConfigError: its card has others.
      CheckpointError: its card is damaged.
    """
    found = checkpoint.find_card(workdir)
    if found is None:
        return
    changed = differing_keys(_as_card(from_card(found["config"])), _as_card(config))
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with other settings ({'; '.join(changed)}); "
            "take them back or choose another --workdir, which "
            f"--config.train.init_from={workdir} starts from this run's weights"
        )


def _run(
    members: list[loop.Member], signals: Signals, say: Callable[[str], None], began: float
) -> State:
    config, stacked = members[0].config, len(members) > 1
    devices = mesh.make_mesh(config.train.devices or None, config.train.fsdp, len(members))
    rules = mesh.Shardings.of(devices, stacked=stacked)
    # Refuses a batch that does not divide by the devices before any work is done.
    mesh.process_slice(devices, config.train.batch_size)
    start = None
    if config.train.init_from:
        loaded = checkpoint.load(config.train.init_from, which="best")
        predictor.check_params(config, loaded.params, config.train.init_from)
        start = loaded.params["network"]
    # The key is an argument, so that runs of other seeds find this compiled.
    seeds = np.array([member.config.seed for member in members], np.int32)
    key = jax.vmap(jax.random.key)(seeds) if stacked else jax.random.key(config.seed)
    fresh = functools.partial(init_state, config, start)
    one = jax.eval_shape(fresh, jax.random.key(0))  # of a single member
    initial = jax.vmap(fresh) if stacked else fresh
    where = rules.state(jax.eval_shape(initial, key))
    resumed = _restore(members, one, rules, where)
    if resumed is not None:
        state, normalisation = resumed
        say(f"resumed at step {loop.step_of(state)} of {config.train.steps}")
        if loop.step_of(state) >= config.train.steps:
            say(loop.finished(members))
            return state
    datas = [member.config.data for member in members]
    heeding = signals.heeding(say)
    recordings, weight_NR = processes.together(
        lambda: corpus.open_folds(datas, heeding), ValueError, OSError
    )
    choosing = {
        data: processes.together(
            functools.partial(corpus.open_corpus, data, "valid", heeding), ValueError, OSError
        )
        for data in dict.fromkeys(datas)
    }
    materials = [
        _material(recordings, weight_R, choosing[data])
        for weight_R, data in zip(weight_NR, datas, strict=True)
    ]
    if not processes.alike(materials):
        raise ConfigError(
            f"the processes see different recordings in {', '.join(config.data.sources)}: give "
            "each machine the same files"
        )
    if resumed is not None:
        for member, material in zip(members, materials, strict=True):
            _check_same_material(member.workdir, material)
    folds = f", of which each member holds out its fold of {config.data.folds}"
    say(
        f"train: {len(recordings.talker_R)} recordings, {recordings.seconds() / 60:.1f} min"
        f"{folds if len(choosing) > 1 else ''}; "
        f"{devices.size} {devices.devices.flat[0].platform} device(s)"
    )
    signals.stop_early()
    # Before anything is written: the held-out talkers' recordings may give no pair.
    for own in choosing.values():
        pairs.build_index(own, config.data.segment_seconds[0], config.data.min_loudness_lufs)
    supply = batches.make_source(config, recordings, devices, heeding)
    own_supplies = [supply]
    if stacked:
        own_supplies = [
            batches.of_member(supply, member.config.seed, weight_R)
            for member, weight_R in zip(members, weight_NR, strict=True)
        ]
        supply = batches.of_members(own_supplies, functools.partial(mesh.placed, rules.own))
    take = _taker(one, rules, stacked)
    if resumed is None:
        measured = _begin(members, own_supplies, materials)
        together = jax.tree.map(lambda *x: np.stack(x), *measured) if stacked else measured[0]
        normalisation = mesh.placed(rules.own, together)
        state = jax.jit(initial, out_shardings=where)(key)
        for i, member in enumerate(members):
            member.saved.save(0, loop.saved_tree(take(state, i), take(normalisation, i)))
    signals.stop_early()
    trained_on = {recordings.talker_R[r] for r in np.flatnonzero(weight_NR[0])}
    held_out = not set(choosing[datas[0]].talker_R) & trained_on
    judged = [batches.valid_pairs(x.config, choosing[x.config.data], devices) for x in members]
    valid = jax.jit(_stack, out_shardings=rules.own_batch)(*judged) if stacked else judged[0]
    say(f"valid: {config.train.eval_pairs} pairs of {'held-out' if held_out else 'TRAIN'} talkers")
    count = sum(x.size for x in jax.tree.leaves(one.params))
    many = f", {len(members)} of them in one program" if stacked else ""
    say(f"network: {count:,} parameters{many}{mesh.share_line(state)}")
    ready = loop.Ready(devices, rules, where, supply, valid, held_out, take, began)
    return loop.run(members, signals, say, ready, state, normalisation)


def _material(recordings: corpus.Corpus, weight_R: np.ndarray, held_out: corpus.Corpus) -> dict:
    """What is trained on and chosen by, as a card says it: alike on all machines, whose decoders
    may differ in a sample's last bit, and whatever other members the program has."""

    def lines(corpus: corpus.Corpus, which_R: np.ndarray) -> str:
        return "\n".join(f"{corpus.talker_R[r]} {corpus.length_R[r]}" for r in which_R)

    trained = np.flatnonzero(weight_R)
    every = np.arange(len(held_out.talker_R))
    text = f"{lines(recordings, trained)}\n\n{lines(held_out, every)}"
    return {
        "train": {"recordings": len(trained), "samples": int(recordings.length_R[trained].sum())},
        "valid": {"recordings": len(every), "samples": int(held_out.length_R.sum())},
        "digest": card.digest(text)[:16],
    }


def _check_same_material(workdir: epath.Path, material: dict) -> None:
    """Refuses to go on with other recordings, some of which may have been held out before."""
    old = checkpoint.find_card(workdir)
    if old is None or "recordings" not in old or old["recordings"] == material:  # or an older run
        return
    changed = differing_keys(old["recordings"], material)
    raise ConfigError(
        f"{workdir} was begun with other recordings ({'; '.join(changed)}): put them back, or "
        "choose another --workdir, which "
        f"--config.train.init_from={workdir} starts from this run's weights"
    )


def _begin(
    members: list[loop.Member], supplies: list[batches.Source], materials: list[dict]
) -> list[predictor.Normalisation]:
    """Measures every member's normalisation and writes their cards."""
    table = dataclasses.asdict(eq.table(members[0].config.eq_table))
    measured = []
    for member, own, material in zip(members, supplies, materials, strict=True):
        measured.append(batches.measure_normalisation(member.config, own))
        facts = {name: np.asarray(x).tolist() for name, x in measured[-1]._asdict().items()}
        plain = as_dict(member.config)
        own_card = {"config": plain, "normalisation": facts, "band_table": table}
        checkpoint.write_card(member.workdir, {**own_card, "recordings": material})
    return measured


def _taker(one: State, rules: mesh.Shardings, stacked: bool) -> Callable[[Any, int], Any]:
    """How a member's part is cut out of a stacked state or normalisation."""
    if not stacked:
        return lambda tree, _: tree

    def cut(tree: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[i], tree)

    cut_state = jax.jit(cut, out_shardings=rules.one(one))
    cut_rest = jax.jit(cut, out_shardings=rules.copied)
    return lambda tree, i: (cut_state if isinstance(tree, State) else cut_rest)(tree, i)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _restore(
    members: list[loop.Member], one: State, rules: mesh.Shardings, where: Any
) -> tuple[State, predictor.Normalisation] | None:
    """The newest intact checkpoint that all members have, stacked if they are several; or None."""
    config = members[0].config
    tree = loop.saved_tree(one, predictor.normalisation_shape(config))
    places = rules.one(tree)
    places["params"]["normalisation"] = dict.fromkeys(tree["params"]["normalisation"], rules.copied)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, places
    )
    steps: list[int] = []
    newest: list[int] = []
    while len(set(steps)) != 1:
        at_most = min(steps) if steps else None
        found = [member.saved.restore(abstract, at_most=at_most) for member in members]
        if all(x is None for x in found):
            return None
        steps = [-1 if x is None else x[0] for x in found]
        newest = newest or steps
        if -1 in newest and max(newest) == 0:  # ended between the first saves: nothing is lost
            return None
        # Killed between two saves they are one checkpoint apart. One further behind has diverged,
        # and would cost the others what they have done since.
        apart = max(newest) - min(newest) > config.train.checkpoint_every
        if -1 in steps or apart or at_most is not None and min(steps) == at_most != max(steps):
            raise ConfigError(
                f"the members are at steps {', '.join(map(str, newest))} (-1: at none) and have "
                "none in common to go on from: train those ahead or behind by themselves"
            )
    pending = [[step for step, _ in loop.unlogged(member)] for member in members]
    if any(x != pending[0] for x in pending):
        raise ConfigError(
            "the members were saved with different train.log_every: train each by itself first"
        )
    parts = []
    for x in found:
        assert x is not None
        own = x[1]
        normalisation = predictor.Normalisation(**own["params"]["normalisation"])
        parts.append((own["state"]._replace(ema=own["params"]["network"]), normalisation))
    if len(members) == 1:
        return parts[0]
    states, normalisations = zip(*parts, strict=True)
    return (
        jax.jit(_stack, out_shardings=where)(*states),
        jax.jit(_stack, out_shardings=rules.own)(*normalisations),
    )


@contextlib.contextmanager
def explained(workdir: str) -> Iterator[None]:
    """What ends a run, in a line of what to do, and told to the processes beside this one.

    Raises:
      Interrupted: another process is gone.
      OSError: another has failed and says why; the bucket is away.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        other = processes.part(error)
        if other:
            line, code = other
            raise (Interrupted if code == EXIT_INTERRUPTED else OSError)(line) from None
        away = saving.away(error, workdir)
        if away is not None:
            raise away from None
        raise


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    config_flags.DEFINE_config_file("config", None, "Config file; --config.key=value changes it.")
    flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes.")
    flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    """The command."""
    processes.join()
    try:
        with explained(flags.FLAGS.workdir):
            config = validate(flags.FLAGS.config)
            train(config, flags.FLAGS.workdir, functools.partial(print, flush=True))
    except Interrupted as event:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what there was to save is saved
        print(event, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    command.start("eqst.train", define_flags, main)
