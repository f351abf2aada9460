"""The S_max adjustment: its numbers, and the authors' sampler with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import models, samplers
from flowdcn_jax.config import load_config
from flowdcn_jax.flow.guidance import guided_velocity
from flowdcn_jax.models.resolution import max_scale_factor
from tests import ensemble, official
from tests.comparison import relative_error

MEMBERS = 4


def factor(kind, t=0.0, tokens=(24, 32), training_tokens=16, depth=12):
    options = dict(tokens=tokens, training_tokens=training_tokens, depth=depth)
    return max_scale_factor(kind, jnp.float32(t), **options)


def test_the_papers_factor_is_the_ratio_of_tokens_in_every_block():
    assert factor("none") is None
    np.testing.assert_array_equal(factor("paper", t=0.9), np.tile([2.0, 1.5], (12, 1)))
    np.testing.assert_array_equal(factor("paper", tokens=(8, 16))[0], [1.0, 0.5])


def test_the_released_factor_is_of_inner_blocks_fades_and_never_shrinks():
    at_noise = np.asarray(factor("released", 0.0))
    assert at_noise[5:8].tolist() == [[2.0, 1.5]] * 3
    assert (np.delete(at_noise, [5, 6, 7], axis=0) == 1).all()
    np.testing.assert_allclose(factor("released", 0.45)[6], [1.25, 1.25])
    np.testing.assert_allclose(factor("released", 0.15)[6], [1.75, 1.5])
    assert (factor("released", 0.6) == 1).all() and (factor("released", 0.9) == 1).all()
    np.testing.assert_array_equal(factor("released", tokens=(8, 64))[6], [2.0, 1.0])
    inner = np.asarray(factor("released", depth=28))[:, 0] != 1
    assert np.flatnonzero(inner).tolist() == list(range(5, 24))
    assert (factor("released", depth=4) == 1).all()


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'half'; expected one of none, paper, released"):
        factor("half")


@pytest.fixture(scope="module")
def golden(fixture_file):
    return fixture_file("smax.npz")


@pytest.fixture(scope="module")
def network(golden):
    graphdef, _ = models.abstract_model(official.model_config(golden))
    params = official.to_tree(golden)
    return jax.jit(lambda *args: models.apply_model(graphdef, params, *args))


# This network moves by 0.1 in one evaluation if its input does by 1e-7: see tests.ensemble.
@pytest.mark.parametrize(
    "shape", ["tall", *(pytest.param(x, marks=pytest.mark.slow) for x in ("square", "wide"))]
)
def test_official_adjusted_sampler(golden, network, shape):
    x = jnp.asarray(ensemble.perturbed(official.nhwc(golden[f"smax/{shape}/x_init"]), MEMBERS))
    y = np.tile([3, 7], MEMBERS).astype(np.int32)
    h, w = x.shape[1] // 2, x.shape[2] // 2

    def run(kind):
        def model(x, t, y):
            options = dict(tokens=(h, w), training_tokens=16, depth=12)
            scale = max_scale_factor(kind, t[0], **options)
            with jax.disable_jit(False):
                return network(x, t, y, jnp.ones((12, 2)) if scale is None else scale)

        guided = guided_velocity(model, y, null_class=10, scale=1.375)
        with jax.disable_jit():  # the scan as a loop, so that the network compiles only once
            found = samplers.solve(guided, x, sampler="euler", num_steps=6)
        return np.asarray(found).reshape(MEMBERS, -1, *x.shape[1:])

    recorded, ours = official.nhwc(golden[f"smax/{shape}/out"]), run("released")
    assert ensemble.spread_ratio(recorded, ours) < 1.1
    assert abs(ensemble.position(recorded, ours, run("none"))) < 0.35


def test_a_factor_is_a_larger_max_scale(quick_compilation):
    config = load_config("digits").model
    config.update(width=8, depth=1, num_groups=2, dtype="float32")
    random = np.random.default_rng(0)
    _, params = models.abstract_model(config)
    params = jax.tree.map(lambda p: 0.3 * random.standard_normal(p.shape, np.float32), params)
    x = random.standard_normal((1, 16, 24, 1), np.float32)
    network = jax.jit(models.apply_model, static_argnums=0)
    ty = np.array([0.5], np.float32), np.array([3])

    def run(factor=None, max_scale=6.0):
        config.max_scale = max_scale
        graphdef, _ = models.abstract_model(config)
        return network(graphdef, params, x, *ty, factor)

    assert relative_error(run(jnp.full((1, 2), 1.5)), run(max_scale=9.0)) < 1e-6
    along_x, along_y = run(jnp.array([[2.0, 1.0]])), run(jnp.array([[1.0, 2.0]]))
    assert relative_error(along_x, along_y) > 1e-4
    with pytest.raises(ValueError):
        run(jnp.ones((2, 2)))  # expected: a row a block
