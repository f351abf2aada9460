"""Learning rates, what decays, and Muon's steps, each beside a computation by hand."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flowdcn_jax.models import MODELS, abstract_model, parameter_count
from flowdcn_jax.runs.optimizer import (
    decays,
    learning_rate_schedule,
    make_optimizer,
    orthogonalised,
)
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state
from tests import tiny


def rates(count, **options):
    config = tiny.config(train__num_steps=10, optimizer__learning_rate=0.1, **options)
    schedule = learning_rate_schedule(config)
    return [float(schedule(np.int32(step))) for step in range(count)]


WARMUP = [0, 0.025, 0.05, 0.075]


@pytest.mark.parametrize(
    "schedule, after",
    [
        ("constant", [0.1] * 8),
        ("linear", [0.1 - 0.06 * step / 6 for step in range(7)] + [0.04]),
        ("cosine", [0.07 + 0.03 * np.cos(np.pi * step / 6) for step in range(7)] + [0.04]),
    ],
)
def test_the_learning_rate_follows_the_schedule_to_its_final_value(schedule, after):
    options = dict(optimizer__schedule=schedule, optimizer__final_learning_rate=0.04)
    found = rates(12, **options, optimizer__warmup_steps=4)
    np.testing.assert_allclose(found, WARMUP + after, rtol=1e-5)
    without = rates(1, **options, optimizer__warmup_steps=0)
    np.testing.assert_allclose(without, [0.1], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_may_take_the_whole_run(schedule):
    found = rates(10, optimizer__schedule=schedule, optimizer__warmup_steps=10)
    np.testing.assert_allclose(found, np.arange(10) / 100, rtol=1e-6)


UNDECAYED = {"bias", "scale", "embedding", "scale_prior"}


@pytest.mark.parametrize("model", ["flowdcn", "flowcnn", "sit"])
def test_kernels_decay_and_the_blocks_matrices_are_orthogonalised(model):
    config = {"flowdcn": tiny.config().model, "flowcnn": tiny.FLOWCNN, "sit": tiny.SIT}[model]
    _, params = abstract_model(config)
    assert set(MODELS) == {"flowdcn", "flowcnn", "sit"}
    for (path, leaf), decay, muon in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(decays(params)),
        jax.tree.leaves(orthogonalised(params)),
        strict=True,
    ):
        name = path[-1].key
        assert name in UNDECAYED | {"kernel"}
        assert decay == (name not in UNDECAYED)
        assert decay == (len(leaf.shape) > 1 and name != "embedding")
        assert muon == (path[0].key == "blocks" and name == "kernel" and len(leaf.shape) == 2)


# A parameter that Muon makes steps of, wide and tall, and of each kind that it does not.
SHAPES = {
    "blocks": [{"wide": {"kernel": (3, 5), "bias": (5,)}, "tall": {"kernel": (6, 2)}}],
    "class_embedder": {"embedding": (4, 3)},
    "stem": {"kernel": (4, 3)},
}
MUON = dict(
    train__num_steps=5,
    optimizer__name="muon",
    optimizer__learning_rate=0.01,
    optimizer__warmup_steps=0,
    optimizer__schedule="linear",
    optimizer__weight_decay=0.3,
    optimizer__b1=0.8,
    optimizer__b2=0.7,
    optimizer__epsilon=1e-3,
)


def random_tree(seed):
    generator = np.random.default_rng(seed)
    draw = lambda shape: generator.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def orthogonal(matrix):
    """Five Newton-Schulz iterations with Muon's coefficients, in float64."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-3)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_by_hand(path, param, *grads):
    """The parameter after steps with these gradients, in float64."""
    decays, mean, square = path[-1].key == "kernel", 0.0, 0.0
    matrix = decays and path[0].key == "blocks"
    beta = 0.95 if matrix else 0.8
    for done, grad in enumerate(grads):
        mean = beta * mean + (1 - beta) * grad.astype(float)
        square = 0.7 * square + 0.3 * grad.astype(float) ** 2
        # Nesterov's look ahead, as Optax has it, for Adam too.
        ahead = beta * mean / (1 - beta ** (done + 2))
        ahead = ahead + (1 - beta) * grad / (1 - beta ** (done + 1))
        if matrix:
            update = 0.2 * np.sqrt(max(param.shape)) * orthogonal(ahead)
        else:
            update = ahead / (np.sqrt(square / (1 - 0.7 ** (done + 1))) + 1e-3)
        rate = 0.01 * (1 - done / 5)
        param = param - rate * (update + (0.3 * param if decays else 0))
    return param


def test_three_steps_of_muon_by_hand():
    start, grads = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    optimizer = make_optimizer(tiny.config(**MUON))
    params, state = start, optimizer.init(start)
    for number, grad in enumerate(grads, start=1):
        updates, state = optimizer.update(grad, state, params)
        params = jax.tree.map(np.add, params, updates)
        expected = jax.tree_util.tree_map_with_path(muon_by_hand, start, *grads[:number])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, params, expected)


def test_muons_state_is_split_as_the_parameters_are():
    mesh = make_mesh(1, 8, jax.devices()[:8])
    state = abstract_state(tiny.config(model__width=64, optimizer__name="muon"), mesh)
    kernel = state.params["blocks"][0]["modulation"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
    muon = state.opt_state[0].inner_states["muon"].inner_state[0]
    assert muon.mu["blocks"][0]["modulation"]["kernel"] == kernel
    adam = state.opt_state[0].inner_states["adam"].inner_state[0]
    matrices, rest, both = map(parameter_count, (muon.mu, adam.mu, state.params))
    assert matrices + rest == both and matrices > rest
