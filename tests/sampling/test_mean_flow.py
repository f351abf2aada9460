"""Drawing with a model of mean velocities: in jumps, and with guidance once at most."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flowdcn_jax import sampling
from flowdcn_jax.models import abstract_model, apply_model
from flowdcn_jax.sampling.generator import image_keys
from flowdcn_jax.sampling.pictures import strip_columns
from tests import tiny
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


def mean_flow_config(**overrides):
    keys = dict(flow__objective="mean_flow", sampling__num_steps=1, sampling__guidance=1.0)
    return tiny.config(model=tiny.FLOWCNN | {"second_time": True}, **keys | overrides)


GUIDED = mean_flow_config(flow__mean_flow__guidance_kappa=0.5)


def test_two_steps_are_two_jumps(one_device):
    """By themselves, and guided where training did not."""
    config = mean_flow_config()
    graphdef, shapes = abstract_model(config.model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    indices, y = np.arange(2, dtype=np.uint32), np.array([3, 7], np.int32)
    x = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 1)))(image_keys(0, indices)[0])

    @jax.jit
    def u(x, t, r, y):
        t, r = jnp.full(2, t), jnp.full(2, r)
        return apply_model(graphdef, params, x, t, y, r=r)

    for guidance in (1.0, 2.0):
        settings = sampling.Settings(num_steps=2, guidance=guidance)
        expected = x
        for t, r in ((0.0, 0.5), (0.5, 1.0)):
            weak = u(expected, t, r, np.full(2, 10))
            expected += 0.5 * (weak + guidance * (u(expected, t, r, y) - weak))
        found, _ = sampling.make_generator(config, one_device, settings)(params, indices, y)
        assert relative_error(found, expected) < 1e-5


def test_what_is_not_given_is_one_jump():
    settings = sampling.fill_settings(sampling.Settings(), GUIDED)
    assert (settings.sampler, settings.num_steps, settings.guidance) == ("mean_flow", 1, 1.0)
    assert sampling.count_evaluations(settings) == (1, 1)
    columns, _ = strip_columns("steps", sampling.Settings(), GUIDED)
    assert list(columns) == ["1 steps", "2 steps", "4 steps", "8 steps"]


@pytest.mark.parametrize(
    "config, options, message",
    [
        (
            tiny.config(),
            dict(sampler="mean_flow"),
            "sampler is 'mean_flow', and the model was trained for velocities; expected one of eul",
        ),
        (
            mean_flow_config(),
            dict(sampler="heun"),
            "sampler is 'heun', and the model was trained for mean velocities of jumps; expected m",
        ),
        (
            GUIDED,
            dict(guidance=2.0),
            "guidance is 2.0; expected 1, since the model was trained with guidance in its target",
        ),
        (mean_flow_config(), dict(sampler="jump"), "sampler is 'jump'; expected one of"),
    ],
)
def test_what_the_model_cannot_serve_is_one_line(config, options, message):
    with pytest.raises(sampling.SamplingError, match=message) as caught:
        sampling.fill_settings(sampling.Settings(**options), config)
    assert "\n" not in str(caught.value)


def test_a_guide_or_a_strip_of_other_velocities_is_refused():
    with pytest.raises(sampling.SamplingError, match="the guide was trained for another objective"):
        settings = sampling.Settings(guidance=2.0)
        sampling.fill_settings(settings, mean_flow_config(), guide=tiny.config())
    with pytest.raises(sampling.SamplingError, match="compare is 'samplers'; expected another"):
        strip_columns("samplers", sampling.Settings(), GUIDED)


def test_a_run_saved_before_there_were_objectives_is_drawn_as_ever():
    saved = ConfigDict(tiny.config().to_dict())
    del saved.flow["objective"], saved.flow["mean_flow"], saved.model["second_time"]
    assert sampling.fill_settings(sampling.Settings(), saved).sampler == "euler"
