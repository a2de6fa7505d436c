"""Where training's batches come from, as the network sees them.

`make_source` is the resident corpus or tf.data behind one face; `measure_normalisation` and
`valid_pairs` are what training needs of recordings before its first step; `rendered_chunks` is the
exactly filtered audio that anything held out is judged on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import corpus, eq, mesh, observe, pairs, predictor, processes, resident
from eqst.config import Config

# Numbers of the examples the feature normalisation is measured on, out of training's reach.
NORMALISATION_FIRST, NORMALISATION_PAIRS = 2**30, 512
# Held-out pairs rendered at a time.
CHUNK = 8


class Seen(NamedTuple):
    """A batch as the network sees it: features of both recordings, and the label."""

    input_BXM: jax.Array
    reference_BXM: jax.Array
    label_BKP: jax.Array


class Source(NamedTuple):
    """Training examples: `stream(first step)` gives what `see` turns into features in the step.

    Attributes:
      stream: step -> iterator of trees, leaves sharded over the data axis; of the resident corpus
        steps' numbers, all that `see` needs to know, and can be told inside the step as well.
      see: (tree, constants, which length) -> Seen; traced inside the step.
      constants: device arrays `see` needs (the resident corpus).
    """

    stream: Callable[[int], Iterator[Any]]
    see: Callable[[Any, Any, int], Seen]
    constants: Any


def make_source(
    config: Config, recordings: corpus.Corpus, devices: jax.sharding.Mesh, say: Callable
) -> Source:
    """The source of the config: resident corpus or tf.data."""
    data = config.data
    indices = []
    for seconds in data.segment_seconds:
        index, skipped = pairs.build_index(recordings, seconds, data.min_loudness_lufs)
        for line in skipped:
            say(f"left out {line}")
        indices.append(index)
    size = config.train.batch_size
    part = mesh.process_slice(devices, size)
    if data.pipeline == "resident":
        parts = mesh.ways(devices) if data.shard_corpus else 1
        over = devices if parts > 1 else None
        held = resident.load(config, recordings, tuple(indices), say, over)
        specs = resident.places(held, parts)

        def numbers(first: int) -> Iterator[Any]:
            return map(np.int32, itertools.count(first))

        def see_resident(step: jax.Array, held: resident.Resident, which: int) -> Seen:
            def own(step: jax.Array, held: resident.Resident) -> Seen:
                k_B = step * size + mesh.own_rows(devices, size)
                return Seen(*resident.batch(config, held, which, k_B, parts))

            return mesh.on_each(devices, own, mesh.COPIED, specs)(step, held)

        return Source(numbers, see_resident, _copied(devices, held))
    from eqst import data as tf_data

    def batches(first: int) -> Iterator[Any]:
        stream = tf_data.batches(config, recordings, tuple(indices), first=first, part=part)
        return (mesh.global_batch(devices, batch) for batch in stream)

    def see_batch(batch: Any, _: Any, which: int) -> Seen:
        return mesh.on_each(devices, see_own, mesh.SPLIT)(batch)

    def see_own(batch: Any) -> Seen:
        if data.rendering == "host":
            hear = jax.vmap(functools.partial(observe.heard, config))
            return Seen(hear(batch.input_BT), hear(batch.reference_BT), batch.plan.label_KP)
        render = jax.vmap(functools.partial(observe.rendered, config))
        seen = render(batch.input_BT, batch.reference_BT, batch.plan)
        return Seen(*seen, batch.plan.label_KP)

    return Source(batches, see_batch, ())


def _copied(devices: jax.sharding.Mesh, held: resident.Resident) -> resident.Resident:
    """On all devices what is not split over them already."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else mesh.copied(devices, x), held)


def of_member(source: Source, seed: int, weight_R: np.ndarray) -> Source:
    """A resident source with another seed and other probabilities of its recordings."""
    held: resident.Resident = source.constants
    cumulatives = [pairs.cumulative(weight_R[np.asarray(x.recording_R)]) for x in held.indices]
    return source._replace(constants=_drawing(held, np.asarray(seed, np.int32), cumulatives))


def of_members(own: Sequence[Source], place: Callable[[Any], Any]) -> Source:
    """Sources from `of_member` as one: what is seen has a first axis [members].

    `place` puts a tree of numpy arrays with that axis on the devices.
    """
    drawings = [
        (held.seed, [x.cumulative_R for x in held.indices])
        for held in (source.constants for source in own)
    ]
    seeds, cumulatives = place(jax.tree.map(lambda *x: np.stack(x), *drawings))
    constants = _drawing(own[0].constants, seeds, cumulatives)
    nowhere: Any = jax.tree.map(lambda _: None, constants)
    axes = _drawing(nowhere, 0, [0] * len(cumulatives))

    def see(step: jax.Array, held: resident.Resident, which: int) -> Seen:
        def see_one(one: resident.Resident) -> Seen:
            return own[0].see(step, one, which)

        return jax.vmap(see_one, in_axes=(axes,), spmd_axis_name=mesh.MEMBERS)(held)

    return own[0]._replace(see=see, constants=constants)


def _drawing(held: resident.Resident, seed: Any, cumulatives: Sequence[Any]) -> resident.Resident:
    """The same corpus, drawn from by another seed and other probabilities."""
    indices = tuple(
        index._replace(cumulative_R=x) for index, x in zip(held.indices, cumulatives, strict=True)
    )
    return held._replace(seed=seed, indices=indices)


def measure_normalisation(config: Config, source: Source) -> predictor.Normalisation:
    """Mean and deviation of the features over fixed training pairs, per band (and statistic).

    Without `features.normalise` they are 0 and 1.
    """
    if not config.features.normalise:
        shape = predictor.normalisation_shape(config).mean.shape
        return predictor.Normalisation(jnp.zeros(shape), jnp.ones(shape))
    see = jax.jit(source.see, static_argnums=2)
    first = NORMALISATION_FIRST // config.train.batch_size
    first -= first % len(config.data.segment_seconds)
    stream = source.stream(first)
    count = max(1, NORMALISATION_PAIRS // config.train.batch_size)
    lengths = len(config.data.segment_seconds)
    axes = (0, 1) if config.features.kind == "mel" else (0,)
    moments = []
    for number in range(count):
        seen = see(next(stream), source.constants, number % lengths)
        # Gathered first, so that it is the same sum for any number of devices and processes.
        parts = (seen.input_BXM, seen.reference_BXM)
        both = [processes.on_host(part).astype(np.float64) for part in parts]
        moments += [np.stack([x.mean(axes), np.square(x).mean(axes)]) for x in both]
    mean, square = np.mean(moments, axis=0)
    scale = np.sqrt(np.maximum(square - mean**2, 0.0)) + 1e-3
    return predictor.Normalisation(mean.astype(np.float32), scale.astype(np.float32))


def rendered_chunks(
    config: Config,
    recordings: corpus.Corpus,
    *,
    seconds: float,
    protocol: str,
    count: int,
    seed: int,
    without_label: bool = False,
    different_recordings: bool = False,
    first: int = 0,
) -> Iterator[tuple[pairs.Plan, tuple[np.ndarray, ...]]]:
    """Pairs `first` .. `first + count - 1` of this seed, recordings in turn, `CHUNK` at a time.

    The EQ is put on by the exact filter, with context. The last chunk is whole; the caller cuts.

    Yields:
      the plans, and audio [CHUNK, T]: input, reference, and, if `without_label`, the reference
      without the label's EQ.
    """
    data, rate = config.data, recordings.sample_rate
    index, _ = pairs.build_index(recordings, seconds, data.min_loudness_lufs)
    draw_one = functools.partial(
        pairs.draw,
        index=index,
        protocol=protocol,
        different_recordings=different_recordings,
        turn=True,
    )
    draw = jax.jit(jax.vmap(lambda k: draw_one(seed, k)))
    render_one = functools.partial(
        pairs.render,
        table=eq.table(config.eq_table),
        protocol=protocol,
        sample_rate=rate,
        context=round(data.context_seconds * rate),
    )

    @jax.jit
    @jax.vmap
    def render(input_T: jax.Array, reference_T: jax.Array, plan: pairs.Plan) -> tuple:
        sounds = render_one(input_T, reference_T, plan)
        if not without_label:
            return sounds
        flat = plan._replace(label_KP=pairs.without_gain(plan.label_KP))
        return *sounds, render_one(input_T, reference_T, flat)[1]

    for begin in range(first, first + count, CHUNK):
        plan = jax.tree.map(np.asarray, draw(np.arange(begin, begin + CHUNK)))
        audio = pairs.fetch(recordings, plan, seconds, data.context_seconds)
        yield plan, jax.tree.map(np.asarray, render(*audio, plan))


class Weighed(NamedTuple):
    """Pairs that fill every device evenly; the padding has weight 0 and the others share 1."""

    seen: Seen
    weight_B: jax.Array


def valid_pairs(config: Config, recordings: corpus.Corpus, devices: jax.sharding.Mesh) -> Weighed:
    """Features of fixed pairs of held-out train talkers, on exactly filtered audio.

    Split over the devices; every process renders its own. A weighted sum over them is the mean over
    `train.eval_pairs` pairs for any number of devices and processes.
    """
    hear = jax.jit(jax.vmap(functools.partial(observe.heard, config)))
    count = config.train.eval_pairs
    padded = -(-count // mesh.ways(devices)) * mesh.ways(devices)
    mine = mesh.process_slice(devices, padded)
    parts = [
        (*(np.asarray(hear(sound_BT)) for sound_BT in sounds), plan.label_KP)
        for plan, sounds in rendered_chunks(
            config,
            recordings,
            seconds=config.data.segment_seconds[0],
            protocol=config.data.protocol,
            first=mine.start,
            count=mine.stop - mine.start,
            seed=config.seed + 2,
        )
    ]
    rows = mine.stop - mine.start
    leaves: list[Any] = [np.concatenate(x)[:rows] for x in zip(*parts, strict=True)]
    weight_B: Any = np.where(np.arange(padded) < count, 1.0 / count, 0.0).astype(np.float32)
    return mesh.global_batch(devices, Weighed(Seen(*leaves), weight_B[mine]))
