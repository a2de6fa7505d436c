"""Device meshes: splitting a batch changes nothing about it."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqst.mesh import Shardings, global_batch, make_mesh, process_slice


def example_batch(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "audio_BT": rng.normal(size=(rows, 5)).astype(np.float32),
        "seed_B": np.arange(rows, dtype=np.uint32),
        "params": (rng.uniform(size=(rows, 4, 3)).astype(np.float32),),
    }


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batch_is_split_in_order_and_whole(count: int) -> None:
    mesh = make_mesh(count)
    batch = example_batch(8)
    assert process_slice(mesh, 8) == slice(0, 8)
    joined = global_batch(mesh, batch)
    assert jax.tree.structure(joined) == jax.tree.structure(batch)
    for array, rows in zip(jax.tree.leaves(joined), jax.tree.leaves(batch), strict=True):
        assert array.sharding == Shardings.of(mesh).batch
        assert array.dtype == rows.dtype
        np.testing.assert_array_equal(np.asarray(array), rows)
        shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
        assert len(shards) == count
        for i, shard in enumerate(shards):
            per_device = 8 // count
            mine = rows[i * per_device : (i + 1) * per_device]
            np.testing.assert_array_equal(np.asarray(shard.data), mine)


def test_sharded_gradient_equals_the_plain_one() -> None:
    mesh = make_mesh()
    rules = Shardings.of(mesh)
    x_BT = example_batch(8)["audio_BT"]
    w_T = np.linspace(-1, 1, 5, dtype=np.float32)

    def loss(w_T: jax.Array, x_BT: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x_BT @ w_T) ** 2)

    step = jax.jit(
        jax.value_and_grad(loss),
        in_shardings=(rules.copied, rules.batch),
        out_shardings=(rules.copied, rules.copied),
    )
    with jax.transfer_guard("disallow"):  # the training loop runs under it
        batch = global_batch(mesh, x_BT)
        value, grad = step(jax.device_put(w_T, rules.copied), batch)
    expected, expected_grad = jax.value_and_grad(loss)(jnp.asarray(w_T), jnp.asarray(x_BT))
    # The sum over 8 examples is taken in another order: a few float32 roundings.
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert value.sharding.is_fully_replicated and grad.sharding.is_fully_replicated


def test_resident_corpus_is_read_by_a_sharded_index() -> None:
    """What AxisType.Explicit refuses, and why the mesh is Auto."""
    mesh = make_mesh()
    rules = Shardings.of(mesh)
    corpus_RT = np.arange(40, dtype=np.int16).reshape(10, 4)
    index_B = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
    read = jax.jit(lambda corpus, index: corpus[index].reshape(4, 2, 4))
    got = read(jax.device_put(corpus_RT, rules.copied), global_batch(mesh, index_B))
    np.testing.assert_array_equal(np.asarray(got), corpus_RT[index_B].reshape(4, 2, 4))


@pytest.mark.parametrize("rows, way_out", [(6, "use 4 or 8"), (3, "use 4"), (0, "use 4")])
def test_a_batch_that_does_not_divide_is_refused(rows: int, way_out: str) -> None:
    with pytest.raises(ValueError, match=f"batch of {rows} does not divide by 4 .*{way_out}$"):
        process_slice(make_mesh(4), rows)


def test_bad_batches_are_refused() -> None:
    mesh = make_mesh(4)
    with pytest.raises(ValueError, match="6 examples of this process do not divide by its 4"):
        global_batch(mesh, np.zeros((6, 2), np.float32))
    with pytest.raises(ValueError, match="the same rows"):
        global_batch(mesh, {"a": np.zeros((4, 2)), "b": np.zeros(8)})
    with pytest.raises(ValueError, match="the same rows"):
        global_batch(mesh, {"a": np.float32(1.0)})


@pytest.mark.parametrize("count", [0, 5, -1])
def test_devices_that_are_not_there(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} devices asked for, 1 to 4 are there"):
        make_mesh(count)


TWO_PROCESSES = """
import sys
import jax
import numpy as np
index, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from eqst.checkpoint import Checkpoints
from eqst.mesh import Shardings, global_batch, make_mesh, process_slice
mesh = make_mesh()
rules = Shardings.of(mesh)
whole_BT = np.arange(24, dtype=np.float32).reshape(8, 3)
rows = process_slice(mesh, 8)
assert rows == slice(4 * index, 4 * index + 4), rows
batch = global_batch(mesh, whole_BT[rows])
assert batch.shape == (8, 3)
weights_B = np.arange(8, dtype=np.float32)
weights = global_batch(mesh, weights_B[rows])
total = jax.jit(lambda x, w: w @ x, out_shardings=rules.copied)(batch, weights)
np.testing.assert_array_equal(np.asarray(total), weights_B @ whole_BT)
try:
    make_mesh(2)
except ValueError as error:
    assert "leave 1 of 2 processes without one" in str(error)
else:
    raise AssertionError("a process without a device")
state = {"params": {"w": jax.device_put(np.arange(5.0, dtype=np.float32), rules.copied)}, "step": 3}
with Checkpoints(workdir) as run:
    assert run.restore(state) is None
    for step in (1, 2, 3):
        assert run.save(step, state)
    assert run.save_best(3, state["params"], 0.5)
    assert run.latest_step() == 3
    step, restored = run.restore(state)
    assert step == 3
    np.testing.assert_array_equal(np.asarray(restored["params"]["w"]), np.arange(5.0))
print("fine", flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.long
def test_two_processes_share_batch_and_checkpoints(tmp_path: Any) -> None:
    from eqst import checkpoint

    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [
        subprocess.Popen(
            [*command, str(index), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=150)
            assert process.returncode == 0 and "fine" in out, err[-3000:]
    finally:
        for process in processes:
            process.kill()
    checkpoint.write_card(tmp_path, {"config": {}, "normalisation": {}, "band_table": []})
    loaded = checkpoint.load(tmp_path)  # by one process what two have saved
    np.testing.assert_array_equal(loaded.params["w"], np.arange(5.0, dtype=np.float32))
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "last").iterdir()) == ["2", "3"]


def test_large_leaves_of_the_state_are_split_and_small_ones_whole() -> None:
    mesh = make_mesh(4, fsdp=2)
    rules = Shardings.of(mesh)
    shapes = {
        "tall": (2048, 3),
        "wide": (3, 2048),
        "odd": (2047, 3),  # divides along neither axis
        "small": (16, 16),
        "step": (),
    }
    tree = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    placed = jax.device_put(tree, rules.state(tree))
    held = {name: leaf.addressable_shards[0].data.shape for name, leaf in placed.items()}
    assert held == shapes | {"tall": (1024, 3), "wide": (3, 1024)}
    # A batch is split over all four, whatever the width of fsdp.
    batch = global_batch(mesh, np.arange(8))
    assert [int(shard.data[0]) for shard in batch.addressable_shards] == [0, 2, 4, 6]
    alone = Shardings.of(make_mesh(4))
    assert all(sharding == alone.copied for sharding in jax.tree.leaves(alone.state(tree)))


@pytest.mark.parametrize("fsdp", [0, 3])
def test_an_fsdp_that_does_not_divide_is_refused(fsdp: int) -> None:
    with pytest.raises(ValueError, match=f"fsdp={fsdp} does not divide 4 devices"):
        make_mesh(4, fsdp=fsdp)
