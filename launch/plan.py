"""What a million hours of audio take on a TPU pod: python launch/plan.py [--hours=1e6] [--chips=64]

Prints the tables of launch/README.md, every number from measured ones (speed.json, gpu.json and
shard_reads.json in colab/results), data sheets and assumptions, which come first.
`--time_reads=SET` measures the last of these instead, on a set of eqst.build.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from eqst import card, command, pairs, shards
from eqst.config import Data

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "colab" / "results"

# A v5p host and chip, and the H100 that the training rate was measured on (Cloud TPU v5p page,
# NVIDIA's data sheet).
CHIPS_PER_HOST, VCPU_PER_HOST, GB_PER_HOST, GBIT_S_PER_HOST = 4, 208, 448, 200
CHIP_TFLOPS, H100_TFLOPS, HBM_GB = 459, 989, 95
SAMPLE_BYTES, SHARD_MB, RECORD_SECONDS = 2, 500, 10.0  # the last is eqst.build's --chunk_seconds
# On each host, for each start of 100 ms: float32 of loudness, three int32 of pairs.Index.
POWER_BYTES, INDEX_BYTES = 4, 12


class Assumed(NamedTuple):
    """What is chosen or guessed.

    Attributes:
      hours: of mono audio at the default rate.
      chips: of v5p.
      batch_pairs: of a step, all chips together.
      core_share: of the hosts' vCPU that make pairs, as fast each as one of the two measured.
      bucket_gbit_s: what the bucket gives.
      memory_share: of the hosts' memory that holds audio.
    """

    hours: float
    chips: int
    batch_pairs: int
    core_share: float
    bucket_gbit_s: float
    memory_share: float


class Plan(NamedTuple):
    """What follows; rates are pairs/s of the whole pod.

    A pair is read with context, as host rendering needs it, but for `dry_records` and
    `host_reading`: without it, as `data.rendering=device` does.
    """

    hosts: int
    corpus_tb: float
    shards: int
    pairs: float
    steps: int
    records: float
    dry_records: float
    record_bytes: int
    host_rendering: float
    host_reading: float
    chip_batch: int
    h100_step_s: float
    chips_training: float
    from_network: float
    from_bucket: float
    memory_hours: float
    power_gb: float
    index_gb: float
    index_hours: float


# ---- what was measured


def _stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rendered_per_s() -> float:
    """Coloured pairs of 3 s that a core renders exactly, from memory-mapped stores."""
    stored = _stored("speed")
    rows = stored["sections"]["host_pairs"]["rows"]
    (rate,) = (x["pairs_per_s"] for x in rows if x["what"] == "EQST, host rendering in tf.data")
    return rate / stored["machine"]["cores"]


def read_s(context_seconds: float) -> float:
    """Seconds of a core for one segment of 3 s and its context from a built set."""
    rows = _stored("shard_reads")["rows"]
    (row,) = (x for x in rows if x["context_seconds"] == context_seconds)
    return row["cpu_milliseconds"] / 1e3


def h100_steps() -> tuple[tuple[int, float], tuple[int, float]]:
    """(pairs, seconds) of two float32 steps of `db_mel_pm` on an H100, features included.

    The small batch was timed from the features on; these were timed at the large one, and cost
    in proportion to the pairs.
    """
    rows = {(x["what"], x["batch"]): x["milliseconds"] / 1e3 for x in _stored("gpu")["steps"]}
    small, large = 64, 1024
    features_s = rows["features of both recordings alone", large] * small / large
    small_s = rows["step from features on, float32", small] + features_s
    return (small, small_s), (large, rows["full step, float32", large])


def h100_step_s(batch_pairs: float) -> float:
    """A step's seconds, on the line through the two: a fixed part, and one for each pair."""
    (small, small_s), (large, large_s) = h100_steps()
    return small_s + (large_s - small_s) * (batch_pairs - small) / (large - small)


def step_is(batch_pairs: int) -> str:
    """How `h100_step_s` comes by it."""
    (small, _), (large, _) = h100_steps()
    if batch_pairs in (small, large):
        return "measured" if batch_pairs == large else "measured from the features on"
    return "between the two" if small < batch_pairs < large else "beyond the two, on their line"


# ---- what follows


def records_per_segment(seconds: float) -> float:
    """Whole records that a segment, its context included, touches on average.

    The reader fetches records whole. Starts, ends and the records' own edges are whole numbers of
    hops of 100 ms, so a segment of n hops crosses n - 1 inner borders, each an edge of a record
    once in so many as a record has. (A recording's first segments have less context to read.)
    """
    return 1.0 + (seconds - 1.0 / pairs.HOPS_PER_SECOND) / RECORD_SECONDS


def plan(assumed: Assumed) -> Plan:
    """The arithmetic.

    Raises:
      ValueError: the chips are no whole hosts, or do not divide the batch.
    """
    chips, batch = assumed.chips, assumed.batch_pairs
    if chips < CHIPS_PER_HOST or chips % CHIPS_PER_HOST:
        raise ValueError(f"--chips={chips}: give a multiple of {CHIPS_PER_HOST}, a host's")
    if batch % chips:
        raise ValueError(f"--batch={batch}: give a multiple of --chips={chips}, its parts")
    data = Data()
    seconds, context, rate = data.segment_seconds[0], data.context_seconds, data.sample_rate
    hosts = chips // CHIPS_PER_HOST
    hour_bytes = 3600 * rate * SAMPLE_BYTES
    count = assumed.hours * 3600 / (2 * seconds)
    record_bytes = round(RECORD_SECONDS * rate) * SAMPLE_BYTES
    records = 2 * records_per_segment(seconds + context)
    cores = hosts * VCPU_PER_HOST * assumed.core_share
    step_s = h100_step_s(batch / chips)
    starts_per_hour = 3600 * pairs.HOPS_PER_SECOND
    return Plan(
        hosts=hosts,
        corpus_tb=assumed.hours * hour_bytes / 1e12,
        shards=math.ceil(assumed.hours * hour_bytes / (SHARD_MB * 1e6)),
        pairs=count,
        steps=math.ceil(count / batch),
        records=records,
        dry_records=2 * records_per_segment(seconds),
        record_bytes=record_bytes,
        # Rendering's own reads, of memory, are in it: 0.1 ms of its 3.6.
        host_rendering=cores / (1 / rendered_per_s() + 2 * read_s(context)),
        host_reading=cores / (2 * read_s(0.0)),
        chip_batch=batch // chips,
        h100_step_s=step_s,
        chips_training=batch / step_s * CHIP_TFLOPS / H100_TFLOPS,
        from_network=hosts * GBIT_S_PER_HOST * 1e9 / 8 / (records * record_bytes),
        from_bucket=assumed.bucket_gbit_s * 1e9 / 8 / (records * record_bytes),
        memory_hours=hosts * GB_PER_HOST * 1e9 * assumed.memory_share / hour_bytes,
        power_gb=assumed.hours * starts_per_hour * POWER_BYTES / 1e9,
        index_gb=assumed.hours * starts_per_hour * INDEX_BYTES / 1e9,
        index_hours=pairs.MAX_ROWS / starts_per_hour,
    )


def tables(assumed: Assumed, batches: list[int], dollars: float) -> Iterator[str]:
    """Markdown; what does not depend on the batch is said once."""
    each = [plan(assumed._replace(batch_pairs=batch)) for batch in batches]
    yield from _inputs(assumed, batches, each)
    yield ""
    yield from _outputs(assumed, batches, each)
    yield ""
    yield from _limits(assumed, batches, each, dollars)
    for batch, made in zip(batches, each, strict=True):
        yield ""
        yield _verdict(assumed, batch, made)


def _inputs(assumed: Assumed, batches: list[int], each: list[Plan]) -> Iterator[str]:
    made, data = each[0], Data()
    share, seconds = CHIP_TFLOPS / H100_TFLOPS, data.segment_seconds[0]
    yield "| assumed or measured | |"
    yield "|---|---|"
    yield f"| audio | {assumed.hours:,.0f} hours, mono, 44.1 kHz, 16 bit |"
    yield f"| chips, hosts | {assumed.chips} of v5p, {made.hosts} of {VCPU_PER_HOST} vCPU |"
    yield f"| a core renders, the audio in memory (speed.json) | {rendered_per_s():.0f} pairs/s |"
    for context in (data.context_seconds, 0.0):
        length = f"{seconds:g} s" + (f" and {context:g} s of context" if context else "")
        yield (
            f"| a core reads {length} from a built set (shard_reads.json) | "
            f"{read_s(context) * 1e3:.2f} ms |"
        )
    yield f"| share of the vCPU that do so (guess) | {assumed.core_share:.0%} |"
    for pairs_, step_s in h100_steps():
        yield (
            f"| a step of `db_mel_pm`, {pairs_:,} pairs, float32, one H100 (gpu.json) | "
            f"{step_s * 1e3:.1f} ms, {pairs_ / step_s:,.0f} pairs/s |"
        )
    for batch, one in zip(batches, each, strict=True):
        yield (
            f"| the same of a batch of {batch:,}: {one.chip_batch:,} a chip | "
            f"{one.h100_step_s * 1e3:.1f} ms ({step_is(one.chip_batch)}) |"
        )
    yield f"| a chip against it, by bf16 peak (guess for v5p) | {share:.2f} |"
    yield f"| the bucket gives (your quota) | {assumed.bucket_gbit_s:,.0f} Gb/s |"


def _outputs(assumed: Assumed, batches: list[int], each: list[Plan]) -> Iterator[str]:
    made = each[0]
    hour_gb = made.corpus_tb * 1e3 / assumed.hours
    used_kb = 2 * Data().segment_seconds[0] / 3600 * hour_gb * 1e6
    hbm_gb = assumed.chips * HBM_GB
    yield "| what follows | |"
    yield "|---|---|"
    yield f"| size | {made.corpus_tb:.1f} TB in {made.shards:,} shards of {SHARD_MB} MB |"
    yield f"| once through it | {made.pairs / 1e6:,.0f} million pairs |"
    for batch, one in zip(batches, each, strict=True):
        yield f"| the same in batches of {batch:,} | {one.steps:,} steps |"
    yield (
        f"| a pair uses, and reads for it | {used_kb:,.0f} kB; {made.records:.2f} records of "
        f"{made.record_bytes / 1e3:.0f} kB: {made.records * made.record_bytes / 1e3:,.0f} kB |"
    )
    yield (
        f"| in all HBM ({hbm_gb / 1e3:.1f} TB), in {assumed.memory_share:.0%} of the hosts' memory "
        f"| {hbm_gb / hour_gb:,.0f} hours, {made.memory_hours:,.0f} hours |"
    )
    yield (
        f"| loudness of every 100 ms, and the index, on each host | {made.power_gb:,.0f} + "
        f"{made.index_gb:,.0f} of {GB_PER_HOST} GB |"
    )
    parts = math.ceil(assumed.hours / made.index_hours)
    yield (
        f"| one corpus today, if all of it is loud | {made.index_hours:,.0f} hours (row numbers "
        f"are int32): sets needed: {parts:,} |"
    )


def _limits(
    assumed: Assumed, batches: list[int], each: list[Plan], dollars: float
) -> Iterator[str]:
    made = each[0]
    a_core = VCPU_PER_HOST * made.hosts * assumed.core_share
    render, read = made.host_rendering / a_core, made.host_reading / a_core
    limits = [
        ("the bucket", made.from_bucket, made.records, render),
        ("the hosts' network", made.from_network, made.records, render),
        ("the hosts, reading and rendering (guess)", made.host_rendering, made.records, render),
        (
            "the hosts, reading alone: `rendering=device` (guess)",
            made.host_reading,
            made.dry_records,
            read,
        ),
    ]
    for batch, one in zip(batches, each, strict=True):
        name = f"the chips, training batches of {batch:,} (guess)"
        limits.append((name, one.chips_training, one.records, render))
    price = ("", "") if dollars <= 0 else (" $ |", "---|")
    yield (
        "| if this is the limit | pairs/s | records/s a host | cores a host | Gb/s | hours | "
        f"chip-hours |{price[0]}"
    )
    yield "|---|---|---|---|---|---|---|" + price[1]
    for name, rate, records, core in sorted(limits, key=lambda limit: limit[1]):
        hours = made.pairs / rate / 3600
        cost = "" if dollars <= 0 else f" {hours * assumed.chips * dollars:,.0f} |"
        yield (
            f"| {name} | {rate:,.0f} | {rate * records / made.hosts:,.0f} | "
            f"{rate / made.hosts / core:,.0f} | {rate * records * made.record_bytes * 8 / 1e9:,.0f}"
            f" | {hours:.2f} | {hours * assumed.chips:,.0f} |{cost}"
        )


def _verdict(assumed: Assumed, batch: int, made: Plan) -> str:
    room = made.host_rendering / made.chips_training
    gbit_s = made.chips_training * made.records * made.record_bytes * 8 / 1e9
    return (
        f"Batches of {batch:,}: a chip takes {made.chips_training / assumed.chips:,.0f} pairs/s, "
        f"and reading and rendering on the hosts make {made.host_rendering / assumed.chips:,.0f} "
        f"for each chip. They {'keep' if room >= 1 else 'do not keep'} up, and are level where a "
        f"chip trains {room:.2f} times as fast as is assumed, or where they have "
        f"{assumed.core_share / room:.0%} of the vCPU. The bucket keeps up from {gbit_s:,.0f} Gb/s "
        f"on; the hosts' network has {made.hosts * GBIT_S_PER_HOST:,}."
    )


# ---- measuring


def time_reads(folder: str, rounds: int = 9, reads: int = 200) -> dict[str, Any]:
    """What a core takes for a segment from a built set, from where a hop begins, drawn anew.

    Args:
      folder: of the set, NAME/VERSION; at the default rate, its recordings longer than a segment.
      rounds: of timing; the lengths take turns.
      reads: in a round.

    Raises:
      ValueError: a recording is too short; CorpusError: the set is missing or damaged.
    """
    data, rng, load = Data(), np.random.default_rng(0), os.getloadavg()[0]
    corpus = shards.load(folder).corpus
    rate, seconds = corpus.sample_rate, data.segment_seconds[0]
    contexts = (data.context_seconds, 0.0)
    shortest = float(corpus.length_R.min()) / rate
    if shortest < seconds + max(contexts):
        raise ValueError(
            f"--time_reads={folder}: its shortest recording has {shortest:.1f} s; build a set of "
            f"{seconds + max(contexts):g} s and more (--min_seconds)"
        )
    timed: dict[float, list[tuple[float, float]]] = {context: [] for context in contexts}
    for number in range(rounds + 1):
        for context in contexts:
            length = round((seconds + context) * rate)
            recording_B = rng.integers(len(corpus.length_R), size=reads)
            hops_B = (corpus.length_R[recording_B] - length) * pairs.HOPS_PER_SECOND // rate + 1
            begin_B = pairs.first_sample(rng.integers(hops_B), rate)
            cpu, wall = time.process_time(), time.perf_counter()
            for recording, begin in zip(recording_B, begin_B, strict=True):
                corpus.stored(int(recording), int(begin), length)
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            if number:  # the first opens the shards
                timed[context].append(spent)
    rows = []
    for context, spent_N in timed.items():
        cpu_N, wall_N = (sorted(1e3 * x[i] / reads for x in spent_N) for i in range(2))
        row = {"seconds": seconds, "context_seconds": context, "rounds": rounds, "reads": reads}
        row |= {"cpu_milliseconds": statistics.median(cpu_N), "cpu_least": cpu_N[0]}
        row |= {"cpu_most": cpu_N[-1], "wall_milliseconds": statistics.median(wall_N)}
        rows.append(row)
    info = shards.read_info(folder)
    parts = [shard for split in info["shards"].values() for shard in split]
    share = sum(x["bytes"] for x in parts) / sum(x["example_bytes"] for x in parts)
    return {
        "about": "a segment by eqst.store.Corpus.stored from a built set whose shards are in the "
        "page cache; time of the processor, all threads, and of the clock",
        "command": "python launch/plan.py --time_reads=SET",
        "commit": card.commit(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "load_before": load},
        "chunk_seconds": info["chunk"] / rate,
        "hours": corpus.seconds() / 3600,
        "file_bytes_per_example_byte": share,
        "rows": rows,
    }


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_float("hours", 1e6, "Of audio.", lower_bound=1.0)
    flags.DEFINE_integer("chips", 64, "Of v5p.", lower_bound=1)
    flags.DEFINE_multi_integer("batch", [4096, 65536], "Pairs of a step.", lower_bound=1)
    flags.DEFINE_float("core_share", 0.75, "Of the vCPU that make pairs.", 0.01, 1.0)
    flags.DEFINE_float("bucket_gbit_s", 200.0, "What the bucket gives.", lower_bound=0.1)
    flags.DEFINE_float("memory_share", 0.6, "Of the hosts' memory for audio.", 0.01, 1.0)
    flags.DEFINE_float("dollars", 0.0, "Of a chip-hour, for a column; 0: none.", lower_bound=0.0)
    flags.DEFINE_string("time_reads", None, "A set of eqst.build: time reads from it, print JSON.")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    if given.time_reads is not None:
        print(json.dumps(time_reads(given.time_reads), indent=1))
        return
    for name in ("hours", "core_share", "bucket_gbit_s", "memory_share", "dollars"):
        if not math.isfinite(float(given[name].value or 0.0)):
            raise ValueError(f"--{name}={given[name].value}: give a number")
    assumed = Assumed(
        given.hours,
        given.chips,
        given.batch[0],
        given.core_share,
        given.bucket_gbit_s,
        given.memory_share,
    )
    print("\n".join(tables(assumed, given.batch, given.dollars)))


if __name__ == "__main__":
    command.start("launch/plan.py", define_flags, main)
