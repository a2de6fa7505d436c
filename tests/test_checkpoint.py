"""Runs on disk: what was saved comes back, whatever happens to the process or the files."""

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqst import arrays, checkpoint
from eqst.checkpoint import CheckpointError, Checkpoints
from eqst.mesh import Shardings, make_mesh
from eqst.seal import SEAL_NAME

CARD = {
    "config": {"model": {"channels": 20}, "seed": 3},
    "normalisation": {"mean_M": np.array([0.1, 0.2], np.float32), "scale": np.float32(3)},
    "band_table": [{"name": "low", "freq_low_hz": 30.0}],
}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any
    empty: Any


def optimiser() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


@functools.cache
def example_state(seed: int = 0) -> State:
    """A small training state after one real update, copied to all devices."""

    def make(kernel: jax.Array, bias: jax.Array, head: jax.Array) -> State:
        params = {"encoder": {"conv0": {"kernel": kernel, "bias": bias}}, "head": {"kernel": head}}
        updates, opt_state = optimiser().update(params, optimiser().init(params), params)
        params = optax.apply_updates(params, updates)
        return State(jnp.int32(1), params, opt_state, jax.random.key(5), {})

    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(3, 3, 1, 4)).astype(np.float32)
    bias = rng.normal(size=4).astype(jnp.bfloat16)
    head = rng.normal(size=(64, 12)).astype(np.float32)
    return jax.jit(make, out_shardings=Shardings.of(make_mesh()).copied)(kernel, bias, head)


def abstract(state: Any, num_devices: int | None = None) -> Any:
    sharding = Shardings.of(make_mesh(num_devices)).copied
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def assert_same(left: Any, right: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def data_file(step_folder: Path) -> Path:
    """The largest file of arrays; what a process wrote of its own (ocdbt.process_0) is a copy."""
    return max((step_folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip_bytes(path: Path) -> None:
    """Inverts a run of bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 8)
    data[middle] = bytes(255 - byte for byte in data[middle])
    path.write_bytes(data)


def run_python(code: str, *arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# The card


def test_card_round_trip(tmp_path: Path) -> None:
    written = checkpoint.write_card(tmp_path / "run", CARD)
    card = checkpoint.read_card(tmp_path / "run")
    assert card == written
    assert card["format_version"] == 1
    assert card["config"] == CARD["config"]
    assert card["normalisation"] == {
        "mean_M": [float(np.float32(0.1)), float(np.float32(0.2))],
        "scale": 3.0,
    }
    assert card["packages"]["jax"] == jax.__version__
    assert card["commit"]
    assert steps_in(tmp_path / "run") == ["config.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "format_version 2, this eqst reads 1: use a newer eqst"),
        ({"format_version": 0}, "format_version 0, this eqst reads 1: use the eqst that wrote it"),
        ({"format_version": None}, "names no format_version"),
    ],
)
def test_card_of_another_format_is_refused_in_a_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    card = checkpoint.write_card(tmp_path, CARD)
    (tmp_path / "config.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read_card(tmp_path)
    assert "\n" not in str(caught.value)


def test_card_errors_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder .*give the --workdir"):
        checkpoint.read_card(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no run of EQST: give the folder"):
        checkpoint.read_card(tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 1')
    with pytest.raises(CheckpointError, match="is not JSON"):
        checkpoint.read_card(tmp_path)
    with pytest.raises(CheckpointError, match="band_table"):
        checkpoint.write_card(tmp_path, {"config": {}, "normalisation": {}})
    with pytest.raises(CheckpointError, match="cannot be written down"):
        checkpoint.write_card(tmp_path, {**CARD, "band_table": float("nan")})


# Saving and restoring


def test_round_trip_keeps_structure_bits_and_placement(tmp_path: Path) -> None:
    state = example_state()
    with Checkpoints(tmp_path) as run:
        assert run.latest_step() is None
        assert run.restore(abstract(state)) is None
        assert run.save(1, state)
        assert run.latest_step() == 1
        restored = run.restore(abstract(state))
    assert restored is not None
    step, tree = restored
    assert step == 1
    assert_same(tree, state)
    wanted = Shardings.of(make_mesh()).copied
    assert all(leaf.sharding == wanted for leaf in jax.tree.leaves(tree))
    # The optimiser goes on as if nothing had happened.
    update = jax.jit(lambda state: optimiser().update(state.params, state.opt_state, state.params))
    assert_same(update(tree), update(state))


def test_restore_places_on_the_devices_it_is_told(tmp_path: Path) -> None:
    state = example_state()
    with Checkpoints(tmp_path) as run:
        run.save(1, state)
        step_and_tree = run.restore(abstract(state, num_devices=2))
    assert step_and_tree is not None
    assert_same(step_and_tree[1], state)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(step_and_tree[1])} == {2}


def test_numpy_and_python_scalars_are_safe_leaves(tmp_path: Path) -> None:
    """A numpy scalar would make Orbax raise in a worker thread and hang at exit."""
    state = {"params": {"w": np.ones(3, np.float32)}, "step": np.int64(7), "epoch": 2, "lr": 0.5}
    with Checkpoints(tmp_path) as run:
        run.save(0, state)
        restored = run.restore(state)
    assert restored is not None
    assert {name: restored[1][name].item() for name in ("step", "epoch", "lr")} == {
        "step": 7,
        "epoch": 2,
        "lr": 0.5,
    }


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    state = example_state()
    with Checkpoints(tmp_path) as run:
        for step in (5, 10, 15, 20):
            run.save(step, state)
        assert run.latest_step() == 20
    assert steps_in(tmp_path / "checkpoints" / "last") == ["15", "20"]


def test_a_saved_step_is_never_written_over(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as run:
        assert run.save(5, example_state(seed=1))
        assert not run.save(5, example_state(seed=2))
        restored = run.restore(abstract(example_state()))
    assert restored is not None
    assert_same(restored[1], example_state(seed=1))


def test_best_keeps_the_best(tmp_path: Path) -> None:
    trees = [{"w": jnp.full(3, float(i))} for i in range(5)]
    metrics = [2.5, 2.1, 2.3, float("nan"), 2.1]
    with Checkpoints(tmp_path) as run:
        assert run.best_metric() is None
        accepted = [
            run.save_best(i, tree, m)
            for i, (tree, m) in enumerate(zip(trees, metrics, strict=True))
        ]
        assert accepted == [True, True, False, False, False]
        assert run.best_metric() == 2.1
    assert steps_in(tmp_path / "checkpoints" / "best") == ["1"]
    with Checkpoints(tmp_path) as run:  # another process remembers what was best
        assert not run.save_best(7, trees[0], 2.2)
        # After a fallback to an older step, a better one may come with a smaller number.
        assert run.save_best(0, trees[4], 1.9)
    checkpoint.write_card(tmp_path, CARD)
    loaded = checkpoint.load(tmp_path)
    assert loaded.step == 0
    np.testing.assert_array_equal(loaded.params["w"], np.full(3, 4.0, np.float32))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from eqst.checkpoint import Checkpoints\nwith Checkpoints(sys.argv[1]): pass"
    )
    with Checkpoints(tmp_path):
        second = run_python(code, str(tmp_path))
    assert second.returncode != 0
    assert f"is in use by process {os.getpid()} on " in second.stderr.splitlines()[-1]
    assert run_python(code, str(tmp_path)).returncode == 0


# Damage


def two_checkpoints(folder: Path) -> tuple[State, State]:
    older, newer = example_state(seed=1), example_state(seed=2)
    with Checkpoints(folder) as run:
        run.save(10, older)
        run.save(20, newer)
    return older, newer


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path: Path) -> None:
    path.unlink()


def flip_data(step_folder: Path) -> None:
    flip_bytes(data_file(step_folder))


def edit_seal(step_folder: Path) -> None:
    """Still JSON, and wrong: only the seal's own checksum can tell."""
    path = step_folder / SEAL_NAME
    seal = json.loads(path.read_text())
    seal["body"]["leaves"]["params/head/kernel"]["shape"] = [64, 13]
    path.write_text(json.dumps(seal))


DAMAGES = {
    "flipped data": flip_data,
    "truncated data": lambda folder: truncate(data_file(folder)),
    "no data": lambda folder: remove(data_file(folder)),
    "no folder of data": lambda folder: shutil.rmtree(folder / "state" / "d"),
    "no state at all": lambda folder: shutil.rmtree(folder / "state"),
    "no manifest": lambda folder: remove(folder / "state" / "manifest.ocdbt"),
    "flipped seal": lambda folder: flip_bytes(folder / SEAL_NAME),
    "edited seal": edit_seal,
    "truncated seal": lambda folder: truncate(folder / SEAL_NAME),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_falls_back_to_the_one_before(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = two_checkpoints(tmp_path)
    damage(tmp_path / "checkpoints" / "last" / "20")
    checkpoint.write_card(tmp_path, CARD)
    with caplog.at_level(logging.WARNING, logger="eqst"):
        assert checkpoint.load(tmp_path, which="last").step == 10
        caplog.clear()
        with Checkpoints(tmp_path) as run:
            restored = run.restore(abstract(newer))
            assert restored is not None
            assert restored[0] == 10
            assert_same(restored[1], older)
            (message,) = [r.getMessage() for r in caplog.records if r.name == "eqst"]
            assert "step 20" in message and "going on from step 10" in message
            assert "\n" not in message
            # It is not offered again, and the same step can be saved anew.
            assert run.latest_step() == 10
            assert run.save(20, newer)
            again = run.restore(abstract(newer))
    assert again is not None and again[0] == 20
    assert_same(again[1], newer)
    assert steps_in(tmp_path / "checkpoints" / "last") == ["10", "20"]


def test_no_damage_to_any_file_is_ever_loaded(tmp_path: Path) -> None:
    older, newer = two_checkpoints(tmp_path / "whole")
    last = Path("checkpoints") / "last"
    newest = tmp_path / "whole" / last / "20"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for i, file in enumerate(files):
        for damage in (flip_bytes, truncate, remove):
            if damage is not remove and not (newest / file).stat().st_size:
                continue
            copy = tmp_path / f"{i}-{damage.__name__}"
            shutil.copytree(tmp_path / "whole", copy)
            damage(copy / last / "20" / file)
            with Checkpoints(copy) as run:
                restored = run.restore(abstract(newer))
            assert restored is not None
            assert restored[0] == 10, (file, damage)
            assert_same(restored[1], older)


def test_a_damaged_best_makes_room(tmp_path: Path) -> None:
    checkpoint.write_card(tmp_path, CARD)
    with Checkpoints(tmp_path) as run:
        run.save_best(3, {"w": jnp.zeros(9)}, 1.0)
    flip_data(tmp_path / "checkpoints" / "best" / "3")
    with Checkpoints(tmp_path) as run:
        assert run.save_best(3, {"w": jnp.ones(9)}, 2.0)
    np.testing.assert_array_equal(checkpoint.load(tmp_path).params["w"], np.ones(9, np.float32))


LOAD_LAST = "import sys; from eqst import checkpoint; checkpoint.load(sys.argv[1], which='last')"


def test_a_user_sees_one_line_of_damage(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    checkpoint.write_card(tmp_path, CARD)
    flip_data(tmp_path / "checkpoints" / "last" / "20")
    done = run_python(LOAD_LAST, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "step 20 (" in line and line.endswith("going on from step 10")


def test_a_flipped_byte_is_not_loaded_for_analysis(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as run:
        run.save_best(3, {"w": jnp.arange(4096.0)}, 1.0)
    checkpoint.write_card(tmp_path, CARD)
    flip_data(tmp_path / "checkpoints" / "best" / "3")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read") as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_where_no_best_can_be_read_the_last_is_taken(tmp_path: Path, caplog) -> None:
    state = example_state()
    with Checkpoints(tmp_path) as run:
        run.save(0, state)
        checkpoint.write_card(tmp_path, CARD)
        with pytest.raises(
            CheckpointError, match="has no best checkpoint: let it train for longer"
        ):
            checkpoint.load(tmp_path)  # of step 0 there is nothing but random numbers
        run.save(40, state)
        assert checkpoint.load(tmp_path).step == 40
        assert "has no best checkpoint; taking the last one, of step 40" in caplog.text
        run.save_best(30, {"w": jnp.arange(4096.0)}, 1.0)
    assert checkpoint.load(tmp_path).step == 30
    flip_data(tmp_path / "checkpoints" / "best" / "30")
    loaded = checkpoint.load(tmp_path)
    assert_same(loaded.params, jax.tree.map(np.asarray, state.params))
    assert "no checkpoint in" in caplog.text and loaded.step == 40


def test_all_damaged_never_starts_from_scratch(tmp_path: Path) -> None:
    _, newer = two_checkpoints(tmp_path)
    for step in ("10", "20"):
        DAMAGES["flipped seal"](tmp_path / "checkpoints" / "last" / step)
    for _ in range(2):
        with (
            Checkpoints(tmp_path) as run,
            pytest.raises(CheckpointError, match="step 20: .*step 10: .*move the folder away"),
        ):
            run.restore(abstract(newer))


def test_what_comes_out_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files, and yet a loader that hands out something else."""
    older, newer = two_checkpoints(tmp_path)
    orbax = arrays.orbax()
    whole_load = orbax.load

    def wrong_load(path: Any, *arguments: Any, **options: Any) -> Any:
        tree = whole_load(path, *arguments, **options)
        return tree._replace(step=tree.step + 1) if path.name == "20" else tree

    monkeypatch.setattr(orbax, "load", wrong_load)
    with Checkpoints(tmp_path) as run:
        restored = run.restore(abstract(newer))
    assert restored is not None and restored[0] == 10
    assert_same(restored[1], older)


def test_what_a_killed_save_leaves_is_passed_over_and_cleaned(tmp_path: Path) -> None:
    state = example_state()
    last = tmp_path / "checkpoints" / "last"
    with Checkpoints(tmp_path) as run:
        run.save(1, state)
        run.save(2, state)
        (last / "2" / SEAL_NAME).unlink()  # killed between Orbax's commit and the seal
        (last / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # killed while writing
        assert run.latest_step() == 1
        restored = run.restore(abstract(state))
        assert restored is not None and restored[0] == 1
        assert run.save(2, state)
        assert run.save(3, state)
    assert steps_in(last) == ["2", "3"]


SAVE_FOREVER = """
import sys, itertools, numpy as np
from eqst.checkpoint import Checkpoints
rng = np.random.default_rng(0)
with Checkpoints(sys.argv[1]) as run:
    for step in itertools.count(1):
        run.save(step, {"params": {"w": np.full((256, 1024), step, np.float32)}, "step": step})
        run.save_best(step, {"w": np.full(1000, step, np.float32)}, 1.0 / step)
        print(step, flush=True)
"""


def kill_while_saving(folder: Path, *, after_steps: int, then_seconds: float) -> int:
    """Runs a loop that saves, kills it with -9, returns the last step it reported."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        reported = 0
        while reported < after_steps:
            reported = int(process.stdout.readline())
        time.sleep(then_seconds)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    return int(rest[-1]) if rest else reported


def check_survivor(folder: Path, reported: int) -> None:
    like = {"params": {"w": np.empty((256, 1024), np.float32)}, "step": 0}
    with Checkpoints(folder) as run:
        restored = run.restore(like)
        assert restored is not None
        step, state = restored
        assert step >= reported
        assert state["step"] == step
        np.testing.assert_array_equal(state["params"]["w"], np.full((256, 1024), step, np.float32))
        run.save(step + 1, {"params": state["params"], "step": step + 1})
        assert run.latest_step() == step + 1
    checkpoint.write_card(folder, CARD)
    best = checkpoint.load(folder)
    assert best.step >= reported
    np.testing.assert_array_equal(best.params["w"], np.full(1000, best.step, np.float32))


def test_kill_9_while_saving_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    check_survivor(tmp_path, kill_while_saving(tmp_path, after_steps=3, then_seconds=0.05))


@pytest.mark.long
def test_kill_9_at_many_moments(tmp_path: Path) -> None:
    for i, delay in enumerate(np.linspace(0.0, 0.3, 12)):
        folder = tmp_path / str(i)
        check_survivor(folder, kill_while_saving(folder, after_steps=2, then_seconds=delay))


# Mistakes


def test_another_model_is_named_not_called_damage(tmp_path: Path) -> None:
    state = example_state()
    wider = state._replace(params={**state.params, "head": {"kernel": jnp.ones((64, 13))}})
    fewer = state._replace(params={"head": state.params["head"]})
    with Checkpoints(tmp_path) as run:
        run.save(1, state)
        with pytest.raises(CheckpointError, match=r"params/head/kernel is float32\[64, 12\] there"):
            run.restore(abstract(wider))
        with pytest.raises(CheckpointError, match="params/encoder/conv0/bias .* absent here"):
            run.restore(abstract(fewer))
        assert run.restore(abstract(state)) is not None


def test_a_target_without_sharding_is_refused(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones(3)}}
    with Checkpoints(tmp_path) as run:
        run.save(1, state)
        with pytest.raises(ValueError, match="params/w has no sharding"):
            run.restore(jax.eval_shape(lambda: state))


def test_arguments_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        Checkpoints(tmp_path).save(-1, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="choose 'best' or 'last'"):
        checkpoint.load(tmp_path, which="first")


# Loading for analysis


def test_load_needs_only_the_folder(tmp_path: Path) -> None:
    state = example_state()
    with Checkpoints(tmp_path) as run:
        run.save(40, state)
    with pytest.raises(CheckpointError, match="no run of EQST"):
        checkpoint.load(tmp_path)
    card = checkpoint.write_card(tmp_path, CARD)
    loaded = checkpoint.load(tmp_path, which="last")
    assert (loaded.card, loaded.step) == (card, 40)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded.params))
    assert_same(loaded.params, jax.tree.map(np.asarray, state.params))


LOAD_ON_ONE = """
import sys, jax, numpy as np
from eqst import arrays, checkpoint
assert jax.device_count() == 1
loaded = checkpoint.load(sys.argv[1], which="last")
print(loaded.step, loaded.params["head"]["kernel"].sum(dtype=np.float64))
"""


def test_saved_on_four_devices_loads_on_one(tmp_path: Path) -> None:
    state = example_state()
    assert len(state.params["head"]["kernel"].sharding.device_set) == 4
    with Checkpoints(tmp_path) as run:
        run.save(9, state)
    checkpoint.write_card(tmp_path, CARD)
    done = run_python(LOAD_ON_ONE, str(tmp_path), devices=1)
    assert done.returncode == 0, done.stderr[-2000:]
    step, total = done.stdout.split()
    assert int(step) == 9
    kernel = np.asarray(state.params["head"]["kernel"])
    assert float(total) == kernel.sum(dtype=np.float64)


# Runs for analysis


def sweep_run(folder: Path, step: int) -> None:
    """A run of a sweep: one best checkpoint that holds its step, a card and two rows."""
    checkpoint.write_card(folder, CARD)
    with Checkpoints(folder) as run:
        run.save_best(step, {"w": jnp.full(3, float(step))}, 1.0 / step)
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "valid_shape_db": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_loaded_with_its_metrics_and_settings(tmp_path: Path) -> None:
    sweep_run(tmp_path, 5)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\n[1]\n{"step": 3, "loss"')  # a bad disk, and a killed process
    loaded = checkpoint.load(tmp_path)
    assert loaded.step == 5
    assert loaded.metrics == ({"step": 1, "loss": 4.0}, {"step": 2, "valid_shape_db": 3.0})
    settings = checkpoint.config_of(loaded)
    assert settings.seed == 3 and settings.model.channels == 20
    (tmp_path / "metrics.jsonl").unlink()
    assert checkpoint.load(tmp_path).metrics == ()


def test_a_sweep_is_loaded_whole_in_order_and_what_is_no_run_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, name in enumerate(("db/seed_1", "linear/a/b/seed_0", "db/seed_0"), start=1):
        sweep_run(tmp_path / name, step)
    (tmp_path / "pictures").mkdir()
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    checkpoint.write_card(tmp_path / "begun", CARD)
    checkpoint.write_card(tmp_path / "foreign", CARD)
    (tmp_path / "foreign" / "config.json").write_text("{}")
    (tmp_path / "plan.json").write_text("[]")
    (tmp_path / "db" / "again").symlink_to(tmp_path / "db", target_is_directory=True)
    sweep_run(tmp_path / "db/seed_2", 9)
    (tmp_path / "db/seed_2/config.json").unlink()  # its checkpoint has a copy
    with caplog.at_level(logging.WARNING, logger="eqst"):
        runs = checkpoint.load_all(tmp_path)
    assert list(runs) == ["db/seed_0", "db/seed_1", "db/seed_2", "linear/a/b/seed_0"]
    assert [runs[name].step for name in runs] == [3, 1, 9, 2]
    assert [float(run.params["w"][0]) for run in runs.values()] == [3.0, 1.0, 9.0, 2.0]
    left_out = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line for line in left_out)
    for name in ("begun", "foreign", "pictures"):
        assert sum(f"left out {name}" in x or f"/{name}: " in x for x in left_out) == 1, left_out
    assert list(checkpoint.load_all(tmp_path / "db" / "seed_0")) == ["seed_0"]


def test_exported_weights_are_loaded_beside_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep_run(tmp_path / "run", 7)
    checkpoint.export_weights(tmp_path / "run", tmp_path / "small" / "run")
    (tmp_path / "small" / "notes.txt").write_text("not a run")
    with caplog.at_level(logging.WARNING, logger="eqst"):
        runs = checkpoint.load_all(tmp_path)
    assert list(runs) == ["run", "small/run"] and not caplog.records
    assert [run.step for run in runs.values()] == [7, 7]
    assert list(checkpoint.load_all(tmp_path / "small")) == ["run"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        checkpoint.load_all(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no run that can be loaded"):
        checkpoint.load_all(tmp_path)


# Packaged weights


def saved_run(folder: Path) -> dict[str, Any]:
    params = {
        "encoder": {
            "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
        },
        "table": {"index": jnp.arange(4, dtype=jnp.int32)},
    }
    with Checkpoints(folder) as run:
        run.save_best(12, params, 2.0)
    checkpoint.write_card(folder, CARD)
    return params


def test_exported_weights_are_exact(tmp_path: Path) -> None:
    params = saved_run(tmp_path)
    checkpoint.export_weights(tmp_path, tmp_path / "out" / "mine")
    assert steps_in(tmp_path / "out") == ["mine.json", "mine.npz"]
    loaded = checkpoint.load_weights(tmp_path / "out" / "mine")
    assert loaded.step == 12
    assert loaded.card["config"] == CARD["config"]
    assert_same(loaded.params, jax.tree.map(np.asarray, params))
    # Whoever takes a run takes these, and the record goes with them.
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    checkpoint.export_weights(tmp_path, tmp_path / "out" / "mine")
    again = checkpoint.load(tmp_path / "out" / "mine")
    assert_same(again.params, loaded.params)
    assert again.metrics == ({"step": 3, "loss": 1.5},)
    assert not checkpoint.is_exported(tmp_path) and not checkpoint.is_exported(tmp_path / "none")
    with np.load(tmp_path / "out" / "mine.npz") as arrays:
        assert sorted(arrays.files) == ["encoder/kernel", "table/index"]


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path) -> None:
    params = saved_run(tmp_path)
    checkpoint.export_weights(tmp_path, tmp_path / "half", dtype="float16")
    loaded = checkpoint.load_weights(tmp_path / "half")
    kernel = loaded.params["encoder"]["kernel"]
    assert kernel.dtype == np.float32
    # Half precision has 11 significant bits: a relative error of at most 2^-11.
    np.testing.assert_allclose(kernel, params["encoder"]["kernel"], rtol=2.0**-11)
    assert loaded.params["table"]["index"].dtype == np.int32
    with Checkpoints(tmp_path) as run:
        run.save_best(13, {"w": jnp.full(3, 1e6)}, 1.0)
    with pytest.raises(CheckpointError, match="w is not finite in float16"):
        checkpoint.export_weights(tmp_path, tmp_path / "half", dtype="float16")


def test_weights_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    saved_run(tmp_path)
    stem = tmp_path / "mine"
    with pytest.raises(CheckpointError, match="are not there"):
        checkpoint.load_weights(stem)
    checkpoint.export_weights(tmp_path, stem)
    flip_bytes(tmp_path / "mine.npz")
    with pytest.raises(CheckpointError, match="export both again"):
        checkpoint.load_weights(stem)
    with pytest.raises(ValueError, match="choose 'float32' or 'float16'"):
        checkpoint.export_weights(tmp_path, stem, dtype="bfloat16")


LOAD_WEIGHTS = """
import sys
from eqst import checkpoint
checkpoint.load_weights(sys.argv[1])
print(sorted({name.split(".")[0] for name in sys.modules} & {"orbax", "tensorflow", "flax"}))
"""


def test_weights_load_without_orbax(tmp_path: Path) -> None:
    saved_run(tmp_path)
    checkpoint.export_weights(tmp_path, tmp_path / "mine")
    done = run_python(LOAD_WEIGHTS, str(tmp_path / "mine"))
    assert done.stdout == "[]\n", done.stderr[-2000:]


def test_a_relative_workdir_is_taken_from_the_current_folder(tmp_path, monkeypatch):
    """As every README command names it; Orbax itself refuses relative paths."""
    monkeypatch.chdir(tmp_path)
    checkpoint.write_card("run", CARD)
    with Checkpoints("run") as saved:
        saved.save(1, {"params": {"w": np.arange(3.0)}})
        saved.save_best(1, {"w": np.arange(3.0)}, 0.5)
    np.testing.assert_array_equal(checkpoint.load("run").params["w"], np.arange(3.0))
