"""The train step: the same numbers on any mesh, and the formulas it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import data
from flowdcn_jax.autoencoders import to_unit_range
from flowdcn_jax.flow.loss import draw, velocity_loss
from flowdcn_jax.models import abstract_model, apply_model
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, state_sharding
from flowdcn_jax.runs.state import abstract_state, initial_state
from flowdcn_jax.training import inputs
from flowdcn_jax.training.step import STEP_KEY_SALT, make_train_step
from tests import tiny
from tests.comparison import relative_error

WIDE = dict(model__width=64)  # wide enough for the sharding rule to split something
# Every key of the step off its default.
SMALL = dict(
    train__num_steps=5,
    flow__time_distribution="logit_normal",
    flow__label_dropout=0.6,
    optimizer__learning_rate=3e-3,
    optimizer__warmup_steps=1,
    optimizer__schedule="linear",
    optimizer__final_learning_rate=1e-3,
    optimizer__weight_decay=0.5,
    optimizer__b1=0.8,
    optimizer__b2=0.7,
    optimizer__epsilon=1e-2,
    optimizer__clip_norm=1.3,
    ema__decay=0.9,
    ema__warmup=0.2,
    ema__others=("constant_0.6", "power_0.2357"),
)
EXPONENT = 1  # of the width 1 / sqrt(18) = 0.2357

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batches(config, count):
    source = data.make_source(config.data)
    stream = data.make_batches(
        source, batch_size=config.train.batch_size, seed=0, num_threads=0, prefetch_batches=0
    )
    return [next(stream) for _ in range(count)]


def run(config, mesh, num_steps=3):
    """(state, losses, gradient norms) after a few steps on `mesh`."""
    state, step = initial_state(config, mesh), make_train_step(config, mesh)
    history = []
    for batch in batches(config, num_steps):
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        history.append(jax.device_get(metrics))
    return (
        state,
        np.array([m["loss"] for m in history]),
        np.array([m["grad_norm"] for m in history]),
    )


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def single():
    return run(tiny.config(**WIDE), one_device())


@pytest.mark.parametrize(
    "sizes", [(4, 2), *(pytest.param(x, marks=pytest.mark.slow) for x in ((8, 1), (1, 8)))]
)
def test_eight_devices_match_one(single, sizes):
    mesh = make_mesh(*sizes, jax.devices()[:8])
    state, losses, norms = run(tiny.config(**WIDE), mesh)
    assert relative_error(losses, single[1]) < 1e-5
    assert relative_error(norms, single[2]) < 1e-5
    for name in ("params", "ema"):
        errors = jax.tree.map(relative_error, getattr(state, name), getattr(single[0], name))
        # Adam divides by tiny second moments in the first steps, which magnifies rounding.
        assert max(jax.tree.leaves(errors)) < 1e-4, errors
        flat = [
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(s, name))])
            for s in (state, single[0])
        ]
        assert relative_error(*flat) < 1e-5
    kernel = state.params["blocks"][0]["modulation"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // sizes[1]


def test_initial_values_do_not_depend_on_the_mesh():
    config = tiny.config(**WIDE)
    one, eight = (initial_state(config, make_mesh(1, n, jax.devices()[:n])) for n in (1, 8))
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_accumulation_is_the_whole_batch_in_parts(single):
    config = tiny.config(**WIDE, train__accumulation_steps=4)
    _, losses, norms = run(config, make_mesh(2, 2, jax.devices()[:4]))
    assert relative_error(losses, single[1]) < 1e-5
    assert relative_error(norms, single[2]) < 1e-5


@pytest.fixture(scope="module")
def small():
    """A config, the initial state in the host's memory, a batch, and the step on one device."""
    config = tiny.config(**SMALL)
    state = jax.device_get(initial_state(config, one_device()))
    return config, state, batches(config, 1)[0], make_train_step(config, one_device())


def on_device(state):
    return jax.device_put(state, state_sharding(state, one_device()))


def test_three_steps_by_hand(small):
    """After one whose learning rate is 0. Gradients are the public pieces', the rest is NumPy's."""
    config, state, _, step = small
    gradients = jax.jit(functools.partial(loss_and_gradients, config))
    state, norms = on_device(state), []
    moments = jax.tree.map(lambda p: np.zeros((2, *p.shape)), state.params)
    for done, batch in enumerate(batches(config, 4)):
        before = jax.device_get(state)
        loss, grads = jax.device_get(gradients(before.params, batch, done))
        norms.append(np.sqrt(sum(np.sum(g.astype(float) ** 2) for g in jax.tree.leaves(grads))))
        grads = jax.tree.map(lambda g, norm=norms[-1]: g * min(1, 1.3 / norm), grads)
        rate = [0, 3e-3, 2.5e-3, 2e-3][done]  # 1e-3 after the fifth step
        expected = adamw(before.params, grads, moments, done=done, rate=rate)

        state, metrics = jax.device_get(step(state, batch))
        assert relative_error(metrics["loss"], loss) < 1e-5
        assert relative_error(metrics["grad_norm"], norms[-1]) < 1e-5
        assert metrics["learning_rate"] == pytest.approx(rate)
        moved = jax.tree.map(lambda x, y: x.astype(float) - y, state.params, before.params)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, moved, expected)
        for name, share in shares(done).items():
            old, new = ((s.other_emas | {"ema": s.ema})[name] for s in (before, state))
            average = jax.tree.map(lambda e, p, s=share: e + s * (p - e), old, state.params)
            jax.tree.map(close, new, average)
        state = on_device(state)
    assert state.step == 4
    assert min(norms) < 1.3 < max(norms)  # both those that are clipped and those that are not


def adamw(params, grads, moments, *, done, rate):
    """What SMALL's optimizer adds to the parameters, in float64; `moments` [2,...] are updated."""

    def update(path, param, grad, moment):
        moment[0] = 0.8 * moment[0] + 0.2 * grad
        moment[1] = 0.7 * moment[1] + 0.3 * grad.astype(float) ** 2
        mean, square = moment[0] / (1 - 0.8 ** (done + 1)), moment[1] / (1 - 0.7 ** (done + 1))
        decay = 0.5 if path[-1].key == "kernel" else 0
        return -rate * (mean / (np.sqrt(square) + 1e-2) + decay * param)

    return jax.tree_util.tree_map_with_path(update, params, grads, moments)


def shares(done):
    """What new parameters weigh in SMALL's EMAs."""
    warmed_up = 1 - 0.5 ** (1 / (0.2 * done)) if done else 1  # a fifth of the steps is a half-life
    return {
        "ema": max(0.1, warmed_up),
        "constant_0.6": max(0.4, warmed_up),
        "power_0.2357": 1 - (done / (done + 1)) ** (EXPONENT + 1),
    }


def loss_and_gradients(config, params, batch, number):
    """Of step `number` with SMALL's flow, at `params`."""
    graphdef, _ = abstract_model(config.model)
    x = to_unit_range(batch["image"])
    keys = jax.random.fold_in(jax.random.key(config.seed), STEP_KEY_SALT)
    drawn = draw(
        jax.random.fold_in(keys, number),
        x.shape,
        time_distribution="logit_normal",
        label_dropout=0.6,
    )
    return jax.value_and_grad(velocity_loss)(
        params,
        x,
        batch["label"],
        drawn,
        velocity_fn=functools.partial(apply_model, graphdef),
        null_class=10,
    )


def test_the_whole_range_of_pixels_is_learned_from():
    x = np.asarray(to_unit_range(jnp.array([0, 255], jnp.uint8)))
    assert x.dtype == np.float32 and x.tolist() == [-1, 1]


def test_gradients_are_split_as_the_parameters_are():
    """Which no number tells, but time and memory: each leaf has a constraint of its own."""
    mesh = make_mesh(1, 8, jax.devices()[:8])
    config = tiny.config(**WIDE)
    state = abstract_state(config, mesh)
    (batch,) = inputs.batch_shapes(config, data.make_source(config.data), mesh)
    jaxpr = make_train_step(config, mesh).trace(state, batch).jaxpr
    found = [e.params["sharding"] for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    expected = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    assert len({sharding.spec for sharding in expected}) > 1  # some are split
    assert found == expected


def test_the_state_is_donated(small):
    _, before, batch, step = small
    state = on_device(before)
    step(state, batch)
    assert state.params["stem"]["kernel"].is_deleted()


def test_no_gradient_is_a_scatter():
    """GPUs add the terms of a scatter in any order, so the same run would give other bits."""
    config, mesh = tiny.config(train__accumulation_steps=2), one_device()
    state, batch = initial_state(config, mesh), batches(config, 1)[0]
    text = make_train_step(config, mesh).lower(state, batch).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.scatter" not in text


def test_every_step_and_seed_draws_anew(small):
    _, before, batch, of_seed_0 = small
    of_seed_1 = make_train_step(tiny.config(**SMALL, seed=1), one_device())
    losses = []
    for step, number in ((of_seed_0, 0), (of_seed_0, 0), (of_seed_0, 1), (of_seed_1, 0)):
        _, metrics = step(on_device(before._replace(step=np.int32(number))), batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
