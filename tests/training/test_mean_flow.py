"""Training by MeanFlow: the same numbers on any mesh and in parts, and what it asks of a config."""

import json
import re

import jax
import numpy as np
import pytest

from flowdcn_jax.config import load_config, validate
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs.record import check_resumable
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated
from flowdcn_jax.training.objective import make_objective
from flowdcn_jax.training.step import accumulate
from tests import tiny
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")


def config(**overrides):
    """Of a SiT, guided in training; each second row has r > t."""
    model = tiny.SIT | {"second_time": True, "patch_size": 4, "attention": "xla"}
    keys = {
        "flow__objective": "mean_flow",
        "flow__mean_flow__equal_share": 0.5,
        "flow__mean_flow__guidance_kappa": 0.5,
        "flow__label_dropout": 0.3,
        "sampling__guidance": 1.0,
        "train__batch_size": 32,
    }
    remat = overrides.pop("remat", False)
    return tiny.config(model=model | {"remat": remat}, **keys | overrides)


def loss_and_gradients(config, mesh, num_parts):
    """(((loss, more), gradients) of a step, the compiled program) on `mesh`, in parts."""
    objective, image = make_objective(config), (32, 8, 8, 1)
    value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)

    def step(params, data, label):
        rows = data, label, objective.draw(jax.random.key(1), image)
        if num_parts == 1:
            return value_and_grad(params, *rows)
        return accumulate(value_and_grad, params, rows, num_parts, mesh, group=objective.group)

    rng, shapes = np.random.default_rng(0), abstract_model(config.model)[1]
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    data = rng.standard_normal(image, np.float32)
    rows = batch_sharding(mesh)
    compiled = jax.jit(step, in_shardings=(replicated(mesh), rows, rows))
    program = compiled.lower(params, data, np.arange(32) % 10).compile()
    return program(params, data, np.arange(32) % 10), program.as_text()


def test_devices_and_parts_make_no_difference_and_rows_stay_where_they_are():
    of_one, of_eight = (
        config(remat=remat, flow__mean_flow__guidance_kappa=0.0) for remat in (False, True)
    )
    expected, _ = loss_and_gradients(of_one, make_mesh(devices=jax.devices()[:1]), 1)
    found, program = loss_and_gradients(of_eight, make_mesh(8, 1, jax.devices()[:8]), 2)
    errors = jax.tree.map(relative_error, found, expected)
    assert max(jax.tree.leaves(errors)) < 2e-5, errors
    assert not re.search(r" (all-to-all|collective-permute|all-gather)(-start)?\(", program)


def test_what_does_not_go_together_is_one_line():
    for overrides, message in (
        (dict(flow__objective="velocity"), "model.second_time is True; expected False, since con"),
        (dict(model__second_time=False), "model.second_time is False; expected True, since conf"),
        (
            dict(flow__mean_flow__equal_share=0.2),
            "equal_share is 0.2; expected a share of whole rows, a fraction whose denominator div",
        ),
        (dict(flow__mean_flow__equal_share=1.01), r"equal_share is 1.01; expected a number in \[0"),
        (dict(flow__mean_flow__r_std=0.0), "mean_flow.r_std is 0.0; expected a positive number"),
        (dict(flow__mean_flow__r_mean=11.0), r"r_mean is 11.0; expected a number in \[-10, 10\]"),
        (dict(flow__mean_flow__guidance_end=-0.5), r"guidance_end is -0.5; expected a number in"),
        (
            dict(flow__mean_flow__guidance_begin=0.8, flow__mean_flow__guidance_end=0.5),
            "guidance_begin is 0.8; expected at most flow.mean_flow.guidance_end=0.5",
        ),
        (dict(flow__label_dropout=0.0), "label_dropout is 0.0; expected above 0 and at most"),
        (dict(flow__label_dropout=0.6), "label_dropout is 0.6; expected .*equal_share=0.5"),
        (dict(sampling__guidance=2.0), "sampling.guidance is 2.0; expected 1, since the target"),
        (dict(evaluate__guidance=2.0), "evaluate.guidance is 2.0; expected 1, since the target"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            validate(config(**overrides), num_devices=1, num_processes=1)
        assert "\n" not in str(caught.value)
    validate(config(evaluate__guidance=1.0), num_devices=8, num_processes=1)


def test_a_run_keeps_its_objective():
    now = config()
    saved = json.loads(now.to_json())
    check_resumable(saved, now)
    now.flow.mean_flow.guidance_kappa = 0.0  # what may change
    check_resumable(saved, now)
    velocity = load_config("s2")
    old = json.loads(velocity.to_json())
    del old["flow"]["objective"], old["flow"]["mean_flow"], old["model"]["second_time"]
    check_resumable(old, velocity)
    velocity.flow.objective, velocity.model.second_time = "mean_flow", True
    with pytest.raises(ConfigError, match="config.flow.objective: 'velocity' -> 'mean_flow'"):
        check_resumable(old, velocity)
