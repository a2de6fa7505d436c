"""What a step of training costs: compiled FLOP and memory, share of the peak, device-hours.

The compiler's own counts, of one device's program: they are what was compiled, recomputation and
all, not a formula for the network.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from eqst.record import clock

# Dense bf16 FLOP/s of a chip, by the start of JAX's name for it; from the makers' data sheets. Our
# float32 work cannot reach it: the share says how much of the chip is left, whatever the format.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p; after the lite one, whose name begins alike
    "TPU v6 lite": 918e12,
}


class StepCost(NamedTuple):
    """Of one step on one device; None where the backend does not say."""

    flops: float | None
    held_bytes: int | None  # arguments: state, corpus, batch
    working_bytes: int | None  # on top of them while it runs


class Spent(NamedTuple):
    """What a run has taken so far, over all its interruptions; what was lost in one is not in it.

    Attributes:
      seconds: from the start, before stores are opened and statistics measured.
      device_seconds: the same times the devices that it ran on.
      waited: seconds of those in which the next batch was not there.
      steps: done in them.
      aside: seconds of those that were no steps: what comes before the first, compilation,
        evaluation, checkpoints.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    aside: float = 0.0

    def plus(
        self, seconds: float, devices: float, waited: float, steps: int, aside: float
    ) -> Spent:
        """After one more step, or several; members share the devices."""
        return Spent(
            self.seconds + seconds,
            self.device_seconds + seconds * devices,
            self.waited + waited,
            self.steps + steps,
            self.aside + aside,
        )


def of_step(compiled: jax.stages.Compiled, steps: int = 1) -> StepCost:
    """What the compiler says of a step.

    Args:
      compiled: the program of a step, or of a loop over such.
      steps: in one turn of the loop, of which FLOP are counted once, however often it is taken.
    """
    counts, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops = counts["flops"] / steps if counts and "flops" in counts else None
    if memory is None:
        return StepCost(flops, None, None)
    # What is donated is in the arguments and in the outputs, once in memory.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return StepCost(flops, memory.argument_size_in_bytes, memory.temp_size_in_bytes + outputs)


def step_line(cost: StepCost, compile_seconds: float) -> str:
    """What is said before the first step."""
    parts = []
    if cost.flops is not None:
        parts.append(f"{cost.flops / 1e9:,.1f} GFLOP")
    if cost.held_bytes is not None and cost.working_bytes is not None:
        parts.append(f"{cost.held_bytes / 1e6:,.0f} MB held")
        parts.append(f"{cost.working_bytes / 1e6:,.0f} MB more while it runs")
    return f"a step, on a device: {', '.join(parts)}; compiled in {compile_seconds:.0f} s"


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s the device could do at best; None where it is not known (a CPU)."""
    kind = device.device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)


def summary(spent: Spent, cost: StepCost, batch_size: int, devices: list[jax.Device]) -> dict:
    """What a finished run leaves beside its record: JSON with names that carry units.

    Pairs and FLOP a second are those of steps alone; FLOP of the last segment length compiled.
    """
    step_seconds = spent.seconds - spent.aside
    per_s = spent.steps / step_seconds
    flops = None if cost.flops is None else cost.flops * per_s
    peak = peak_flops(devices[0])
    return {
        "steps": spent.steps,
        "seconds": spent.seconds,
        "step_seconds": step_seconds,
        "device_hours": spent.device_seconds / 3600,
        "devices": len(devices),
        "device": devices[0].device_kind,
        "pairs_per_s": per_s * batch_size,
        "input_wait": spent.waited / step_seconds,
        "step_gflop_per_device": None if cost.flops is None else cost.flops / 1e9,
        "gflops_per_device": None if flops is None else flops / 1e9,
        "share_of_peak": None if flops is None or peak is None else flops / peak,
    }


def summary_line(facts: dict[str, Any]) -> str:
    """The same in a line."""
    line = (
        f"{facts['steps']:,} steps in {clock(facts['step_seconds'])} of "
        f"{clock(facts['seconds'])}: {facts['device_hours']:.2f} device-hours "
        f"({facts['devices']} x {facts['device']}), {facts['pairs_per_s']:,.0f} pairs/s, input "
        f"wait {facts['input_wait']:.0%}"
    )
    if facts["gflops_per_device"] is not None:
        line += f", {facts['gflops_per_device']:,.1f} GFLOP/s a device"
    if facts["share_of_peak"] is not None:
        line += f" ({facts['share_of_peak']:.1%} of its peak in bf16)"
    return line
