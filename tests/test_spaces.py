"""eqst.sweeps.spaces: what a sweep() is made of, and the example that uses all of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eqst.sweeps import members, spaces

RATE, DECAY = "train.learning_rate", "train.weight_decay"


def values(levels: list[spaces.Level], key: str) -> list:
    return [changes[key] for _, changes in levels]


def test_a_grid_has_every_combination_once() -> None:
    levels = spaces.grid({"a.x": (1, 2), "b.y": ("u", "v", "w")})
    wanted = [{"a.x": x, "b.y": y} for x in (1, 2) for y in "uvw"]
    assert [changes for _, changes in levels] == wanted
    assert levels[1][0] == "x=1, y=v" and len({name for name, _ in levels}) == 6


def test_keys_of_one_last_part_are_named_whole() -> None:
    ((name, _),) = spaces.grid({"loss.gain": (1,), "eq.gain": (2,), "model.hidden": (3,)})
    assert name == "loss.gain=1, eq.gain=2, hidden=3"


def test_a_zip_takes_values_side_by_side() -> None:
    levels = spaces.zipped({"a.x": (1, 2), "b.y": (3, 4)})
    assert [changes for _, changes in levels] == [{"a.x": 1, "b.y": 3}, {"a.x": 2, "b.y": 4}]
    with pytest.raises(ValueError, match="a.x has 2, b.y has 1 values"):
        spaces.zipped({"a.x": (1, 2), "b.y": (3,)})


def test_a_draw_depends_on_seed_number_and_key_alone() -> None:
    def draws(count: int, seed: int = 0, **more: spaces.Distribution) -> list[spaces.Level]:
        return spaces.random({RATE: spaces.log_uniform(1e-4, 1e-2)} | more, count=count, seed=seed)

    many = draws(50)
    assert draws(7) == many[:7]
    assert values(draws(7, other=spaces.uniform(0, 1)), RATE) == values(many[:7], RATE)
    same = [x == y for x, y in zip(draws(50, seed=1), many, strict=True)]
    assert sum(same) < 3  # by chance, of four digits
    both = spaces.random({RATE: spaces.uniform(0, 1), DECAY: spaces.uniform(0, 1)}, count=400)
    correlation = np.corrcoef(values(both, RATE), values(both, DECAY))[0, 1]
    assert abs(correlation) < 0.15  # three deviations of 400 independent pairs
    assert len({name for name, _ in many}) == 50


def test_draws_are_distributed_as_they_say() -> None:
    kinds = {
        "a": spaces.uniform(-3.0, 5.0),
        "b": spaces.log_uniform(1e-4, 1e-1),
        "c": spaces.choice(("x", "y", "z")),
    }
    levels = spaces.random(kinds, count=2000, seed=3)
    flat, octaves = np.array(values(levels, "a")), np.log10(values(levels, "b"))
    for found, low, high in ((flat, -3.0, 5.0), (octaves, -4.0, -1.0)):
        assert low <= found.min() and found.max() <= high
        share_10, _ = np.histogram(found, bins=10, range=(low, high))
        assert np.all(np.abs(share_10 - 200) < 5 * np.sqrt(200 * 0.9))
    counts = [values(levels, "c").count(x) for x in "xyz"]
    assert np.all(np.abs(np.array(counts) - 2000 / 3) < 5 * np.sqrt(2000 * 2 / 9))
    # The name says the value itself.
    name, changes = levels[5]
    assert name == f"5: a={changes['a']}, b={changes['b']}, c={changes['c']}"
    assert float(f"{changes['b']:.3e}") == changes["b"]


def test_the_ends_of_distributions() -> None:
    below_one = np.nextafter(1.0, 0.0)
    assert spaces.uniform(0.0, 2.0)(0.0) == 0.0 and spaces.uniform(0.0, 2.0)(below_one) == 2.0
    assert spaces.choice([1, 2])(0.0) == 1 and spaces.choice([1, 2])(below_one) == 2
    for make in (
        lambda: spaces.uniform(2, 1),
        lambda: spaces.log_uniform(0, 1),
        lambda: spaces.log_uniform(2, 1),
        lambda: spaces.choice([]),
        lambda: spaces.random({}, count=0),
    ):
        with pytest.raises(ValueError, match="^sweep: "):
            make()


def test_spaces_are_crossed_and_joined() -> None:
    sizes = spaces.named({"small": {"model.hidden": 8}, "large": {"model.hidden": 16}})
    rates = spaces.grid({RATE: (1e-3, 3e-3)})
    both = spaces.crossed(sizes, rates)
    assert [name for name, _ in both] == [
        f"{size}, learning_rate={rate}" for size in ("small", "large") for rate in (0.001, 0.003)
    ]
    assert both[3][1] == {"model.hidden": 16, RATE: 3e-3}
    with pytest.raises(ValueError, match="both change train.learning_rate"):
        spaces.crossed(rates, rates)
    yielded = list(spaces.runs("f", sizes + rates, seeds=(4, 5)))
    assert [x[:3] for x in yielded] == [
        ("f", name, seed) for seed in (4, 5) for name, _ in sizes + rates
    ]
    with pytest.raises(ValueError, match="two levels named 'large'"):
        list(spaces.runs("f", sizes + sizes))


def test_the_example_expands_and_shares_programs(repo: Path) -> None:
    path = repo / "configs" / "search.py"
    namespace: dict = {}
    exec(path.read_text(), namespace)
    every = members.expand(str(path), namespace["get_config"]())
    names = [member.name for member in every]
    assert len(set(names)) == len(names)
    factors = {place.factor for member in every for place in member.places}
    assert factors == {"network", "batch", "optimiser", "data"}
    drawn = [x for x in every if x.places[0].factor == "optimiser" and x.config.seed == 0]
    assert len(drawn) == 12  # the base is that of the grid
    unit = next(x for x in members.units(drawn, 12).values())
    assert unit == drawn
    done = subprocess.run(
        [sys.executable, "launch/sweep.py", f"--config={path}", "--workdir=none", "--dry_run",
         "--only=^optimiser/.*/0$", "--replicas=12"],
        cwd=repo, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (command,) = (x for x in done.stdout.splitlines() if x.startswith("  "))
    assert command.endswith(",".join(x.name for x in drawn))
    assert not (repo / "none").exists()


def test_a_mistake_in_a_sweep_is_one_line(repo: Path, tmp_path: Path) -> None:
    text = (repo / "configs" / "search.py").read_text()
    path = tmp_path / "search.py"
    path.write_text(text.replace("(5e-4, 1e-3, 2e-3)", "(5e-4, 1e-3)"))
    done = subprocess.run(
        [sys.executable, "launch/sweep.py", f"--config={path}", f"--workdir={tmp_path}/w"],
        cwd=repo, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "w").exists()
    assert done.stderr == (
        "launch/sweep.py: sweep: train.batch_size has 3, train.learning_rate has 2 values: what is "
        "zipped needs as many of each\n"
    )
