"""What a million hours of audio take on a TPU pod: python launch/plan.py [--hours=1e6] [--chips=64]

Prints the tables of launch/README.md, every number from measured ones (colab/results/speed.json, a
step on an H100), data sheets and assumptions, which come first.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

from eqst import command
from eqst.config import Data

SPEED = pathlib.Path(__file__).resolve().parents[1] / "colab" / "results" / "speed.json"

# A v5p host and chip, and the H100 that the training rate was measured on (Cloud TPU v5p page,
# NVIDIA's data sheet).
CHIPS_PER_HOST, VCPU_PER_HOST, GB_PER_HOST, GBIT_S_PER_HOST = 4, 208, 448, 200
CHIP_TFLOPS, H100_TFLOPS, HBM_GB = 459, 989, 95
# A training step of `db_mel_pm` on one H100, features included, float32: measured on
# 2026-11-27 by a profiling script that is not in the repository (features alone 6.3 ms, the network
# from features 17.6 ms). A new measurement changes the next line alone.
H100_STEP_PAIRS, H100_STEP_SECONDS = 1024, 23.8e-3
SAMPLE_BYTES, SHARD_MB = 2, 500


class Assumed(NamedTuple):
    """What is chosen or guessed.

    Attributes:
      hours: of mono audio at the default rate.
      chips: of v5p.
      batch_pairs: of a step.
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
    """What follows; rates are pairs/s of the whole pod."""

    hosts: int
    corpus_tb: float
    shards: int
    pairs: float
    steps: int
    pair_bytes: int
    host_rendering: float
    chips_training: float
    from_network: float
    from_bucket: float
    memory_hours: float
    index_gb: float


def measured_pairs_per_s_per_core() -> float:
    """Exact rendering of coloured pairs of 3 s in tf.data, from speed.json."""
    stored = json.loads(SPEED.read_text(encoding="utf-8"))
    rows = stored["sections"]["host_pairs"]["rows"]
    (rate,) = (x["pairs_per_s"] for x in rows if x["what"] == "EQST, host rendering in tf.data")
    return rate / stored["machine"]["cores"]


def h100_pairs_per_s() -> float:
    """What the H100 trains, measured; a v5p chip's rate is this by a guess."""
    return H100_STEP_PAIRS / H100_STEP_SECONDS


def plan(assumed: Assumed) -> Plan:
    """The arithmetic.

    Raises:
      ValueError: the chips are no whole hosts.
    """
    if assumed.chips < CHIPS_PER_HOST or assumed.chips % CHIPS_PER_HOST:
        raise ValueError(f"--chips={assumed.chips}: give a multiple of {CHIPS_PER_HOST}, a host's")
    data = Data()
    seconds, rate = data.segment_seconds[0], data.sample_rate
    hosts = assumed.chips // CHIPS_PER_HOST
    hour_bytes = 3600 * rate * SAMPLE_BYTES
    pairs = assumed.hours * 3600 / (2 * seconds)
    # A segment is read with what the filter's memory needs before it.
    pair_bytes = round(2 * (seconds + data.context_seconds) * rate) * SAMPLE_BYTES
    return Plan(
        hosts=hosts,
        corpus_tb=assumed.hours * hour_bytes / 1e12,
        shards=math.ceil(assumed.hours * hour_bytes / (SHARD_MB * 1e6)),
        pairs=pairs,
        steps=math.ceil(pairs / assumed.batch_pairs),
        pair_bytes=pair_bytes,
        host_rendering=(
            hosts * VCPU_PER_HOST * assumed.core_share * measured_pairs_per_s_per_core()
        ),
        chips_training=assumed.chips * h100_pairs_per_s() * CHIP_TFLOPS / H100_TFLOPS,
        from_network=hosts * GBIT_S_PER_HOST * 1e9 / 8 / pair_bytes,
        from_bucket=assumed.bucket_gbit_s * 1e9 / 8 / pair_bytes,
        memory_hours=hosts * GB_PER_HOST * 1e9 * assumed.memory_share / hour_bytes,
        index_gb=assumed.hours * 36_000 * 4 / 1e9,  # float32 of every 100 ms
    )


def tables(assumed: Assumed, dollars: float) -> Iterator[str]:
    """Markdown."""
    made = plan(assumed)
    core = measured_pairs_per_s_per_core()
    yield "| assumed or measured | |"
    yield "|---|---|"
    yield f"| audio | {assumed.hours:,.0f} hours, mono, 44.1 kHz, 16 bit |"
    yield f"| chips, hosts | {assumed.chips} of v5p, {made.hosts} of {VCPU_PER_HOST} vCPU |"
    yield f"| batch | {assumed.batch_pairs:,} pairs of 3 s |"
    yield f"| a core renders (speed.json, host_pairs) | {core:.0f} pairs/s |"
    yield f"| share of the vCPU that do so (guess) | {assumed.core_share:.0%} |"
    yield (
        f"| a step of `db_mel_pm`, {H100_STEP_PAIRS:,} pairs, float32 (measured on one H100) | "
        f"{H100_STEP_SECONDS * 1e3:.1f} ms, {h100_pairs_per_s():,.0f} pairs/s |"
    )
    share = CHIP_TFLOPS / H100_TFLOPS
    yield f"| a chip against it, by bf16 peak (guess for v5p) | {share:.2f} |"
    yield f"| the bucket gives (your quota) | {assumed.bucket_gbit_s:,.0f} Gb/s |"
    yield ""
    yield "| what follows | |"
    yield "|---|---|"
    yield f"| size | {made.corpus_tb:.1f} TB in {made.shards:,} shards of {SHARD_MB} MB |"
    yield f"| once through it | {made.pairs / 1e6:,.0f} million pairs, {made.steps:,} steps |"
    yield f"| a pair, read with its context | {made.pair_bytes / 1e3:.0f} kB |"
    yield (
        f"| in all HBM ({assumed.chips * HBM_GB / 1e3:.1f} TB), "
        f"in {assumed.memory_share:.0%} of the hosts' memory | "
        f"{assumed.chips * HBM_GB * 1e9 / (3600 * 44_100 * 2):,.0f} hours, "
        f"{made.memory_hours:,.0f} hours |"
    )
    yield f"| loudness of every 100 ms, on each host | {made.index_gb:,.0f} of {GB_PER_HOST} GB |"
    yield ""
    cost = "" if dollars <= 0 else " | $"
    yield f"| if this is the limit | pairs/s | pairs/s a host | Gb/s | hours | chip-hours{cost} |"
    yield "|---|---|---|---|---|---|" + ("" if dollars <= 0 else "---|")
    limits = {
        "the bucket": made.from_bucket,
        "the hosts' network": made.from_network,
        "the chips, training (guess for v5p)": made.chips_training,
        "the hosts, rendering exactly (guess)": made.host_rendering,
    }
    for name, rate in sorted(limits.items(), key=lambda limit: limit[1]):
        hours = made.pairs / rate / 3600
        bits = rate * made.pair_bytes * 8 / 1e9
        price = "" if dollars <= 0 else f" | {hours * assumed.chips * dollars:,.0f}"
        yield (
            f"| {name} | {rate:,.0f} | {rate / made.hosts:,.0f} | {bits:,.0f} | {hours:.2f} | "
            f"{hours * assumed.chips:,.0f}{price} |"
        )
    yield ""
    room = made.host_rendering / made.chips_training
    yield (
        f"Host rendering makes {made.host_rendering / assumed.chips:,.0f} pairs/s for each chip "
        f"and a chip takes {made.chips_training / assumed.chips:,.0f}: it "
        f"{'keeps' if room >= 1 else 'does not keep'} up, and the two are level where a chip "
        f"trains {room:.2f} times as fast as is assumed, or where rendering has "
        f"{assumed.core_share / room:.0%} of the vCPU. "
        f"The bucket keeps up from {made.chips_training * made.pair_bytes * 8 / 1e9:,.0f} Gb/s on."
    )


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_float("hours", 1e6, "Of audio.", lower_bound=1.0)
    flags.DEFINE_integer("chips", 64, "Of v5p.", lower_bound=1)
    flags.DEFINE_integer("batch", 4096, "Pairs of a step.", lower_bound=1)
    flags.DEFINE_float("core_share", 0.75, "Of the vCPU that make pairs.", 0.01, 1.0)
    flags.DEFINE_float("bucket_gbit_s", 200.0, "What the bucket gives.", lower_bound=0.1)
    flags.DEFINE_float("memory_share", 0.6, "Of the hosts' memory for audio.", 0.01, 1.0)
    flags.DEFINE_float("dollars", 0.0, "Of a chip-hour, for a column; 0: none.", lower_bound=0.0)


def main() -> None:
    """The command."""
    given = flags.FLAGS
    assumed = Assumed(
        given.hours,
        given.chips,
        given.batch,
        given.core_share,
        given.bucket_gbit_s,
        given.memory_share,
    )
    print("\n".join(tables(assumed, given.dollars)))


if __name__ == "__main__":
    command.start("launch/plan.py", define_flags, main)
