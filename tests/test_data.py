"""tf.data against numpy: the same examples in any order, from any start, in any slice."""

import functools

import jax
import numpy as np
import pytest

from eqst import biquad, eq, pairs

tf = pytest.importorskip("tensorflow", reason="needs the extra [data]: tensorflow")

from eqst import data as tf_data  # noqa: E402

RATE = 16000
SETTINGS = {
    "data.sample_rate": RATE,
    "data.segment_seconds": [0.5, 0.8],
    "data.context_seconds": 1.5,
    "data.pipeline": "tfdata",
    "features.window": 512,
    "features.hop": 256,
    "train.batch_size": 4,
}


@pytest.fixture(scope="module")
def little(corpus_of, bursts):
    return corpus_of([bursts(30 + i, 4.0, RATE) for i in range(3)], RATE)


def indices_of(config, recordings):
    return tuple(
        pairs.build_index(recordings, seconds, -40.0)[0] for seconds in config.data.segment_seconds
    )


def taken(config, recordings, count, *, first=0, part=slice(None)):
    stream = tf_data.batches(
        config, recordings, indices_of(config, recordings), first=first, part=part
    )
    return [next(stream) for _ in range(count)]


def by_hand(config, recordings, number):
    """Batch `number` by numpy and JAX alone: plans, dry audio with context, rendered audio."""
    data, size = config.data, config.train.batch_size
    which = number % len(data.segment_seconds)
    index = indices_of(config, recordings)[which]
    draw = jax.jit(jax.vmap(lambda k: pairs.draw(config.seed, k, index, protocol=data.protocol)))
    plan = jax.tree.map(np.asarray, draw(np.arange(size, dtype=np.int32) + number * size))
    seconds = data.segment_seconds[which]
    dry = pairs.fetch(recordings, plan, seconds, data.context_seconds)
    render = functools.partial(
        pairs.render,
        table=eq.table(config.eq_table),
        protocol=data.protocol,
        sample_rate=RATE,
        context=round(data.context_seconds * RATE),
    )
    return plan, dry, jax.tree.map(np.asarray, jax.jit(jax.vmap(render))(*dry, plan))


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def host(configure):
    return configure(SETTINGS | {"data.rendering": "host", "data.segment_seconds": [0.5]})


@pytest.fixture(scope="module")
def device(configure):
    return configure(SETTINGS | {"data.rendering": "device"})


def test_host_rendering_is_pairs_render_and_scipy(host, little):
    from scipy.signal import sosfilt

    for number, batch in ((0, taken(host, little, 1)[0]), (3, taken(host, little, 1, first=3)[0])):
        plan, _, rendered = by_hand(host, little, number)
        same(batch.plan, plan)
        for got_BT, expected_BT in zip((batch.input_BT, batch.reference_BT), rendered, strict=True):
            assert got_BT.dtype == np.float32
            # Two compilations of one function.
            np.testing.assert_allclose(got_BT, expected_BT, atol=1e-5 * np.abs(expected_BT).max())
        for b in range(4):
            recording = int(plan.reference_recording[b])
            full_T = little.segment(recording, 0, int(little.length_R[recording])).astype(float)
            for unit_KP in (plan.colour_KP[b], plan.label_KP[b]):
                settings = eq.from_unit(eq.PAPER, unit_KP.astype(np.float64))
                settings, _ = eq.limit_to_rate(settings, RATE)
                full_T = sosfilt(biquad.sos(*settings, kinds=eq.KINDS, sample_rate=RATE), full_T)
            begin = int(plan.reference_hop[b]) * RATE // 10
            expected_T = full_T[begin : begin + batch.reference_BT.shape[1]]
            error = np.abs(batch.reference_BT[b] - expected_T).max()
            assert 20 * np.log10(error / np.abs(expected_T).max()) < -90.0


@pytest.fixture(scope="module")
def whole(device, little):
    """Batches 0 to 5."""
    return taken(device, little, 6)


@pytest.mark.parametrize("first", [1, 2])
def test_resuming_is_exact(device, little, whole, first):
    for a, b in zip(whole[first : first + 3], taken(device, little, 3, first=first), strict=True):
        same(a, b)


def test_dry_batches_are_the_numpy_path(device, little, whole):
    for number, batch in enumerate(whole[:2]):
        plan, dry, _ = by_hand(device, little, number)
        same(batch.plan, plan)
        context = round(1.5 * RATE)
        same((batch.input_BT, batch.reference_BT), tuple(x[:, context:] for x in dry))
        assert batch.input_BT.shape == (4, round([0.5, 0.8][number % 2] * RATE))


def test_processes_tile_the_global_batch(device, little, whole):
    parts = [taken(device, little, 2, part=slice(2 * i, 2 * i + 2)) for i in range(2)]
    for number in range(2):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(part[number] for part in parts))
        same(whole[number], joined)


def test_another_seed_is_another_batch_and_no_accelerator_is_taken(configure, little, whole):
    other = configure(SETTINGS | {"data.rendering": "device", "seed": 5})
    assert not np.array_equal(whole[0].plan.label_KP, taken(other, little, 1)[0].plan.label_KP)
    assert tf.config.get_visible_devices("GPU") == []
