"""Properties of the numbers that hold for every variant: what must not change them, by how much.

Level, identity, order of channels and of a batch, compilation, the backend, 64 bits, and the places
where a logarithm or a quotient meets a zero. Tolerances stand below, with the reason for each.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from eqst import (
    batches,
    biquad,
    eq,
    features,
    learner,
    match,
    objective,
    observe,
    pairs,
    pooled,
    predictor,
    render,
)

RATE, SAMPLES, BATCH = 16000, 6000, 4
SMALL = {
    "data.sample_rate": RATE,
    "features.window": 512,
    "features.hop": 256,
    "features.mel_bands": 24,
    "model.channels": 4,
    "model.hidden": 16,
    "model.blocks": 1,
    "train.batch_size": BATCH,
    "train.warmup_steps": 0,  # the first step moves
}
VARIANTS = {
    "linear_mel_bl": {"features.scale": "linear", "model.comparison": "subtract"},
    "db_mel_bl": {"model.comparison": "subtract"},
    "db_mel_pm": {},
    "pooled": {
        "features.kind": "pooled",
        "model.comparison": "direct",
        "model.head": "continuous",
        "data.rendering": "pooled",
    },
}
AUGMENTED = {
    "data.warp": 1.2,
    "data.curve_share": 0.5,
    "data.noise_share": 0.5,
    "data.one_sided_noise_share": 0.3,
}

# Of a parameter's range, and of the largest feature: rounding alone, seen at 6e-7.
UNIT_ROUNDING = 5e-6
# Settings are rounded to these for a person, so that they may differ by one step.
SETTINGS_STEPS = eq.EqParams(0.01, 0.001, 0.0001)
# Relative to an array's largest value: float32 sums in another order, seen at 7e-7.
SUM_ROUNDING = 5e-6
# dB. A float32 response against float64: eqst.accuracy finds 2.3e-5 for one shelf; four bands here.
RESPONSE_DB = 1e-4
# dB. Power in a mel band, at most 60 dB under its frame's loudest. An FFT's error is relative to
# the loudest bin, so that it weighs most down there.
FEATURE_DB = 2e-3
# Relative, of the loss and of the gradient's length, against float64. The encoder and the dense
# layers run at the backend's own precision: TF32 rounds factors to 2^-11 on NVIDIA's GPUs, bfloat16
# to 2^-9 on TPUs.
STEP_PARITY = {"cpu": 5e-6, "gpu": 1e-2, "tpu": 4e-2}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
# Where nothing new is to be learnt from the other two, and compiling takes seconds.
both_kinds = pytest.mark.parametrize(
    "variant", [pytest.param("db_mel_pm", marks=pytest.mark.long), "pooled"]
)
every_feature = pytest.mark.parametrize(
    "variant", [pytest.param("linear_mel_bl", marks=pytest.mark.long), "db_mel_pm", "pooled"]
)


class Model(NamedTuple):
    """A variant, small and untrained, with weights and inputs large enough for all to show."""

    config: Any
    params: Any
    normalisation: predictor.Normalisation


@pytest.fixture(scope="module")
def model_of(configure) -> Callable[[str], Model]:
    """A function from a variant's name to its Model."""

    @functools.cache
    def make(variant: str) -> Model:
        config = configure(SMALL | VARIANTS[variant])
        rng = np.random.default_rng(1)

        def weights(leaf):
            fan_in = max(1, int(np.prod(leaf.shape[:-1])))
            return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan_in), jnp.float32)

        init = functools.partial(predictor.init, config)
        params = jax.tree.map(weights, jax.eval_shape(init, jax.random.key(0)))
        shape = seen_shape(config).shape
        shape = shape[1:] if config.features.kind == "mel" else shape
        linear = config.features.scale == "linear"
        mean, scale = (1.0, 1.0) if linear else (-20.0, 10.0)
        return Model(
            config, params, predictor.Normalisation(jnp.full(shape, mean), jnp.full(shape, scale))
        )

    return make


def seen_shape(config) -> jax.ShapeDtypeStruct:
    """What `heard` makes of SAMPLES samples."""
    return jax.eval_shape(functools.partial(observe.heard, config), floats(SAMPLES))


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture(scope="module")
def sound(bursts) -> Callable[[int], np.ndarray]:
    """A function from a seed to [SAMPLES] of float32 noise with pauses."""
    return lambda seed: bursts(seed, SAMPLES / RATE, RATE)[:SAMPLES]


@pytest.fixture(scope="module")
def matcher() -> match.Matcher:
    """The packaged model."""
    return match.Matcher.load()


def assert_same_settings(found, expected) -> None:
    for a_K, b_K, step in zip(found.params, expected.params, SETTINGS_STEPS, strict=True):
        np.testing.assert_allclose(a_K, b_K, rtol=UNIT_ROUNDING, atol=1.01 * step)


def batch_of(sound) -> tuple[np.ndarray, ...]:
    """Audio of both sides [B, T], and labels [B, K, 3]."""
    sides = (np.stack([sound(seed + side) for seed in range(BATCH)]) for side in (0, 10))
    return *sides, np.random.default_rng(3).uniform(size=(BATCH, 4, 3)).astype(np.float32)


def chain(model: Model, input_T, reference_T, label_KP) -> tuple:
    """Features, prediction and terms of one pair."""
    seen = tuple(observe.heard(model.config, x) for x in (input_T, reference_T))
    said = predictor.apply(model.config, model.params, model.normalisation, *seen)
    return seen, said, objective.pair_terms(model.config, said, label_KP)


@pytest.fixture(scope="module")
def run_chain(model_of) -> Callable[..., tuple]:
    """`chain` of a batch, compiled: (variant, *batch); one compilation serves many tests.

    Everything in float32, whatever the backend would take for convolutions: what is compared here
    is what goes in, not how a product is rounded.
    """

    @functools.cache
    def compiled(variant: str) -> Callable:
        return jax.jit(jax.vmap(functools.partial(chain, model_of(variant))))

    def run(variant: str, *batch: np.ndarray) -> tuple:
        with jax.default_matmul_precision("highest"):
            return compiled(variant)(*batch)

    return run


# ---- level


@pytest.mark.parametrize("factors", [(1e-3, 1.0), (1.0, 1e3), (1e3, 1e-3), (0.037, 5.0)])
def test_the_packaged_model_does_not_hear_level(matcher, bursts, factors):
    # So loud that the quietest is still above what `predict` refuses (-60 LUFS).
    sounds = [20.0 * bursts(seed, 1.5, 44100) for seed in (0, 1)]
    plain = matcher.predict(*sounds, 44100)
    scaled = (np.float32(factor) * x for factor, x in zip(factors, sounds, strict=True))
    assert_same_settings(matcher.predict(*scaled, 44100), plain)
    # It hears something.
    swapped = matcher.predict(*sounds[::-1], 44100)
    assert np.abs(swapped.params.gain_db - plain.params.gain_db).max() > 0.5


@every_variant
def test_no_variant_hears_level(model_of, run_chain, sound, variant):
    config = model_of(variant).config
    input_BT, reference_BT, label_BKP = batch_of(sound)
    plain_seen, plain_said, plain_terms = run_chain(variant, input_BT, reference_BT, label_BKP)
    assert np.asarray(plain_said.unit_KP).std(axis=0).max() > 100 * UNIT_ROUNDING
    # dB features reach down to -80, linear ones up to the loudest band of the loudest frame.
    bound = UNIT_ROUNDING * np.abs(plain_seen[0]).max()
    exponents_B = st.lists(st.floats(-3.0, 3.0), min_size=BATCH, max_size=BATCH)

    @hypothesis_settings(max_examples=12, derandomize=True, deadline=None, database=None)
    @given(exponents_B, exponents_B)
    def check(input_exponents: list[float], reference_exponents: list[float]) -> None:
        scaled = [
            (10.0 ** np.array(exponents)[:, None]).astype(np.float32) * sound_BT
            for exponents, sound_BT in (
                (input_exponents, input_BT),
                (reference_exponents, reference_BT),
            )
        ]
        seen, said, terms = run_chain(variant, *scaled, label_BKP)
        for found, expected in zip(seen, plain_seen, strict=True):
            assert np.abs(found - expected).max() < bound
        assert np.abs(said.unit_KP - plain_said.unit_KP).max() < UNIT_ROUNDING
        assert np.abs(terms.loss - plain_terms.loss).max() < 5 * UNIT_ROUNDING  # dB, most of it
        heard_XM = observe.listen(config, scaled[0][0])
        assert np.abs(heard_XM - plain_seen[0][0]).max() < bound

    check()


# ---- identity


@every_variant
def test_identical_recordings(model_of, run_chain, sound, variant):
    """A difference of latents is 0 to the last bit, and so says the same whatever they are of."""
    input_BT, _, label_BKP = batch_of(sound)
    _, said, _ = run_chain(variant, input_BT, input_BT, label_BKP)
    comparison = model_of(variant).config.model.comparison
    if comparison == "direct":
        # Normalised on the way, in a fused multiplication and addition that rounds once for one of
        # the two and twice for the other.
        half = said.extracted_input.shape[-1]
        assert np.abs(said.fed[:, :half]).max() < 1e-6 < np.abs(said.fed[:, half:]).max()
        return
    np.testing.assert_array_equal(said.extracted_input, said.extracted_reference)
    assert not np.array_equal(said.extracted_input[0], said.extracted_input[1])
    if comparison == "subtract":
        assert not np.any(said.fed)
        np.testing.assert_array_equal(said.unit_KP, said.unit_KP[:1].repeat(BATCH, axis=0))


def corners() -> np.ndarray:
    """[*, K, 3] points of the unit cube: all bands at each corner, at the middle, at random."""
    corner_C3 = np.stack(np.meshgrid(*[[0.0, 0.5, 1.0]] * 3), axis=-1).reshape(-1, 1, 3)
    random_nKP = np.random.default_rng(2).uniform(size=(20, len(eq.KINDS), 3))
    all_nKP = np.concatenate([np.tile(corner_C3, (1, len(eq.KINDS), 1)), random_nKP])
    return all_nKP.astype(np.float32)


def edge_frequencies(rate: int) -> np.ndarray:
    """[F] with 0 Hz, the least float32, Nyquist, what lies next to it, and the bands' own edges."""
    edges = [x for band in eq.PAPER.bands for x in (band.freq_low_hz, band.freq_high_hz)]
    nyquist = np.float32(rate / 2)
    ends = [0.0, 1e-30, nyquist, np.nextafter(nyquist, np.float32(0)), eq.RATE_LIMIT * rate]
    return np.unique(np.array([*ends, *(x for x in edges if x < nyquist)], np.float32))


@pytest.mark.parametrize("rate", [8000, 192000])
def test_no_gain_does_nothing_and_the_negated_gain_undoes(rate, sound):
    freq_hz_F = np.concatenate([edge_frequencies(rate), eq.curve_grid_hz(rate)])
    cube_nKP = jnp.asarray(corners())
    made = eq.limit_to_rate(eq.from_unit(eq.PAPER, cube_nKP), rate)[0]
    flat = eq.limit_to_rate(eq.from_unit(eq.PAPER, pairs.without_gain(cube_nKP)), rate)[0]
    response = jax.jit(functools.partial(eq.response_db, sample_rate=rate))
    assert not np.any(response(flat, freq_hz_F))
    curve_nF = response(made, freq_hz_F)
    assert np.abs(curve_nF).max() > 5.0
    assert np.abs(curve_nF + response(eq.negate(made), freq_hz_F)).max() < RESPONSE_DB

    # The same in audio: in time, and by FFT with the last of the settings.
    samples_T = sound(0)
    one, none = (eq.EqParams(*(np.asarray(x)[-1] for x in params)) for params in (made, flat))
    sections = [
        biquad.sos(*params, kinds=eq.KINDS, sample_rate=rate)
        for params in (none, one, eq.negate(one))
    ]
    np.testing.assert_array_equal(render.render(samples_T, sections[0]), samples_T)
    wide_T = samples_T.astype(np.float64)
    there_and_back_T = render.render(render.render(wide_T, sections[1]), sections[2])
    assert np.abs(there_and_back_T - wide_T).max() < 1e-10 * np.abs(wide_T).max()
    circular = jax.jit(functools.partial(pairs.filter_circular, sample_rate=rate, context=0))
    peak = np.abs(samples_T).max()
    assert np.abs(circular(samples_T, none) - samples_T).max() < 1e-6 * peak
    assert np.abs(circular(circular(samples_T, one), eq.negate(one)) - samples_T).max() < (
        SUM_ROUNDING * peak
    )


# ---- order


def test_channels_may_come_in_any_order(matcher, bursts):
    three_TC = np.stack([bursts(seed, 1.5, 44100) for seed in range(3)], axis=-1)
    three_TC *= np.array([1.0, 0.3, 0.6], np.float32)
    reference_T = bursts(7, 1.5, 44100)
    plain = matcher.predict(three_TC, reference_T, 44100)
    sos_K6 = biquad.sos(*plain.params, kinds=eq.KINDS, sample_rate=44100)
    rendered_TC = render.render(three_TC, sos_K6)
    for order in ([2, 0, 1], [1, 0, 2]):
        # Loudness and the mono mix are sums over channels: all but the last bits are the same.
        other = matcher.predict(three_TC[:, order], reference_T, 44100)
        assert_same_settings(other, plain)
        np.testing.assert_array_equal(
            render.render(three_TC[:, order], sos_K6), rendered_TC[:, order]
        )
    one_channel_T = render.render(np.ascontiguousarray(three_TC[:, 1]), sos_K6)
    np.testing.assert_array_equal(one_channel_T, rendered_TC[:, 1])


def assert_close(found: Any, expected: Any, share: float) -> None:
    """Every leaf within a share of the expected leaf's largest value."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.all(np.isfinite(b))
        assert np.abs(a - b).max() <= share * max(np.abs(b).max(), 1e-6), (a, b)


@every_variant
def test_a_batch_may_come_in_any_order(run_chain, sound, variant):
    batch = batch_of(sound)
    plain = run_chain(variant, *batch)
    order = np.array([2, 0, 3, 1])
    other = run_chain(variant, *(x[order] for x in batch))
    assert_close(other, jax.tree.map(lambda x: x[order], plain), 1e-6)
    assert_close(jnp.mean(other[2].loss), jnp.mean(plain[2].loss), 1e-6)


# ---- compilation


@pytest.mark.long  # one operation after the other, each compiled by itself
@pytest.mark.parametrize("variant", ["db_mel_pm", "pooled"])
def test_compiled_or_not(model_of, run_chain, sound, variant):
    """What XLA fuses may round elsewhere, and no more."""
    batch = batch_of(sound)
    compiled = run_chain(variant, *batch)
    with jax.disable_jit(), jax.default_matmul_precision("highest"):
        plain = chain(model_of(variant), *(x[0] for x in batch))
    assert_close(jax.tree.map(lambda x: x[0], compiled), plain, SUM_ROUNDING)


def test_compiled_or_not_for_responses():
    settings = eq.from_unit(eq.PAPER, jnp.asarray(corners()[-1]))
    freq_hz_F = jnp.asarray(edge_frequencies(44100))

    def value_and_gradient(params):
        response = functools.partial(eq.response_db, sample_rate=44100)
        return jax.value_and_grad(lambda p: jnp.sum(jnp.square(response(p, freq_hz_F))))(params)

    compiled = jax.jit(value_and_gradient)(settings)
    with jax.disable_jit():
        plain = value_and_gradient(settings)
    assert_close(compiled, plain, SUM_ROUNDING)


# ---- the backend


def backends() -> tuple[str, jax.Device, jax.Device]:
    """The default backend, its last device and the first CPU (on CPUs alone: two of them)."""
    return jax.default_backend(), jax.devices()[-1], jax.devices("cpu")[0]


def test_responses_on_this_backend_are_those_of_float64():
    _, device, cpu = backends()
    freq_hz_F = np.concatenate([edge_frequencies(44100)[2:], eq.curve_grid_hz(44100)])
    made = eq.from_unit(eq.PAPER, corners().astype(np.float64))
    found = []
    for place in (device, cpu):
        arrays = jax.device_put([np.asarray(x, np.float32) for x in made], place)
        response = jax.jit(functools.partial(eq.response_db, sample_rate=44100))
        found.append(response(eq.EqParams(*arrays), jax.device_put(np.float32(freq_hz_F), place)))
        assert found[-1].devices() == {place}
    sos_nK6 = biquad.sos(*made, kinds=eq.KINDS, sample_rate=44100)
    # Near z = 1 coefficients cancel, even in float64.
    clear_F = freq_hz_F > 20.0
    delay_3F = np.exp(-2j * np.pi * freq_hz_F[clear_F] / 44100) ** np.arange(3)[:, None]
    ratio_nKF = (sos_nK6[..., :3] @ delay_3F) / (sos_nK6[..., 3:] @ delay_3F)
    expected_nF = 20 * np.log10(np.abs(ratio_nKF)).sum(axis=-2)
    for curve_nF in found:
        np.testing.assert_allclose(np.asarray(curve_nF)[:, clear_F], expected_nF, atol=RESPONSE_DB)
    np.testing.assert_allclose(found[0], found[1], atol=RESPONSE_DB)


def test_features_on_this_backend_are_those_of_float64(model_of, sound):
    config = model_of("db_mel_pm").config
    window, hop = config.features.window, config.features.hop
    samples_T = sound(0)
    starts = range(0, SAMPLES - window + 1, hop)
    hann_W = np.sin(np.pi * np.arange(window) / window) ** 2
    frames_NW = np.stack([samples_T[i : i + window].astype(np.float64) * hann_W for i in starts])
    power_NF = np.abs(np.fft.rfft(frames_NW)) ** 2 / np.sum(hann_W**2)
    mel_NM = power_NF @ features.filterbank(config.features, RATE)
    expected_NM = 10 * np.log10(mel_NM / mel_NM.mean() + 1e-8)
    clear_NM = expected_NM > expected_NM.max(axis=1, keepdims=True) - 60.0
    for place in backends()[1:]:
        hear = jax.jit(functools.partial(observe.heard, config))
        found_NM = np.asarray(hear(jax.device_put(samples_T, place)))
        np.testing.assert_allclose(found_NM[clear_NM], expected_NM[clear_NM], atol=FEATURE_DB)


def doubled(tree: Any) -> Any:
    """The same numbers in float64, on the host."""

    def double(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

    return jax.tree.map(double, tree)


@both_kinds
def test_a_step_on_this_backend_is_that_of_float64(model_of, run_chain, sound, variant):
    """On a CPU in float64 but for the encoder, which makes float32 of what it is given."""
    config, params, normalisation = model_of(variant)
    name, device, cpu = backends()
    batch = batch_of(sound)
    seen = batches.Seen(*run_chain(variant, *batch)[0], batch[2])
    given_all = (learner.init_state(config, params), normalisation, seen)

    @jax.jit
    def step(state, normalisation, seen):
        after, terms = learner.train_step(config, state, normalisation, seen)
        # Adam's first moment is the clipped gradient; the step itself is its sign, or nearly so,
        # which shows little of how large an error is.
        return terms, optax.tree.get(after.opt_state, "mu"), after.params

    terms, gradient, params = step(*jax.device_put(given_all, device))
    with jax.enable_x64(True):
        expected, true_gradient, _ = step(*jax.device_put(doubled(given_all), cpu))
    assert expected.loss.dtype == np.float64 and terms.loss.dtype == np.float32
    np.testing.assert_allclose(terms, expected, rtol=STEP_PARITY[name])
    found, wanted = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(tree))])
        for tree in (gradient, true_gradient)
    )
    assert 0 < np.linalg.norm(found - wanted) < STEP_PARITY[name] * np.linalg.norm(wanted)
    assert bool(learner.all_finite(params))


# ---- what the traced programs hold


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those inside its loops, branches and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        )
        for value in inner:
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)
            elif hasattr(value, "eqns"):
                yield from equations(value)


def gradient(function: Callable) -> Callable:
    """Of the sum of all that a function returns, by its first argument."""

    def total(first, *others):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(first, *others)))

    return jax.grad(total)


PLAN = pairs.Plan(
    *[jax.ShapeDtypeStruct((), jnp.int32)] * 6, floats(4, 3), floats(4, 3), floats(pairs.AUGMENT)
)


def signal_programs(config, augmented) -> dict[str, tuple[Callable, tuple]]:
    """Features and responses: name -> function and the shapes of its arguments."""
    hear = functools.partial(observe.heard, config)
    respond = functools.partial(eq.response_db, sample_rate=RATE)
    params = eq.EqParams(floats(4), floats(4), floats(4))
    filtered = functools.partial(
        pairs.render, table=eq.PAPER, protocol="mixed", sample_rate=RATE, context=100
    )
    programs = {
        "heard": (hear, (floats(SAMPLES),)),
        "gradient of heard": (gradient(hear), (floats(SAMPLES),)),
        "response": (respond, (params, floats(50))),
        "gradient of response": (gradient(respond), (params, floats(50))),
        "filtered": (filtered, (floats(SAMPLES), floats(SAMPLES), PLAN)),
    }
    if config.features.kind == "pooled":
        shape = seen_shape(config).shape
        stats = floats(shape[0] - 1, shape[1])
        shift = functools.partial(observe.shifted, augmented, seconds=3.0)
        programs["shifted"] = (shift, (stats, stats, PLAN))
    else:
        rendered = functools.partial(observe.rendered, augmented)
        programs["rendered"] = (rendered, (floats(SAMPLES), floats(SAMPLES), PLAN))
    return programs


@pytest.fixture(scope="module")
def programs_of(model_of, configure) -> Callable[[str], tuple[dict, dict]]:
    """A function from a variant to its programs: features and responses, and what learns."""

    def make(variant: str) -> tuple[dict, dict]:
        model = model_of(variant)
        config = model.config
        rendering = "pooled" if variant == "pooled" else "device"
        changes = AUGMENTED | {"data.rendering": rendering}
        if variant == "pooled":
            changes |= {"data.gate_share": 0.3}
        augmented = configure(SMALL | VARIANTS[variant] | changes)
        seen = seen_shape(config)
        batch = (floats(BATCH, *seen.shape), floats(BATCH, *seen.shape), floats(BATCH, 4, 3))
        state = jax.eval_shape(functools.partial(learner.init_state, config))
        apply = functools.partial(predictor.apply, config)
        said = jax.eval_shape(apply, model.params, model.normalisation, seen, seen)
        learning = {
            "apply": (apply, (model.params, model.normalisation, seen, seen)),
            "objective": (functools.partial(objective.pair_terms, config), (said, floats(4, 3))),
            "step": (
                functools.partial(learner.train_step, config),
                (state, model.normalisation, batches.Seen(*batch)),
            ),
        }
        return signal_programs(config, augmented), learning

    return make


@every_feature
def test_products_of_features_and_responses_are_at_the_highest_precision(programs_of, variant):
    """Without it an accelerator rounds the factors to bfloat16 or TF32: 0.01 dB and more."""
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    signal, _ = programs_of(variant)
    with_products = set()
    for name, (function, arguments) in signal.items():
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                assert equation.params["precision"] == highest, f"{name}: {equation}"
                with_products.add(name)
    assert {"heard", "gradient of heard", "gradient of response"} <= with_products


def wide(function: Callable, arguments: tuple, *, scalars: bool) -> set[str]:
    """Where 64-bit floats appear in a program of float32 arguments, 64 bits being allowed.

    A Python number is one until it meets an array, and changes none; `scalars` says whether other
    single numbers count.
    """
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found = set()
    for equation in equations(jaxpr):
        for value in equation.outvars:
            aval = value.aval
            if not hasattr(aval, "dtype") or aval.dtype not in (np.float64, np.complex128):
                continue
            if aval.shape == () and (aval.weak_type or not scalars):
                continue
            found.add(f"{equation.primitive.name} {aval}")
    return found


@every_feature
def test_no_float64_hides_anywhere(programs_of, variant):
    signal, learning = programs_of(variant)
    for name, (function, arguments) in (signal | learning).items():
        # Optax powers its decay rates by the step, which is an integer: one number each.
        found = wide(function, arguments, scalars=name != "step")
        assert not found, f"{name}: {sorted(found)}"


def test_the_search_for_float64_finds_it():
    def leak(x_F):
        return x_F * np.float64(2.0) + jnp.sum(x_F) * np.linspace(0.0, 1.0, 5)

    assert wide(leak, (floats(5),), scalars=True)
    assert not wide(lambda x_F: 2.0 * x_F, (floats(5),), scalars=True)


@every_variant
def test_everything_trained_is_32_bits_and_stays_so(model_of, programs_of, variant):
    config = model_of(variant).config
    step, arguments = programs_of(variant)[1]["step"]
    with jax.enable_x64(True):
        before = jax.eval_shape(functools.partial(learner.init_state, config))
        after, terms = jax.eval_shape(step, before, *arguments[1:])
    types = {leaf.dtype for leaf in jax.tree.leaves((before, after, terms))}
    assert types == {np.dtype(np.float32), np.dtype(np.int32)}
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, before, after)
    assert all(jax.tree.leaves(same))


# ---- zeros, edges and ends

SIGNALS = {
    "silence": np.zeros(SAMPLES),
    "one sample": (np.arange(SAMPLES) == 1000) * 1.0,
    "first sample": (np.arange(SAMPLES) == 0) * 1.0,
    "full-scale DC": np.ones(SAMPLES),
    "full-scale Nyquist": (-1.0) ** np.arange(SAMPLES),
    "denormals": np.full(SAMPLES, 1e-40),
    "the least denormal": np.full(SAMPLES, 1.4e-45),
    "powers that are denormals": 1e-20 * np.random.default_rng(0).standard_normal(SAMPLES),
    "powers near the floor": 1e-10 * np.random.default_rng(0).standard_normal(SAMPLES),
    "half silent": np.where(np.arange(SAMPLES) < 3000, 0.0, 1.0) * np.sin(np.arange(SAMPLES)),
    "full scale": np.sign(np.random.default_rng(0).standard_normal(SAMPLES)),
}


@every_feature
def test_features_and_loss_are_finite_for_any_signal(model_of, sound, variant):
    """Values and gradients, by the audio and by the weights, against sound and against itself."""
    model = model_of(variant)
    label_KP = jnp.full((4, 3), 0.3)
    other_T = sound(0)

    @jax.jit
    def everything(input_T, reference_T):
        def loss(params, input_T, reference_T):
            moved = model._replace(params=params)
            seen, said, terms = chain(moved, input_T, reference_T, label_KP)
            return terms.loss, (seen, said, terms)

        by_all = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        hear = functools.partial(observe.heard, model.config)
        weight_XM = jnp.cos(jnp.arange(seen_shape(model.config).size, dtype=jnp.float32))
        by_sample = jax.grad(lambda x: jnp.sum(hear(x).ravel() * weight_XM))(input_T)
        return by_all(model.params, input_T, reference_T), by_sample

    for name, signal_T in SIGNALS.items():
        samples_T = signal_T.astype(np.float32)
        for pair in ((samples_T, other_T), (other_T, samples_T), (samples_T, samples_T)):
            for leaf in jax.tree.leaves(everything(*pair)):
                assert np.all(np.isfinite(leaf)), name


@pytest.mark.parametrize("name", SIGNALS)
def test_statistics_on_the_host_are_finite_for_any_signal(model_of, name):
    config = model_of("pooled").config
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        seen_SM = observe.listen(config, SIGNALS[name].astype(np.float32))
    assert np.all(np.isfinite(seen_SM)) and seen_SM.dtype == np.float32
    if name in ("silence", "denormals"):  # no band stands out of the floor
        assert not np.any(seen_SM[:-1])


def test_moved_statistics_are_finite_for_silence(model_of, configure):
    """Statistics of silence, moved by any EQ and augmented: values and gradients."""
    augmented = configure(SMALL | VARIANTS["pooled"] | AUGMENTED | {"data.gate_share": 0.3})
    bands = len(pooled.centres_hz(augmented.features, RATE))
    rng = np.random.default_rng(4)

    @jax.jit
    def moved(stats_SM, label_KP, augment_A):
        plan = pairs.Plan(*[0] * 6, label_KP, label_KP, augment_A)
        shift = functools.partial(observe.shifted, augmented, seconds=3.0)
        return shift(stats_SM, stats_SM, plan), gradient(lambda x: shift(x, x, plan))(stats_SM)

    # As `pool` gives them for digital silence, for numbers beyond it, and for one band alone.
    silent_SM = np.full((2 + len(pooled.QUANTILES), bands), -300.0, np.float32)
    one_SM = silent_SM.copy()
    one_SM[:, 5] = 0.0
    for stats_SM in (silent_SM, silent_SM - 2000.0, one_SM):
        for augment_A in (
            np.zeros(pairs.AUGMENT),
            np.ones(pairs.AUGMENT),
            rng.uniform(size=pairs.AUGMENT),
        ):
            for label_KP in corners()[::9]:
                for leaf in jax.tree.leaves(moved(stats_SM, label_KP, np.float32(augment_A))):
                    assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("rate", [8000, 192000])
def test_responses_and_their_gradients_are_finite_at_every_edge(rate):
    freq_hz_F = edge_frequencies(rate)

    @jax.jit
    @jax.vmap
    def everything(unit_KP):
        def curve(unit_KP, freq_hz_F):
            params, _ = eq.limit_to_rate(eq.from_unit(eq.PAPER, unit_KP), rate)
            return eq.response_db(params, freq_hz_F, sample_rate=rate)

        def total(unit_KP, freq_hz_F):
            return jnp.sum(jnp.cos(jnp.arange(freq_hz_F.size)) * curve(unit_KP, freq_hz_F))

        gradients = jax.grad(total, argnums=(0, 1))(unit_KP, jnp.asarray(freq_hz_F))
        return curve(unit_KP, jnp.asarray(freq_hz_F)), gradients

    for leaf in jax.tree.leaves(everything(corners())):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("variant", ["db_mel_pm", "pooled"])
def test_the_loss_is_finite_at_every_corner(model_of, variant):
    """A prediction on the label, at 0 dB, and at the ends of every range; both heads."""
    config = model_of(variant).config
    sizes = eq.grid_sizes(eq.PAPER)

    @jax.jit
    @jax.vmap
    def everything(unit_KP, label_KP, sharpness):
        def loss(unit_KP, logits):
            said = predictor.Prediction(unit_KP, logits, *[jnp.zeros(1)] * 3)
            return objective.pair_terms(config, said, label_KP).loss

        # Certain of the first grid point, and of the last.
        logits = tuple(jnp.tile(sharpness * jnp.linspace(-1, 1, n)[None], (4, 1)) for n in sizes)
        logits = logits if config.model.head == "grid" else ()
        return jax.value_and_grad(loss, argnums=(0, 1))(unit_KP, logits)

    cube_nKP = corners()
    for label_nKP in (cube_nKP, np.zeros_like(cube_nKP), pairs.without_gain(jnp.asarray(cube_nKP))):
        for sharpness in (0.0, 1e3, -1e3):
            filled = np.full(len(cube_nKP), sharpness, np.float32)
            for leaf in jax.tree.leaves(everything(cube_nKP, label_nKP, filled)):
                assert np.all(np.isfinite(leaf))
