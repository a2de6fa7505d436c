"""What a run says of its own cost: counts of known programs, and the times of real runs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import POOLED, TINY, losses, silent

from eqst import cost, train


def test_flops_and_bytes_of_a_known_program() -> None:
    m, n, k = 64, 48, 32
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    found = cost.of_step(jax.jit(lambda a, b: a @ b).lower(a, b).compile())
    assert found.flops == pytest.approx(2 * m * n * k, rel=0.02)
    assert found.held_bytes == 4 * (m * k + k * n)
    assert found.working_bytes is not None and found.working_bytes >= 4 * m * n


def test_what_is_donated_is_counted_once() -> None:
    big = jnp.ones(100_000)
    program = jax.jit(lambda x: x + 1.0, donate_argnums=0).lower(big).compile()
    found = cost.of_step(program)
    assert found.held_bytes == 400_000
    assert found.working_bytes is not None and found.working_bytes < 1000


class Chip:
    """Stands for a device of that name."""

    def __init__(self, kind: str) -> None:
        """A name is all that is asked for."""
        self.device_kind = kind


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("cpu", None),
    ],
)
def test_the_peak_is_of_the_right_chip(kind: str, tera: float | None) -> None:
    chip: Any = Chip(kind)
    assert cost.peak_flops(chip) == (None if tera is None else tera * 1e12)


def test_the_summary_is_arithmetic_of_what_was_spent() -> None:
    chips: list[Any] = [Chip("TPU v4")] * 4
    spent = cost.Spent(seconds=100.0, device_seconds=400.0, waited=2.5, steps=50, aside=50.0)
    facts = cost.summary(spent, cost.StepCost(2.75e12, 1, 1), 64, chips)
    assert facts["device_hours"] == pytest.approx(400 / 3600)
    assert facts["step_seconds"] == 50.0  # what is aside is no step
    assert facts["pairs_per_s"] == pytest.approx(64.0)
    assert facts["input_wait"] == pytest.approx(0.05)
    assert facts["share_of_peak"] == pytest.approx(2.75e12 / 275e12)
    line = cost.summary_line(facts)
    assert "50 steps in 0:50 of 1:40: 0.11 device-hours (4 x TPU v4), 64 pairs/s" in line
    assert "2,750.0 GFLOP/s a device (1.0% of its peak in bf16)" in line
    unknown = cost.summary(spent, cost.StepCost(None, None, None), 64, chips)
    assert unknown["share_of_peak"] is None and "FLOP" not in cost.summary_line(unknown)


@pytest.mark.long
def test_a_run_says_what_it_costs_and_leaves_its_profile(configure, tmp_path: Path) -> None:
    lines: list[str] = []
    changes = TINY | POOLED | {"data.cache_dir": str(tmp_path / "cache"), "train.devices": 2}
    profiled = changes | {"train.profile_steps": 2}

    def stop_at_4(line: str) -> None:
        lines.append(line)
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(configure(profiled), tmp_path / "run", stop_at_4)
    assert not (tmp_path / "run" / "summary.json").exists()
    train.train(configure(changes), tmp_path / "run", lines.append)
    assert sum(line.startswith("a step, on a device: ") for line in lines) == 2
    assert any("resumed at step 2 of 6" in line for line in lines)
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The first two steps and their time come from the checkpoint.
    assert facts["steps"] == 6 and facts["devices"] == 2
    assert facts["device_hours"] == pytest.approx(2 * facts["seconds"] / 3600)
    assert facts["pairs_per_s"] == pytest.approx(6 * 8 / facts["step_seconds"])
    # Statistics, compilation and checkpoints are what takes the time here.
    assert 0.0 < facts["step_seconds"] < 0.5 * facts["seconds"]
    assert 0.0 <= facts["input_wait"] < 1.0 and facts["step_gflop_per_device"] > 0
    assert lines[-2].startswith("6 steps in ")
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 10_000
    # Neither profiling nor stopping is seen in what was learnt.
    train.train(configure(changes), tmp_path / "whole", silent)
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(tmp_path / "whole"))


@pytest.mark.long
def test_a_run_that_ends_before_its_profile_leaves_what_there_is_and_says_so(
    configure, tmp_path: Path
) -> None:
    changes = TINY | POOLED | {"data.cache_dir": str(tmp_path / "cache"), "train.devices": 1}
    lines: list[str] = []
    short = changes | {"train.steps": 3, "train.profile_steps": 20}
    train.train(configure(short), tmp_path / "run", lines.append)
    assert any(line.startswith("profile of 2 steps: ") for line in lines)
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
    train.train(configure(short | {"train.steps": 1}), tmp_path / "one", lines.append)
    assert "no profile: this run had no step left once all was compiled" in lines
    assert not (tmp_path / "one" / "profile").exists()
