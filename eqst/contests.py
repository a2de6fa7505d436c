"""What is compared with what, for `eqst.speed`: ours first, then what others use.

A section is a function of a `Size` that returns `Section`; `SECTIONS` lists them. Rivals that are
not installed are left out and named.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from eqst import (
    batches,
    biquad,
    config,
    corpus,
    data,
    eq,
    learner,
    match,
    mesh,
    pairs,
    predictor,
    recipes,
    render,
    rivals,
    settings,
    synthetic,
    train,
)
from eqst.timing import Say, Section, Size, Spent, in_turns, process, target, timings

_RATE = 44_100
_BINS = 1025
_AHEAD = 8  # batches: more than tf.data holds ready


# --- responses -----------------------------------------------------------------------------------


def responses(size: Size, say: Say) -> Section:
    """The closed form against coefficients, value and gradient, with the error beside the time."""
    freq_hz_F = np.linspace(0.0, _RATE / 2, _BINS).astype(np.float32)
    unit_BKP = jax.random.uniform(jax.random.key(0), (size.equalisers, len(eq.KINDS), 3))
    bands = eq.from_unit(eq.PAPER, unit_BKP)
    weight_BF = np.random.default_rng(0).standard_normal((size.equalisers, _BINS), np.float32)

    def ours(*one: jax.Array) -> jax.Array:
        return biquad.cascade_db(
            jnp.asarray(freq_hz_F), *one, kinds=eq.KINDS, sample_rate=float(_RATE)
        )

    def total(function: Callable) -> Callable:
        return lambda *x: jnp.sum(jnp.asarray(weight_BF) * jax.vmap(function)(*x))

    forms = {"EQST": ours}
    in_jax = {
        "complex coefficients (JAX)": rivals.complex_db,
        "the same, unrolled by us (JAX)": rivals.complex_unrolled_db,
        "FFT of coefficients (JAX)": rivals.fft_db,
    }
    for name, form in in_jax.items():
        forms[name] = functools.partial(form, freq_hz_F=freq_hz_F, sample_rate=_RATE)

    def compiled(function: Callable) -> Callable[[], Any]:
        ready = jax.jit(function)
        return lambda: jax.block_until_ready(ready(*bands))

    values = {name: compiled(jax.vmap(form)) for name, form in forms.items()}
    slopes = {
        name: compiled(jax.value_and_grad(total(form), (0, 1, 2))) for name, form in forms.items()
    }
    if rivals.installed("dasp_pytorch"):
        forward, backward = rivals.dasp(bands, freq_hz_F, _RATE, weight_BF)
        values["dasp-pytorch"], slopes["dasp-pytorch"] = forward, backward
    else:
        say("dasp-pytorch is not installed: left out")
    values["scipy"] = lambda: rivals.scipy_db(bands, freq_hz_F, _RATE)
    exact_BF = rivals.scipy_db(bands, freq_hz_F.astype(np.float64), _RATE)
    error = {name: float(np.abs(np.asarray(f()) - exact_BF).max()) for name, f in values.items()}
    say("responses: value")
    forward_rows = timings(in_turns(values, size.rounds), worst_error_db=error)
    say("responses: value and gradient")
    gradient_rows = timings(in_turns(slopes, size.rounds))
    targets = []
    for what, rows in (("value", forward_rows), ("value and gradient", gradient_rows)):
        for row in rows:
            row["what"] += f", {what}"
        targets += [target(row["what"], row["ratio"], least=15) for row in rows[1:]]
    about = f"{size.equalisers} EQs of 4 bands at {_BINS} frequencies; error against float64"
    return Section(about, forward_rows + gradient_rows, targets)


# --- pairs ---------------------------------------------------------------------------------------


def _cores() -> int:
    """Cores that this process may use."""
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return able or 1


def _synthetic(size: Size, **changes: Any) -> config.Config:
    """The paper's proposal on a few synthetic talkers, with these dotted settings."""
    raw = recipes.paper()
    raw.data.synthetic_talkers, raw.data.valid_share = size.talkers, 0.0
    raw.train.batch_size, raw.train.warmup_steps = size.batch, 1
    for key, value in changes.items():
        group, name = key.split("__")
        raw[group][name] = value
    if raw.data.rendering in ("host", "exact"):  # which take no augmentation
        raw.data.warp, raw.data.curve_share, raw.data.noise_share = 1.0, 0.0, 0.0
    return config.validate(raw)


def host_pairs(size: Size, say: Say) -> Section:
    """Pairs per second of the exact host path against the bare cost of its FFTs and reads."""
    chosen = _synthetic(size, data__rendering="host", data__pipeline="tfdata")
    recordings = corpus.open_corpus(chosen.data, "train", say)
    seconds = chosen.data.segment_seconds[0]
    index, _ = pairs.build_index(recordings, seconds, chosen.data.min_loudness_lufs)
    plan = data.plans(chosen, index)(np.arange(size.batch))
    context = chosen.data.context_seconds
    fetch = functools.partial(pairs.fetch_stored, recordings, plan, seconds, context)
    sounds = np.concatenate(pairs.fetch(recordings, plan, seconds, context))
    length = sounds.shape[-1]
    there_and_back = jax.jit(jax.vmap(lambda x: jnp.fft.irfft(jnp.fft.rfft(x), length)))
    cores = _cores()
    pool = concurrent.futures.ThreadPoolExecutor(cores)

    def in_parts(rows: int, each: Callable = map) -> Callable[[], Any]:
        """The FFTs alone, so many sounds at a time: which is fastest depends on the caches."""
        parts = [sounds[i : i + rows] for i in range(0, len(sounds), rows)]
        return lambda: list(each(lambda x: there_and_back(x).block_until_ready(), parts))

    def by_scipy(x_T: np.ndarray) -> np.ndarray:
        import scipy.fft

        return scipy.fft.irfft(scipy.fft.rfft(x_T), length)

    bare = {f"FFTs alone, XLA, {n} at a time": in_parts(n) for n in (8, 16, 32, 64)}
    bare["FFTs alone, XLA, 16 in each of the cores"] = in_parts(16, pool.map)
    bare["FFTs alone, scipy, one in each of the cores"] = lambda: list(pool.map(by_scipy, sounds))
    reads = "reads alone, one core"
    fresh = functools.partial(data.batches, chosen, recordings, (index,), first=0)
    others = in_turns(bare | {reads: fetch}, size.rounds)
    timed = {"EQST, host rendering in tf.data": _streamed(fresh, 2 * size.rounds)} | others
    say("host pairs: timed")
    middle = {name: float(np.median(values)) for name, values in timed.items()}
    limit = min(middle[name] for name in bare) + middle[reads] / cores
    rows = timings(timed)
    for row in rows:
        row["pairs_per_s"] = 1e3 * size.batch / row["milliseconds"]
    rows.append({"what": "the limit: fastest FFTs and reads", "pairs_per_s": size.batch / limit})
    share = limit / next(iter(middle.values()))
    about = f"batches of {size.batch} coloured pairs of {seconds:g} s with context, {cores} cores"
    return Section(about, rows, [target("host pairs/s against the limit", share, least=0.7)])


def _streamed(fresh: Callable[[], Iterator[Any]], rounds: int) -> np.ndarray:
    """Seconds [rounds] of a batch in a stream that nothing else interrupts.

    Each from a new stream: one that waits while others have their turn works ahead meanwhile.
    """
    seconds = []
    for _ in range(rounds):
        stream = fresh()
        for _ in range(_AHEAD):
            next(stream)
        start = time.perf_counter()
        for _ in range(_AHEAD):
            next(stream)
        seconds.append((time.perf_counter() - start) / _AHEAD)
        del stream
    return np.array(seconds)


def pair_sources(size: Size, say: Say) -> Section:
    """Pairs per second as the network sees them, from every path, without the network."""
    choices = {
        "db_mel, resident, device rendering": {"data__rendering": "device"},
        "db_mel, resident, exact rendering": {"data__rendering": "exact"},
        "db_mel, tf.data, device rendering": {"data__pipeline": "tfdata"},
        "db_mel, tf.data, host rendering": {
            "data__pipeline": "tfdata",
            "data__rendering": "host",
        },
        "pooled, resident": {
            "data__rendering": "pooled",
            "features__kind": "pooled",
            "model__comparison": "direct",
            "model__head": "continuous",
        },
    }
    timed = {}
    devices = mesh.make_mesh(1)
    for name, changes in choices.items():
        chosen = _synthetic(size, **changes)
        recordings = corpus.open_corpus(chosen.data, "train", say)
        source = batches.make_source(chosen, recordings, devices, say)
        see = jax.jit(source.see, static_argnums=2)

        def fresh(source: batches.Source = source, see: Callable = see) -> Iterator[Any]:
            for batch in source.stream(0):
                yield jax.block_until_ready(see(batch, source.constants, 0))

        timed[name] = _streamed(fresh, max(size.rounds // 2, 2))
        say(f"{name}: timed")
    rows = timings(timed)
    for row in rows:
        row["pairs_per_s"] = 1e3 * size.batch / row["milliseconds"]
        del row["ratio"]
    about = f"features of both recordings of {size.batch} pairs of 3 s, on one CPU device"
    return Section(about, rows, [])


# --- training ------------------------------------------------------------------------------------


def training_step(size: Size, say: Say) -> Section:
    """One step of `db_mel_pm` from features on, against the same network in PyTorch."""
    chosen = _synthetic(size)
    frames = 128
    rng = np.random.default_rng(0)
    bands = chosen.features.mel_bands
    sounds = [rng.standard_normal((size.batch, frames, bands), np.float32) for _ in range(2)]
    label_BKP = rng.random((size.batch, len(eq.KINDS), 3), np.float32)
    seen = batches.Seen(*(jnp.asarray(x) for x in (*sounds, label_BKP)))
    normalisation = predictor.Normalisation(jnp.zeros(bands), jnp.ones(bands))
    params = predictor.init(chosen, jax.random.key(chosen.seed))
    state = learner.init_state(chosen, jax.tree.map(jnp.copy, params))
    step = jax.jit(functools.partial(learner.train_step, chosen), donate_argnums=0)

    def ours() -> None:
        nonlocal state
        state, _ = step(state, normalisation, seen)
        jax.block_until_ready(state)

    functions: dict[str, Callable[[], Any]] = {"EQST": ours}
    about = (
        f"{size.batch} pairs of {frames} frames of {bands} bands; ours with the response in the "
        "loss and an average of the weights, PyTorch's without"
    )
    if not rivals.installed("torch"):
        say("torch is not installed: left out")
        return Section(about, timings(in_turns(functions, size.rounds)), [])
    import torch

    torch.set_num_threads(_cores())
    predict = jax.jit(jax.vmap(functools.partial(predictor.apply, chosen, params, normalisation)))
    logits = np.concatenate(predict(*seen[:2]).logits, axis=-1)
    for name, channels_last in (("PyTorch", False), ("PyTorch, channels last", True)):
        network = rivals.torch_network(chosen, params, channels_last=channels_last)
        with torch.no_grad():
            other = network(*(torch.tensor(x) for x in sounds)).numpy()
        worst = float(np.abs(other - logits).max())
        if worst > 1e-4 * np.abs(logits).max():
            raise ValueError(f"{name} is another network: its logits differ by {worst:g}")
        functions[name] = rivals.torch_step(chosen, network, seen)
    rows = timings(in_turns(functions, size.rounds))
    best = min(row["milliseconds"] for row in rows[1:])
    share = rows[0]["milliseconds"] / best
    return Section(about, rows, [target("our step / PyTorch's fastest", share, most=1.5)])


def training_run(size: Size, say: Say) -> Section:
    """The training command of `db_mel_pm`: pairs per second and the share that waits for input."""
    rows: list[dict[str, Any]] = []
    targets = []
    choices = {"resident": {}, "tf.data": {"data__pipeline": "tfdata"}}
    for name, changes in choices.items():
        chosen = _synthetic(
            size,
            train__steps=size.steps,
            train__log_every=max(size.steps // 3, 1),
            train__eval_every=size.steps,
            train__checkpoint_every=size.steps,
            train__eval_pairs=8,
            train__devices=1,
            **changes,
        )
        with tempfile.TemporaryDirectory() as folder:
            train.train(chosen, folder, say)
            lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
        logged = [x for x in map(json.loads, lines) if "pairs_per_s" in x]
        last = logged[-1]  # the first is compilation
        row = {"what": f"db_mel_pm, {name}", "pairs_per_s": last["pairs_per_s"]}
        ours = rows[0]["pairs_per_s"] if rows else last["pairs_per_s"]
        row |= {"ratio": ours / last["pairs_per_s"], "input_wait": last["input_wait"]}
        rows.append(row)
        targets.append(target(f"input wait, {name}", last["input_wait"], most=0.05))
    about = f"batches of {size.batch}, the last third of {size.steps} steps, features included"
    return Section(about, rows, targets)


# --- match ---------------------------------------------------------------------------------------


def match_files(size: Size, say: Say) -> Section:
    """A cold `eqst.match` of two stereo files, matchering, warm prediction and rendering."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(pathlib.Path(folder) / name) for name in ("input.wav", "reference.wav")]
        for number, path in enumerate(paths):
            say(f"match: making {pathlib.Path(path).name}")
            channels = [
                synthetic.synthesise(2**31, 2 * number + c, size.file_seconds) for c in range(2)
            ]
            soundfile.write(path, np.stack(channels, axis=1), _RATE, "PCM_16")
        output = str(pathlib.Path(folder) / "output.wav")
        ours = [sys.executable, "-m", "eqst.match", f"--input={paths[0]}", "--overwrite"]
        ours += [f"--reference={paths[1]}", f"--output={output}"]
        cache = {"XDG_CACHE_HOME": str(pathlib.Path(folder) / "cache")}
        turns = {"EQST, later": (ours, cache)}
        spent = {"EQST, the first time (nothing compiled)": [process(ours, cache)]}
        if rivals.installed("matchering"):
            theirs = rivals.matchering_command(paths[0], paths[1], output)
            turns["matchering"] = (theirs, {})
            process(theirs, {})  # ours has run too
        else:
            say("matchering is not installed: left out")
        for _ in range(max(size.rounds, 2)):
            for name, (line, environment) in turns.items():
                spent.setdefault(name, []).append(process(line, environment))
                say(f"match: {name} {spent[name][-1].seconds:.1f} s")
        rows: list[dict[str, Any]] = []
        for name, runs in spent.items():
            middle = {
                key: float(np.median([x._asdict()[key] for x in runs])) for key in Spent._fields
            }
            seconds = [x.seconds for x in runs]
            spread = {"least": min(seconds), "most": max(seconds), "runs": len(runs)}
            rows.append({"what": name, **middle, **spread})
        rows += _warm(paths[0], output, size)
    first, later = rows[:2]
    targets = [
        target("match, the first time, s", first["seconds"], most=6.0),
        target("match, later, s", later["seconds"], most=3.0),
        target("match, MB", max(first["megabytes"], later["megabytes"]), most=500.0),
        target("warm prediction, ms", 1e3 * rows[-3]["seconds"], most=50.0),
        *(
            target(f"{row['what']}, times real time", row["times_real_time"], least=500.0)
            for row in rows[-2:]
        ),
    ]
    about = (
        f"{size.file_seconds:g} s, stereo, {_RATE} Hz, processes in turns (medians); matchering "
        "matches level and limits as well, and says no settings"
    )
    return Section(about, rows, targets)


def _warm(path: str, output: str, size: Size) -> list[dict[str, Any]]:
    """Prediction from 10 s of audio in a process that has predicted before, and rendering."""
    samples_TC, rate = soundfile.read(path, dtype="float32", always_2d=True)
    ten = 10 * rate
    half_TC = samples_TC[len(samples_TC) // 2 :]
    matcher = match.Matcher.load()
    found = matcher.predict(samples_TC[:ten, 0], half_TC[:ten, 0], rate)
    up = found.params._replace(gain_db=np.full(len(eq.KINDS), 9.0))
    renderings = {
        "rendering what has to be attenuated (two passes)": up,
        "rendering what fits (one pass)": up._replace(gain_db=-up.gain_db),
    }
    timed = in_turns(
        {
            "warm prediction from 10 s and 10 s, mono": lambda: matcher.predict(
                samples_TC[:ten, 0], half_TC[:ten, 0], rate
            ),
            **{
                name: functools.partial(render.render_file, path, output, params, overwrite=True)
                for name, params in renderings.items()
            },
        },
        max(size.rounds // 2, 2),
    )
    rows: list[dict[str, Any]] = [
        {"what": name, "seconds": float(np.median(values))} for name, values in timed.items()
    ]
    for row in rows[1:]:
        row["times_real_time"] = len(samples_TC) / rate / row["seconds"]
    return rows


def hour(size: Size, say: Say) -> Section:
    """Memory of rendering an hour of 8 channels against a minute of the same."""
    program = (
        "import sys; from eqst import render, settings; "
        "render.render_file(sys.argv[1], sys.argv[2], settings.load(sys.argv[3]).params)"
    )
    rows = []
    rng = np.random.default_rng(0)
    second_TC = (0.1 * rng.standard_normal((_RATE, 8))).astype(np.float32)
    unit_KP = rng.random((len(eq.KINDS), 3))
    found = settings.from_params(eq.from_unit(eq.PAPER, unit_KP), _RATE)
    with tempfile.TemporaryDirectory() as folder:
        chosen = pathlib.Path(folder) / "settings.json"
        settings.save(str(chosen), found)
        for seconds in (size.hour_seconds / 60, size.hour_seconds):
            path, output = (pathlib.Path(folder) / name for name in ("long.wav", "out.wav"))
            with soundfile.SoundFile(path, "w", _RATE, 8, "PCM_16") as file:
                for _ in range(round(seconds)):
                    file.write(second_TC)
            line = [sys.executable, "-c", program, str(path), str(output), str(chosen)]
            spent = process(line, {})
            output.unlink()
            say(f"hour: {seconds:g} s rendered in {spent.seconds:.0f} s")
            row = {"what": f"{seconds:g} s of 8 channels", **spent._asdict()}
            rows.append(row | {"times_real_time": seconds / spent.seconds})
    growth = rows[1]["megabytes"] / rows[0]["megabytes"]
    about = f"8 channels of 16 bit at {_RATE} Hz, a process each"
    return Section(about, rows, [target("memory of 60 times the length", growth, most=1.05)])


SECTIONS = {
    "responses": responses,
    "host_pairs": host_pairs,
    "pair_sources": pair_sources,
    "training_step": training_step,
    "training_run": training_run,
    "match_files": match_files,
    "hour": hour,
}
