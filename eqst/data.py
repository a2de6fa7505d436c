"""Pairs through tf.data. The only importer of tensorflow.

Batch b of a run holds the examples b B .. b B + B - 1 of `pairs.draw`, so a resumed run starts at
`range(b, ...)` and there is no iterator state to save. Reading is a numpy function on the stores;
exact rendering runs in the TF graph, as the same JAX function that everything else uses (one
definition of the filter, compiled through jax2tf).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from eqst import eq, pairs
from eqst.config import Config
from eqst.corpus import Corpus, CorpusError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


class Batch(NamedTuple):
    """A batch as the training step takes it.

    Attributes:
      input_BT, reference_BT: [B, T] audio; with host rendering filtered, else dry.
      plan: the pairs' plans, leaves [B, ...].
    """

    input_BT: Any
    reference_BT: Any
    plan: pairs.Plan


def _tensorflow() -> Any:
    try:
        import tensorflow as tf
    except ImportError:
        raise ImportError(
            "data.pipeline 'tfdata' needs tensorflow: pip install 'eqst[data]', "
            "or train with --config.data.pipeline=resident"
        ) from None
    # TF must leave the accelerators to JAX.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def plans(config: Config, index: pairs.Index) -> Any:
    """A function from example numbers [B] to numpy plans, compiled for the host."""
    data = config.data
    one = functools.partial(
        pairs.draw,
        config.seed,
        index=index,
        protocol=data.protocol,
        different_recordings=data.different_recordings,
    )
    many = jax.jit(jax.vmap(lambda k: one(k)))
    host = jax.local_devices(backend="cpu")[0]

    def draw_many(k_B: np.ndarray) -> pairs.Plan:
        with jax.default_device(host):
            return jax.tree.map(np.asarray, many(np.asarray(k_B, np.int32)))

    return draw_many


def _dataset(
    config: Config,
    corpus: Corpus,
    index: pairs.Index,
    seconds: float,
    numbers: Any,
    part: slice,
    failed: list[CorpusError],
) -> Any:
    """One segment length: batch numbers -> flat tensors (input, reference, *plan).

    What cannot be read is noted in `failed`: TensorFlow passes on the error's text alone.
    """
    tf = _tensorflow()
    from jax.experimental import jax2tf

    draw_many = plans(config, index)
    data, host = config.data, config.data.rendering == "host"
    context_seconds = data.context_seconds if host else 0.0
    size = config.train.batch_size

    def load(number: np.ndarray) -> tuple:
        plan = draw_many(np.arange(size)[part] + int(number) * size)
        # Integers: half of what floats are to copy, and several copies are made on the way.
        try:
            return *pairs.fetch_stored(corpus, plan, seconds, context_seconds), *plan
        except CorpusError as error:
            failed.append(error)
            raise

    example = load(np.asarray(0))

    def load_tf(number: Any) -> tuple:
        flat = tf.numpy_function(load, [number], [tf.as_dtype(x.dtype) for x in example])
        return tuple(tf.ensure_shape(x, y.shape) for x, y in zip(flat, example, strict=True))

    one = functools.partial(
        pairs.render,
        table=eq.table(config.eq_table),
        protocol=data.protocol,
        sample_rate=corpus.sample_rate,
        context=round(context_seconds * corpus.sample_rate),
    )

    def hear(input_BT: Any, reference_BT: Any, input_B: Any, reference_B: Any, *plan: Any) -> tuple:
        sounds = input_BT * input_B[:, None], reference_BT * reference_B[:, None]
        return jax.vmap(one)(*sounds, pairs.Plan(*plan)) if host else sounds

    in_graph = tf.autograph.experimental.do_not_convert(
        jax2tf.convert(hear, with_gradient=False, native_serialization_platforms=("cpu",))
    )
    dataset = numbers.map(load_tf, num_parallel_calls=tf.data.AUTOTUNE).map(
        lambda *flat: (*in_graph(*flat), *flat[4:]), num_parallel_calls=tf.data.AUTOTUNE
    )
    return dataset.prefetch(2)


def batches(
    config: Config,
    corpus: Corpus,
    indices: tuple[pairs.Index, ...],
    *,
    first: int,
    part: slice = slice(None),
) -> Iterator[Batch]:
    """Batches from number `first` on, for ever.

    Args:
      config: settings; batch b has the segment length b modulo their number.
      corpus: the recordings.
      indices: one for each segment length of the config.
      first: number of the first batch (the step to resume at).
      part: this process's slice of the global batch.

    Yields:
      Batch of numpy arrays, leaves [part of B, ...].

    Raises:
      CorpusError: recordings that are read where they lie are damaged there.
    """
    tf = _tensorflow()
    lengths = config.data.segment_seconds
    count = len(lengths)
    streams: list[Iterator[tuple]] = []
    failed: list[CorpusError] = []
    for which, (seconds, index) in enumerate(zip(lengths, indices, strict=True)):
        start = first + (which - first) % count
        numbers = tf.data.Dataset.range(start, np.iinfo(np.int64).max, count)
        dataset = _dataset(config, corpus, index, seconds, numbers, part, failed)
        streams.append(dataset.as_numpy_iterator())
    number = first
    while True:
        try:
            flat = next(streams[number % count])
        except tf.errors.OpError:
            if failed:
                raise failed[0] from None
            raise
        yield Batch(flat[0], flat[1], pairs.Plan(*flat[2:]))
        number += 1
