"""Devices and processes: one mesh with three axes, what is split over it, how host data get there.

The examples of a batch are split over the axes `data` and `fsdp`. Along `data` everything else is a
copy; along `fsdp` (one device wide, unless asked for) the large leaves of parameters and optimiser
state are split as well, and gathered where a step needs them: our networks are a few MB and need
none of it, larger ones may. Along `replica` lie members of a sweep that are trained as one program:
they have a state each, and share the example numbers and the corpus. The corpus is a copy on every
device, or split as a batch is (`from_parts`, `read_parts`). The names of axes stand in this module
and nowhere else.

Where there are several processes (`eqst.processes`), all of them call what is here, in one order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

REPLICA_AXIS, DATA_AXIS, FSDP_AXIS = "replica", "data", "fsdp"

# Where an axis of members lies that `jax.vmap` adds (its `spmd_axis_name`).
MEMBERS = REPLICA_AXIS

# Auto lets the compiler place what lies between our inputs and outputs. Under Explicit a placement
# is part of every array's type: the convolutions and `vmap` work (with the mesh set globally), but
# reading segments of a resident corpus with a sharded index, and folding [B] into [B / 2, 2], are
# refused until each line names an out_sharding: placement in modules that should not know of it.
AXIS_TYPE = AxisType.Auto

ROWS = (DATA_AXIS, FSDP_AXIS)
SPLIT = PartitionSpec(ROWS)
COPIED = PartitionSpec()

# Smaller leaves (biases, norms) stay whole: to gather them costs more than they weigh.
LEAST_SPLIT = 1024


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where each part of training lives, of one run or of several stacked along a first axis.

    Attributes:
      batch: of arrays of any rank whose first axis counts examples.
      copied: of what is the same everywhere: metrics, a corpus that is not split.
      own: of what every member has of its own and devices of a member share: its normalisation.
      own_batch: of examples that every member has of its own, [members, examples, ..] if stacked.
      state: from a tree of parameters or optimiser state (arrays, or their shapes) to its
        shardings, leaf by leaf.
      one: the same for the state of a single member.
    """

    batch: NamedSharding
    copied: NamedSharding
    own: NamedSharding
    own_batch: NamedSharding
    state: Callable[[Any], Any]
    one: Callable[[Any], Any]

    @classmethod
    def of(cls, mesh: Mesh, *, stacked: bool = False) -> Shardings:
        """The rules on one mesh."""
        first = (REPLICA_AXIS,) if stacked else ()

        def place(*axes: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*axes))

        def rule(first: tuple[str, ...], tree: Any) -> Any:
            return jax.tree.map(
                lambda x: place(*first, *_split_axes(x.shape[len(first) :], mesh)), tree
            )

        return cls(
            batch=NamedSharding(mesh, SPLIT),
            copied=NamedSharding(mesh, COPIED),
            own=place(*first),
            own_batch=place(*first, *SPLIT),
            state=functools.partial(rule, first),
            one=functools.partial(rule, ()),
        )


def _split_axes(shape: tuple[int, ...], mesh: Mesh) -> tuple[str | None, ...]:
    """How a leaf of the state is split: its longest axis that divides, over the axis `fsdp`."""
    ways = mesh.shape[FSDP_AXIS]
    fitting = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or math.prod(shape) < LEAST_SPLIT or not fitting:
        return ()
    longest = max(fitting, key=lambda axis: shape[axis])
    return tuple(FSDP_AXIS if axis == longest else None for axis in range(len(shape)))


def share_line(tree: Any) -> str:
    """How much of a state a device holds, where it is split; nothing where all of it is a copy."""
    leaves = jax.tree.leaves(tree)
    whole = sum(leaf.nbytes for leaf in leaves)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if held == whole:
        return ""
    return f"; of {whole / 1e6:.1f} MB of state a device holds {held / 1e6:.1f} MB"


def make_mesh(num_devices: int | None = None, fsdp: int = 1, members: int = 1) -> Mesh:
    """A mesh [replica, data, fsdp] over the first `num_devices` devices of all processes.

    Devices are in the order of their processes, so each process owns one contiguous run of a batch
    and example k of the global batch is the same for any number of hosts and any `fsdp`. The axis
    `fsdp` is the innermost: its devices are neighbours, on one host where they fit. Members lie
    apart as far as they can: the fewer devices share one, the less they have to say to each other.

    Args:
      num_devices: how many devices to use; None takes all.
      fsdp: over how many of them large leaves of the state are split.
      members: how many runs are trained as one program.

    Raises:
      ValueError: more devices asked for than there are, fewer than 1, or (with several processes)
        a number that leaves a process without a device; `fsdp` does not divide them.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"{count} devices asked for, 1 to {len(devices)} are there ({devices[0].platform}): "
            "ask for fewer, or on a CPU start with JAX_NUM_CPU_DEVICES set"
        )
    idle = {device.process_index for device in devices} - {
        device.process_index for device in devices[:count]
    }
    if idle:
        raise ValueError(
            f"{count} of {len(devices)} devices leave {len(idle)} of {jax.process_count()} "
            "processes without one: use all devices, or start fewer processes"
        )
    if fsdp < 1 or count % fsdp:
        raise ValueError(
            f"fsdp={fsdp} does not divide {count} devices: use 1 (nothing is split), or a divisor"
        )
    replicas = math.gcd(count // fsdp, members)
    grid = np.asarray(devices[:count]).reshape(replicas, -1, fsdp)
    return Mesh(grid, (REPLICA_AXIS, DATA_AXIS, FSDP_AXIS), axis_types=(AXIS_TYPE,) * 3)


def groups(mesh: Mesh) -> int:
    """Over how many groups of devices members are spread."""
    return mesh.shape[REPLICA_AXIS]


def ways(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return mesh.shape[DATA_AXIS] * mesh.shape[FSDP_AXIS]


def _own_parts(mesh: Mesh) -> range:
    """Which of the `ways` parts of a batch this process's devices need, whatever their member."""
    owners = [device.process_index for device in mesh.devices.flat]
    parts = {i % ways(mesh) for i, owner in enumerate(owners) if owner == jax.process_index()}
    return range(min(parts), max(parts) + 1)


def process_slice(mesh: Mesh, global_batch_size: int) -> slice:
    """The examples of each global batch that this process has to supply.

    Args:
      mesh: from `make_mesh`.
      global_batch_size: examples in a batch, over all processes.

    Returns:
      A slice of range(global_batch_size). Processes that train one member tile the range; those
      that train different members have the same examples.

    Raises:
      ValueError: the batch does not divide by the devices it is split over.
    """
    if global_batch_size < 1 or global_batch_size % ways(mesh):
        below = global_batch_size // ways(mesh) * ways(mesh)
        choices = " or ".join(str(n) for n in (below, below + ways(mesh)) if n > 0)
        raise ValueError(
            f"a batch of {global_batch_size} does not divide by {ways(mesh)} devices: use {choices}"
        )
    rows, parts = global_batch_size // ways(mesh), _own_parts(mesh)
    return slice(parts.start * rows, parts.stop * rows)


def global_batch(mesh: Mesh, batch_tree: Any) -> Any:
    """Joins every process's rows of a batch to global arrays, split over the devices.

    Args:
      mesh: from `make_mesh`.
      batch_tree: tree of numpy arrays [rows, ...], the rows of `process_slice` in that order. All
        leaves have the same number of rows. On a CPU the result may share the arrays' memory, so
        do not write to them afterwards.

    Returns:
      The same tree of jax.Array [global rows, ...].

    Raises:
      ValueError: leaves disagree about the rows, or the batch does not divide by the devices.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(batch_tree)]
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(counts) != 1 or 0 in counts:
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(f"a batch needs the same rows (1 or more) in every array, got {shapes}")
    parts = _own_parts(mesh)
    (rows,) = counts
    if rows % len(parts):
        raise ValueError(
            f"{rows} examples of this process do not divide by its {len(parts)} devices: make the "
            f"batch a multiple of the {ways(mesh)} devices it is split over, or use fewer devices"
        )
    total = rows // len(parts) * ways(mesh)
    sharding = NamedSharding(mesh, SPLIT)

    def join(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_process_local_data(sharding, array, (total, *array.shape[1:]))

    return jax.tree.map(join, batch_tree)


def placed(sharding: NamedSharding, tree: Any) -> Any:
    """A tree of numpy arrays, whole and the same on every process, where a sharding puts it."""

    def place(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    # Within one process device_put is quicker; over several it would send everything round.
    return (
        jax.device_put(tree, sharding)
        if sharding.is_fully_addressable
        else jax.tree.map(place, tree)
    )


def copied(mesh: Mesh, tree: Any) -> Any:
    """A tree of numpy arrays, the same on every process, as a copy on every device."""
    return placed(NamedSharding(mesh, COPIED), tree)


def on_each(mesh: Mesh, function: Callable, *specs: Any) -> Callable:
    """A function that each device calls for its own examples alone, and what it gives is a batch.

    The compiler would split most functions so by itself. But for an FFT it gathers the batch (and
    all members), and every device transforms all of it.

    Args:
      mesh: from `make_mesh`.
      function: of arrays as one device has them, to a tree of arrays [own examples, ..].
      *specs: `SPLIT` or `COPIED` for each argument, or a tree of them.
    """
    if mesh.size == 1:
        return function
    # Of members (a vmapped axis, see `MEMBERS`) the check of varying axes does not know.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)


def own_rows(mesh: Mesh, size: int) -> jax.Array:
    """Within `on_each`: which examples of a batch of this size are the device's own, [rows]."""
    if mesh.size == 1:
        return jnp.arange(size, dtype=jnp.int32)
    rows = size // ways(mesh)
    return jax.lax.axis_index(ROWS) * rows + jnp.arange(rows, dtype=jnp.int32)


def from_parts(mesh: Mesh, make: Callable[[int], np.ndarray]) -> jax.Array:
    """`ways` parts, joined along their first axis: part i lies on device i of those of a batch.

    Args:
      mesh: from `make_mesh`.
      make: number -> part, all of one shape; a process asks for those of its own devices, once.
    """
    make = functools.cache(make)
    rows, *rest = make(_own_parts(mesh).start).shape
    sharding = NamedSharding(mesh, SPLIT)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return make((index[0].start or 0) // rows)

    return jax.make_array_from_callback((rows * ways(mesh), *rest), sharding, part)


def read_parts(
    read: Callable[[Any, jax.Array], jax.Array],
    part: jax.Array | np.ndarray,
    part_B: jax.Array,
    place_B: jax.Array,
) -> jax.Array:
    """Within `on_each`: reads a table that is split over the devices, wherever in it a row lies.

    Every device is told all places, reads those in its own part, and has zeros for the others. The
    sum over devices, of which each takes its own examples, is of bits and 0: it is exact, and the
    same for any number of devices. Sent are the whole batch's rows, by every device.

    Args:
      read: (a device's part, place) -> [..], of 16 bits; out of range it may give anything.
      part: the device's own, of what `from_parts` made.
      part_B: [B] the part in which each of the device's examples lies.
      place_B: [B] where in that part.

    Returns:
      [B, ..] for these examples.
    """
    all_parts_B, all_places_B = (jax.lax.all_gather(x, ROWS, tiled=True) for x in (part_B, place_B))
    mine_B = all_parts_B == jax.lax.axis_index(ROWS)
    rows = jax.vmap(lambda place, mine: jnp.where(mine, read(part, place), 0))(all_places_B, mine_B)
    shape = rows.shape[1:]
    packed_BW = jax.vmap(_packed)(rows)
    own_BW = jax.lax.psum_scatter(packed_BW, ROWS, scatter_dimension=0, tiled=True)
    own = jax.vmap(lambda packed_W: _unpacked(packed_W, shape, rows.dtype))(own_BW)
    # With members the sum comes in another order of axes, in which XLA's CPU has no FFT (0.10).
    return with_layout_constraint(own, Layout(tuple(range(own.ndim))))


def _packed(row: jax.Array) -> jax.Array:
    """Numbers of 16 bits, two in an int32: collectives add no shorter integers."""
    flat_N = jax.lax.bitcast_convert_type(row, jnp.int16).reshape(-1)
    low_W, high_W = jnp.pad(flat_N, (0, flat_N.size % 2)).astype(jnp.int32).reshape(2, -1)
    return (high_W << 16) | (low_W & 0xFFFF)


def _unpacked(packed_W: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The numbers back: of such a shape and kind."""
    both_2W = jnp.stack([(packed_W << 16) >> 16, packed_W >> 16]).astype(jnp.int16)
    row = both_2W.reshape(-1)[: math.prod(shape)].reshape(shape)
    return jax.lax.bitcast_convert_type(row, dtype)


def flags(mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """What a process hands to a jitted step to say False or True; `jnp.any` of it is for all."""
    every = NamedSharding(mesh, PartitionSpec((REPLICA_AXIS, DATA_AXIS, FSDP_AXIS)))
    mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)

    def flag(value: bool) -> jax.Array:
        given = np.full(mine, value)
        return jax.make_array_from_process_local_data(every, given, (mesh.size,))

    return flag(False), flag(True)
