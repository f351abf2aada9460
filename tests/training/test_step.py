"""The train step: the same numbers on any mesh, and the formulas it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowdcn_jax import data
from flowdcn_jax.autoencoders import to_unit_range
from flowdcn_jax.flow.loss import draw, velocity_loss
from flowdcn_jax.models import abstract_model, apply_model
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, state_sharding
from flowdcn_jax.runs.state import initial_state
from flowdcn_jax.training.step import STEP_KEY_SALT, make_train_step
from tests import tiny
from tests.comparison import relative_error

WIDE = dict(model__width=64)  # wide enough for the sharding rule to split something
SMALL = dict(optimizer__clip_norm=0.5, optimizer__warmup_steps=0, ema__decay=0.9)

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


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (1, 8)])
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


def test_one_step_by_hand(small):
    """Loss, clipping, AdamW and EMA recomputed from the public pieces."""
    config, before, batch, step = small
    after, metrics = jax.device_get(step(on_device(before), batch))

    graphdef, _ = abstract_model(config.model)
    x = np.asarray(to_unit_range(jnp.asarray(batch["image"])))
    assert x.min() >= -1 and x.max() <= 1 and x.dtype == np.float32
    keys = jax.random.fold_in(jax.random.key(config.seed), STEP_KEY_SALT)
    drawn = draw(
        jax.random.fold_in(keys, 0), x.shape, time_distribution="uniform", label_dropout=0.1
    )

    def loss_fn(params):
        return velocity_loss(
            params,
            x,
            batch["label"],
            drawn,
            velocity_fn=functools.partial(apply_model, graphdef),
            null_class=10,
        )

    @jax.jit
    def by_hand(params):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: g * 0.5 / norm, grads)
        adam = optax.adamw(2e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
        updates, _ = adam.update(grads, adam.init(params), params)
        return loss, norm, optax.apply_updates(params, updates)

    loss, norm, expected = jax.device_get(by_hand(before.params))
    assert norm > 0.5
    assert relative_error(metrics["loss"], loss) < 1e-5
    assert relative_error(metrics["grad_norm"], norm) < 1e-5
    final = expected["final"]["linear"]["kernel"]
    assert relative_error(after.params["final"]["linear"]["kernel"], final) < 1e-3
    ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before.ema, after.params)
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.ema, ema)
    assert max(jax.tree.leaves(errors)) < 1e-6
    assert after.step == 1


def test_learning_rate_warms_up_and_stays():
    config = tiny.config(optimizer__warmup_steps=4, optimizer__learning_rate=0.1).optimizer
    rates = [float(learning_rate_schedule(config)(step)) for step in range(7)]
    np.testing.assert_allclose(rates, [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)
    config.warmup_steps = 0
    assert float(learning_rate_schedule(config)(0)) == pytest.approx(0.1)


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
