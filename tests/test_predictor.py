"""The network as a function: sizes of the seed's figures, purity, length, swap, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqst import card, eq, predictor

SMALL = {
    "features.mel_bands": 16,
    "features.window": 256,
    "features.hop": 128,
    "model.channels": 3,
    "model.hidden": 16,
    "model.blocks": 1,
}
VARIANTS = {
    "linear_mel_bl": {"features.scale": "linear", "model.comparison": "subtract"},
    "db_mel_bl": {"model.comparison": "subtract"},
    "db_mel_pm": {},
}


@functools.cache
def network(config):
    """Parameters of the right shapes from numpy, larger than fresh ones: every property shows."""
    shapes = jax.eval_shape(functools.partial(predictor.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def weights(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(weights, shapes)


def apply(config):
    return functools.partial(predictor.apply, config)


def frames(config, seed, count=40):
    return jax.random.normal(jax.random.key(seed), (count, config.features.mel_bands))


def unit_normalisation(config):
    bands = config.features.mel_bands
    return predictor.Normalisation(jnp.full(bands, 0.3), jnp.full(bands, 1.7))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_latents_of_the_papers_variants_are_2560(configure, changes):
    config = configure(changes)
    params = jax.eval_shape(lambda: predictor.init(config, jax.random.key(0)))
    seen = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    norm = predictor.Normalisation(*(jax.ShapeDtypeStruct((128,), jnp.float32),) * 2)
    said = jax.eval_shape(functools.partial(predictor.apply, config), params, norm, seen, seen)
    assert said.extracted_input.shape == said.extracted_reference.shape == said.fed.shape == (2560,)
    assert said.unit_KP.shape == (4, 3)
    assert [x.shape for x in said.logits] == [(4, 21), (4, 21), (4, 14)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"features.kind": "pooled", "model.comparison": "direct"}],
    ids=["mel", "pooled"],
)
def test_init_is_deterministic_and_plain(configure, changes):
    config = configure(SMALL | changes)
    init = jax.jit(functools.partial(predictor.init, config))
    one, other = (init(jax.random.key(seed)) for seed in (3, 4))
    two = jax.jit(functools.partial(predictor.init, config))(jax.random.key(3))

    def plain(tree):
        assert type(tree) is dict and all(type(key) is str for key in tree)
        for leaf in tree.values():
            if isinstance(leaf, dict):
                plain(leaf)
            else:
                assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32

    plain(one)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(
        one["predictor"]["enter"]["kernel"], other["predictor"]["enter"]["kernel"]
    )
    # What a checkpoint gives back is the same tree, not one with other keys.
    assert jax.tree.structure(one) == jax.tree.structure(card.nested(card.named_leaves(one)))


@pytest.mark.parametrize("count", [1, 17])
def test_any_number_of_frames(configure, count):
    config = configure(SMALL)
    said = apply(config)(
        network(config),
        unit_normalisation(config),
        frames(config, 0, count),
        frames(config, 1, count + 5),
    )
    assert said.fed.shape == (48,) and np.all(np.isfinite(said.unit_KP))


def test_stationary_features_say_the_same_at_any_length(configure):
    """Constant frames: only the edges know how long the recording is, so long ones agree."""
    config = configure(SMALL)
    params, norm = network(config), unit_normalisation(config)
    row = frames(config, 0, 1)

    def at(count):
        seen = jnp.tile(row, (count, 1))
        return np.asarray(apply(config)(params, norm, seen, 0.5 * seen).fed)

    assert np.abs(at(800) - at(3200)).max() < 0.1 * np.abs(at(3200)).max()


@pytest.mark.parametrize(
    ("comparison", "head"),
    [("learned", "grid"), ("subtract", "continuous"), ("direct", "continuous")],
)
def test_vmap_is_the_loop(configure, comparison, head):
    changes = SMALL | {"model.comparison": comparison, "model.head": head}
    if comparison == "direct":
        changes |= {"features.kind": "pooled", "data.sample_rate": 16000}
    config = configure(changes)
    params = network(config)
    if comparison == "direct":
        size = params["predictor"]["enter"]["kernel"].shape[0] // 2
        norm = predictor.Normalisation(jnp.zeros((10, size // 9)), jnp.ones((10, size // 9)))
        a, b = jnp.abs(jax.random.normal(jax.random.key(5), (2, 3, 10, size // 9)))
    else:
        norm = unit_normalisation(config)
        a, b = (jnp.stack([frames(config, s + i) for i in range(3)]) for s in (0, 10))

    def one(x, y):
        return predictor.apply(config, params, norm, x, y)

    together = jax.jit(jax.vmap(one))(a, b)
    for i in range(3):
        for batched, alone in zip(
            jax.tree.leaves(together),
            jax.tree.leaves(apply(config)(params, norm, a[i], b[i])),
            strict=True,
        ):
            np.testing.assert_allclose(batched[i], alone, rtol=2e-4, atol=2e-5)
    spread = np.asarray(together.unit_KP).std(axis=0).max()
    assert spread > 1e-4  # the three pairs are not answered alike


def test_the_pooled_network_hears_how_much_evidence_there_is(configure):
    """Within the lengths of its training, and by the harmonic mean of the two recordings'."""
    pooled_kind = {"features.kind": "pooled", "model.comparison": "direct"}
    config = configure(
        SMALL | pooled_kind | {"data.sample_rate": 16000, "data.segment_seconds": (3.0, 12.0)}
    )
    params = network(config)
    bands = params["predictor"]["enter"]["kernel"].shape[0] // 18
    norm = predictor.Normalisation(jnp.zeros((10, bands)), jnp.ones((10, bands)))

    def length(input_seconds, reference_seconds):
        a, b = (jnp.ones((10, bands)).at[-1].set(x) for x in (input_seconds, reference_seconds))
        return float(predictor.apply(config, params, norm, a, b).fed[-1])

    assert length(6.0, 6.0) == pytest.approx(0.0, abs=1e-6)
    assert length(12.0, 4.0) == pytest.approx(0.0, abs=1e-6)  # 2 / (1/12 + 1/4) = 6
    assert length(3.0, 3.0) == pytest.approx(-1.0) and length(1.0, 2.0) == pytest.approx(-1.0)
    assert length(12.0, 12.0) == pytest.approx(1.0) and length(300.0, 90.0) == pytest.approx(1.0)


def test_normalisation_is_applied(configure):
    config = configure(SMALL)
    params, norm = network(config), unit_normalisation(config)
    a, b = frames(config, 0), frames(config, 1)
    said = apply(config)(params, norm, a, b)
    by_hand = apply(config)(
        params,
        predictor.Normalisation(jnp.zeros(16), jnp.ones(16)),
        (a - 0.3) / 1.7,
        (b - 0.3) / 1.7,
    )
    np.testing.assert_allclose(said.unit_KP, by_hand.unit_KP, atol=1e-5)


def test_swap_negates_what_a_subtraction_feeds(configure):
    config = configure(SMALL | {"model.comparison": "subtract"})
    params, norm = network(config), unit_normalisation(config)
    a, b = frames(config, 0), frames(config, 1)
    there = apply(config)(params, norm, a, b)
    back = apply(config)(params, norm, b, a)
    np.testing.assert_array_equal(there.fed, -np.asarray(back.fed))
    difference = there.extracted_reference - there.extracted_input
    np.testing.assert_allclose(there.fed, difference, atol=1e-6)
    assert np.all(np.asarray(apply(config)(params, norm, a, a).fed) == 0.0)


def test_encoder_is_shared(configure):
    config = configure(SMALL)
    params, norm = network(config), unit_normalisation(config)
    a, b = frames(config, 0), frames(config, 1)
    there = apply(config)(params, norm, a, b)
    back = apply(config)(params, norm, b, a)
    np.testing.assert_array_equal(there.extracted_input, back.extracted_reference)
    assert not np.array_equal(there.extracted_input, there.extracted_reference)


def test_latents_keep_the_mel_axis(configure):
    """A change of band m reaches only its neighbours: the mel axis is never strided."""
    config = configure(SMALL | {"features.mel_bands": 40})
    params, norm = network(config), unit_normalisation(config)
    a = frames(config, 0)
    nudged = a.at[:, 20].add(1.0)
    before, after = (
        np.asarray(apply(config)(params, norm, x, x).extracted_input).reshape(3, 40)
        for x in (a, nudged)
    )
    moved = np.flatnonzero(np.abs(after - before).max(axis=0) > 0)
    reach = sum(width // 2 for width in config.model.kernel_mel)
    assert moved.min() >= 20 - reach and moved.max() <= 20 + reach and 20 in moved


def test_grid_head_decodes_to_its_expectation(configure):
    config = configure(SMALL)
    params, norm = network(config), unit_normalisation(config)
    said = apply(config)(params, norm, frames(config, 0), frames(config, 1))
    for p, (logit_KG, grid_G) in enumerate(zip(said.logits, eq.grid_units(eq.PAPER), strict=True)):
        weight_KG = np.exp(np.asarray(logit_KG, np.float64))
        weight_KG /= weight_KG.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(said.unit_KP[:, p], weight_KG @ grid_G, atol=1e-5)


def test_predictions_lie_in_the_cube(configure):
    for head in ("grid", "continuous"):
        config = configure(SMALL | {"model.head": head})
        params = jax.tree.map(lambda x: 30.0 * x, network(config))
        norm = unit_normalisation(config)
        unit_KP = apply(config)(params, norm, frames(config, 0), frames(config, 1)).unit_KP
        assert np.all((unit_KP >= 0.0) & (unit_KP <= 1.0 + 1e-6))


def test_dropout_is_of_the_key_alone(configure):
    config = configure(SMALL | {"model.dropout": 0.5})
    params, norm = network(config), unit_normalisation(config)
    a, b = frames(config, 0), frames(config, 1)

    def said(key):
        return np.asarray(apply(config)(params, norm, a, b, key).unit_KP)

    np.testing.assert_array_equal(said(jax.random.key(1)), said(jax.random.key(1)))
    assert not np.array_equal(said(jax.random.key(1)), said(jax.random.key(2)))
    np.testing.assert_array_equal(said(None), said(None))


def test_bfloat16_is_inside_the_encoder_alone(configure):
    config = configure(SMALL | {"model.bfloat16": True})
    full = configure(SMALL)
    params, norm = network(config), unit_normalisation(config)
    a, b = frames(config, 0), frames(config, 1)
    low, high = (apply(c)(params, norm, a, b) for c in (config, full))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    # 8 bits of mantissa, three layers: about a per cent.
    error = np.abs(np.asarray(low.fed) - np.asarray(high.fed)).max()
    assert 0.0 < error < 0.05 * np.abs(high.fed).max()


def test_audio_in_settings_out(configure, bursts):
    config = configure(SMALL | {"data.sample_rate": 16000, "data.segment_seconds": [0.5]})
    params, norm = network(config), unit_normalisation(config)
    a, b = (jnp.asarray(bursts(seed, 1.0, 16000)) for seed in (0, 1))
    settings = predictor.predict_audio(config, params, norm, a, b)
    louder = predictor.predict_audio(config, params, norm, 10.0 * a, 0.1 * b)
    for x, y, low, high in zip(
        settings, louder, (30.0, -10.0, 0.11), (16000.1, 10.0, 10.01), strict=True
    ):
        assert x.shape == (4,) and np.all((x >= low) & (x <= high))
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frames, taps, stride", [(33, 3, 2), (16, 5, 4), (7, 2, 3), (9, 1, 2)])
@pytest.mark.parametrize("ours", [predictor._strided_conv, predictor._patch_product])
def test_strided_convolution_and_its_gradients_are_those_of_lax(frames, taps, stride, ours):
    keys = jax.random.split(jax.random.key(1), 3)
    x_BNMC = jax.random.normal(keys[0], (2, frames, 12, 3))
    kernel = jax.random.normal(keys[1], (taps, 5, 3, 4))

    def reference(x_BNMC, kernel):
        return jax.lax.conv_general_dilated(
            x_BNMC, kernel, (stride, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def mapped(x_BNMC, kernel):
        return jax.vmap(ours, (0, None, None))(x_BNMC, kernel, stride)

    weight = jax.random.normal(keys[2], reference(x_BNMC, kernel).shape)
    values, gradients = [], []
    for conv in (reference, mapped):

        def total(*a, conv=conv):
            return jnp.sum(weight * conv(*a))

        values.append(jax.jit(conv)(x_BNMC, kernel))
        gradients.append(jax.jit(jax.grad(total, (0, 1)))(x_BNMC, kernel))
    np.testing.assert_allclose(values[1], values[0], atol=1e-4)
    for mine, theirs in zip(gradients[1], gradients[0], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
