"""Devices and processes: one mesh with two axes, what is split over it, how host data get there.

The examples of a batch are split over all devices. Along the axis `data` everything else is a copy;
along the axis `fsdp` (one device wide, unless asked for) the large leaves of parameters and
optimiser state are split as well, and gathered where a step needs them: our networks are a few MB
and need none of it, larger ones may. The names of axes stand in this module and nowhere else.

Where there are several processes (`eqst.processes`), all of them call what is here, in one order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS, FSDP_AXIS = "data", "fsdp"

# Auto lets the compiler place what lies between our inputs and outputs. Under Explicit a placement
# is part of every array's type: the convolutions and `vmap` work (with the mesh set globally), but
# reading segments of a resident corpus with a sharded index, and folding [B] into [B / 2, 2], are
# refused until each line names an out_sharding: placement in modules that should not know of it.
AXIS_TYPE = AxisType.Auto

SPLIT = PartitionSpec((DATA_AXIS, FSDP_AXIS))
COPIED = PartitionSpec()

# Smaller leaves (biases, norms) stay whole: to gather them costs more than they weigh.
LEAST_SPLIT = 1024


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where each part of training lives.

    Attributes:
      batch: of arrays of any rank whose first axis counts examples.
      copied: of what is the same everywhere: metrics, the normalisation, a resident corpus.
      state: from a tree of parameters or optimiser state (arrays, or their shapes) to its
        shardings, leaf by leaf.
    """

    batch: NamedSharding
    copied: NamedSharding
    state: Callable[[Any], Any]

    @classmethod
    def of(cls, mesh: Mesh) -> Shardings:
        """The rules on one mesh."""

        def state(tree: Any) -> Any:
            return jax.tree.map(lambda x: NamedSharding(mesh, _state_spec(x.shape, mesh)), tree)

        return cls(NamedSharding(mesh, SPLIT), NamedSharding(mesh, COPIED), state)


def _state_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a leaf of the state is split: its longest axis that divides, over the axis `fsdp`."""
    ways = mesh.shape[FSDP_AXIS]
    fitting = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or math.prod(shape) < LEAST_SPLIT or not fitting:
        return COPIED
    longest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*(FSDP_AXIS if axis == longest else None for axis in range(len(shape))))


def share_line(tree: Any) -> str:
    """How much of a state a device holds, where it is split; nothing where all of it is a copy."""
    leaves = jax.tree.leaves(tree)
    whole = sum(leaf.nbytes for leaf in leaves)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if held == whole:
        return ""
    return f"; of {whole / 1e6:.1f} MB of state a device holds {held / 1e6:.1f} MB"


def make_mesh(num_devices: int | None = None, fsdp: int = 1) -> Mesh:
    """A mesh [data, fsdp] over the first `num_devices` devices of all processes.

    Devices are in the order of their processes, so each process owns one contiguous run of a batch
    and example k of the global batch is the same for any number of hosts and any `fsdp`. The axis
    `fsdp` is the inner one: its devices are neighbours, on one host where they fit.

    Args:
      num_devices: how many devices to use; None takes all.
      fsdp: over how many of them large leaves of the state are split.

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
    grid = np.asarray(devices[:count]).reshape(-1, fsdp)
    return Mesh(grid, (DATA_AXIS, FSDP_AXIS), axis_types=(AXIS_TYPE, AXIS_TYPE))


def process_slice(mesh: Mesh, global_batch_size: int) -> slice:
    """The examples of each global batch that this process has to supply.

    Args:
      mesh: from `make_mesh`.
      global_batch_size: examples in a batch, over all processes.

    Returns:
      A slice of range(global_batch_size): contiguous, and the processes' slices tile the range.

    Raises:
      ValueError: the batch does not divide by the devices of the mesh.
    """
    _check_divides(global_batch_size, mesh)
    owners = [device.process_index for device in mesh.devices.flat]
    per_device = global_batch_size // len(owners)
    first = owners.index(jax.process_index())
    return slice(first * per_device, (first + owners.count(jax.process_index())) * per_device)


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
    owners = [device.process_index for device in mesh.devices.flat]
    mine = owners.count(jax.process_index())
    (rows,) = counts
    if rows % mine:
        raise ValueError(
            f"{rows} examples of this process do not divide by its {mine} devices: make the batch "
            f"a multiple of the {len(owners)} devices of the mesh, or use fewer devices"
        )
    total = rows // mine * len(owners)
    sharding = NamedSharding(mesh, SPLIT)

    def join(leaf: Any) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_process_local_data(sharding, array, (total, *array.shape[1:]))

    return jax.tree.map(join, batch_tree)


def copied(mesh: Mesh, tree: Any) -> Any:
    """A tree of numpy arrays, the same on every process, as a copy on every device."""
    sharding = NamedSharding(mesh, COPIED)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # device_put would send everything round to see that it is the same.
    def copy(leaf: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))

    return jax.tree.map(copy, tree)


def flags(mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """What a process hands to a jitted step to say False or True; `jnp.any` of it is for all."""
    mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    no, yes = (global_batch(mesh, np.full(mine, value)) for value in (False, True))
    return no, yes


def _check_divides(global_batch_size: int, mesh: Mesh) -> None:
    if global_batch_size < 1 or global_batch_size % mesh.size:
        below = global_batch_size // mesh.size * mesh.size
        choices = " or ".join(str(n) for n in (below, below + mesh.size) if n > 0)
        raise ValueError(
            f"a batch of {global_batch_size} does not divide by {mesh.size} devices: use {choices}"
        )
