"""MeanFlow's draws and loss, held to a computation with whole Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax.config_flow import MeanFlow
from flowdcn_jax.flow import loss, mean_flow
from flowdcn_jax.options import options_of
from tests.comparison import relative_error

ROWS, SHAPE, CLASSES = 4, (4, 2, 2, 1), 3
DROPPED = 2  # the row without a class

pytestmark = pytest.mark.usefixtures("quick_compilation")


def options(**keys):
    return MeanFlow(**keys)


def network(params, x, t, y, r):
    """A network of a few products of all that it is given."""
    inputs = jnp.concatenate([x.reshape(len(x), -1), t[:, None], (r - t)[:, None]], axis=1)
    hidden = jnp.tanh(inputs @ params["in"] + params["classes"][y])
    return (hidden @ params["out"]).reshape(x.shape)


def problem(dtype):
    rng = np.random.default_rng(0)
    params = {
        "in": rng.normal(size=(6, 7)),
        "classes": rng.normal(size=(CLASSES + 1, 7)),
        "out": rng.normal(size=(7, 4)),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    t, r = np.sort(rng.uniform(size=(2, ROWS)), axis=0)
    equal = np.arange(ROWS) % 2 == 0
    drawn = mean_flow.MeanFlowDraws(
        t=jnp.asarray(t, dtype),
        r=jnp.asarray(np.where(equal, t, r), dtype),
        noise=jnp.asarray(rng.normal(size=SHAPE), dtype),
        drop_label=jnp.arange(ROWS) == DROPPED,
    )
    data, label = jnp.asarray(rng.normal(size=SHAPE), dtype), np.arange(ROWS) % CLASSES
    return params, data, label, drawn


def naive_loss_and_gradient(params, data, label, drawn, options):
    """One row after the other, by whole Jacobians; only u of `fixed` has a gradient."""

    def u(params, i, x, r, y):
        t = drawn.t[i]
        return network(params, x[None], t[None], jnp.array([y]), r[None])[0]

    def constants(i):
        """(x, y, v_g, (r - t) du/dt) of a row."""
        noise, x1, t, r = drawn.noise[i], data[i], drawn.t[i], drawn.r[i]
        x, v = t * x1 + (1 - t) * noise, x1 - noise
        y, omega, kappa = int(label[i]), options.guidance_omega, options.guidance_kappa
        v_g = v
        if i == DROPPED:
            y = CLASSES
        else:
            guided = omega * v + (1 - omega - kappa) * u(params, i, x, t, CLASSES)
            guided += kappa * u(params, i, x, t, y)
            inside = (t >= options.guidance_begin) & (t <= options.guidance_end)
            v_g = jnp.where(inside, guided, v)
        direction = u(params, i, x, t, y) if options.tangent == "network" else v_g

        def at(x, t):
            return network(params, x[None], t[None], jnp.array([y]), r[None])[0]

        in_x, in_t = jax.jacfwd(at, argnums=(0, 1))(x, t)
        return x, y, v_g, (r - t) * (jnp.tensordot(in_x, direction, axes=3) + in_t)

    rows = [constants(i) for i in range(ROWS)]
    squares = [
        jnp.sum((u(params, i, x, drawn.r[i], y) - jump - v_g) ** 2)
        for i, (x, y, v_g, jump) in enumerate(rows)
    ]

    def fixed(params):
        total = 0.0
        for i, (x, y, v_g, jump) in enumerate(rows):
            square = jnp.sum((u(params, i, x, drawn.r[i], y) - jump - v_g) ** 2)
            total += square / (squares[i] + options.weight_offset) ** options.weight_power
        return total / ROWS

    return jax.value_and_grad(fixed)(params)


@pytest.mark.parametrize(
    "keys, once",
    [
        ({}, True),
        (dict(tangent="network", weight_power=0.5, weight_offset=2.0), True),
        (
            dict(guidance_omega=0.5, guidance_kappa=0.6, guidance_begin=0.1, guidance_end=0.7),
            False,
        ),
        (dict(guidance_omega=2.0, tangent="network", weight_power=0.0), False),
    ],
)
def test_loss_and_gradient_are_those_of_whole_jacobians(keys, once):
    """`once`: u and the derivative come from one function."""
    chosen = options(equal_share=0.5, **keys)
    with jax.enable_x64(True):
        params, data, label, drawn = problem(jnp.float64)

        def loss_of(params):
            return mean_flow.mean_flow_loss(
                params,
                data,
                label,
                drawn,
                network=network,
                derivative_network=network if once else lambda *args: network(*args),
                null_class=CLASSES,
                options=chosen,
            )

        (found, _), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
        naive = jax.jit(lambda p: naive_loss_and_gradient(p, data, label, drawn, chosen))
        expected, expected_gradient = naive(params)
        assert relative_error(found, expected) < 1e-12
        errors = jax.tree.map(relative_error, gradient, expected_gradient)
        assert max(jax.tree.leaves(errors)) < 1e-12, errors


def test_without_jumps_it_is_flow_matching():
    params, data, label, drawn = problem(jnp.float32)
    drawn = drawn._replace(r=drawn.t)
    found, more = mean_flow.mean_flow_loss(
        params,
        data,
        label,
        drawn,
        network=network,
        derivative_network=None,
        null_class=CLASSES,
        options=options(equal_share=1.0, weight_power=0.0),
    )
    plain = loss.velocity_loss(
        params,
        data,
        label,
        loss.Draws(drawn.t, drawn.noise, drawn.drop_label),
        velocity_fn=lambda params, x, t, y: network(params, x, t, y, t),
        null_class=CLASSES,
    )
    assert relative_error(found, 4 * plain) < 1e-6  # a sum over four numbers a row
    assert relative_error(more["velocity_loss"], plain) < 1e-6


def draws(**keys):
    return mean_flow.draw(
        jax.random.key(0), (4096, 1, 1, 1), label_dropout=0.1, options=options(**keys)
    )


def logits(t):
    return np.log(t / (1 - t))


def test_times_are_in_order_and_the_first_rows_of_each_group_are_equal():
    drawn = jax.device_get(draws(equal_share=0.75))
    assert (drawn.t <= drawn.r).all() and drawn.t.min() > 0 and drawn.r.max() < 1
    np.testing.assert_array_equal(drawn.t == drawn.r, np.arange(4096) % 4 < 3)
    assert mean_flow.find_group(0.0) == (0, 1) and mean_flow.find_group(1.0) == (1, 1)
    assert mean_flow.find_group(0.333) == (1, 3)


def test_both_times_are_logit_normal():
    """Of the swapped pair together; of the clipped one t alone."""
    keys = dict(equal_share=0.0, t_mean=0.6, t_std=1.6, r_mean=4.0, r_std=0.5)
    swapped, clipped = (jax.device_get(draws(r_below_t=each, **keys)) for each in ("swap", "clip"))
    both = np.concatenate([logits(swapped.t), logits(swapped.r)])
    assert abs(both.mean() - 2.3) < 0.05
    assert abs(logits(clipped.t).mean() - 0.6) < 0.1 and abs(logits(clipped.t).std() - 1.6) < 0.1
    assert 0 < (clipped.t == clipped.r).mean() < 0.1
    uniform = jax.device_get(draws(equal_share=0.0, time_distribution="uniform"))
    assert abs(uniform.t.mean() - 1 / 3) < 0.02 and abs(uniform.r.mean() - 2 / 3) < 0.02


# Key -> (another value, what of the draws it changes; none: it is of the loss, keys beside it).
GUIDED = {"guidance_kappa": 0.5}
KEYS = {
    "equal_share": (0.5, {"r"}, {}),
    "time_distribution": ("uniform", {"t", "r"}, {}),
    "t_mean": (-1.0, {"t", "r"}, {}),
    "t_std": (2.0, {"t", "r"}, {}),
    "r_mean": (2.0, {"t", "r"}, {}),
    "r_std": (0.5, {"t", "r"}, {}),
    "r_below_t": ("clip", {"t", "r"}, {}),
    "tangent": ("network", set(), {}),
    "weight_power": (0.5, set(), {}),
    "weight_offset": (10.0, set(), {}),
    "guidance_omega": (2.0, {"drop_label"}, {}),
    "guidance_kappa": (0.5, {"drop_label"}, {}),
    "guidance_begin": (0.6, set(), GUIDED),
    "guidance_end": (0.6, set(), GUIDED),
}


def test_every_key_is_here():
    assert KEYS.keys() | {"derivative_dtype"} == options_of(MeanFlow).keys()


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_what_it_should(key):
    value, expected, beside = KEYS[key]
    before, after = draws(**beside), draws(**beside | {key: value})
    changed = {
        name
        for name in before._fields
        if not np.array_equal(getattr(before, name), getattr(after, name))
    }
    assert changed == expected
    if key[0] in "tr" and key != "tangent" or key == "equal_share":
        return
    params, *inputs = problem(jnp.float32)
    fixed = dict(network=network, derivative_network=network, null_class=CLASSES)

    def loss_of(options):
        return mean_flow.mean_flow_loss(params, *inputs, options=options, **fixed)

    keys = {"equal_share": 0.5} | beside | ({} if "weight" in key else {"weight_power": 0.0})
    (loss_before, more), (loss_after, more_after) = jax.jit(
        lambda: [loss_of(options(**each)) for each in (keys, keys | {key: value})]
    )()
    assert relative_error(loss_after, loss_before) > 1e-3
    np.testing.assert_array_equal(more["velocity_loss"], more_after["velocity_loss"])


def test_noise_and_dropped_labels_are_those_of_flow_matching_unless_it_guides():
    plain = loss.draw(
        jax.random.key(0), (4096, 1, 1, 1), time_distribution="uniform", label_dropout=0.1
    )
    drawn = draws()
    np.testing.assert_array_equal(drawn.noise, plain.noise)
    np.testing.assert_array_equal(drawn.drop_label, plain.drop_label)
    guided = jax.device_get(draws(guidance_omega=2.0))
    assert abs(guided.drop_label.mean() - 0.1) < 0.015
    assert not guided.drop_label[3::4].any()
