"""STFT against scipy, bands against their own definition, and features that do not hear level."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from eqst import biquad, eq, features, observe
from eqst.config import Features

RATES = (8000, 16000, 44100, 96000)


@pytest.mark.parametrize(("window", "hop"), [(512, 128), (2048, 1024), (256, 256)])
def test_stft_power_is_scipys(window, hop):
    samples_T = np.random.default_rng(0).standard_normal(window + 7 * hop + 11).astype(np.float32)
    got = np.asarray(features.stft_power(jnp.asarray(samples_T), window, hop), np.float64)
    hann_W = scipy.signal.get_window("hann", window)
    transform = scipy.signal.ShortTimeFFT(hann_W, hop, 1.0, scale_to=None)
    first = -(-transform.m_num_mid // hop)
    spectrum_FN = np.stack(
        [np.fft.rfft(samples_T[n * hop : n * hop + window] * hann_W) for n in range(8)], axis=-1
    )
    reference_FN = transform.stft(samples_T.astype(np.float64))
    if window // 2 % hop == 0:  # scipy's own framing has a frame that starts at sample 0
        inside = slice(window // 2 // hop - transform.p_min, None)
        assert first >= 0
        np.testing.assert_allclose(
            np.abs(reference_FN[:, inside][:, :8]), np.abs(spectrum_FN), atol=1e-6 * window
        )
    expected = np.abs(spectrum_FN.T) ** 2 / np.sum(hann_W**2)
    assert got.shape == (8, window // 2 + 1)
    assert np.abs(got - expected).max() < 1e-5 * expected.max()


def test_power_of_white_noise_is_its_variance():
    samples_T = 0.1 * np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    power_NF = features.stft_power(jnp.asarray(samples_T), 1024, 512)
    assert float(jnp.mean(power_NF[:, 1:-1])) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("samples", [2048, 2049, 3071, 3072, 44100, 50000])
def test_frames_are_whole_windows(samples):
    frames = features.frame_count(samples, 2048, 1024)
    assert features.stft_power(jnp.zeros(samples), 2048, 1024).shape == (frames, 1025)
    assert (frames - 1) * 1024 + 2048 <= samples < frames * 1024 + 2048


def test_mel_scale_and_back():
    freq_hz = np.array([20.0, 700.0, 1000.0, 20000.0])
    # 2595 log10(2) at 700 Hz; 1000 Hz is 1000 mel to 0.02 %.
    assert features.mel(700.0) == pytest.approx(781.17, abs=0.01)
    assert features.mel(1000.0) == pytest.approx(1000.0, rel=2e-4)
    np.testing.assert_allclose(features.hertz(features.mel(freq_hz)), freq_hz, rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_filterbank(rate):
    spec = Features()
    bank_FM = features.filterbank(spec, rate)
    centre_hz = features.band_centres_hz(spec)
    masked = centre_hz > rate / 2
    assert bank_FM.shape == (1025, 128) and bank_FM.dtype == np.float64
    assert bank_FM.min() >= 0.0
    np.testing.assert_allclose(bank_FM.sum(axis=0), np.where(masked, 0.0, 1.0), atol=1e-12)
    assert np.all(np.diff(centre_hz) > 0) and 20.0 < centre_hz[0] and centre_hz[-1] < 20000.0
    # Mean frequency of a band against its triangle's; bands cut off by Nyquist apart.
    freq_hz_F = np.arange(1025) * rate / 2048
    edges = features.hertz(np.linspace(features.mel(20.0), features.mel(20000.0), 130))
    whole = edges[2:] < rate / 2
    centroid = (edges[:-2] + edges[1:-1] + edges[2:]) / 3
    got = freq_hz_F @ bank_FM
    assert np.abs(got - centroid)[whole].max() < 0.5 * rate / 2048
    # Where a triangle spans many bins it is the triangle sampled at the bins.
    wide = whole & (edges[2:] - edges[:-2] > 12 * rate / 2048)
    for m in np.flatnonzero(wide):
        hat_F = np.interp(freq_hz_F, edges[m : m + 3], [0.0, 1.0, 0.0])
        assert (
            np.abs(bank_FM[:, m] - hat_F / hat_F.sum()).max() < 0.05 * bank_FM[:, m].max()
        )  # the kink


def test_flat_power_gives_flat_bands():
    power_NF = jnp.full((3, 1025), 0.25)
    mel_NM = features.mel_power(Features(), power_NF, 44100)
    np.testing.assert_allclose(mel_NM, 0.25, rtol=1e-6)


def test_equalised_power_is_scipys_response():
    rate = 44100
    unit_KP = np.random.default_rng(3).uniform(size=(2, 4, 3)).astype(np.float32)
    params = eq.from_unit(eq.PAPER, unit_KP)
    flat = eq.EqParams(*(jnp.asarray(x.reshape(-1), jnp.float32) for x in params))
    got = features.equalise_power(jnp.ones((2, 1025)), flat, rate)
    sections = biquad.sos(*params, kinds=eq.KINDS, sample_rate=rate).reshape(-1, 6)
    _, response_F = scipy.signal.sosfreqz(sections, np.linspace(0, rate / 2, 1025), fs=rate)
    error_db = 10 * np.log10(np.asarray(got, np.float64)) - 20 * np.log10(np.abs(response_F))
    assert np.abs(error_db).max() < 2e-3


def test_warp_moves_a_peak():
    power_NF = jnp.ones((2, 513)).at[:, 100].set(50.0)
    for factor, place in ((1.2, 120), (0.84, 84), (1.0, 100)):
        warped_NF = features.warp_bins(power_NF, jnp.asarray(factor, jnp.float32))
        assert int(jnp.argmax(warped_NF[0])) == place
    np.testing.assert_allclose(features.warp_bins(power_NF, jnp.float32(1.0)), power_NF)
    smooth_F = np.exp(-((np.arange(513) / 60.0 - 3.0) ** 2)).astype(np.float32)
    got = features.warp_bins(jnp.asarray(smooth_F)[None], jnp.float32(1.1))[0]
    expected = np.interp(np.arange(513) / 1.1, np.arange(513), smooth_F)
    np.testing.assert_allclose(got, expected, atol=1e-5)


RATE = 16000
SMALL = {
    "data.sample_rate": RATE,
    "features.window": 512,
    "features.hop": 256,
    "features.mel_bands": 40,
}
KINDS = {
    "db": SMALL,
    "linear": SMALL | {"features.scale": "linear"},
    "pooled": SMALL | {"features.kind": "pooled", "model.comparison": "direct"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_hear_level(configure, bursts, kind):
    config = configure(KINDS[kind])
    samples_T = bursts(0, 1.5, RATE)
    heard = jax.jit(lambda x: observe.heard(config, x))
    plain = np.asarray(heard(samples_T), np.float64)
    assert np.all(np.isfinite(plain)) and plain.std() > 0.1
    for gain_db in (-40.0, -13.0, 40.0):
        louder = heard(samples_T * np.float32(10.0 ** (gain_db / 20.0)))
        # Rounding only: 1e-3 dB, or that share of the loudest linear band.
        scale = plain.max() if kind == "linear" else 1.0
        assert np.abs(np.asarray(louder) - plain).max() < 1e-3 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_digital_silence_is_finite(configure, kind):
    config = configure(KINDS[kind])

    @jax.jit
    def heard_and_gradient(x):
        return jax.value_and_grad(lambda y: jnp.sum(observe.heard(config, y)))(x), observe.heard(
            config, x
        )

    half_T = np.zeros(RATE, np.float32)
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 2)
    half_T[RATE // 2 :] = noise
    for samples_T in (np.zeros(RATE, np.float32), half_T):
        (_, gradient_T), seen = heard_and_gradient(samples_T)
        assert np.all(np.isfinite(seen))
        # Silence throughout has no gradient; in parts it must not spoil that of the rest.
        assert not np.any(samples_T) or np.all(np.isfinite(gradient_T))
    if kind == "db":  # the silent frames lie on the floor
        np.testing.assert_allclose(seen[:20], -80.0, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_no_hidden_float64(configure, kind):
    """With 64 bits allowed, float32 audio still makes float32 features, every step of the way."""
    config = configure(KINDS[kind])
    with jax.enable_x64(True):
        samples_T = jax.ShapeDtypeStruct((RATE,), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda x: observe.heard(config, x))(samples_T)
    # Arrays only: jnp.quantile has a float64 scalar of its own, which it converts at once.
    assert not re.search(r"f64\[\d", str(jaxpr))


@pytest.mark.parametrize("kind", KINDS)
def test_least_samples_is_enough_and_no_less(configure, kind):
    config = configure(KINDS[kind])
    least = observe.least_samples(config)

    def shape(samples):
        audio = jax.ShapeDtypeStruct((samples,), jnp.float32)
        return jax.eval_shape(lambda x: observe.heard(config, x), audio).shape

    assert shape(least)[0] > 0
    with pytest.raises(ValueError, match=f"{least - 1} samples do not fill a window of {least}"):
        shape(least - 1)
