"""What it costs to be many, for `eqst.speed`: devices, processes, and runs that share a program.

Everything is on the CPU of one machine, in child processes that are told how many devices they have
and who the others are, as `eqst.processes` reads it. Virtual devices share the machine's cores: no
more is computed per second with more of them, so what a step takes beyond that of one device with
the same batch is the runtime's own: splitting, summing gradients, gathering.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from eqst import batches, command, config, corpus, eq, learner, mesh, predictor, processes, recipes
from eqst.timing import Say, Section, Size, target
from eqst.train import train_together

RECIPES: dict[str, Callable[[], config_dict.ConfigDict]] = {
    "pooled": recipes.pooled,
    "db_mel_pm": recipes.paper,
}
_FRAMES = 128  # of mel features
_WARM_STEPS = 3
_SAME_LOSS = 1e-3  # after an update: sums in another order, and no more
_MOST_PROCESSES = 4


# --- devices and processes -----------------------------------------------------------------------


class Case(NamedTuple):
    """One step that is timed.

    Attributes:
      recipe: of `RECIPES`.
      devices: over all processes.
      batch: pairs, over all devices.
      fsdp: over how many devices the state is split.
    """

    recipe: str
    devices: int
    batch: int
    fsdp: int


def scaling(size: Size, say: Say) -> Section:
    """The training step on 1, 2, 4 .. virtual devices and processes, weak and strong."""
    counts = [2**i for i in range(size.devices.bit_length())]
    each = {"pooled": size.batch, "db_mel_pm": max(size.batch // 8, 1)}
    topologies = [(1, count) for count in counts]
    topologies += [(count, 1) for count in counts[1:] if count <= _MOST_PROCESSES]
    rows: list[dict[str, Any]] = []
    alone: dict[tuple[str, int], dict[str, Any]] = {}  # one device, by recipe and batch
    for count, devices in topologies:
        cases = _cases(count * devices, counts[-1], each)
        if count > 1:  # each compiles for itself, which takes most of the time
            cases = [case for case in cases if case.recipe == "pooled"]
        say(f"scaling: {count} process(es) of {devices} device(s), {len(cases)} steps")
        found = _in_children(cases, 4 * size.rounds, count, devices)
        for case, (seconds, loss) in zip(cases, found, strict=True):
            low, middle, high = 1e3 * np.quantile(seconds, [0.1, 0.5, 0.9])
            what = _label(case, count, each[case.recipe] * np.array([1, counts[-1]]))
            row: dict[str, Any] = {"what": what, "milliseconds": middle, "p10": low, "p90": high}
            one = alone.setdefault((case.recipe, case.batch), row | {"loss": loss})
            if abs(loss - one["loss"]) > _SAME_LOSS * abs(one["loss"]):
                raise ValueError(f"{what}: its loss is {loss}, not {one['loss']}")
            row |= {"ratio": middle / one["milliseconds"], "batch": case.batch}
            rows.append(row | {"devices": case.devices, "processes": count, "fsdp": case.fsdp})
    rows.sort(key=lambda row: not row["what"].startswith("pooled"))
    about = (
        f"the training step from features on; weak: {each['pooled']} pairs a device for pooled; "
        f"strong: {each['pooled'] * counts[-1]} and {each['db_mel_pm'] * counts[-1]} pairs in all; "
        "ratio to one device with the same batch: devices share the cores, so it is the runtime's "
        "overhead and no speed-up"
    )
    return Section(about, rows, [])


def _cases(devices: int, most: int, each: dict[str, int]) -> list[Case]:
    """What is timed on so many devices; on one, all that others are compared with.

    The convolutions of `db_mel_pm`, which take long to compile, are timed on one and on the most.
    """
    weak, strong = each["pooled"] * devices, each["pooled"] * most
    ends = (1, most)
    mel = [Case("db_mel_pm", devices, each["db_mel_pm"] * most, 1)] if devices in ends else []
    if devices == 1:
        doublings = range(most.bit_length())
        return [*(Case("pooled", 1, each["pooled"] * 2**i, 1) for i in doublings), *mel]
    pooled = [
        Case("pooled", devices, batch, fsdp)
        for batch in sorted({weak, strong})
        for fsdp in (1, devices)
    ]
    return [*pooled, *mel]


def _label(case: Case, count: int, ends: np.ndarray) -> str:
    """A row's name; `ends`: the weak batch of one device, and the strong one."""
    kinds = [
        *(["weak"] if case.batch == ends[0] * case.devices else []),
        *(["strong"] if case.batch == ends[1] else []),
    ]
    plural = "es" if count > 1 else ""
    where = f"{count} process{plural}" if count > 1 else f"{case.devices} device"
    where += "s" if count == 1 < case.devices else ""
    split = f", fsdp {case.fsdp}" if case.fsdp > 1 else ""
    return f"{case.recipe}, {where}{split}, {' and '.join(kinds) or 'reference'} {case.batch}"


def _in_children(
    cases: list[Case], steps: int, count: int, devices: int
) -> list[tuple[list[float], float]]:
    """What `measure` finds in so many processes of so many devices each.

    Raises:
      ValueError: one of them failed; the message has the end of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {
        **{name: x for name, x in os.environ.items() if name not in processes.ENVIRONMENT},
        **{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    }
    if count > 1:
        shared |= dict(zip(processes.ENVIRONMENT[:2], (address, str(count)), strict=True))
    program = "import sys; from eqst import scaling; scaling.measure(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "found.json"
        words = [sys.executable, "-c", program, json.dumps(cases), str(steps), str(path)]
        own = [{processes.ENVIRONMENT[2]: str(i)} if count > 1 else {} for i in range(count)]
        logs = [open(f"{folder}/{i}.txt", "w+") for i in range(count)]
        children = [
            subprocess.Popen(words, env=shared | more, stdout=log, stderr=subprocess.STDOUT)
            for more, log in zip(own, logs, strict=True)
        ]
        try:
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
            said = [pathlib.Path(log.name).read_text()[-300:] for log in logs]
            for log in logs:
                log.close()
        for code, text in zip(codes, said, strict=True):
            if code:
                raise ValueError(f"a child that times steps failed: {' '.join(text.split())}")
        return json.loads(path.read_text())


def measure(cases: str, steps: str, path: str) -> None:
    """The body of a child, alone or one of several: times its cases, and writes what it found."""
    processes.join()
    found = [_timed(Case(*case), int(steps)) for case in json.loads(cases)]
    if jax.process_index() == 0:
        pathlib.Path(path).write_text(json.dumps(found))


def _timed(case: Case, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, and the loss after two updates."""
    raw = RECIPES[case.recipe]()
    raw.train.batch_size, raw.train.warmup_steps = case.batch, 1
    chosen = config.validate(raw)
    devices = mesh.make_mesh(case.devices, case.fsdp)
    rules, rng = mesh.Shardings.of(devices), np.random.default_rng(0)
    shape = predictor.normalisation_shape(chosen)
    features = shape.mean.shape if case.recipe == "pooled" else (_FRAMES, *shape.mean.shape)
    leaves: list[Any] = [rng.standard_normal((case.batch, *features), np.float32) for _ in range(2)]
    leaves.append(rng.random((case.batch, len(eq.KINDS), 3), np.float32))
    part = mesh.process_slice(devices, case.batch)
    seen = mesh.global_batch(devices, batches.Seen(*(leaf[part] for leaf in leaves)))
    normalisation = mesh.copied(
        devices,
        predictor.Normalisation(jnp.zeros(shape.mean.shape), jnp.ones(shape.scale.shape)),
    )
    initial = functools.partial(learner.init_state, chosen)
    where = rules.state(jax.eval_shape(initial))
    state = jax.jit(initial, out_shardings=where)()
    step = jax.jit(
        functools.partial(learner.train_step, chosen),
        donate_argnums=0,
        out_shardings=(where, rules.copied),
    )
    seconds = []
    for number in range(_WARM_STEPS + steps):
        start = time.perf_counter()
        state, terms = step(state, normalisation, seen)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
        if number == _WARM_STEPS - 1:
            loss = float(terms.loss)
    return seconds[_WARM_STEPS:], loss


# --- runs that share a program -------------------------------------------------------------------


def replicas(size: Size, say: Say) -> Section:
    """Runs as one program, against the same runs one after the other and two at a time."""
    rows = [row for recipe in RECIPES for row in contest(recipe, size, say)]
    targets = [
        target(f"{row['what']}, time to ours", row["ratio"], least=1.0)
        for row in rows
        if "as one program" not in row["what"]
    ]
    about = (
        f"{size.members} runs of {size.steps} steps of {size.batch} pairs that differ in seed and "
        "learning rate, on one CPU device each: wall time from the start of Python, compilation "
        "and evaluation included, nothing compiled before; step: of one run's step, at the rate "
        "at which all of them together go"
    )
    return Section(about, rows, targets)


def contest(recipe: str, size: Size, say: Say) -> list[dict[str, Any]]:
    """The rows of one model."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        members = _members(recipe, size, root / "cache")
        for split in ("train", "valid"):  # the recordings are there before anyone's clock runs
            corpus.open_corpus(members[0].data, split, say)
        singles = [[member] for member in members]
        for name, units, jobs in (
            ("as one program", [members], 1),
            ("one after the other", singles, 1),
            ("two at a time", singles, 2),
        ):
            spent, step_s = _trained(units, jobs, root / name.replace(" ", "_"))
            say(f"replicas: {recipe}, {len(members)} runs {name}: {spent:.0f} s")
            row = {"what": f"{recipe}, {len(members)} runs {name}", "seconds": spent}
            rows.append(row | {"step_milliseconds": 1e3 * step_s})
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
        row["step_ratio"] = row["step_milliseconds"] / rows[0]["step_milliseconds"]
    return rows


def _members(recipe: str, size: Size, cache: pathlib.Path) -> list[config.Config]:
    """Small runs that can share a program."""
    raw = RECIPES[recipe]()
    raw.data.cache_dir, raw.data.synthetic_talkers = str(cache), size.talkers
    raw.data.segment_seconds = (3.0,)
    raw.model.hidden, raw.model.channels = 128, 8
    raw.features.mel_bands = 64
    raw.train.batch_size, raw.train.steps, raw.train.devices = size.batch, size.steps, 1
    raw.train.eval_every = raw.train.checkpoint_every = size.steps
    raw.train.log_every, raw.train.eval_pairs = max(size.steps // 3, 1), 8
    base = config.validate(raw)
    return [
        dataclasses.replace(
            base,
            seed=i,
            train=dataclasses.replace(base.train, learning_rate=1e-3 * 1.3**i),
        )
        for i in range(size.members)
    ]


def _trained(
    units: Sequence[Sequence[config.Config]], jobs: int, root: pathlib.Path
) -> tuple[float, float]:
    """Trains units in processes of their own, so many at a time; seconds that all of it took, and
    those of a step of one run, by the last line of its record."""
    program = "import sys; from eqst import scaling; scaling.train_unit(*sys.argv[1:])"
    # A cache of compiled programs of this very contender: of equal ones the first compiles.
    own = {"XDG_CACHE_HOME": str(root / "cache"), "JAX_PLATFORMS": "cpu"}
    unset = (*processes.ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES")
    environment = {k: x for k, x in os.environ.items() if k not in unset} | own

    def run(number: int) -> None:
        plain = json.dumps([config.as_dict(x) for x in units[number]])
        words = [sys.executable, "-c", program, plain, str(root / str(number))]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"a run that is timed failed: {' '.join(done.stderr[-300:].split())}")

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, range(len(units))))
    spent = time.perf_counter() - began
    rates = []
    for path in sorted(root.glob("*/*/metrics.jsonl")):
        logged = [x for x in map(json.loads, path.read_text().splitlines()) if "pairs_per_s" in x]
        rates.append(logged[-1]["pairs_per_s"])  # the first is compilation
    members = len(units[0])  # of a program go through a step together
    return spent, units[0][0].train.batch_size / float(np.median(rates)) / members / jobs


def train_unit(plain: str, root: str) -> None:
    """The body of a child: trains runs as one program."""
    command.keep_compiled()
    configs = [config.from_dict(x) for x in json.loads(plain)]
    train_together(configs, [f"{root}/{i}" for i in range(len(configs))])


SECTIONS = {"scaling": scaling, "replicas": replicas}
