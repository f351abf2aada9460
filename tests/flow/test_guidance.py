"""Guidance: what each option does to a model whose velocities are known, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax.flow.guidance import guided_at, guided_velocity
from tests.comparison import relative_error

NULL = 5
X = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
Y = jnp.array([1, 2])


def model(x, t, y):
    return x + (t + 10.0 * y).reshape(-1, 1, 1, 1)


def weaker(x, t, y):
    return 0.5 * x - y.reshape(-1, 1, 1, 1)


def velocity(t, **options):
    defaults = dict(null_class=NULL, scale=3.0)
    return guided_velocity(model, Y, **defaults | options)(X, jnp.float32(t))


def parts(t):
    t = jnp.full(2, t)
    return model(X, t, Y), model(X, t, jnp.full(2, NULL))


def test_it_extrapolates_from_no_class():
    strong, weak = parts(0.3)
    assert relative_error(velocity(0.3), weak + 3 * (strong - weak)) < 1e-6
    assert relative_error(velocity(0.3, scale=0.0), weak) < 1e-6


def test_scale_one_is_no_guidance_and_one_evaluation():
    batches = []

    def counted(x, t, y):
        batches.append(len(x))
        assert t.shape == y.shape == x.shape[:1]
        return model(x, t, y)

    unguided = guided_velocity(counted, Y, null_class=NULL, scale=1.0)(X, 0.3)
    np.testing.assert_array_equal(unguided, parts(0.3)[0])
    assert batches == [2]
    guided_velocity(counted, Y, null_class=NULL, scale=1.5)(X, 0.3)
    assert batches == [2, 4]


def test_three_channels_leave_the_others_alone():
    guided, full = velocity(0.3, channels="three"), velocity(0.3)
    np.testing.assert_array_equal(guided[..., :3], full[..., :3])
    np.testing.assert_array_equal(guided[..., 3:], parts(0.3)[0][..., 3:])


def test_an_interval_is_guided_at_its_ends_and_not_outside_and_costs_no_more_there():
    sizes = []

    def counted(x, t, y):
        jax.debug.callback(lambda: sizes.append(len(x)))
        return model(x, t, y)

    interval = (0.25, 0.5)
    options = dict(null_class=NULL, scale=3.0, interval=interval)
    guided = jax.jit(guided_velocity(counted, Y, **options))
    for t in (0.0, 0.24, 0.25, 0.4, 0.5, 0.51, 1.0):
        inside = 0.25 <= t <= 0.5
        assert guided_at(np.float32(t), scale=3.0, interval=interval) == inside
        sizes.clear()
        expected = velocity(t) if inside else parts(t)[0]
        assert relative_error(guided(X, jnp.float32(t)), expected) < 1e-6
        jax.effects_barrier()
        assert sizes == [4 if inside else 2]
    assert not guided_at(0.3, scale=1.0)


@pytest.mark.parametrize(
    "schedule, weights",
    [("constant", (3, 3, 3)), ("linear", (1, 1.5, 3)), ("cosine", (1, 2 - np.sqrt(0.5), 3))],
)
def test_schedules_rise_from_one_to_the_scale(schedule, weights):
    for t, weight in zip((0.0, 0.25, 1.0), weights, strict=True):
        strong, weak = parts(t)
        expected = weak + weight * (strong - weak)
        assert relative_error(velocity(t, schedule=schedule), expected) < 1e-5


def test_autoguidance_extrapolates_from_the_weaker_model_for_the_same_labels():
    strong, weak = parts(0.3)[0], weaker(X, jnp.full(2, 0.3), Y)
    assert relative_error(velocity(0.3, guide=weaker), weak + 3 * (strong - weak)) < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scale=-1.0), "guidance is -1.0; expected a number of at least 0"),
        (dict(scale=float("inf")), "guidance is inf"),
        (dict(channels="two"), "channels is 'two'; expected one of all, three"),
        (dict(schedule="step"), "schedule is 'step'; expected one of constant, linear, cosine"),
        (dict(scale="2"), "guidance is '2'; expected a number of at least 0"),
        (dict(interval=(0.2,)), r"interval is \(0.2,\); expected two times, \(low, high\)"),
        (dict(interval=0.5), "interval is 0.5; expected two times"),
        (dict(interval=("0.2", "0.8")), "interval is .*; expected two times"),
        (dict(interval=(0.8, 0.2)), "interval is 0.8 to 0.2; expected low <= high"),
        (dict(interval=(0.2, 1.2)), "interval is 0.2 to 1.2; expected .* in"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        velocity(0.5, **options)
