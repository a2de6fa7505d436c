"""Responses against the cookbook in float64, closed-form facts and finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from eqst import biquad, halfangle

# Float32 against float64; eqst.accuracy measures 4e-6 (peaks) and 2.3e-5 (shelves).
TOLERANCE_DB = 5e-5
RATES = (8000.0, 44100.0, 192000.0)
KINDS = (biquad.LOW_SHELF, biquad.PEAKING, biquad.PEAKING, biquad.HIGH_SHELF)
RESPONSES_DB = {
    biquad.PEAKING: biquad.peaking_db,
    biquad.LOW_SHELF: biquad.low_shelf_db,
    biquad.HIGH_SHELF: biquad.high_shelf_db,
}
RESPONSES_COMPLEX = {
    biquad.PEAKING: biquad.peaking_complex,
    biquad.LOW_SHELF: biquad.low_shelf_complex,
    biquad.HIGH_SHELF: biquad.high_shelf_complex,
}
CASCADE = ([110.0, 700.0, 1900.0, 7000.0], [6.0, -8.5, 0.0, -9.0], [0.7, 10.0, 0.12, 2.0])


def cookbook(kind, cutoff_hz, gain_db, q, rate):
    """b0 b1 b2 a0 a1 a2 written out from the Audio EQ Cookbook, one kind at a time, float64."""
    w0, a = 2 * math.pi * cutoff_hz / rate, 10 ** (gain_db / 40)
    c, alpha = math.cos(w0), math.sin(w0) / (2 * q)
    k = 2 * math.sqrt(a) * alpha
    if kind == "peaking":
        return [1 + alpha * a, -2 * c, 1 - alpha * a, 1 + alpha / a, -2 * c, 1 - alpha / a]
    if kind == "low_shelf":
        return [
            a * ((a + 1) - (a - 1) * c + k),
            2 * a * ((a - 1) - (a + 1) * c),
            a * ((a + 1) - (a - 1) * c - k),
            (a + 1) + (a - 1) * c + k,
            -2 * ((a - 1) + (a + 1) * c),
            (a + 1) + (a - 1) * c - k,
        ]
    return [
        a * ((a + 1) + (a - 1) * c + k),
        -2 * a * ((a - 1) + (a + 1) * c),
        a * ((a + 1) + (a - 1) * c - k),
        (a + 1) - (a - 1) * c + k,
        2 * ((a - 1) - (a + 1) * c),
        (a + 1) - (a - 1) * c - k,
    ]


def reference(kind, freq_hz, cutoff_hz, gain_db, q, rate):
    """Complex response by scipy from the cookbook's coefficients."""
    coefficients = cookbook(kind, cutoff_hz, gain_db, q, rate)
    return scipy.signal.freqz(coefficients[:3], coefficients[3:], freq_hz, fs=rate)[1]


def reference_cascade_db(freq_hz, cutoff_hz, gain_db, q, rate, kinds=KINDS):
    bands = zip(kinds, cutoff_hz, gain_db, q, strict=True)
    return sum(20 * np.log10(np.abs(reference(kind, freq_hz, *b, rate))) for kind, *b in bands)


def random_bands(rate, count, seed=0):
    """Bands wider than any table, rounded to float32 so that both sides see the same numbers."""
    rng = np.random.default_rng(seed)
    top = min(20000.0, 0.49 * rate)
    cutoff = 20.0 * (top / 20.0) ** rng.random(count)
    gain, q = rng.uniform(-15, 15, count), 10 ** rng.uniform(-1, 1, count)
    return [np.float64(np.float32(x)) for x in (cutoff, gain, q)]


def grid_hz(rate, cutoff_hz=1000.0):
    edges = [0.0, 1e-3, cutoff_hz * (1 - 1e-6), cutoff_hz, rate / 2 * (1 - 1e-6), rate / 2]
    inner = np.geomspace(1.0, rate / 2, 200)
    return np.minimum(np.float64(np.float32(np.sort([*edges, *inner]))), rate / 2)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", RESPONSES_DB)
def test_response_is_the_cookbooks_from_0_hz_to_nyquist(kind, rate):
    freq_hz_F = np.stack([grid_hz(rate, c) for c in random_bands(rate, 60)[0]])
    bands = random_bands(rate, 60)
    measured = RESPONSES_DB[kind](freq_hz_F, *(b[:, None] for b in bands), sample_rate=rate)
    assert measured.dtype == jnp.float32 and measured.shape == freq_hz_F.shape
    for n, band in enumerate(zip(*bands, strict=True)):
        expected = 20 * np.log10(np.abs(reference(kind, freq_hz_F[n], *band, rate)))
        np.testing.assert_allclose(measured[n], expected, rtol=0, atol=TOLERANCE_DB)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("gain_db", [-12.0, 0.0, 7.5])
def test_gain_at_the_ends_and_at_the_cutoff(rate, gain_db):
    freq_hz, cutoff, q = np.array([0.0, 900.0, rate / 2]), 900.0, 1.3
    expected = {
        biquad.PEAKING: [0.0, gain_db, 0.0],
        biquad.LOW_SHELF: [gain_db, gain_db / 2, 0.0],
        biquad.HIGH_SHELF: [0.0, gain_db / 2, gain_db],
    }
    for kind, response in RESPONSES_DB.items():
        measured = response(freq_hz, cutoff, gain_db, q, sample_rate=rate)
        np.testing.assert_allclose(measured, expected[kind], rtol=0, atol=5e-6)


def test_no_gain_is_flat_to_the_last_bit():
    for rate in RATES:
        for q in (0.1, 0.7, 10.0):
            for response in RESPONSES_DB.values():
                assert not np.any(response(grid_hz(rate), 1000.0, 0.0, q, sample_rate=rate))


@pytest.mark.parametrize("kind", RESPONSES_COMPLEX)
def test_complex_response_has_the_phase(kind):
    rate = 44100.0
    freq_hz = grid_hz(rate)
    for band in zip(*random_bands(rate, 30, seed=1), strict=True):
        measured = RESPONSES_COMPLEX[kind](freq_hz, *band, sample_rate=rate)
        expected = reference(kind, freq_hz, *band, rate)
        assert measured.dtype == jnp.complex64
        # The same relative error as 5e-5 dB, in either direction of the plane.
        np.testing.assert_array_less(np.abs(measured - expected) / np.abs(expected), 6e-6)
        assert abs(measured.imag[0]) == abs(measured.imag[-1]) == 0.0


def test_negated_gain_is_the_inverse_filter():
    freq_hz = grid_hz(48000.0)
    cutoff, gain, q = CASCADE
    there = biquad.cascade_complex(freq_hz, cutoff, gain, q, kinds=KINDS, sample_rate=48000)
    back = biquad.cascade_complex(
        freq_hz, cutoff, [-g for g in gain], q, kinds=KINDS, sample_rate=48000
    )
    np.testing.assert_allclose(there * back, 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", RATES)
def test_sections_are_the_cookbooks(rate):
    cutoff, gain, q = random_bands(rate, 40, seed=2)
    for kind in RESPONSES_DB:
        measured = biquad.sos(
            cutoff[:, None], gain[:, None], q[:, None], kinds=[kind], sample_rate=rate
        )
        assert measured.shape == (40, 1, 6) and measured.dtype == np.float64
        for n, band in enumerate(zip(cutoff, gain, q, strict=True)):
            coefficients = np.array(cookbook(kind, *band, rate))
            np.testing.assert_allclose(
                measured[n, 0], coefficients / coefficients[3], rtol=1e-13, atol=1e-14
            )


def test_sections_render_what_the_response_says():
    sections = biquad.sos(*CASCADE, kinds=KINDS, sample_rate=44100)
    impulse = np.zeros(1 << 16)
    impulse[0] = 1.0
    spectrum = np.fft.rfft(scipy.signal.sosfilt(sections, impulse))
    freq_hz = np.fft.rfftfreq(impulse.size, 1 / 44100)
    response = biquad.cascade_complex(freq_hz, *CASCADE, kinds=KINDS, sample_rate=44100)
    np.testing.assert_allclose(response, spectrum, rtol=0, atol=1e-5 * np.abs(spectrum).max())


def test_cascade_is_the_sum_of_its_bands():
    freq_hz = grid_hz(44100.0)
    bands = biquad.bands_db(freq_hz, *CASCADE, kinds=KINDS, sample_rate=44100)
    assert bands.shape == (4, freq_hz.size)
    for k, kind in enumerate(KINDS):
        alone = RESPONSES_DB[kind](freq_hz, *(row[k] for row in CASCADE), sample_rate=44100)
        np.testing.assert_array_equal(bands[k], alone)
    cascade = biquad.cascade_db(freq_hz, *CASCADE, kinds=KINDS, sample_rate=44100)
    expected = reference_cascade_db(freq_hz, *CASCADE, 44100)
    np.testing.assert_allclose(cascade, expected, rtol=0, atol=TOLERANCE_DB)
    np.testing.assert_allclose(jnp.sum(bands, axis=0), expected, rtol=0, atol=TOLERANCE_DB)


def test_jacobian_is_that_of_finite_differences_edges_included():
    """Within 1e-3 |g| + 1e-5, with one gain of exactly 0 dB, at 0 Hz and Nyquist too."""
    freq_hz = np.array([0.0, 1e-3, 30.0, 110.0, 700.0, 1900.0, 7000.0, 15000.0, 22049.0, 22050.0])
    settings = np.array(np.float32(CASCADE), np.float64)
    value, jacobian = biquad.cascade_jacobian_db(freq_hz, *settings, kinds=KINDS, sample_rate=44100)
    np.testing.assert_allclose(
        value, reference_cascade_db(freq_hz, *settings, 44100), rtol=0, atol=TOLERANCE_DB
    )
    assert jacobian.shape == (4, 3, freq_hz.size) and np.all(np.isfinite(jacobian))
    for p in range(3):
        for k in range(4):
            step = np.zeros_like(settings)
            step[p, k] = 1e-5 * max(1.0, abs(settings[p, k]))
            up, down = (
                reference_cascade_db(freq_hz, *(settings + s), 44100) for s in (step, -step)
            )
            expected = (up - down) / (2 * step[p, k])
            np.testing.assert_allclose(jacobian[k, p], expected, rtol=1e-3, atol=1e-5)


def _plain(freq_hz_F, *bands, kinds, sample_rate):
    """The closed form of every band, added up, with none of the project's derivative rules."""
    total = jnp.zeros_like(freq_hz_F)
    for kind, cutoff, gain, q in zip(kinds, *bands, strict=True):
        shape = halfangle.SHAPES[kind]
        terms = halfangle.evaluate(shape, sample_rate, freq_hz_F, cutoff, gain, q)
        total += 10.0 * jnp.log10(halfangle.ratio(terms)) + 0.5 * shape.s * gain
    return total


def _added(*arrays, **static):
    return jnp.sum(biquad.bands_db(*arrays, **static), axis=0)


def _gradients(response, examples):
    """Gradients by frequency, cutoff, gain and q of random sums over frequency, one per example."""
    rng = np.random.default_rng(3)
    freq_hz_F = jnp.asarray(np.linspace(0, 22050, 129))
    bands_BK = [jnp.asarray(x.reshape(examples, 4)) for x in random_bands(44100.0, 4 * examples)]
    weight_BF = jnp.asarray(rng.normal(size=(examples, 129)), freq_hz_F.dtype)

    def one(weight_F, *arrays):
        return jnp.sum(response(*arrays, kinds=KINDS, sample_rate=44100) * weight_F)

    each = jax.vmap(jax.grad(one, (1, 2, 3, 4)), in_axes=(0, None, 0, 0, 0))
    return jax.jit(each)(weight_BF, freq_hz_F, *bands_BK)


def test_custom_gradient_is_that_of_autodiff():
    with jax.enable_x64(True):  # in float64 the two formulas must be one, element by element
        expected = _gradients(_plain, 64)
        for response in (biquad.cascade_db, _added):
            for custom, plain in zip(_gradients(response, 64), expected, strict=True):
                assert custom.dtype == jnp.float64
                np.testing.assert_allclose(custom, plain, rtol=1e-8, atol=1e-11)


def test_custom_gradient_is_that_of_autodiff_in_float32():
    both = zip(_gradients(biquad.cascade_db, 64), _gradients(_plain, 64), strict=True)
    for (custom, plain), limit in zip(both, (3e-6, 1e-6, 1e-6, 1e-6), strict=True):
        assert custom.dtype == jnp.float32
        assert jnp.linalg.norm(custom - plain) <= limit * jnp.linalg.norm(plain)


@pytest.mark.parametrize("kind", RESPONSES_DB)
def test_gradients_of_bands_are_finite_at_every_edge(kind):
    def total(*arrays):
        return jnp.sum(RESPONSES_DB[kind](*arrays, sample_rate=44100.0))

    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)))
    freq_hz = jnp.array([0.0, 1000.0, 22050.0])
    for gain_db in (-15.0, 0.0, 15.0):
        for q in (0.1, 10.0):
            arrays = (freq_hz, jnp.float32(1000.0), jnp.float32(gain_db), jnp.float32(q))
            for gradient in gradients(*arrays):
                assert np.all(np.isfinite(gradient))


@pytest.mark.long
def test_jacobian_is_that_of_forward_mode():
    with jax.enable_x64(True):
        freq_hz = jnp.linspace(0, 22050, 50)
        bands = [jnp.asarray(row) for row in CASCADE]
        _, measured = biquad.cascade_jacobian_db(freq_hz, *bands, kinds=KINDS, sample_rate=44100)

        def plain(*bands):
            return _plain(freq_hz, *bands, kinds=KINDS, sample_rate=44100)

        for p, expected_FK in enumerate(jax.jit(jax.jacfwd(plain, (0, 1, 2)))(*bands)):
            np.testing.assert_allclose(measured[:, p], expected_FK.T, rtol=1e-9, atol=1e-12)


def test_batched_and_compiled_is_the_same():
    freq_hz = jnp.linspace(0, 22050, 65)
    bands = [jnp.asarray(x.reshape(8, 4)) for x in random_bands(44100.0, 32, seed=4)]

    def one(*band):
        return biquad.cascade_db(freq_hz, *band, kinds=KINDS, sample_rate=44100)

    batched = jax.jit(jax.vmap(one))(*bands)
    for n in range(8):
        np.testing.assert_allclose(batched[n], one(*(b[n] for b in bands)), rtol=0, atol=1e-5)


def test_arrays_broadcast_and_types_need_no_promotion():
    freq_hz = jnp.ones((5, 1, 7)) * 100
    with jax.numpy_dtype_promotion("strict"):
        response = biquad.low_shelf_db(
            freq_hz, jnp.full((3, 1), 200.0), jnp.float32(3.0), 0.7, sample_rate=16000
        )
        cascade = biquad.cascade_db(freq_hz[0, 0], *CASCADE, kinds=KINDS, sample_rate=44100)
    assert response.shape == (5, 3, 7) and cascade.shape == (7,)
    assert biquad.peaking_db(1000, 1000, 3, 1, sample_rate=8000).shape == ()


def test_mistakes_are_named():
    freq_hz = np.linspace(0, 100, 5)
    with pytest.raises(ValueError, match="'notch'.*peaking, low_shelf, high_shelf"):
        biquad.cascade_db(freq_hz, [1.0], [1.0], [1.0], kinds=["notch"], sample_rate=8000)
    with pytest.raises(ValueError, match=r"cutoff, gain and q \[4\]"):
        biquad.cascade_db(freq_hz, [1.0], [1.0], [1.0], kinds=KINDS, sample_rate=8000)
    with pytest.raises(ValueError, match="jax.vmap"):
        biquad.bands_db(freq_hz[None], *CASCADE, kinds=KINDS, sample_rate=44100)
    with pytest.raises(ValueError, match="4000 Hz; see eq.limit_to_rate"):
        biquad.sos(*CASCADE, kinds=KINDS, sample_rate=8000)
    with pytest.raises(ValueError, match="want q > 0"):
        biquad.sos([100.0], [1.0], [0.0], kinds=["peaking"], sample_rate=8000)
    with pytest.raises(ValueError, match="2 kinds"):
        biquad.sos([100.0], [1.0], [1.0], kinds=["peaking"] * 2, sample_rate=8000)


@pytest.mark.long
@pytest.mark.parametrize("kind", RESPONSES_DB)
def test_bands_have_forward_mode_and_second_derivatives(kind):
    point = (800.0, 1000.0, 4.0, 1.7)
    with jax.enable_x64(True):

        def plain(*arrays):
            freq_hz, *band = arrays
            columns = ([x] for x in band)
            return _plain(freq_hz, *columns, kinds=[kind], sample_rate=44100.0)

        def custom(*arrays):
            return RESPONSES_DB[kind](*arrays, sample_rate=44100.0)

        every = (0, 1, 2, 3)
        for derivative in (jax.jacfwd, jax.hessian):
            measured, expected = (
                jax.tree.leaves(jax.jit(derivative(f, every))(*point)) for f in (custom, plain)
            )
            np.testing.assert_allclose(measured, expected, rtol=1e-7, atol=1e-12)
