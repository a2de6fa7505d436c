"""The backend that JAX has, against float64 in numpy: mel features, responses, the bf16 encoder.

Written to run by itself on a machine with an accelerator: it needs jax, flax, optax, orbax,
ml_collections, pytest, scipy, soundfile, soxr and joblib, no tensorflow, no recordings, and less
than a minute. From the root of the clone,

    JAX_PLATFORMS= PYTHONPATH=. python -m pytest -c /dev/null --rootdir=. tests/test_parity.py

where the empty JAX_PLATFORMS leaves the choice to JAX (tests/conftest.py takes the CPU otherwise),
and -c /dev/null leaves the options of pyproject.toml out, which ask for plugins.

What is exact by design has to hold whatever a backend does with products by default, so each such
test is run under a default of bfloat16 as well: an explicit precision must prevail over it. (On a
CPU, whose products are float32 always, that shows nothing.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqst import batches, eq, features, learner, objective, observe, predictor

RATE = 44100
# dB. Products with the filterbank: sums of positive numbers, so that float32 is far below this, and
# factors rounded to TF32 (2^-11) or bfloat16 (2^-9) are above it.
PRODUCT_DB = 1e-4
# dB. Features in bands at most 40 dB under their frame's loudest: the error of a float32 FFT is
# relative to the loudest bin, and grows tenfold every 20 dB further down.
FEATURE_DB, CLEAR_DB = 1e-3, 40.0
# dB, of four bands, and relative, of the length of a gradient.
RESPONSE_DB, GRADIENT = 1e-3, 1e-4
# Relative to the largest latent: the encoder in float32 products, and its answer in bfloat16, which
# rounds weights, inputs and each layer's output to 2^-9 (seen: 0.004).
EXACT_LATENTS, BFLOAT16_LATENTS = 2e-5, 0.02
# Of the encoder at the backend's own precision: TF32 on NVIDIA's GPUs, bfloat16 on TPUs.
OWN_LATENTS = {"cpu": EXACT_LATENTS, "gpu": 5e-3, "tpu": BFLOAT16_LATENTS}
# Of a setting's range, between bfloat16 and float32, with random weights of full size; and of the
# loss, relative (seen: 0.0012 and 0.0003).
BFLOAT16_UNIT, BFLOAT16_LOSS = 0.01, 0.005

BATCH = 8
both_defaults = pytest.mark.parametrize("default", [None, "bfloat16"])


@pytest.fixture(scope="module")
def config(configure) -> Any:
    """The paper's proposal, with a smaller head."""
    return configure({"model.hidden": 64, "train.batch_size": BATCH, "train.warmup_steps": 0})


@pytest.fixture(scope="module")
def sound_T(bursts) -> np.ndarray:
    return bursts(0, 1.0, RATE)


def test_which_backend_this_is(capsys: pytest.CaptureFixture) -> None:
    with capsys.disabled():
        device = jax.devices()[0]
        print(f"\nparity of {jax.default_backend()}: {device.device_kind}, JAX {jax.__version__}")
    assert jnp.ones(3).devices() == {device}


# ---- features


@both_defaults
def test_mel_features_are_those_of_float64(config, sound_T, default) -> None:
    spec = config.features
    starts = range(0, len(sound_T) - spec.window + 1, spec.hop)
    hann_W = np.sin(np.pi * np.arange(spec.window) / spec.window) ** 2
    frames_NW = np.stack([sound_T[i : i + spec.window].astype(np.float64) * hann_W for i in starts])
    power_NF = np.abs(np.fft.rfft(frames_NW)) ** 2 / np.sum(hann_W**2)
    mel_NM = power_NF @ features.filterbank(spec, RATE)
    expected_NM = 10 * np.log10(mel_NM / mel_NM.mean() + 10 ** (spec.floor_db / 10))
    with jax.default_matmul_precision(default):
        found_NM = np.asarray(jax.jit(functools.partial(observe.heard, config))(sound_T))
    assert found_NM.dtype == np.float32 and found_NM.shape == expected_NM.shape
    clear_NM = expected_NM > expected_NM.max(axis=1, keepdims=True) - CLEAR_DB
    assert 0.5 < clear_NM.mean()
    np.testing.assert_allclose(found_NM[clear_NM], expected_NM[clear_NM], atol=FEATURE_DB)


@both_defaults
def test_products_with_the_filterbank_are_at_full_precision(config, default) -> None:
    spec = config.features
    rng = np.random.default_rng(1)
    power_NF = (10 ** rng.uniform(-8, 2, (64, spec.window // 2 + 1))).astype(np.float32)
    with jax.default_matmul_precision(default):
        found_NM = jax.jit(lambda x_NF: features.mel_power(spec, x_NF, RATE))(power_NF)
    exact_NM = power_NF.astype(np.float64) @ features.filterbank(spec, RATE)
    error_db = 10 * np.log10(np.asarray(found_NM, np.float64) / exact_NM)
    assert np.abs(error_db).max() < PRODUCT_DB


# ---- responses


def analogue_db(params: eq.EqParams, freq_hz_F: np.ndarray) -> np.ndarray:
    """[n, F] float64: the cookbook's prototypes under the bilinear transform, without coefficients.

    At s = i tan(w / 2) / tan(w0 / 2).
    """
    centre_hz, gain_db, q = (np.asarray(x, np.float64)[..., None] for x in params)
    s = 1j * np.tan(np.pi * freq_hz_F / RATE) / np.tan(np.pi * centre_hz / RATE)
    a = 10 ** (gain_db / 40)
    root = np.sqrt(a) / q
    low = a * (s**2 + root * s + a) / (a * s**2 + root * s + 1)
    high = a * (a * s**2 + root * s + 1) / (s**2 + root * s + a)
    peak = (s**2 + s * a / q + 1) / (s**2 + s / (a * q) + 1)
    ratio_nKF = np.stack([low[:, 0], peak[:, 1], peak[:, 2], high[:, 3]], axis=1)
    return 20 * np.log10(np.abs(ratio_nKF)).sum(axis=1)


def settings() -> eq.EqParams:
    """[256, 4] settings over the whole of the ranges, corners included, as float32."""
    unit_nKP = np.random.default_rng(2).random((256, len(eq.KINDS), 3))
    unit_nKP[:64] = np.round(unit_nKP[:64])
    made = eq.limit_to_rate(eq.from_unit(eq.PAPER, unit_nKP), RATE)[0]
    return eq.EqParams(*(np.asarray(x, np.float32) for x in made))


@both_defaults
def test_responses_are_those_of_float64(default) -> None:
    given, freq_hz_F = settings(), eq.curve_grid_hz(RATE).astype(np.float32)
    with jax.default_matmul_precision(default):
        found_nF = jax.jit(functools.partial(eq.response_db, sample_rate=RATE))(given, freq_hz_F)
    assert found_nF.dtype == np.float32
    np.testing.assert_allclose(found_nF, analogue_db(given, freq_hz_F), rtol=0, atol=RESPONSE_DB)


@both_defaults
def test_gradients_of_responses_are_those_of_float64(default) -> None:
    given, freq_hz_F = settings(), eq.curve_grid_hz(RATE).astype(np.float32)
    weight_F = np.random.default_rng(3).standard_normal(len(freq_hz_F)).astype(np.float32)

    def total(params: eq.EqParams) -> jax.Array:
        return jnp.sum(eq.response_db(params, freq_hz_F, sample_rate=RATE) * weight_F[None])

    with jax.default_matmul_precision(default):
        found = jax.jit(jax.grad(total))(given)
    for number, name in enumerate(eq.EqParams._fields):
        # Central differences in float64: their own error is 1e-8 or so.
        exact_nK = np.zeros_like(given[number], np.float64)
        for band in range(len(eq.KINDS)):
            sides = []
            for sign in (1, -1):
                moved = [np.asarray(x, np.float64).copy() for x in given]
                step_n = 1e-5 * np.maximum(np.abs(moved[number][:, band]), 1e-2)
                moved[number][:, band] += sign * step_n
                sides.append(analogue_db(eq.EqParams(*moved), freq_hz_F) @ weight_F)
            exact_nK[:, band] = (sides[0] - sides[1]) / (2 * step_n)
        error = np.linalg.norm(np.asarray(found[number]) - exact_nK)
        assert error < GRADIENT * np.linalg.norm(exact_nK), name


# ---- the network


@pytest.fixture(scope="module")
def params(config) -> Any:
    """Weights of such a size that a change anywhere shows in the answer."""
    rng = np.random.default_rng(4)

    def weights(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return (rng.standard_normal(leaf.shape) * np.sqrt(1.5 / fan_in)).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(predictor.init, config), jax.random.key(0))
    return jax.tree.map(weights, shapes)


@pytest.fixture(scope="module")
def normalisation(config) -> predictor.Normalisation:
    bands = config.features.mel_bands
    return predictor.Normalisation(
        np.full(bands, -20.0, np.float32), np.full(bands, 10.0, np.float32)
    )


@pytest.fixture(scope="module")
def seen(config) -> batches.Seen:
    """Pairs of features, of the size that they have, and labels."""
    rng = np.random.default_rng(5)
    shape = (BATCH, 41, config.features.mel_bands)  # frames that no stride divides
    sides = [(-20 + 10 * rng.standard_normal(shape)).astype(np.float32) for _ in range(2)]
    return batches.Seen(*sides, rng.random((BATCH, len(eq.KINDS), 3)).astype(np.float32))


def with_bfloat16(config: Any, configure: Any, value: bool) -> Any:
    changes = {"model.hidden": config.model.hidden, "model.bfloat16": value}
    return configure(changes | {"train.batch_size": BATCH, "train.warmup_steps": 0})


def latents(config: Any, params: Any, normalisation: Any, features_NM: np.ndarray) -> np.ndarray:
    """[channels * mel bands] of the encoder, tap by tap, in float64."""
    model, layers = config.model, params["encoder"]["layers"]
    x_NMC = ((features_NM.astype(np.float64) - normalisation.mean) / normalisation.scale)[..., None]
    for number, stride in enumerate(model.stride_time):
        kernel_XYCD = np.asarray(layers[str(number)]["kernel"], np.float64)
        (frames, bands), (taps, width) = x_NMC.shape[:2], kernel_XYCD.shape[:2]
        out = -(-frames // stride)
        padding = max((out - 1) * stride + taps - frames, 0)
        ends = (padding // 2, padding - padding // 2 + stride), ((width - 1) // 2, width // 2)
        padded_NMC = np.pad(x_NMC, (*ends, (0, 0)))
        total = np.asarray(layers[str(number)]["bias"], np.float64)[None, None]
        for t in range(taps):
            for m in range(width):
                part_NMC = padded_NMC[t::stride][:out, m : m + bands]
                total = total + part_NMC @ kernel_XYCD[t, m]
        x_NMC = np.where(total > 0, total, 0.01 * total)
    return x_NMC.mean(axis=0).T.reshape(-1)


@pytest.mark.parametrize("kind", ["highest", "own", "bfloat16"])
def test_the_encoder_is_that_of_float64(
    config, configure, params, normalisation, seen, kind: str
) -> None:
    made = with_bfloat16(config, configure, kind == "bfloat16")
    apply = jax.jit(jax.vmap(functools.partial(predictor.apply, made, params, normalisation)))
    with jax.default_matmul_precision("highest" if kind == "highest" else None):
        said = apply(seen.input_BXM, seen.reference_BXM)
    bound = {
        "highest": EXACT_LATENTS,
        "own": OWN_LATENTS[jax.default_backend()],
        "bfloat16": BFLOAT16_LATENTS,
    }[kind]
    sides = (said.extracted_input, seen.input_BXM), (said.extracted_reference, seen.reference_BXM)
    for found_BL, given_BXM in sides:
        assert found_BL.dtype == np.float32
        exact_BL = np.stack([latents(made, params, normalisation, x) for x in given_BXM])
        error = np.abs(np.asarray(found_BL) - exact_BL).max() / np.abs(exact_BL).max()
        assert error < bound
        if kind == "bfloat16":
            assert error > 1e-4  # it is at work


@pytest.mark.long  # two compilations of a step
def test_bfloat16_answers_as_float32_does(config, configure, params, normalisation, seen) -> None:
    """And only the encoder computes in it: what is trained, lost and answered stays float32."""
    answers, losses = [], []
    for value in (False, True):
        made = with_bfloat16(config, configure, value)
        apply = jax.jit(jax.vmap(functools.partial(predictor.apply, made, params, normalisation)))
        said = apply(seen.input_BXM, seen.reference_BXM)
        assert {x.dtype for x in jax.tree.leaves(said)} == {np.dtype(np.float32)}
        answers.append(np.asarray(said.unit_KP))
        curves = jax.vmap(
            lambda unit_KP: eq.response_db(
                eq.from_unit(eq.PAPER, unit_KP), eq.curve_grid_hz(RATE), sample_rate=RATE
            )
        )(said.unit_KP)
        assert curves.dtype == np.float32
        state = learner.init_state(made, jax.tree.map(jnp.copy, params))
        step = jax.jit(functools.partial(learner.train_step, made))
        after, terms = step(state, normalisation, seen)
        assert isinstance(terms, objective.Terms)
        floats = {x.dtype for x in jax.tree.leaves((state, after, terms))}
        assert floats == {np.dtype(np.float32), np.dtype(np.int32)}  # steps are whole numbers
        losses.append(np.asarray(terms))
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, after.params)
        assert all(jax.tree.leaves(changed))
    spread = answers[0].std(axis=0).mean()
    assert spread > 0.01  # the answers differ by so much
    assert 0 < np.abs(answers[1] - answers[0]).max() < BFLOAT16_UNIT
    np.testing.assert_allclose(losses[1], losses[0], rtol=BFLOAT16_LOSS)
