"""The path, the loss and guidance: properties with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax.flow import loss, path
from tests.comparison import relative_error


def draws(shape=(4096, 2, 2, 1), **options):
    defaults = dict(time_distribution="uniform", label_dropout=0.1)
    return loss.draw(jax.random.key(0), shape, **defaults | options)


def test_path_runs_from_noise_to_data_at_the_target_velocity():
    noise, data = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    np.testing.assert_array_equal(path.interpolate(noise, data, jnp.zeros(3)), noise)
    np.testing.assert_array_equal(path.interpolate(noise, data, jnp.ones(3)), data)
    _, slope = jax.jvp(
        lambda t: path.interpolate(noise, data, t), (jnp.full(3, 0.3),), (jnp.ones(3),)
    )
    assert relative_error(slope, path.target_velocity(noise, data)) < 1e-6


@pytest.mark.parametrize(
    "name, mean, std", [("uniform", 0.5, 0.2887), ("logit_normal", 0.5, 0.2083)]
)
def test_time_distributions(name, mean, std):
    t = np.asarray(draws(time_distribution=name).t)
    assert 0 <= t.min() and t.max() < 1
    assert abs(t.mean() - mean) < 0.01 and abs(t.std() - std) < 0.01


def test_draws_are_normal_noise_and_the_asked_dropout():
    drawn = draws(label_dropout=0.25)
    assert abs(drawn.noise.mean()) < 0.03 and abs(drawn.noise.std() - 1) < 0.03
    assert abs(drawn.drop_label.mean() - 0.25) < 0.03
    assert not draws(label_dropout=0.0).drop_label.any()


def test_loss_of_the_true_velocity_is_zero_and_of_zero_velocity_the_targets_power():
    drawn = draws((64, 4, 4, 3))
    data = jax.random.uniform(jax.random.key(1), drawn.noise.shape)
    label = jnp.arange(64) % 10
    truth = path.target_velocity(drawn.noise, data)

    def loss_of(velocity):
        return loss.velocity_loss(
            velocity, data, label, drawn, velocity_fn=lambda v, x, t, y: v, null_class=10
        )

    assert loss_of(truth) == 0
    zero = loss_of(jnp.zeros_like(truth))
    assert relative_error(zero, jnp.mean(truth**2)) < 1e-6


def test_dropped_labels_become_the_null_class():
    drawn = draws((256, 1, 1, 1), label_dropout=0.5)
    label = jnp.arange(256) % 10
    seen = []

    def velocity_fn(params, x, t, y):
        seen.append(y)
        return x

    data = jnp.zeros(drawn.noise.shape)
    loss.velocity_loss(None, data, label, drawn, velocity_fn=velocity_fn, null_class=10)
    np.testing.assert_array_equal(seen[0] == 10, drawn.drop_label)
    np.testing.assert_array_equal(seen[0][~drawn.drop_label], label[~drawn.drop_label])
