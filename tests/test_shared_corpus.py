"""A resident corpus that is split over the devices: the same examples, bit for bit, anywhere."""

import functools
import hashlib
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_processes import ends, started
from test_resident import POOLED, RATE, SETTINGS, indices_of
from test_train import silent

from eqst import batches, mesh, processes, resident

BATCH = 8
RENDERINGS = {
    "exact": {"data.rendering": "exact"},
    "device": {"data.rendering": "device"},
    "pooled": POOLED | {"data.rendering": "pooled"},
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


def settings(rendering: str) -> dict:
    usual = {"train.batch_size": BATCH, "data.shard_corpus": True, "data.min_loudness_lufs": -40.0}
    return SETTINGS | RENDERINGS[rendering] | usual


@pytest.fixture(scope="module")
def little(corpus_of, bursts):
    return corpus_of(
        [bursts(20 + i, seconds, RATE) for i, seconds in enumerate((9, 4, 5, 7))], RATE
    )


def dry_of(config, recordings, which, devices=None):
    """Both dry segments of a batch, and what the network sees of it."""
    indices = indices_of(config, recordings)
    held = resident.load(config, recordings, indices, silent, devices)
    numbers = np.arange(100, 100 + BATCH, dtype=np.int32)
    if devices is None:
        see = jax.jit(lambda held, k_B: resident.batch(config, held, which, k_B))
        return held, None, jax.tree.map(np.asarray, see(held, numbers))
    k_B = mesh.global_batch(devices, numbers[mesh.process_slice(devices, BATCH)])
    # On one device too, as its one part.
    specs = resident.places(held, 2)
    held = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else mesh.copied(devices, x), held)
    found = []
    for make in (resident.shared_out, functools.partial(resident.batch, parts=2)):
        own = functools.partial(make, config, length_index=which)
        program = jax.shard_map(
            lambda held, k_B, own=own: own(held, k_B=k_B),
            mesh=devices, in_specs=(specs, mesh.SPLIT), out_specs=mesh.SPLIT, check_vma=False,
        )  # fmt: skip
        found.append(jax.tree.map(processes.on_host, jax.jit(program)(held, k_B)))
    return held, *found


def dry_by_the_host(config, recordings, which, plan) -> tuple[np.ndarray, np.ndarray]:
    """The same segments, read from the corpus one by one."""
    data = config.data
    context = round(data.context_seconds * RATE) if data.rendering == "exact" else 0
    length = context + round(data.segment_seconds[which] * RATE)
    return tuple(
        np.stack(
            [
                recordings.segment(int(r), int(hop) * RATE // 10 - context, length)
                for r, hop in zip(recording_B, hop_B, strict=True)
            ]
        )
        for recording_B, hop_B in (
            (plan.input_recording, plan.input_hop),
            (plan.reference_recording, plan.reference_hop),
        )
    )


@pytest.mark.parametrize("rendering", ["exact", pytest.param("device", marks=pytest.mark.long)])
def test_every_device_gets_its_examples_of_the_whole_corpus(rendering, configure, little):
    config, which = configure(settings(rendering)), 1
    _, _, whole = dry_of(config, little, which)
    first = None
    for devices in (mesh.make_mesh(1), mesh.make_mesh(2), mesh.make_mesh(4, fsdp=2)):
        held, dry, seen = dry_of(config, little, which, devices)
        expected = dry_by_the_host(config, little, which, dry.plan)
        for got_BT, expected_BT in zip((dry.input, dry.reference), expected, strict=True):
            # One float32 rounding of the gain apart.
            np.testing.assert_allclose(got_BT, expected_BT, rtol=3e-7, atol=0)
            assert np.abs(got_BT).max(axis=1).min() > 0
        first = first or dry
        for got, wanted in zip(jax.tree.leaves(dry), jax.tree.leaves(first), strict=True):
            assert got.tobytes() == wanted.tobytes()
        # dB of single bands in single frames, of which near silence is left.
        for got, wanted in zip(seen, whole, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-2)
        ways = mesh.ways(devices)
        part = held.samples_T.sharding.shard_shape(held.samples_T.shape)
        assert part == (held.samples_T.shape[0] // ways,)
        if ways == 4:  # a recording each, none of which is larger than the largest
            assert sorted(np.asarray(held.part_R)) == [0, 1, 2, 3]
            assert part[0] == little.length_R.max() + 2 * resident._margin(config)


def test_a_share_is_as_large_as_the_others_and_its_positions_fit_32_bits():
    rng = np.random.default_rng(0)
    length_R = rng.integers(1, 10**8, 200)
    assert length_R.sum() > 2**31
    part_R, start_R = resident._shares(length_R, 8)
    held = np.bincount(part_R, length_R)
    assert held.max() - held.min() <= length_R.min() + 10**6 and held.max() < 2**31
    for part in range(8):
        own = np.flatnonzero(part_R == part)
        ends = start_R[own] + length_R[own]
        assert start_R[own][0] == 0 and (start_R[own][1:] == ends[:-1]).all()
    whole = resident._shares(length_R, 1)[1]
    np.testing.assert_array_equal(whole, np.cumsum(length_R) - length_R)


def test_a_share_that_32_bits_cannot_address_is_refused(configure, little):
    config = configure(settings("exact"))
    endless = little._replace(length_R=np.array([2**31 - 5, 10, 10, 10]))
    with pytest.raises(ValueError, match="37.3 h, do not fit .* or on more devices with "):
        resident.load(config, endless, indices_of(config, little), silent, mesh.make_mesh(2))


def test_banks_are_split_by_rows(configure, little):
    config = configure(settings("pooled"))
    whole, _, seen = dry_of(config, little, 0)
    for devices in (mesh.make_mesh(2), mesh.make_mesh(4)):
        held, dry, shared = dry_of(config, little, 0, devices)
        for one, split in zip(whole.banks, held.banks, strict=True):
            rows = -(-len(one) // mesh.ways(devices))
            assert split.sharding.shard_shape(split.shape) == (rows, *one.shape[1:])
            got = np.asarray(split)
            assert got[: len(one)].tobytes() == one.tobytes() and not got[len(one) :].any()
        for got, row_B in (
            (dry.input, dry.plan.input_row),
            (dry.reference, dry.plan.reference_row),
        ):
            assert got.tobytes() == whole.banks[0][row_B].tobytes()
        for got, wanted in zip(shared, seen, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_parts_without_a_row_are_silent(configure, little):
    config = configure(settings("pooled"))
    index = indices_of(config, little)[0]
    few = index._replace(
        hop_V=index.hop_V[:2], first_R=np.array([0]), count_R=np.array([2]),
        recording_R=index.recording_R[:1],
    )  # fmt: skip
    held = resident.load(config, little, (few, few), silent, mesh.make_mesh(4))
    bank = np.asarray(held.banks[0])
    assert len(bank) == 4 and bank[:2].any(axis=(1, 2)).all() and not bank[2:].any()


@pytest.mark.parametrize("odd", [3, 4])
@pytest.mark.parametrize("kind", [np.int16, np.float16])
def test_numbers_of_16_bits_are_handed_round_as_they_are(odd, kind):
    """Every pattern of bits: signs, infinities, those that are no number."""
    devices = mesh.make_mesh(4)
    rows = np.arange(2**16).astype(np.uint16).view(kind).reshape(-1, 4)[:, :odd]
    size = len(rows) // 4
    table = mesh.from_parts(devices, lambda part: rows[part * size : (part + 1) * size])
    order = np.random.default_rng(0).permutation(len(rows)).astype(np.int32)
    read = functools.partial(mesh.read_parts, lambda part, place: part[place])
    got = jax.jit(mesh.on_each(devices, read, *[mesh.SPLIT] * 3))(
        table, *(mesh.global_batch(devices, x) for x in (order // size, order % size))
    )
    assert got.sharding.shard_shape(got.shape) == (size, odd)
    assert np.asarray(got).tobytes() == rows[order].tobytes()


@pytest.mark.parametrize("rendering", ["exact", "device"])
@pytest.mark.parametrize("members", [1, 2])
def test_of_a_corpus_that_is_copied_nothing_is_handed_round(rendering, members, configure, little):
    """Left to itself the compiler gathers all audio, and every device has all FFTs to do."""
    config = configure(settings(rendering) | {"data.shard_corpus": False})
    devices = mesh.make_mesh(4, members=members)
    source = batches.make_source(config, little, devices, silent)
    if members > 1:
        rules = mesh.Shardings.of(devices, stacked=True)
        own = [batches.of_member(source, seed, np.full(4, 0.25)) for seed in (3, 4)]
        source = batches.of_members(own, lambda tree: mesh.placed(rules.own, tree))
    see = jax.jit(source.see, static_argnums=2)
    compiled = see.lower(next(source.stream(5)), source.constants, 0).compile().as_text()
    assert " fft(" in compiled and not any(name in compiled for name in COLLECTIVES)


def test_on_one_device_nothing_is_handed_round(configure, little):
    programs = []
    for changes in ({}, {"data.shard_corpus": False}):
        config = configure(settings("exact") | changes)
        source = batches.make_source(config, little, mesh.make_mesh(1), silent)
        see = jax.jit(source.see, static_argnums=2)
        programs.append(see.lower(next(source.stream(5)), source.constants, 0))
    assert programs[0].as_text() == programs[1].as_text()
    compiled = programs[0].compile().as_text()
    assert not any(name in compiled for name in COLLECTIVES)


@pytest.mark.parametrize("rendering", ["pooled", pytest.param("exact", marks=pytest.mark.long)])
def test_members_draw_from_one_shared_corpus(rendering, configure, little):
    """Two replicas of two devices each: what a member sees is what it sees alone."""
    config = configure(settings(rendering))
    weights = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.25, 0.25]])
    devices = mesh.make_mesh(4, members=2)
    assert dict(devices.shape) == {"replica": 2, "data": 2, "fsdp": 1}
    rules = mesh.Shardings.of(devices, stacked=True)
    source = batches.make_source(config, little, devices, silent)
    own = [batches.of_member(source, seed, x) for seed, x in zip((3, 4), weights, strict=True)]
    both = batches.of_members(own, lambda tree: mesh.placed(rules.own, tree))
    alone = batches.make_source(config, little, mesh.make_mesh(1), silent)
    step = next(both.stream(7))
    program = jax.jit(both.see, static_argnums=2).lower(step, both.constants, 1).compile()
    seen = program(step, both.constants)
    assert seen.label_BKP.sharding.is_equivalent_to(rules.own_batch, seen.label_BKP.ndim)
    for number, (seed, weight_R) in enumerate(zip((3, 4), weights, strict=True)):
        one = batches.of_member(alone, seed, weight_R)
        wanted = jax.jit(one.see, static_argnums=2)(step, one.constants, 1)
        for got, expected in zip(seen, wanted, strict=True):
            np.testing.assert_allclose(got[number], expected, atol=2e-2)
    assert not np.allclose(seen.label_BKP[0], seen.label_BKP[1])
    # A replica hands round its own members' segments alone.
    length = 1.5 if rendering == "exact" else None
    if length:
        words = (round((length + 1.0) * RATE) + 1) // 2
        scattered = [x for x in program.as_text().splitlines() if " reduce-scatter(" in x]
        assert scattered and all(f"[1,{BATCH // 2},{words}]" in x.split("(")[0] for x in scattered)


HASHES = """
import pickle, sys
from eqst import processes
processes.join()
sys.path.insert(0, sys.argv[1])
from test_shared_corpus import digest
print(digest(*pickle.load(open(sys.argv[2], "rb"))), flush=True)
"""


def digest(config, recordings, fsdp: int) -> str:
    """Of what a batch is made of, on all devices of all processes."""
    _, dry, _ = dry_of(config, recordings, 0, mesh.make_mesh(fsdp=fsdp))
    joined = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(dry))
    return hashlib.sha256(joined).hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("rendering", ["exact", "pooled"])
def test_bits_do_not_depend_on_the_topology(rendering, configure, little, tmp_path):
    config = configure(settings(rendering))
    wanted = digest(config, little, 1)
    for count, devices, fsdp in ((1, 1, 1), (1, 8, 2), (2, 1, 1), (2, 4, 8)):
        (tmp_path / "given").write_bytes(pickle.dumps((config, little, fsdp)))
        words = [sys.executable, "-c", HASHES, str(Path(__file__).parent), str(tmp_path / "given")]
        with started(words, tmp_path, count, devices) as children:
            results = ends(children)
        assert [(code, out) for code, out, _ in results] == [(0, f"{wanted}\n")] * count, results
