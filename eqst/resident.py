"""The corpus in the device's memory: cropping, EQ and features inside the training step.

No tensorflow, and no host work per step: example numbers follow from the step's. int16 samples of
all recordings lie in a row; a segment is one dynamic slice. For the `pooled` rendering not even the
samples are kept: each possible segment's statistics are measured once.

On several devices each has a copy of all that, or (`data.shard_corpus`) a share: whole recordings,
or rows of statistics, as much on each as can be. A batch's segments are then read where they lie
and handed to the devices whose examples they are of (`mesh.read_parts`), bit for bit the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import eq, features, mesh, observe, pairs, pooled
from eqst.config import Config
from eqst.corpus import Corpus


class Resident(NamedTuple):
    """What the step needs of the corpus, as device arrays (a plain tree).

    Attributes:
      indices: one `pairs.Index` per segment length.
      samples_T: [total] int16 with room for context before and a segment after; or [0]. Where it
        is split, parts of such a layout one after another, all of the longest one's length.
      part_R: the part a recording lies in.
      start_R, length_R: where it lies in that part.
      gain_R: factor to -23 LUFS.
      seed: [] of the run. Data, not a constant of the compiled step: members of a sweep that differ
        by their seed share one compilation.
      banks: per length, [V, S, M] float16 statistics of the index's rows; or (). Where they are
        split, filled up to equal parts.
    """

    indices: tuple[pairs.Index, ...]
    samples_T: jax.Array | np.ndarray
    part_R: jax.Array | np.ndarray
    start_R: jax.Array | np.ndarray
    length_R: jax.Array | np.ndarray
    gain_R: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    banks: tuple[jax.Array | np.ndarray, ...]


def places(resident: Resident, parts: int) -> Resident:
    """How each leaf lies on the devices: the specs `mesh.on_each` takes."""
    tree: Any = jax.tree.map(lambda _: mesh.COPIED, resident)
    if parts == 1:
        return tree
    return tree._replace(samples_T=mesh.SPLIT, banks=(mesh.SPLIT,) * len(resident.banks))


def _margin(config: Config) -> int:
    """Silent samples kept before the first recording and after the last."""
    data = config.data
    return round((max(data.segment_seconds) + data.context_seconds + 1.0) * data.sample_rate)


def load(
    config: Config,
    corpus: Corpus,
    indices: tuple[pairs.Index, ...],
    progress: Callable[[str], None] = print,
    devices: jax.sharding.Mesh | None = None,
) -> Resident:
    """Everything the step needs, as numpy arrays; the caller puts them on the devices.

    Args:
      devices: split samples and banks over these, where they then are; without it they are whole.

    Raises:
      ValueError: the corpus, or a device's share, is too long for 32-bit positions (13.5 hours at
        44.1 kHz).
    """
    seed = np.asarray(config.seed, np.int32)
    parts = 1 if devices is None else mesh.ways(devices)

    def join(make: Callable[[int], np.ndarray]) -> jax.Array | np.ndarray:
        return make(0) if devices is None else mesh.from_parts(devices, make)

    if config.data.rendering == "pooled":
        # Once for all lengths; smaller than the banks that are made of them.
        @functools.cache
        def powers(recording: int) -> tuple[np.ndarray, ...]:
            segment = functools.partial(corpus.segment, recording)
            return observe.band_powers(config, segment, int(corpus.length_R[recording]))

        banks = []
        for index, seconds in zip(indices, config.data.segment_seconds, strict=True):
            make = functools.partial(_bank, config, powers, index, seconds, progress, parts)
            banks.append(join(make))
        none = np.zeros(0, np.int32)
        samples_T = none.astype(np.int16)
        return Resident(indices, samples_T, none, none, none, none, seed, tuple(banks))
    margin = _margin(config)
    part_R, start_R = _shares(corpus.length_R, parts)
    start_R = start_R + margin
    total = int(np.max(start_R + corpus.length_R)) + margin
    if total >= 2**31:
        hours = corpus.seconds() / 3600
        share = f", a device's share of {total / corpus.sample_rate / 3600:.1f} h," * (parts > 1)
        raise ValueError(
            f"{hours:.1f} h of audio{share} do not fit the resident path's 32-bit positions; train "
            "with --config.data.pipeline=tfdata, or on more devices with "
            "--config.data.shard_corpus=True"
        )

    def samples(part: int) -> np.ndarray:
        samples_T = np.zeros(total, np.int16)
        for recording in np.flatnonzero(part_R == part):
            offset, length = int(corpus.start_R[recording]), int(corpus.length_R[recording])
            store, start = corpus.samples[corpus.store_R[recording]], start_R[recording]
            samples_T[start : start + length] = store[offset : offset + length]
        return samples_T

    return Resident(
        indices,
        join(samples),
        part_R.astype(np.int32),
        start_R.astype(np.int32),
        corpus.length_R.astype(np.int32),
        corpus.gain_R.astype(np.float32),
        seed,
        (),
    )


def _shares(length_R: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Which part each recording lies in and where it begins there: the longest first, each where
    least lies so far; in a part they keep their order."""
    part_R = np.zeros(len(length_R), np.int64)
    held = np.zeros(parts, np.int64)
    for recording in np.argsort(-length_R, kind="stable"):
        part_R[recording] = np.argmin(held)
        held[part_R[recording]] += length_R[recording]
    start_R = np.zeros(len(length_R), np.int64)
    for part in range(parts):
        own_R = part_R == part
        start_R[own_R] = np.cumsum(length_R[own_R]) - length_R[own_R]
    return part_R, start_R


# Rows whose statistics are made at a time.
_ROWS = 64


def _bank(
    config: Config,
    powers: Callable[[int], tuple[np.ndarray, ...]],
    index: pairs.Index,
    seconds: float,
    progress: Callable[[str], None],
    parts: int,
    part: int,
) -> np.ndarray:
    """[V, S, M] float16 statistics of a part of the index's rows, all parts being of one size.

    Overlapping segments share their frames: `powers` gives a recording's band powers, and a row
    takes the frames nearest to its start (within half a long hop, 46 ms).
    """
    spec, rate = config.features, config.data.sample_rate
    length = round(seconds * rate)
    windows, hops = pooled.windows(spec), observe.hops(spec)
    counts = [features.frame_count(length, w, hop) for w, hop in zip(windows, hops, strict=True)]
    ratio = hops[0] // hops[1]
    bank: np.ndarray | None = None
    size = -(-len(index.hop_V) // parts)
    low, high = part * size, min((part + 1) * size, len(index.hop_V))
    if low >= high:  # more parts than rows
        return np.zeros_like(_bank(config, powers, index, seconds, progress, parts, 0))
    done, rows = 0, high - low
    for first, count, recording in zip(
        index.first_R, index.count_R, index.recording_R, strict=True
    ):
        own = range(max(first, low) - first, min(first + count, high) - first)
        if not own:
            continue
        frames = powers(int(recording))
        last = max(min(len(frames[0]) - counts[0], (len(frames[1]) - counts[1]) // ratio), 0)
        hop_V = index.hop_V[first : first + count]
        start_V = np.array([pairs.first_sample(int(hop), rate) for hop in hop_V])
        frame_V = np.minimum(np.round(start_V / hops[0]).astype(int), last)
        for begin in range(own.start, own.stop, _ROWS):
            chosen = frame_V[begin : min(begin + _ROWS, own.stop)]
            cut = [
                np.stack([x[i * scale : i * scale + n] for i in chosen])
                for x, n, scale in zip(frames, counts, (1, ratio), strict=True)
            ]
            stats_BSM = observe.pool_dry(config, *cut).astype(np.float16)
            if bank is None:
                bank = np.zeros((size, *stats_BSM.shape[1:]), np.float16)
            row = first + begin - low
            bank[row : row + len(stats_BSM)] = stats_BSM
        if (done + len(own)) * 10 // rows > done * 10 // rows:
            share = f" (part {part + 1} of {parts})" * (parts > 1)
            progress(f"statistics of {seconds:g} s segments{share}: {done + len(own)} of {rows}")
        done += len(own)
    assert bank is not None  # an index without rows is refused when it is built
    return bank


def crop(resident: Resident, recording: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """[length] float32 samples at -23 LUFS; zeros before the recording's start and after its end.

    Args:
      resident: of one part.
      recording: [] its number.
      start: [] in samples from the recording's start, negative for context before it.
      length: static.
    """
    first = resident.start_R[recording] + start
    stored_T = _stored(jnp.asarray(resident.samples_T), first, length)
    return _levelled(resident, stored_T, recording, start)


def _stored(samples_T: jax.Array, first: jax.Array, length: int) -> jax.Array:
    return jax.lax.dynamic_slice(samples_T, (first,), (length,))


def _levelled(
    resident: Resident, stored_T: jax.Array, recording: jax.Array, start: jax.Array
) -> jax.Array:
    """What `crop` gives, of the samples as they are stored, of other recordings too."""
    position_T = start + jnp.arange(stored_T.shape[0])
    inside_T = (position_T >= 0) & (position_T < resident.length_R[recording])
    scaled_T = stored_T.astype(jnp.float32) * (resident.gain_R[recording] / 32768.0)
    return jnp.where(inside_T, scaled_T, 0.0)


class _Dry(NamedTuple):
    """An example before any EQ: its plan, and both segments or the statistics of both."""

    plan: pairs.Plan
    input: jax.Array
    reference: jax.Array


def pair(
    config: Config, resident: Resident, length_index: int, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Example k, from its number to what the network sees.

    Args:
      config: static.
      resident: device arrays, of one part.
      length_index: which segment length, static.
      k: [] the example's number.

    Returns:
      features of the input and of the reference, and the label [K, 3] in the unit cube.
    """
    plan = _plan(config, resident, length_index, k)
    if config.data.rendering == "pooled":
        bank = resident.banks[length_index]
        return _seen(
            config, length_index, _Dry(plan, bank[plan.input_row], bank[plan.reference_row])
        )
    context, length = _samples(config, length_index)
    starts = _starts(config, plan, context)
    sounds = (
        crop(resident, recording, start, length)
        for recording, start in zip(_recordings(plan), starts, strict=True)
    )
    return _seen(config, length_index, _Dry(plan, *sounds))


def batch(
    config: Config, resident: Resident, length_index: int, k_B: jax.Array, parts: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`pair` for the numbers of a batch; of a corpus in parts, for a device's own, on all at once.

    Args:
      config, length_index: as in `pair`.
      resident: as a device has it; `k_B` and the result are of its own examples.
      parts: how many there are; with more than 1 this is called within `mesh.on_each`.
    """
    if parts == 1:
        return jax.vmap(lambda k: pair(config, resident, length_index, k))(k_B)
    dry = shared_out(config, resident, length_index, k_B)
    return jax.vmap(functools.partial(_seen, config, length_index))(dry)


def shared_out(config: Config, resident: Resident, length_index: int, k_B: jax.Array) -> _Dry:
    """What examples are made of, [B, ..], read on the devices where it lies."""
    plan = jax.vmap(lambda k: _plan(config, resident, length_index, k))(k_B)
    if config.data.rendering == "pooled":
        bank = resident.banks[length_index]
        size = bank.shape[0]
        rows = (
            mesh.read_parts(lambda part, row: part[row], bank, row_B // size, row_B % size)
            for row_B in (plan.input_row, plan.reference_row)
        )
        return _Dry(plan, *rows)
    context, length = _samples(config, length_index)
    sounds = []
    for recording_B, start_B in zip(_recordings(plan), _starts(config, plan, context), strict=True):
        stored_BT = mesh.read_parts(
            functools.partial(_stored, length=length),
            resident.samples_T,
            resident.part_R[recording_B],
            resident.start_R[recording_B] + start_B,
        )
        level = jax.vmap(functools.partial(_levelled, resident))
        sounds.append(level(stored_BT, recording_B, start_B))
    return _Dry(plan, *sounds)


def _plan(config: Config, resident: Resident, length_index: int, k: jax.Array) -> pairs.Plan:
    return pairs.draw(
        resident.seed,
        k,
        resident.indices[length_index],
        protocol=config.data.protocol,
        different_recordings=config.data.different_recordings,
    )


def _samples(config: Config, length_index: int) -> tuple[int, int]:
    """Samples of context that the rendering asks for, and of a segment with it."""
    data = config.data
    context_seconds = data.context_seconds if data.rendering == "exact" else 0.0
    context = round(context_seconds * data.sample_rate)
    return context, context + round(data.segment_seconds[length_index] * data.sample_rate)


def _recordings(plan: pairs.Plan) -> tuple[jax.Array, jax.Array]:
    return plan.input_recording, plan.reference_recording


def _starts(config: Config, plan: pairs.Plan, context: int) -> tuple[jax.Array, jax.Array]:
    """Where both segments begin, with their context, in samples from their recordings' starts."""
    rate = config.data.sample_rate
    first, second = (
        pairs.first_sample(hop, rate) - context for hop in (plan.input_hop, plan.reference_hop)
    )
    return first, second


def _seen(config: Config, length_index: int, dry: _Dry) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the network sees of an example, and its label."""
    data = config.data
    plan = dry.plan
    if data.rendering == "pooled":
        seconds = data.segment_seconds[length_index]
        seen = observe.shifted(config, dry.input, dry.reference, plan, seconds=seconds)
        return *seen, plan.label_KP
    if data.rendering == "device":
        return *observe.rendered(config, dry.input, dry.reference, plan), plan.label_KP
    context, _ = _samples(config, length_index)
    input_T, reference_T = pairs.render(
        dry.input,
        dry.reference,
        plan,
        table=eq.table(config.eq_table),
        protocol=data.protocol,
        sample_rate=data.sample_rate,
        context=context,
    )
    return observe.heard(config, input_T), observe.heard(config, reference_T), plan.label_KP
