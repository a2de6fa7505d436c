"""Pooled statistics: band gains against integration, moved statistics against filtered noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import sosfilt, sosfreqz

from eqst import augment, biquad, eq, features, observe, pairs, pooled
from eqst.config import Features

RATE = 44100
SPEC = Features(kind="pooled")


def random_eqs(count, seed, highest_q=1.0):
    unit_nKP = np.random.default_rng(seed).uniform(size=(count, 4, 3)).astype(np.float32)
    unit_nKP[..., 2] *= highest_q
    return unit_nKP


def sections(unit_KP, rate):
    settings = eq.limit_to_rate(eq.from_unit(eq.PAPER, np.asarray(unit_KP, float)), rate)[0]
    return biquad.sos(*settings, kinds=eq.KINDS, sample_rate=rate)


@pytest.mark.parametrize("rate", [16000, 44100, 96000])
def test_bands_are_narrow_and_reach_the_top(rate):
    centre_hz = pooled.centres_hz(SPEC, rate)
    assert centre_hz[0] == 34.0
    np.testing.assert_allclose(np.diff(np.log2(centre_hz)), 1 / 8)
    top_hz = min(20000.0, 0.49 * rate)
    assert top_hz / 2 ** (1 / 8) < centre_hz[-1] <= top_hz


@pytest.mark.parametrize("rate", [16000, 44100])
def test_triangles_cover_their_bands(rate):
    long_FM, short_FM = pooled._triangles(SPEC, rate)
    centre_hz = pooled.centres_hz(SPEC, rate)
    assert long_FM.shape[0] == 4097 and short_FM.shape[0] == 1025
    assert long_FM.shape[1] + short_FM.shape[1] == len(centre_hz)
    for bank_FM, centres in (
        (long_FM, centre_hz[: long_FM.shape[1]]),
        (short_FM, centre_hz[long_FM.shape[1] :]),
    ):
        np.testing.assert_allclose(bank_FM.sum(axis=0), 1.0)
        bin_hz = rate / 2 / (len(bank_FM) - 1)
        centroid = np.arange(len(bank_FM)) * bin_hz @ bank_FM
        # The top band is cut off by Nyquist.
        assert np.abs(centroid - centres)[:-1].max() < 0.5 * bin_hz


def test_band_gain_is_the_mean_power_gain_of_the_triangle():
    """Five points against a fine integral of scipy's |H|^2 over each triangle."""
    centre_hz = pooled.centres_hz(SPEC, RATE)
    half_hz = pooled._half_width_hz(SPEC, RATE)
    points = np.linspace(-1.0, 1.0, 401)
    weight_P = (1.0 - np.abs(points)) / np.sum(1.0 - np.abs(points))
    freq_hz = np.clip(centre_hz[:, None] + points * half_hz[:, None], 1.0, RATE / 2)
    gain = jax.jit(
        jax.vmap(lambda u: pooled.band_gain_db(SPEC, pairs.settings(eq.PAPER, u, RATE), RATE))
    )
    unit_nKP = random_eqs(40, 0)
    errors = []
    for unit_KP, got_M in zip(unit_nKP, gain(unit_nKP), strict=True):
        _, response = sosfreqz(sections(unit_KP, RATE), freq_hz.reshape(-1), fs=RATE)
        power_MP = np.abs(response.reshape(freq_hz.shape)) ** 2
        errors.append(np.asarray(got_M) - 10.0 * np.log10(power_MP @ weight_P))
    # Bands as wide as a Q of 10 at +-10 dB are where five points are few.
    assert np.abs(errors).max() < 0.5 and np.sqrt(np.mean(np.square(errors))) < 0.05


def test_band_gain_of_two_equalisers_adds_up_where_they_are_smooth():
    one, two = random_eqs(2, 1, highest_q=0.3)
    first, second = (pairs.settings(eq.PAPER, jnp.asarray(u), RATE) for u in (one, two))
    gain = jax.jit(lambda p: pooled.band_gain_db(SPEC, p, RATE))
    both = gain(pairs.concatenate(first, second))
    np.testing.assert_allclose(both, gain(first) + gain(second), atol=0.1)
    flat = first._replace(gain_db=jnp.zeros(4))
    np.testing.assert_allclose(gain(flat), 0.0, atol=1e-4)


@pytest.fixture(scope="module")
def config(configure):
    return configure(
        {
            "features.kind": "pooled",
            "model.comparison": "direct",
            "data.rendering": "pooled",
            "data.protocol": "plain",
        }
    )


def plan_of(label_KP, augment_A=None):
    nothing = [jnp.zeros((), jnp.int32)] * 6
    colour_KP = pairs.without_gain(jnp.full((4, 3), 0.5))
    augment_A = jnp.full(pairs.AUGMENT, 0.5) if augment_A is None else jnp.asarray(augment_A)
    return pairs.Plan(*nothing, jnp.asarray(label_KP), colour_KP, augment_A)


def dry(config, samples_T):
    """[S, M] statistics without EQ, as the bank has them."""
    powers = (features.stft_power(jnp.asarray(samples_T), w, w // 2) for w in (8192, 2048))
    bands = pooled.band_power(SPEC, tuple(powers), RATE)
    return observe.pool_dry(config, *(np.asarray(x)[None] for x in bands))[0]


@pytest.mark.parametrize("samples", [8192, 20_000, 64 * 4096 + 4095, 64 * 4096 + 4096, 600_001])
def test_listening_in_blocks_is_hearing_at_once(config, samples):
    """Lengths round one block of 64 long hops and its 4096-sample overlap, whole hops or not."""
    noise_T = np.random.default_rng(9).standard_normal(samples).astype(np.float32)
    noise_T *= np.linspace(0.01, 0.3, samples, dtype=np.float32)
    heard = jax.jit(lambda x: observe.heard(config, x))(noise_T)
    listened = observe.listen(config, noise_T)
    assert listened.dtype == np.float32
    np.testing.assert_allclose(listened, heard, atol=2e-3)


@pytest.mark.parametrize("frames", [(1, 2), (3, 7), (31, 126)])
def test_statistics_on_the_host_are_those_of_the_step(frames):
    rng = np.random.default_rng(8)
    bands = [
        rng.exponential(size=(5, n, m)).astype(np.float32)
        for n, m in zip(frames, (4, 6), strict=True)
    ]
    bands[0][0] = 0.0  # digital silence in some bands
    step = jax.vmap(lambda *x: pooled.pool(SPEC, x, extra_floor_db=-20.0))(*bands)
    host = pooled.pool(SPEC, tuple(bands), extra_floor_db=-20.0)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    np.testing.assert_allclose(host, step, atol=1e-3)


def test_statistics_are_numpys(config):
    """Mean power, mean level and quantiles of the short window's bands, from their definition."""
    samples_T = 0.1 * np.random.default_rng(2).standard_normal(RATE).astype(np.float32)
    powers = [features.stft_power(jnp.asarray(samples_T), size, size // 2) for size in (8192, 2048)]
    bands = [
        np.asarray(power, np.float64) @ bank
        for power, bank in zip(powers, pooled._triangles(SPEC, RATE), strict=True)
    ]
    got_SM = jax.jit(lambda x: observe.heard(config, x))(samples_T)
    expected = np.concatenate(
        [
            np.concatenate(
                [
                    10 * np.log10(band.mean(axis=0))[None],
                    (10 * np.log10(band)).mean(axis=0)[None],
                    np.quantile(10 * np.log10(band), pooled.QUANTILES, axis=0),
                ]
            )
            for band in bands
        ],
        axis=1,
    )
    expected -= expected[0].mean()
    np.testing.assert_array_equal(got_SM[-1], 1.0)  # second
    got_SM = got_SM[:-1]
    assert got_SM.shape == expected.shape == (9, len(pooled.centres_hz(SPEC, RATE)))
    np.testing.assert_allclose(got_SM, expected, atol=5e-3)
    assert np.all(np.diff(got_SM[2:], axis=0) >= 0)


def test_moved_statistics_are_those_of_filtered_noise(config):
    """White noise, 4 s: above 100 Hz within 0.3 dB rms of what `heard` finds after scipy's filter.

    Wide bands of random EQs (Q below 2.6): narrower peaks are blurred by the window itself.
    """
    noise_T = 0.1 * np.random.default_rng(3).standard_normal(4 * RATE)
    heard = jax.jit(lambda x: observe.heard(config, x))
    shifted = jax.jit(lambda stats, plan: observe.shifted(config, stats, stats, plan, seconds=4.0))
    stats_SM = dry(config, noise_T.astype(np.float32))
    above = pooled.centres_hz(SPEC, RATE) > 100.0
    for label_KP in random_eqs(6, 4, highest_q=0.7):
        plain_SM, moved_SM = (np.asarray(x) for x in shifted(stats_SM, plan_of(label_KP)))
        filtered_T = sosfilt(sections(label_KP, RATE), noise_T).astype(np.float32)
        np.testing.assert_allclose(plain_SM, heard(noise_T.astype(np.float32)), atol=0.02)
        error_SM = (moved_SM - np.asarray(heard(filtered_T)))[:-1, above]
        error_SM -= error_SM[0].mean()
        assert np.sqrt(np.mean(error_SM**2)) < 0.3
        assert np.sqrt(np.mean(error_SM[0] ** 2)) < 0.15
        # The EQ is there to be seen.
        assert np.abs(moved_SM - plain_SM).max() > 2.0


def test_warp_moves_a_peak_by_the_factor():
    bands = len(pooled.centres_hz(SPEC, RATE))
    stats_SM = jnp.zeros((9, bands)).at[:, 40].set(10.0)
    for octaves, place in ((3 / 8, 43), (-2 / 8, 38), (0.0, 40)):
        warped_SM = pooled.warp(SPEC, stats_SM, jnp.float32(2.0**octaves))
        assert int(jnp.argmax(warped_SM[0])) == place
        np.testing.assert_allclose(warped_SM[:, place], 10.0, atol=1e-3)
    halfway_SM = pooled.warp(SPEC, stats_SM, jnp.float32(2.0 ** (0.5 / 8)))
    np.testing.assert_allclose(halfway_SM[0, 40:42], 5.0, atol=1e-3)


def test_both_warps_go_the_same_way(config):
    """A tone's peak goes to warp times its frequency, in the STFT and in the statistics."""
    tone_hz, factor = 1000.0, 1.15
    samples_T = np.sin(2 * np.pi * tone_hz * np.arange(RATE) / RATE).astype(np.float32)
    power_NF = features.stft_power(jnp.asarray(samples_T), 2048, 1024)
    warped_NF = features.warp_bins(power_NF, jnp.float32(factor))
    peak_hz = float(jnp.argmax(warped_NF[0])) * RATE / 2048
    stats_SM = dry(config, samples_T)
    warped_SM = pooled.warp(SPEC, stats_SM, jnp.float32(factor))
    band_hz = pooled.centres_hz(SPEC, RATE)[int(jnp.argmax(warped_SM[0]))]
    assert peak_hz == pytest.approx(1150.0, abs=25.0)
    assert abs(np.log2(band_hz / 1150.0)) < 1 / 8


def test_add_power():
    a, b = np.array([0.0, -200.0, 30.0]), np.array([0.0, 10.0, 20.0])
    expected = 10 * np.log10(10 ** (a / 10) + 10 ** (b / 10))
    got = pooled.add_power_db(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_augmentation_is_off_at_its_defaults_and_alike_for_both(configure, config):
    stats_SM = jnp.asarray(np.random.default_rng(5).normal(-40.0, 10.0, size=(9, 74)), jnp.float32)
    numbers = np.random.default_rng(6).uniform(size=pairs.AUGMENT).astype(np.float32)
    plan = plan_of(np.full((4, 3), 0.5, np.float32), numbers)
    shifted = jax.jit(functools.partial(observe.shifted, seconds=3.0), static_argnums=0)
    plain = shifted(config, stats_SM, stats_SM, plan)
    neutral = shifted(config, stats_SM, stats_SM, plan_of(np.full((4, 3), 0.5, np.float32)))
    for a, b in zip(plain, neutral, strict=True):
        np.testing.assert_array_equal(a, b)
    full = configure(
        {
            "features.kind": "pooled",
            "model.comparison": "direct",
            "data.rendering": "pooled",
            "data.warp": 1.2,
            "data.curve_share": 1.0,
            "data.noise_share": 1.0,
        }
    )
    augmented = shifted(full, stats_SM, stats_SM, plan)
    # A label without gain: both recordings are the same, so what is done to them must be too.
    np.testing.assert_allclose(augmented[0], augmented[1], atol=1e-4)
    assert np.abs(np.asarray(augmented[0]) - np.asarray(plain[0])).max() > 1.0


def test_augmentation_keeps_to_its_settings(configure):
    data = configure(
        {
            "features.kind": "pooled",
            "model.comparison": "direct",
            "data.rendering": "pooled",
            "data.warp": 1.25,
            "data.curve_share": 0.3,
            "data.noise_share": 0.6,
            "data.one_sided_noise_share": 0.2,
            "data.gate_share": 0.4,
            "data.noise_low_db": -80.0,
            "data.noise_high_db": -40.0,
        }
    ).data
    u = np.random.default_rng(7).uniform(size=(4000, pairs.AUGMENT)).astype(np.float32)
    where = jnp.linspace(0.0, 1.0, 33)

    def what(augment_A):
        change = augment.of_plan(data, plan_of(np.full((4, 3), 0.5, np.float32), augment_A))
        sides = [(s.noise_db(where), s.gate_share, s.gate_db) for s in change[2:]]
        return change.warp, change.curve_db(where), sides

    warp, curve, (left, right) = jax.tree.map(np.asarray, jax.jit(jax.vmap(what))(u))
    assert 0.8 <= warp.min() < 0.81 and 1.24 < warp.max() <= 1.2501
    assert abs(np.log(warp).mean()) < 0.01
    with_curve = np.any(curve != 0.0, axis=1)
    assert with_curve.mean() == pytest.approx(0.3, abs=0.03)
    # Deviation at a place of the curve: the cosines' own, times `curve_db`.
    cosines = np.cos(np.pi * np.arange(1, 7) * 0.25) * augment._COSINES
    expected = data.curve_db * np.sqrt(np.sum(cosines**2))
    assert curve[with_curve][:, 8].std() == pytest.approx(expected, rel=0.1)
    # In 0.2 of the pairs one side has a floor of its own; the others share theirs, or have none.
    differs = np.any(left[0] != right[0], axis=1)
    assert differs.mean() == pytest.approx(0.2, abs=0.03)
    with_noise = left[0][~differs][:, 0] > -190.0
    assert with_noise.mean() == pytest.approx(0.6, abs=0.03)
    assert np.median(left[0][~differs][with_noise][:, 16]) == pytest.approx(-60.0, abs=3.0)
    # Gates are drawn for each side by itself, 3 .. 40 dB deep, closed 5 .. 50 % of the time.
    gates = np.stack([left[2] > 0.0, right[2] > 0.0])
    np.testing.assert_allclose(gates.mean(axis=1), 0.4, atol=0.03)
    assert gates.all(axis=0).mean() == pytest.approx(0.16, abs=0.03)
    depths = left[2][gates[0]]
    assert 3.0 <= depths.min() < 4.0 and 39.0 < depths.max() <= 40.0
    assert 0.05 <= left[1].min() and left[1].max() <= 0.5


def test_a_gate_lowers_quiet_quantiles_and_not_the_mean_power():
    stats_SM = jnp.asarray(np.random.default_rng(8).normal(-40.0, 10.0, (9, 74)), jnp.float32)
    side = augment.Side(lambda position: position, jnp.float32(0.3), jnp.float32(20.0))
    fall_S = np.asarray(stats_SM - augment.gated(stats_SM, side))[:, 0]
    np.testing.assert_allclose(fall_S[0], 0.0, atol=1e-5)
    np.testing.assert_allclose(fall_S[1], 0.3 * 20.0, rtol=1e-5)
    # Quantiles .05, .10, .25 lie inside the closed time (the last near its edge), the others out.
    np.testing.assert_allclose(fall_S[2:4], 20.0, atol=0.01)
    assert 17.0 < fall_S[4] < 20.0
    np.testing.assert_allclose(fall_S[5:], 0.0, atol=0.01)
