"""Devices: one mesh with one axis, what is split over it, and how host batches get there.

Training is data-parallel: the examples of a batch are split over the axis `data`, everything else
(a few MB of parameters, optimiser state, metrics) is a copy on every device. The names of axes
stand in this module and nowhere else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"

# Auto lets the compiler place what lies between our inputs and outputs. Under Explicit a placement
# is part of every array's type: the convolutions and `vmap` work (with the mesh set globally), but
# reading segments of a resident corpus with a sharded index, and folding [B] into [B / 2, 2], are
# refused until each line names an out_sharding: placement in modules that should not know of it.
AXIS_TYPE = AxisType.Auto

SPLIT = PartitionSpec(DATA_AXIS)
COPIED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where each part of training lives; each is a NamedSharding, good for a whole subtree.

    `batch` fits arrays of any rank whose first axis counts examples.
    """

    batch: NamedSharding
    params: NamedSharding
    opt_state: NamedSharding
    metrics: NamedSharding

    @classmethod
    def of(cls, mesh: Mesh) -> Shardings:
        """The rules on one mesh."""
        return cls(
            batch=NamedSharding(mesh, SPLIT),
            params=NamedSharding(mesh, COPIED),
            opt_state=NamedSharding(mesh, COPIED),
            metrics=NamedSharding(mesh, COPIED),
        )


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A one-dimensional mesh over the first `num_devices` devices of all processes.

    Devices are in the order of their processes, so each process owns one contiguous run of a batch
    and example k of the global batch is the same for any number of hosts.

    Args:
      num_devices: how many devices to use; None takes all.

    Raises:
      ValueError: more devices asked for than there are, fewer than 1, or (with several processes)
        a number that leaves a process without a device.
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
    return Mesh(np.asarray(devices[:count]), (DATA_AXIS,), axis_types=(AXIS_TYPE,))


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


def _check_divides(global_batch_size: int, mesh: Mesh) -> None:
    if global_batch_size < 1 or global_batch_size % mesh.size:
        below = global_batch_size // mesh.size * mesh.size
        choices = " or ".join(str(n) for n in (below, below + mesh.size) if n > 0)
        raise ValueError(
            f"a batch of {global_batch_size} does not divide by {mesh.size} devices: use {choices}"
        )
