"""The device mesh and the one rule by which arrays are laid out over it.

Batches are split over both mesh axes. Parameters, optimizer state and EMA are split over "fsdp"
and copied over "data": each array along its largest axis that the mesh axis divides, small arrays
not at all.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flowdcn_jax.errors import ConfigError

AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 2**14  # elements; below it a copy costs less than the collective


def mesh_shape(data: int, fsdp: int, num_devices: int) -> tuple[int, int]:
    """(data, fsdp) with at most one -1 replaced, so that their product is num_devices.

    Raises:
        flowdcn_jax.errors.ConfigError: the sizes do not make up num_devices.
    """
    sizes = {"config.mesh.data": data, "config.mesh.fsdp": fsdp}
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"{name} is {size}; expected a positive number or -1")
    if data == -1 and fsdp == -1:
        raise ConfigError("config.mesh.data and config.mesh.fsdp are both -1; expected only one")
    if data == -1:
        data = num_devices // fsdp
    elif fsdp == -1:
        fsdp = num_devices // data
    if data * fsdp != num_devices:
        raise ConfigError(
            f"config.mesh is data={sizes['config.mesh.data']}, fsdp={sizes['config.mesh.fsdp']}; "
            f"its product must be the number of devices, {num_devices}"
        )
    return data, fsdp


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """A ("data", "fsdp") mesh over `devices` (all of all processes by default)."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(tree, mesh: Mesh):
    """The sharding of every leaf (anything with a shape) of parameters or optimizer state."""
    fsdp = mesh.shape["fsdp"]

    def rule(leaf) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or not divisible or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, tree)


def with_sharding(tree, mesh: Mesh):
    """ShapeDtypeStructs of `tree` that carry `state_sharding`, as restoring wants them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        state_sharding(tree, mesh),
    )
