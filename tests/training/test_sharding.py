"""The mesh and the one sharding rule."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from flowdcn_jax.runs import sharding
from flowdcn_jax.runs.state import abstract_state
from tests import tiny


@pytest.mark.parametrize(
    "sizes, shape", [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((1, 8), (1, 8))]
)
def test_mesh_shape(sizes, shape):
    assert sharding.mesh_shape(*sizes, num_devices=8) == shape


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 2), "data=3, fsdp=2; its product must be the number of devices, 8"),
        ((-1, 3), "fsdp=3; its product"),
        ((-1, -1), "both -1"),
        ((0, 8), "config.mesh.data is 0"),
        ((8, -2), "config.mesh.fsdp is -2"),
    ],
)
def test_impossible_meshes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.mesh_shape(*sizes, num_devices=8)


def test_rule_splits_the_largest_divisible_axis_and_copies_small_arrays():
    mesh = sharding.make_mesh(2, 4, jax.devices()[:8])
    shapes = {"wide": (100, 400), "tall": (402, 100), "odd": (201, 203), "small": (4, 4), "key": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda s: s.spec, sharding.state_sharding(tree, mesh))
    assert specs["wide"] == PartitionSpec(None, "fsdp")
    assert specs["tall"] == PartitionSpec(None, "fsdp")  # 402 is not a multiple of 4
    assert specs["odd"] == specs["small"] == specs["key"] == PartitionSpec()


def test_parameters_optimizer_and_ema_are_laid_out_alike():
    mesh = sharding.make_mesh(1, 8, jax.devices()[:8])
    state = abstract_state(tiny.config(model__width=64), mesh)
    kernel = state.params["blocks"][0]["modulation"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
    moments = state.opt_state[0]
    for tree in (state.ema, moments.mu, moments.nu):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
        assert shardings == jax.tree.map(lambda leaf: leaf.sharding, state.params)
