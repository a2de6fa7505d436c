"""The corpus in the device's memory: cropping, EQ and features inside the training step.

No tensorflow, and no host work per step but the example numbers. int16 samples of all recordings
lie in a row; a segment is one dynamic slice. For the `pooled` rendering not even the samples are
kept: each possible segment's statistics are measured once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import eq, features, observe, pairs, pooled
from eqst.config import Config
from eqst.corpus import Corpus


class Resident(NamedTuple):
    """What the step needs of the corpus, as device arrays (a plain tree).

    Attributes:
      indices: one `pairs.Index` per segment length.
      samples_T: [total] int16 with room for context before and a segment after; or [0].
      start_R, length_R: where a recording lies in it.
      gain_R: factor to -23 LUFS.
      seed: [] of the run. Data, not a constant of the compiled step: members of a sweep that differ
        by their seed share one compilation.
      banks: per length, [V, S, M] float16 statistics of the index's rows; or ().
    """

    indices: tuple[pairs.Index, ...]
    samples_T: jax.Array | np.ndarray
    start_R: jax.Array | np.ndarray
    length_R: jax.Array | np.ndarray
    gain_R: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    banks: tuple[jax.Array | np.ndarray, ...]


def _margin(config: Config) -> int:
    """Silent samples kept before the first recording and after the last."""
    data = config.data
    return round((max(data.segment_seconds) + data.context_seconds + 1.0) * data.sample_rate)


def load(
    config: Config,
    corpus: Corpus,
    indices: tuple[pairs.Index, ...],
    progress: Callable[[str], None] = print,
) -> Resident:
    """Numpy arrays of everything the step needs; the caller puts them on the devices.

    Raises:
      ValueError: the corpus is too long for 32-bit positions (13.5 hours at 44.1 kHz).
    """
    seed = np.asarray(config.seed, np.int32)
    if config.data.rendering == "pooled":
        # Once for all lengths; smaller than the banks that are made of them.
        @functools.cache
        def powers(recording: int) -> tuple[np.ndarray, ...]:
            segment = functools.partial(corpus.segment, recording)
            return observe.band_powers(config, segment, int(corpus.length_R[recording]))

        banks = tuple(
            _bank(config, powers, index, seconds, progress)
            for index, seconds in zip(indices, config.data.segment_seconds, strict=True)
        )
        nothing = np.zeros(0, np.int32)
        return Resident(indices, nothing.astype(np.int16), nothing, nothing, nothing, seed, banks)
    margin = _margin(config)
    start_R = margin + np.concatenate([[0], np.cumsum(corpus.length_R)])
    if start_R[-1] + margin >= 2**31:
        hours = corpus.seconds() / 3600
        raise ValueError(
            f"{hours:.1f} h of audio do not fit the resident path's 32-bit positions; "
            "train with --config.data.pipeline=tfdata"
        )
    samples_T = np.zeros(start_R[-1] + margin, np.int16)
    for recording, start in enumerate(start_R[:-1]):
        offset, length = int(corpus.start_R[recording]), int(corpus.length_R[recording])
        store = corpus.samples[corpus.store_R[recording]]
        samples_T[start : start + length] = store[offset : offset + length]
    return Resident(
        indices,
        samples_T,
        start_R[:-1].astype(np.int32),
        corpus.length_R.astype(np.int32),
        corpus.gain_R.astype(np.float32),
        seed,
        (),
    )


# Rows whose statistics are made at a time.
_ROWS = 64


def _bank(
    config: Config,
    powers: Callable[[int], tuple[np.ndarray, ...]],
    index: pairs.Index,
    seconds: float,
    progress: Callable[[str], None],
) -> np.ndarray:
    """[V, S, M] float16 statistics of every row of the index.

    Overlapping segments share their frames: `powers` gives a recording's band powers, and a row
    takes the frames nearest to its start (within half a long hop, 46 ms).
    """
    spec, rate = config.features, config.data.sample_rate
    length = round(seconds * rate)
    windows, hops = pooled.windows(spec), observe.hops(spec)
    counts = [features.frame_count(length, w, hop) for w, hop in zip(windows, hops, strict=True)]
    ratio = hops[0] // hops[1]
    bank: np.ndarray | None = None
    done, rows = 0, len(index.hop_V)
    for first, count, recording in zip(
        index.first_R, index.count_R, index.recording_R, strict=True
    ):
        frames = powers(int(recording))
        last = max(min(len(frames[0]) - counts[0], (len(frames[1]) - counts[1]) // ratio), 0)
        hop_V = index.hop_V[first : first + count]
        start_V = np.array([pairs.first_sample(int(hop), rate) for hop in hop_V])
        frame_V = np.minimum(np.round(start_V / hops[0]).astype(int), last)
        for begin in range(0, count, _ROWS):
            chosen = frame_V[begin : begin + _ROWS]
            cut = [
                np.stack([x[i * scale : i * scale + n] for i in chosen])
                for x, n, scale in zip(frames, counts, (1, ratio), strict=True)
            ]
            stats_BSM = observe.pool_dry(config, *cut).astype(np.float16)
            if bank is None:
                bank = np.empty((rows, *stats_BSM.shape[1:]), np.float16)
            bank[first + begin : first + begin + len(stats_BSM)] = stats_BSM
        if (done + count) * 4 // rows > done * 4 // rows:
            progress(f"statistics of {seconds:g} s segments: {done + count} of {rows}")
        done += int(count)
    assert bank is not None  # an index without rows is refused when it is built
    return bank


def crop(resident: Resident, recording: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """[length] float32 samples at -23 LUFS; zeros before the recording's start and after its end.

    Args:
      recording: [] its number.
      start: [] in samples from the recording's start, negative for context before it.
      length: static.
    """
    first = resident.start_R[recording] + start
    samples_T = jax.lax.dynamic_slice(jnp.asarray(resident.samples_T), (first,), (length,))
    position_T = start + jnp.arange(length)
    inside_T = (position_T >= 0) & (position_T < resident.length_R[recording])
    scaled_T = samples_T.astype(jnp.float32) * (resident.gain_R[recording] / 32768.0)
    return jnp.where(inside_T, scaled_T, 0.0)


def pair(
    config: Config, resident: Resident, length_index: int, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Example k, from its number to what the network sees.

    Args:
      config: static.
      resident: device arrays.
      length_index: which segment length, static.
      k: [] the example's number.

    Returns:
      features of the input and of the reference, and the label [K, 3] in the unit cube.
    """
    data, rate = config.data, config.data.sample_rate
    plan = pairs.draw(
        resident.seed,
        k,
        resident.indices[length_index],
        protocol=data.protocol,
        different_recordings=data.different_recordings,
    )
    if data.rendering == "pooled":
        bank = resident.banks[length_index]
        seen = observe.shifted(
            config,
            bank[plan.input_row],
            bank[plan.reference_row],
            plan,
            seconds=data.segment_seconds[length_index],
        )
        return *seen, plan.label_KP
    context_seconds = data.context_seconds if data.rendering == "exact" else 0.0
    context = round(context_seconds * rate)
    length = context + round(data.segment_seconds[length_index] * rate)
    input_T, reference_T = (
        crop(resident, recording, pairs.first_sample(hop, rate) - context, length)
        for recording, hop in (
            (plan.input_recording, plan.input_hop),
            (plan.reference_recording, plan.reference_hop),
        )
    )
    if data.rendering == "device":
        return *observe.rendered(config, input_T, reference_T, plan), plan.label_KP
    input_T, reference_T = pairs.render(
        input_T,
        reference_T,
        plan,
        table=eq.table(config.eq_table),
        protocol=data.protocol,
        sample_rate=rate,
        context=context,
    )
    return observe.heard(config, input_T), observe.heard(config, reference_T), plan.label_KP
