"""eqst.sweeps.spaces: what a sweep() is made of, and the example that uses all of it."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from eqst import config, recipes
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
        "d": spaces.integers(-2, 4),
    }
    levels = spaces.random(kinds, count=2000, seed=3)
    flat, octaves = np.array(values(levels, "a")), np.log10(values(levels, "b"))
    for found, low, high in ((flat, -3.0, 5.0), (octaves, -4.0, -1.0)):
        assert low <= found.min() and found.max() <= high
        share_10, _ = np.histogram(found, bins=10, range=(low, high))
        assert np.all(np.abs(share_10 - 200) < 5 * np.sqrt(200 * 0.9))
    counts = [values(levels, "c").count(x) for x in "xyz"]
    assert np.all(np.abs(np.array(counts) - 2000 / 3) < 5 * np.sqrt(2000 * 2 / 9))
    whole = values(levels, "d")
    assert {type(x) for x in whole} == {int} and set(whole) == set(range(-2, 5))
    counts = [whole.count(x) for x in range(-2, 5)]
    assert np.all(np.abs(np.array(counts) - 2000 / 7) < 5 * np.sqrt(2000 * 6 / 49))
    # The name says the value itself.
    name, changes = levels[5]
    assert name == "5: " + ", ".join(f"{key}={changes[key]}" for key in "abcd")
    assert float(f"{changes['b']:.3e}") == changes["b"]


def test_the_ends_of_distributions() -> None:
    below_one = np.nextafter(1.0, 0.0)
    assert spaces.uniform(0.0, 2.0)(0.0) == 0.0 and spaces.uniform(0.0, 2.0)(below_one) == 2.0
    assert spaces.choice([1, 2])(0.0) == 1 and spaces.choice([1, 2])(below_one) == 2
    big = 2**60  # where a float has no ones any more
    assert spaces.integers(1, big)(0.0) == 1 and spaces.integers(1, big)(below_one) <= big
    assert spaces.integers(1, 2)(0.49) == 1 and spaces.integers(1, 2)(below_one) == 2
    for make in (
        lambda: spaces.uniform(2, 1),
        lambda: spaces.log_uniform(0, 1),
        lambda: spaces.log_uniform(2, 1),
        lambda: spaces.choice([]),
        lambda: spaces.choice(np.array([])),
        lambda: spaces.integers(2, 2),
        lambda: spaces.integers(1.0, 2),
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


def test_numpys_numbers_are_taken_as_pythons(tmp_path: Path) -> None:
    levels = spaces.grid({"model.hidden": np.array([8, 16]), RATE: np.array([1e-3, 2e-3])})
    assert [name for name, _ in levels] == [
        f"hidden={hidden}, learning_rate={rate}" for hidden in (8, 16) for rate in (0.001, 0.002)
    ]
    kinds = {type(x) for _, changes in levels for x in changes.values()}
    kinds |= {type(x) for x in values(spaces.zipped({"a": np.arange(2)}), "a")}
    draws = {"a": spaces.choice(np.arange(3)), "b": lambda share: np.float32(share)}
    kinds |= {type(x) for _, own in spaces.random(draws, count=4) for x in own.values()}
    assert kinds == {int, float}
    # And those that a sweep() yields without a space.
    runs = expanded(
        tmp_path,
        """
        import numpy as np
        seconds, pooled = (np.float64(1.5), np.int64(2)), {"data.segment_seconds": np.array([1.5])}
        yield "f", "a", np.int64(3), {"model.hidden": np.int32(8), "evaluation.seconds": seconds}
        yield from spaces.runs("f", spaces.named({"b": pooled}), seeds=np.arange(1, 2))
        """,
    )
    assert [x.config.seed for x in runs] == [3, 1] and runs[0].config.model.hidden == 8
    assert runs[0].config.evaluation.seconds == (1.5, 2.0)
    assert runs[1].config.data.segment_seconds == (1.5,)


def expanded(tmp_path: Path, body: str) -> list[members.Member]:
    """The runs of a config file with this sweep()."""
    path = tmp_path / "config.py"
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    path.write_text(
        "from eqst import recipes\nfrom eqst.sweeps import spaces\n"
        f"get_config = recipes.pooled\ndef sweep():\n{indented}\n"
    )
    return members.expand(str(path), recipes.pooled())


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ('grid({"train.learning_rate": 1e-3})', "grid: train.learning_rate is 0.001: give a list"),
        ('grid({"model.head": "grid"})', "grid: model.head is 'grid': give a list"),
        ('zipped({"model.head": "grid"})', "zipped: model.head is 'grid': give a list"),
        ('random({"data.warp": [1, 2]}, count=2)', "random: data.warp is [1, 2]: give a distrib"),
        (
            'random({"data.warp": spaces.choice("ab")}, count=2)',
            "choice takes is 'ab': give a list",
        ),
        ('named({"a": {}}), seeds=3', "seeds is 3: give a list"),
        ('named({"a": {}}), seeds="12"', "seeds is '12': give a list"),
        ('named({"a": {}}), seeds=["x"]', "f/a has the seed 'x': give a whole number"),
        ('named({"a": {}}), seeds=[0.5]', "f/a has the seed 0.5: give a whole number"),
        ("named({1: {}})", "('f', 1, 0, {}) was yielded: give (factor, level, seed, changes)"),
        ("[]", "sweep() yields no run"),
        ('grid({"model.hidden": []})', "sweep() yields no run"),
        ("grid(5)", "sweep() fails (AttributeError in line 5: "),
        ("random({}, count='5')", "sweep() fails (TypeError in line 5: "),
    ],
)
def test_a_mistake_in_a_space_is_named(tmp_path: Path, space: str, said: str) -> None:
    call = space if space.startswith("[") else f"spaces.{space}"
    with pytest.raises((config.ConfigError, spaces.SpaceError), match=re.escape(said)) as found:
        expanded(tmp_path, f'yield from spaces.runs("f", {call})')
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "body", ["yield 'f', 'a', {}", "yield 'f', 'a', 0, ['model.hidden', 8]", "yield 5", "return 5"]
)
def test_what_is_no_run_is_refused(tmp_path: Path, body: str) -> None:
    with pytest.raises(config.ConfigError, match=r"was yielded: give|sweep\(\) fails \(TypeError"):
        expanded(tmp_path, body)


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(100))
    whole = "a" * members.MOST_CHARACTERS
    levels = [f"{words} a", f"{words} b", whole, f"{whole}a"]
    body = "for level in LEVELS: yield 'f', level, 0, {'model.hidden': 8 + len(LEVELS[level])}"
    numbers = {level: "x" * i for i, level in enumerate(levels)}
    runs = expanded(tmp_path, body.replace("LEVELS", repr(numbers)))
    parts = [run.name.split("/")[1] for run in runs]
    assert len(set(parts)) == 4 and max(map(len, parts)) == members.MOST_CHARACTERS
    assert parts[0].startswith("word0_word1_") and parts[2] == whole
    assert [run.places[0].level for run in runs] == levels  # which tables show
    again = expanded(tmp_path, body.replace("LEVELS", repr(numbers)))
    assert [run.name for run in again] == [run.name for run in runs]
