"""Every model that has a config trains, samples, and counts its MACs as XLA does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import models, sampling
from flowdcn_jax.config import config_names, load_config
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state
from flowdcn_jax.training.step import make_train_step
from tests import compilation, tiny
from tests.models.aggregates import use_aggregate

SMALL = dict(width=16, depth=1, in_channels=1, num_classes=10, dtype="float32", num_groups=2)
SMALL |= dict(num_heads=2)


def shrunk(name, **overrides):
    """The model of a config, small."""
    model = load_config(name).model
    model.update({key: value for key, value in (SMALL | overrides).items() if key in model})
    return model


# One name for each that is not another one's model once shrunk, as sit_l2 is sit_s2's. FlowDCN
# itself is trained and sampled by the tests of runs, and models of a second time are by
# tests/test_benchmarks.py and tests/sampling/test_mean_flow.py.
FLOWDCN = shrunk("s2").to_dict()
DISTINCT = {
    model.to_json(sort_keys=True): name
    for name in reversed(config_names())
    if (model := shrunk(name, patch_size=2, remat=False)).to_dict() != FLOWDCN
    and not model.second_time
}.values()


def elementwise_aggregate(values, offsets, weights, *, boundary):
    """Stands for the sampling, whose products are no part of the published figures."""
    return values * jnp.mean(weights * jnp.sum(offsets, axis=-1), axis=-1, keepdims=True)


@pytest.fixture
def quick_programs(monkeypatch):
    """Compiled quickly, for they run once; and no sampling, which has its own tests."""
    use_aggregate(monkeypatch, elementwise_aggregate)
    with compilation.quick():
        yield


# An ablation of one part is like the one of two.
SLOW = {"s2_fixed_prior", "s2_gelu", "s2_layer_norm", "s2_single_scale"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in sorted(DISTINCT)],
)
def test_it_trains_and_samples(name, quick_programs):
    """One step changes every parameter, and the new ones draw images."""
    config = tiny.config(optimizer__warmup_steps=0)
    config.model = shrunk(name)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state(config, mesh)
    )
    # Not the initial values, whose velocity and most of whose gradients are zero.
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, "f"), state.params)
    batch = dict(image=rng.integers(0, 256, (16, 4, 4, 1), np.uint8), label=np.arange(16) % 10)
    state, metrics = make_train_step(config, mesh)(state._replace(params=params), batch)
    assert np.isfinite(metrics["loss"])
    new_params = jax.device_get(state.params)
    changed = jax.tree.map(lambda old, new: bool((old != new).any()), params, new_params)
    assert all(jax.tree.leaves(changed)), changed

    settings = sampling.Settings(image_size=(4, 8), num_steps=2, guidance=2.0)
    generator = sampling.make_generator(config, mesh, settings)
    x, _ = generator(state.params, np.arange(2, dtype=np.uint32), np.array([3, 7], np.int32))
    assert x.shape == (2, 4, 8, 1) and np.isfinite(x).all()
    assert np.std(x[0] - x[1]) > 0


@pytest.mark.parametrize("name", ["s2", "sit_s2", "sit_s2_plus", "flowcnn_5x5"])
def test_macs_are_those_that_xla_counts(name, monkeypatch):
    """XLA counts two FLOPs a MAC, and elementwise work: in models so wide, up to 0.6 % more.

    With so many channels the first and the last layer, too, are 2 % of the work or more. XLA leaves
    out what a convolution's kernel takes from the padding, and counts the product with one-hot rows
    that looks up the class.
    """
    use_aggregate(monkeypatch, elementwise_aggregate)
    config, tokens = shrunk(name, width=512, depth=2, in_channels=64), 16
    graphdef, params = models.abstract_model(config)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, 32, 32, 64), "float32"), ((1,), "float32"), ((1,), "int32"))
    ]
    forward = jax.jit(functools.partial(models.apply_model, graphdef))
    flops = forward.lower(params, *arguments).compile().cost_analysis()["flops"]
    macs = models.forward_macs(config, 32, 32) + 11 * config.width
    if name == "flowcnn_5x5":
        kernel = 5 * 5 * config.width**2 // config.num_groups
        reached = (5 * tokens - 2 * (1 + 2)) / (5 * tokens)  # along an axis, inside the image
        macs -= round(config.depth * tokens**2 * kernel * (1 - reached**2))
    assert 1 <= flops / (2 * macs) < 1.01
