"""Pairs against brute force, statistics and scipy: what (seed, k) means, and how it is rendered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pyloudnorm
import pytest
import scipy.stats
import soundfile
from scipy.signal import sosfilt

from eqst import audio, biquad, eq, pairs
from eqst.pairs import PairsError

RATE = 8000
WORST_DB = -90.0


@pytest.fixture(scope="module")
def little(corpus_of, bursts):
    """Four recordings of 6 to 12 s, the last with 0.9 s only: too short for any pair."""
    lengths = (6.0, 9.0, 12.0, 0.9)
    return corpus_of([bursts(10 + i, seconds, RATE) for i, seconds in enumerate(lengths)], RATE)


@pytest.fixture(scope="module")
def index(little):
    return pairs.build_index(little, 1.0, -35.0)[0]


CHUNK = 500


@functools.cache
def _many(protocol, different, turn):
    def draw(seed, index, k_B):
        settings = {"protocol": protocol, "different_recordings": different, "turn": turn}
        return jax.vmap(lambda k: pairs.draw(seed, k, index, **settings))(k_B)

    return jax.jit(draw)


def drawn(index, k_B, *, seed=0, protocol="mixed", different=False, turn=False):
    """Plans of these numbers, in chunks of one size, so that one compilation serves all."""
    many, count = _many(protocol, different, turn), len(k_B)
    padded_B = np.resize(np.asarray(k_B, np.int32), -(-count // CHUNK) * CHUNK)
    chunks = [many(seed, index, chunk) for chunk in padded_B.reshape(-1, CHUNK)]
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *chunks)


# --- what an example is --------------------------------------------------------------------------


def test_an_example_is_a_pure_function_of_seed_and_number(index):
    whole = drawn(index, np.arange(96))
    # Alone; in another batch; in another order.
    alone = jax.jit(lambda k: pairs.draw(0, k, index, protocol="mixed"))(37)
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(a[37], b)
    later = drawn(index, np.arange(32, 128))
    order = np.random.default_rng(0).permutation(96)
    shuffled = drawn(index, order)
    for a, b, c in zip(whole, later, shuffled, strict=True):
        np.testing.assert_array_equal(a[32:], b[:64])
        np.testing.assert_array_equal(a[order], c)


def test_other_seeds_and_numbers_are_other_examples(index):
    one, other = drawn(index, np.arange(200)), drawn(index, np.arange(200), seed=1)
    assert not np.any(np.all(one.label_KP == other.label_KP, axis=(1, 2)))
    assert len(np.unique(one.label_KP[:, 0, 0])) == 200
    far = drawn(index, [2**30, 2**31 - 1, 0])
    assert len(np.unique(far.label_KP[:, 1, 1])) == 3


def brute_force(power_J, hops, least_lufs):
    """All pairs of starts (a, b): loud both, and not overlapping."""
    loud = [
        h
        for h in range(len(power_J) - hops + 1)
        if audio.gated_loudness_lufs(power_J[h : h + hops]) >= least_lufs
    ]
    return {(a, b) for a in loud for b in loud if abs(a - b) >= hops}


def test_every_allowed_pair_is_drawn(corpus_of, bursts):
    recordings = corpus_of([bursts(11, 3.2, RATE)], RATE)
    plan = drawn(pairs.build_index(recordings, 1.0, -35.0)[0], np.arange(8000), protocol="plain")
    got = set(zip(plan.input_hop.tolist(), plan.reference_hop.tolist(), strict=True))
    assert got == brute_force(recordings.power_R[0], 10, -35.0) and len(got) > 30


def test_pairs_are_those_of_brute_force(little, index):
    plan = drawn(index, np.arange(20000), protocol="plain")
    np.testing.assert_array_equal(plan.input_recording, plan.reference_recording)
    for recording in range(3):
        mine = plan.input_recording == recording
        got = set(
            zip(plan.input_hop[mine].tolist(), plan.reference_hop[mine].tolist(), strict=True)
        )
        allowed = brute_force(little.power_R[recording], 10, -35.0)
        assert got <= allowed
        assert len(got) > 500
        rows = slice(index.first_R[recording], index.first_R[recording] + index.count_R[recording])
        assert set(index.hop_V[rows].tolist()) == {a for a, _ in allowed}
    assert not np.any(plan.input_recording == 3)


def test_rows_and_hops_agree(index):
    plan = drawn(index, np.arange(500), different=True)
    np.testing.assert_array_equal(index.hop_V[plan.input_row], plan.input_hop)
    np.testing.assert_array_equal(index.hop_V[plan.reference_row], plan.reference_hop)
    owner_V = np.repeat(index.recording_R, index.count_R)
    np.testing.assert_array_equal(owner_V[plan.input_row], plan.input_recording)
    np.testing.assert_array_equal(owner_V[plan.reference_row], plan.reference_recording)


@pytest.mark.parametrize("seconds", [0.5, 0.54, 0.96, 1.25])
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100])
def test_segments_never_overlap_in_samples(corpus_of, bursts, rate, seconds):
    """Also where neither the rate nor the segment is a whole number of hops."""
    recordings = corpus_of([bursts(0, 7.0, rate)], rate)
    index, _ = pairs.build_index(recordings, seconds, -50.0)
    length = round(seconds * rate)
    # Row after row with its nearest partners on either side.
    start_V = pairs.first_sample(np.asarray(index.hop_V), rate)
    assert start_V.min() >= 0 and start_V.max() + length <= recordings.length_R[0]
    for row in range(len(start_V)):
        if index.before_V[row] > 0:
            assert start_V[row] - start_V[index.before_V[row] - 1] >= length
        if index.after_V[row] < len(start_V):
            assert start_V[index.after_V[row]] - start_V[row] >= length


def test_hops_begin_where_the_power_does():
    """`k_weighted_power`'s block j begins at sample floor(j rate / 10), at any rate and length."""
    hop = np.array([0, 1, 7, 48_697, 486_000], np.int32)
    for rate in (8000, 11025, 22050, 44100, 192000):
        expected = [int(h) * rate // 10 for h in hop]
        if expected[-1] < 2**31:
            assert pairs.first_sample(hop, rate).tolist() == expected
            assert np.asarray(pairs.first_sample(jnp.asarray(hop), rate)).tolist() == expected


def test_loudness_gate_by_another_meter(little, index):
    plan = drawn(index, np.arange(40))
    meter = pyloudnorm.Meter(RATE)
    input_BT, reference_BT = pairs.fetch(little, plan, 1.0, 0.0)
    for segment_T in (*input_BT, *reference_BT):
        # The meter's filter starts at rest in each segment, ours long before it.
        assert meter.integrated_loudness(segment_T.astype(np.float64)) > -35.5


def test_segment_loudness_is_the_gated_loudness_of_each():
    rng = np.random.default_rng(4)
    power_J = 10.0 ** rng.uniform(-9.0, -1.0, size=300)
    power_J[40:80] = 0.0
    for blocks in (4, 5, 30):
        expected = [
            audio.gated_loudness_lufs(power_J[h : h + blocks]) for h in range(300 - blocks + 1)
        ]
        np.testing.assert_allclose(pairs.segment_loudness(power_J, blocks), expected, rtol=1e-9)
    assert np.all(np.isneginf(pairs.segment_loudness(np.zeros(20), 10)))
    assert len(pairs.segment_loudness(power_J[:9], 10)) == 0
    # More starts than are treated at a time.
    long_J = 10.0 ** rng.uniform(-4.0, -1.0, size=9000)
    got = pairs.segment_loudness(long_J, 6)
    for h in (0, 4095, 4096, 8191, 8192, 8994):
        assert got[h] == pytest.approx(audio.gated_loudness_lufs(long_J[h : h + 6]), rel=1e-9)


def test_recordings_without_a_pair_are_named(little):
    index, skipped = pairs.build_index(little, 1.0, -35.0)
    assert index.recording_R.tolist() == [0, 1, 2]
    assert len(skipped) == 1 and "talker3" in skipped[0] and "0.9 s" in skipped[0]
    with pytest.raises(PairsError, match="no pair of 30 s"):
        pairs.build_index(little, 30.0, -35.0)
    with pytest.raises(PairsError, match="at 0 LUFS"):
        pairs.build_index(little, 1.0, 0.0)


def test_more_starts_than_can_be_numbered_are_refused(little, index, monkeypatch):
    rows = len(index.hop_V)
    assert index.first_R.dtype == np.int32 and np.int64(pairs.MAX_ROWS).astype(np.int32) > 0
    assert (np.int64(pairs.MAX_ROWS) + 1).astype(np.int32) < 0  # what is refused would wrap
    assert index.first_R[-1] + index.count_R[-1] == rows
    monkeypatch.setattr(pairs, "MAX_ROWS", rows)
    assert len(pairs.build_index(little, 1.0, -35.0)[0].hop_V) == rows
    monkeypatch.setattr(pairs, "MAX_ROWS", rows - 1)
    with pytest.raises(PairsError, match=f"more than {rows - 1} starts .*: take fewer hours") as no:
        pairs.build_index(little, 1.0, -35.0)
    assert "\n" not in str(no.value)


# --- distributions -------------------------------------------------------------------------------


def test_labels_and_colours_are_uniform_and_independent(index):
    plan = drawn(index, np.arange(4000), protocol="coloured")
    columns = np.concatenate([x.reshape(4000, 12) for x in (plan.label_KP, plan.colour_KP)], axis=1)
    columns = np.concatenate([columns, plan.augment_A], axis=1)
    assert columns.min() >= 0.0 and columns.max() < 1.0
    worst = min(scipy.stats.kstest(column, "uniform").pvalue for column in columns.T)
    assert worst > 1e-4  # 41 columns, a fixed seed
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5.0 / np.sqrt(4000)
    assert columns.shape[1] == 24 + pairs.AUGMENT


def test_protocols_differ_in_the_colour_alone(index):
    plain, coloured, mixed = (
        drawn(index, np.arange(2000), protocol=name) for name in ("plain", "coloured", "mixed")
    )
    for a, b, c in zip(plain, coloured, mixed, strict=True):
        if a is not plain.colour_KP:
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)
    assert np.all(plain.colour_KP[..., 1] == 0.5)
    assert np.all(coloured.colour_KP[..., 1].std(axis=1) > 0)
    with_colour = np.any(mixed.colour_KP[..., 1] != 0.5, axis=1)
    assert 0.46 < with_colour.mean() < 0.54
    np.testing.assert_array_equal(mixed.colour_KP[with_colour], coloured.colour_KP[with_colour])
    np.testing.assert_array_equal(plain.colour_KP[..., 0], coloured.colour_KP[..., 0])


def test_recordings_are_drawn_by_weight_and_segments_evenly(little):
    weighted = little._replace(weight_R=np.array([0.5, 0.3, 0.1, 0.1]))
    index, _ = pairs.build_index(weighted, 1.0, -35.0)
    plan = drawn(index, np.arange(8000))
    share = np.bincount(plan.input_recording, minlength=4) / 8000
    np.testing.assert_allclose(share, np.array([5, 3, 1, 0]) / 9, atol=0.02)
    counts = np.bincount(plan.input_row[plan.input_recording == 0])[: index.count_R[0]]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_turn_takes_every_recording(index):
    plan = drawn(index, np.arange(9), turn=True)
    assert plan.input_recording.tolist() == [0, 1, 2] * 3


def test_different_recordings(little, index, corpus_of, bursts):
    plan = drawn(index, np.arange(3000), different=True)
    assert np.all(plan.input_recording != plan.reference_recording)
    same = drawn(index, np.arange(3000))
    np.testing.assert_array_equal(plan.input_hop, same.input_hop)
    others = np.bincount(plan.reference_recording[plan.input_recording == 0], minlength=3)
    assert others[0] == 0 and others[1:].min() > 0.4 * others.sum()
    one, _ = pairs.build_index(corpus_of([bursts(0, 6.0, RATE)], RATE), 1.0, -35.0)
    with pytest.raises(PairsError, match="different_recordings"):
        drawn(one, [0], different=True)


# --- audio ---------------------------------------------------------------------------------------


def test_fetch_reads_the_context_too(little, index):
    plan = drawn(index, np.arange(12))
    input_BT, reference_BT = pairs.fetch(little, plan, 1.0, 1.5)
    assert input_BT.shape == reference_BT.shape == (12, 20000) and input_BT.dtype == np.float32
    for b in range(12):
        begin = int(plan.input_hop[b]) * 800
        np.testing.assert_array_equal(
            input_BT[b, 12000:], little.segment(int(plan.input_recording[b]), begin, 8000)
        )
        if begin < 12000:
            assert np.all(input_BT[b, : 12000 - begin] == 0.0)


def scipy_filtered(recording_T, unit_list, rate):
    """float64 sosfilt of a whole recording by EQs in a row."""
    for unit_KP in unit_list:
        settings = eq.from_unit(eq.PAPER, np.asarray(unit_KP, np.float64))
        settings, _ = eq.limit_to_rate(settings, rate)
        sections = biquad.sos(*settings, kinds=eq.KINDS, sample_rate=rate)
        recording_T = sosfilt(sections, recording_T)
    return recording_T


def worst_units():
    """Highest Q and both signs of gain at the lowest and the highest frequencies."""
    for freq in (0.0, 1.0):
        for gain in (0.0, 1.0):
            yield np.tile(np.array([freq, gain, 1.0], np.float32), (4, 1))


@functools.cache
def _render(rate, context):
    def rendered(dry_T, label_KP, colour_KP):
        nothing = [jnp.zeros((), jnp.int32)] * 6
        plan = pairs.Plan(*nothing, label_KP, colour_KP, jnp.zeros(pairs.AUGMENT))
        where = {"sample_rate": rate, "context": context}
        return pairs.render(dry_T, dry_T, plan, table=eq.PAPER, protocol="coloured", **where)

    return jax.jit(rendered)


def check_rendering(
    recording_T, rate, units, *, seconds=1.0, context_seconds=1.5, starts=(0.0, 0.7, 2.5)
):
    """Worst error of `render` against scipy over the whole recording, dB of the segment's peak."""
    context, length = round(context_seconds * rate), round(seconds * rate)
    padded_T = np.concatenate([np.zeros(context), recording_T]).astype(np.float32)
    worst = -np.inf
    for label_KP, colour_KP in units:
        once_T = scipy_filtered(recording_T, [colour_KP], rate)
        twice_T = scipy_filtered(once_T, [label_KP], rate)
        for start in (round(x * rate) for x in starts):
            dry_T = padded_T[start : start + context + length]
            got = _render(rate, context)(dry_T, label_KP, colour_KP)
            for got_T, full_T in zip(got, (once_T, twice_T), strict=True):
                expected_T = full_T[start : start + length]
                error = np.abs(np.asarray(got_T, np.float64) - expected_T).max()
                worst = max(worst, 20.0 * np.log10(error / np.abs(expected_T).max()))
    return worst


def random_units(count, seed):
    rng = np.random.default_rng(seed)
    return [rng.uniform(size=(2, 4, 3)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("rate", [pytest.param(16000, marks=pytest.mark.long), 44100])
def test_rendering_is_scipys_over_the_whole_recording(rate):
    noise_T = 0.1 * np.random.default_rng(7).standard_normal(4 * rate)
    units = random_units(8, 0) + [(unit, unit) for unit in worst_units()]
    assert check_rendering(noise_T, rate, units) < WORST_DB


@pytest.mark.long
def test_rendering_of_many_equalisers():
    noise_T = 0.1 * np.random.default_rng(8).standard_normal(6 * 44100)
    assert check_rendering(noise_T, 44100, random_units(200, 1), starts=(0.0, 4.9)) < WORST_DB


def low_shelf_corner():
    """The longest ring of the table: 30 Hz, +10 dB, Q 10, and no other band to hide it."""
    unit_KP = np.full((4, 3), 0.5, np.float32)
    unit_KP[0] = (0.0, 1.0, 1.0)
    return unit_KP


FLAT = np.full((4, 3), 0.5, np.float32)


def test_rendering_where_the_filter_rings_longest():
    """One such EQ is exact; two in a row, which only `coloured` can draw, need more context.

    Measured on white noise: -111 dB for one, -72 dB for two (-68 dB on one talker).
    """
    noise_T = 0.1 * np.random.default_rng(7).standard_normal(4 * 44100)
    corner = low_shelf_corner()
    once, twice = [(corner, FLAT)], [(corner, corner)]
    assert check_rendering(noise_T, 44100, once, starts=(2.5,)) < WORST_DB
    assert -90.0 < check_rendering(noise_T, 44100, twice, starts=(2.5,)) < -60.0
    longer = check_rendering(noise_T, 44100, twice, context_seconds=2.0, starts=(2.5,))
    assert longer < WORST_DB


def test_rendering_of_real_speech(shared):
    files = sorted((shared / "speech").rglob("*.flac"))
    checked = 0
    for path in files[:: max(1, len(files) // 4)]:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            recording_T = file.read(5 * rate, always_2d=True)[:, 0]
        if rate != 44100 or len(recording_T) < 4 * rate or checked == 2:
            continue
        units = [*random_units(3, 2), (low_shelf_corner(), FLAT)]
        assert check_rendering(recording_T, rate, units, starts=(0.6, 2.5)) < WORST_DB, path
        checked += 1
    assert checked == 2


def test_plain_input_is_untouched_and_equals_coloured_without_gain(little, index):
    plan = jax.tree.map(lambda x: jnp.asarray(x[3]), drawn(index, np.arange(4), protocol="plain"))
    batch = jax.tree.map(lambda x: np.asarray(x)[None], plan)
    (input_T,), (reference_T,) = pairs.fetch(little, batch, 1.0, 1.5)
    render = functools.partial(pairs.render, table=eq.PAPER, sample_rate=RATE, context=12000)
    plain = jax.jit(functools.partial(render, protocol="plain"))(input_T, reference_T, plan)
    np.testing.assert_array_equal(plain[0], input_T[12000:])
    mixed = jax.jit(functools.partial(render, protocol="mixed"))(input_T, reference_T, plan)
    for a_T, b_T in zip(plain, mixed, strict=True):
        np.testing.assert_allclose(a_T, b_T, atol=1e-6 * np.abs(input_T).max() + 1e-7)


def test_frequencies_are_held_below_nyquist():
    """At 8 kHz the paper's high shelf has no room: 0.45 of the rate is the limit."""
    settings = pairs.settings(eq.PAPER, jnp.ones((4, 3)), 8000)
    np.testing.assert_allclose(settings.freq_hz, [260.0, 2000.0, 3600.0, 3600.0], rtol=1e-5)
