"""The solvers: orders, known solutions, time grids, counts, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import samplers
from flowdcn_jax.samplers.known_solutions import DEVIATION, FIELDS, MEAN, solver_error
from flowdcn_jax.samplers.time_grid import shift_times, uniform_times
from tests.comparison import relative_error

ODE_SAMPLERS = [name for name in samplers.SAMPLERS if "sde" not in name]
SDE_SAMPLERS = [name for name in samplers.SAMPLERS if "sde" in name]


def solve(velocity_fn, x, sampler="euler", num_steps=8, **options):
    return samplers.solve(velocity_fn, x, sampler=sampler, num_steps=num_steps, **options)


@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
def test_a_constant_velocity_is_integrated_exactly(sampler):
    x = jnp.ones((3, 2, 2, 1))
    found = solve(lambda x, *times: jnp.full_like(x, 2.0), x, sampler)
    np.testing.assert_allclose(found, 3, rtol=2e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_jumps_by_the_mean_velocity_end_where_the_path_does(num_steps):
    """Of the exact flow from noise to normal data, on any grid."""

    def at(z, t):
        return t * MEAN + jnp.sqrt((t * DEVIATION) ** 2 + (1 - t) ** 2) * z

    def mean_velocity(x, t, r):
        z = (x - t * MEAN) / jnp.sqrt((t * DEVIATION) ** 2 + (1 - t) ** 2)
        return (at(z, r) - x) / (r - t)

    x = jnp.linspace(-2.0, 2.0, 9)
    found = solve(mean_velocity, x, "mean_flow", num_steps, time_shift=2.0)
    np.testing.assert_allclose(found, FIELDS["normal"].solution(x), atol=2e-6)


@pytest.mark.parametrize(
    "sampler, order",
    dict(euler=1, heun=2, heun_cached=2, adams1=1, adams2=2, adams3=3, adams4=4).items(),
)
def test_each_solver_converges_at_its_order(sampler, order):
    coarse, fine = (solver_error(FIELDS["late"], sampler, n) for n in (256, 512))
    assert abs(np.log2(coarse / fine) - order) < 0.15
    coarse, fine = (solver_error(FIELDS["normal"], sampler, n) for n in (64, 512))
    assert np.log2(coarse / fine) / 3 > min(order, 2) - 0.8  # the first steps are of low order
    assert fine < {1: 3e-3, 2: 3e-5, 3: 5e-7, 4: 5e-7}[order]


def test_a_shifted_grid_keeps_the_order_of_adams():
    with jax.enable_x64(True):
        field, x = FIELDS["late"], jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float64)
        errors = [
            relative_error(solve(field.velocity, x, "adams3", n, time_shift=0.5), field.solution(x))
            for n in (256, 512)
        ]
    assert abs(np.log2(errors[0] / errors[1]) - 3) < 0.15


def test_solvers_that_are_the_same():
    x = jax.random.normal(jax.random.key(0), (2, 3))
    velocity = FIELDS["normal"].velocity
    options = dict(num_steps=7, last_step=0.04)
    np.testing.assert_array_equal(
        solve(velocity, x, "adams1", **options), solve(velocity, x, "euler", **options)
    )
    assert relative_error(solve(velocity, x, "heun_cached"), solve(velocity, x, "adams2")) < 1e-6
    for sampler in SDE_SAMPLERS:
        no_noise = solve(velocity, x, sampler, diffusion="zero", key=jax.random.key(0), **options)
        np.testing.assert_array_equal(no_noise, solve(velocity, x, "euler", **options))


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_evaluations_are_counted_and_the_network_is_traced_once(sampler):
    seen, traces = [], []

    def velocity(x, t, *end):
        seen.append(t)
        return x

    def traced(x, t, *end):
        traces.append(t)
        return x

    x = jnp.ones((1, 2))
    with jax.disable_jit():
        solve(velocity, x, sampler, num_steps=6, key=jax.random.key(0))
    assert len(seen) == samplers.num_evaluations(sampler, 6) == (11 if sampler == "heun" else 6)
    np.testing.assert_array_equal(seen, samplers.evaluation_times(sampler, 6))
    solve(traced, x, sampler, num_steps=6, key=jax.random.key(0))
    assert len(traces) == 1 and traces[0].shape == () and traces[0].dtype == jnp.float32


def test_time_grids():
    np.testing.assert_allclose(uniform_times(4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(uniform_times(3, last_step=0.04), [0, 0.48, 0.96, 1])
    np.testing.assert_array_equal(uniform_times(1), [0, 1])
    shifted = shift_times(uniform_times(4), 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] < [0.25, 0.5, 0.75]).all()
    noise_time = 1 - uniform_times(4)  # SD3's formula, in its own time
    np.testing.assert_allclose(1 - shifted, 3 * noise_time / (1 + 2 * noise_time))
    np.testing.assert_allclose(shift_times(shifted, 1 / 3), uniform_times(4))
    neural = samplers.time_grid("neural", 10)
    assert neural[0] == 0 and neural[-1] == 1 and len(neural) == 11
    np.testing.assert_allclose(np.diff(neural)[:3], [0.0016, 0.0538, 0.0347])


@pytest.mark.parametrize("diffusion", [None, "constant"])
@pytest.mark.parametrize("sampler", ["euler_sde", "euler_sde_preserve"])
def test_the_sdes_end_in_the_distribution_of_the_data(sampler, diffusion):
    x = jax.random.normal(jax.random.key(0), (100_000, 1))
    found = solve(
        FIELDS["normal"].velocity,
        x,
        sampler,
        num_steps=200,
        diffusion=diffusion,
        key=jax.random.key(1),
    )
    assert abs(found.mean() - MEAN) < 0.01 and abs(found.std() / DEVIATION - 1) < 0.02
    assert abs(jnp.corrcoef(found[:, 0], x[:, 0])[0, 1]) < 0.7  # the ODE keeps them aligned


def test_the_mean_variant_contracts_and_draws_nothing():
    x = jax.random.normal(jax.random.key(0), (1000, 1))
    options = dict(sampler="euler_sde_mean", num_steps=200)
    found = solve(FIELDS["normal"].velocity, x, key=jax.random.key(1), **options)
    again = solve(FIELDS["normal"].velocity, x, key=jax.random.key(2), **options)
    np.testing.assert_array_equal(found, again)
    assert found.std() < 0.7 * DEVIATION


def test_recorded_noise_replaces_drawn_noise_and_the_last_step_has_none():
    x, key = jnp.zeros((4, 3)), jax.random.key(5)
    velocity = FIELDS["normal"].velocity
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in range(6)])
    drawn = solve(velocity, x, "euler_sde", 6, key=key)
    np.testing.assert_allclose(
        solve(velocity, x, "euler_sde", 6, step_noise=noise), drawn, rtol=1e-6
    )
    other = solve(velocity, x, "euler_sde", 6, step_noise=noise.at[-1].set(9.0))
    np.testing.assert_allclose(other, drawn, rtol=1e-6)
    assert relative_error(solve(velocity, x, "euler_sde", 6, step_noise=noise + 0.1), drawn) > 1e-2


def test_a_key_a_row_makes_rows_independent_of_one_another():
    keys, x = jax.random.split(jax.random.key(0), 5), jnp.zeros((5, 3))
    velocity = FIELDS["normal"].velocity
    all_rows = solve(velocity, x, "euler_sde", key=keys)
    np.testing.assert_array_equal(
        solve(velocity, x[2:4], "euler_sde", key=keys[2:4]), all_rows[2:4]
    )
    assert len(np.unique(np.asarray(all_rows))) == all_rows.size


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(sampler="ddim"),
            "sampler is 'ddim'; expected one of euler, heun, .*, mean_flow, euler_",
        ),
        (dict(num_steps=0), "num_steps is 0; expected at least 1"),
        (dict(num_steps=2.5), "num_steps is 2.5; expected a whole number"),
        (dict(num_steps="10"), "num_steps is '10'; expected a whole number"),
        (dict(sampler="neural", num_steps=10.0), "num_steps is 10.0; .*'neural' has one of 5"),
        (dict(sampler="neural", num_steps=11), "11; .*'neural' has one of 5, 6, 7, 8, 9, 10, 15"),
        (dict(sampler="neural", last_step=0.04), "last_step is 0.04 .*'neural' has its own"),
        (dict(sampler="neural", time_shift=2.0), "time_shift is 2.0; .*'neural' has its own"),
        (dict(last_step=0.0), r"last_step is 0.0; expected a length in \(0, 1\]"),
        (dict(last_step=1.5), "last_step is 1.5; expected"),
        (dict(last_step="0.1"), "last_step is '0.1'; expected"),
        (dict(sampler="adams3", last_step=1.0), "last_step is 1.0 .* each of the 8 steps more"),
        (dict(time_shift=1e9), "time_shift is 1000000000.0; expected .* more than 1.2e-07"),
        (dict(time_shift=1e-9), "time_shift is 1e-09; expected"),
        (dict(time_shift="2"), "time_shift is '2'; expected a positive number"),
        (dict(time_shift=-1.0), "time_shift is -1.0; expected a positive number"),
        (dict(diffusion="sigma"), "diffusion is 'sigma' and the sampler 'euler'"),
        (dict(sampler="euler_sde", diffusion="s"), "'s'; expected one of sigma, constant, zero"),
        (dict(sampler="euler_sde"), "draws noise; expected a key or step_noise"),
        (
            dict(sampler="euler_sde", key=jax.random.PRNGKey(0)),
            r"key is uint32\[2\]; expected what jax.random.key gives \(not PRNGKey\)",
        ),
        (dict(sampler="euler_sde", key=0), "key is 0; expected what jax.random.key gives"),
        (dict(sampler="euler_sde", step_noise=np.zeros((7, 1, 2))), r"\(7, 1, 2\); .*\(8, 1, 2\)"),
        (dict(sampler="euler_sde", key=jax.random.split(jax.random.key(0), 3)), r"shape \(3,\);"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        solve(lambda x, t: x, jnp.zeros((1, 2)), **options)


@pytest.mark.parametrize("sampler", ["heun", "adams2", "euler_sde"])
def test_a_trajectory_goes_from_the_noise_to_the_result(sampler):
    x = jax.random.normal(jax.random.key(0), (3, 2))
    options = dict(num_steps=6, key=jax.random.key(1))
    velocity = FIELDS["normal"].velocity
    kept = solve(velocity, x, sampler, keep=(0, 1, 4, 6), **options)
    assert kept.shape == (4, 3, 2)
    np.testing.assert_array_equal(kept[0], x)
    assert relative_error(kept[-1], solve(velocity, x, sampler, **options)) < 1e-6
    assert len({float(jnp.abs(state).sum()) for state in kept}) == 4


def test_a_trajectory_is_at_the_times_of_the_grid():
    """Where dx/dt = 2t, Heun's x is t**2 at each of them, and its predictions are not."""
    times = samplers.time_grid("heun", 5, time_shift=2.0)
    kept = solve(
        lambda x, t: jnp.full_like(x, 2 * t),
        jnp.zeros(1),
        "heun",
        5,
        time_shift=2.0,
        keep=range(6),
    )
    np.testing.assert_allclose(kept[:-1, 0], times[:-1] ** 2, atol=1e-6)


@pytest.mark.parametrize("keep", [(0, 9), (2, 1), (1, 1), (-1, 3)])
def test_what_is_kept_are_steps_in_order(keep):
    with pytest.raises(ValueError, match="keep is .*; expected ascending numbers from 0 to 8"):
        solve(lambda x, t: x, jnp.zeros(1), keep=keep)
