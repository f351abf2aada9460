"""Euler's method: its order, the time grids, and the official sampler's outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import models, samplers
from flowdcn_jax.flow.guidance import guided_velocity
from tests import official
from tests.comparison import relative_error


def test_constant_velocity_is_integrated_exactly_and_a_linear_one_at_first_order():
    x, y = jnp.ones((3, 2, 2, 1)), jnp.zeros(3, jnp.int32)

    def moved(velocity_fn, num_steps):
        return samplers.euler(velocity_fn, x, y, samplers.uniform_times(num_steps))

    np.testing.assert_allclose(moved(lambda x, t, y: jnp.full_like(x, 2.0), 7), x + 2, rtol=1e-6)
    errors = [abs(float(moved(lambda x, t, y: x, n)[0, 0, 0, 0]) - np.e) for n in (50, 100, 200)]
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1


def test_velocity_sees_the_start_of_each_step():
    times = samplers.uniform_times(4)
    total = samplers.euler(
        lambda x, t, y: jnp.broadcast_to(t[:, None], x.shape),
        jnp.zeros((1, 1)),
        jnp.zeros(1),
        times,
    )
    assert abs(total[0, 0] - 0.25 * (0 + 0.25 + 0.5 + 0.75)) < 1e-6


def test_time_grids():
    np.testing.assert_allclose(samplers.uniform_times(4), [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
    grid = samplers.uniform_times(3, last_step=0.04)
    np.testing.assert_allclose(grid, [0, 0.48, 0.96, 1], rtol=1e-6)
    np.testing.assert_array_equal(samplers.uniform_times(1), [0, 1])


@pytest.mark.parametrize("num_steps, last_step", [(0, None), (4, 0.0), (4, 1.5)])
def test_bad_time_grids_are_refused(num_steps, last_step):
    with pytest.raises(ValueError, match="expected"):
        samplers.uniform_times(num_steps, last_step)


# Two steps: this model's velocity multiplies differences so fast that a relative change of 1e-7
# moves the result of two steps by 1e-5, of five by 1e-2, of ten by 0.1.
@pytest.mark.parametrize("guidance", [1.0, 1.375])
def test_official_sampler(fixture_file, guidance):
    model, golden = fixture_file("model.npz"), fixture_file("samplers.npz")
    graphdef, _ = models.abstract_model(official.model_config(model))
    params = official.to_tree(model)

    @jax.jit
    def sample(x, y):
        def velocity_fn(x, t, y):
            return models.apply_model(graphdef, params, x, t, y)

        guided = guided_velocity(velocity_fn, null_class=10, scale=guidance)
        return samplers.euler(guided, x, y, samplers.uniform_times(2))

    x = sample(official.nhwc(golden["x_init"]), golden["y"])
    expected = official.nhwc(golden[f"euler_ode/steps2/cfg{guidance}"])
    assert relative_error(x, expected) < 1e-3
