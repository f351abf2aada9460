"""On a GPU: the golden fixtures in float32 (no TF32), bfloat16 beside it, and repeatable steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import data, models
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import initial_state
from flowdcn_jax.training.step import make_train_step
from pallas_kernels.deformable_conv import deformable_aggregate
from tests import official, tiny
from tests.comparison import relative_error
from tests.pallas_kernels.aggregation import check_released, output_and_gradients

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_operator_matches_official(fixture_file, case, dtype, tolerance):
    aggregate = functools.partial(deformable_aggregate, boundary="truncate")
    both = jax.jit(functools.partial(output_and_gradients, aggregate))

    def function(values, offsets, weights, cotangent):
        return both(values.astype(dtype), offsets, weights, cotangent.astype(dtype))

    options = dict(tolerance=tolerance, product_tolerance=10 * tolerance)
    check_released(fixture_file("op.npz"), case, function, **options)


@pytest.mark.parametrize("suffix", ["", "_nonsquare"])
def test_model_matches_official(fixture_file, suffix):
    golden = fixture_file("model.npz")
    config = official.model_config(golden)
    x = official.nhwc(golden["x" + suffix])
    params = official.to_tree(golden)

    def run(dtype, params):
        graphdef, _ = official.build(config, dtype)
        return jax.jit(lambda p: models.apply_model(graphdef, p, x, golden["t"], golden["y"]))(
            params
        )

    single = run(jnp.float32, params)
    assert relative_error(single, official.nhwc(golden["out" + suffix])) < 2e-5
    halved = jax.tree.map(lambda leaf: leaf / 2, params)
    assert relative_error(run(jnp.bfloat16, halved), run(jnp.float32, halved)) < 2e-2


def test_sit_matches_official_and_uses_cudnn_in_bfloat16(fixture_file):
    golden = fixture_file("sit.npz")
    x, expected = official.nhwc(golden["x"]), official.nhwc(golden["out"])
    params = official.to_tree(golden)

    def run(dtype):
        """(output, program) of forward and backward passes."""
        graphdef, _ = models.abstract_model(official.model_config(golden, dtype=dtype))

        def both(params):
            out, pullback = jax.vjp(
                lambda p: models.apply_model(graphdef, p, x, golden["t"], golden["y"]), params
            )
            return out, *pullback(out)

        compiled = jax.jit(both).lower(params).compile()
        return *compiled(params), compiled.as_text()

    single, single_grads, program = run("float32")
    assert relative_error(single, expected) < 1e-5
    assert "fmha" not in program
    half, half_grads, program = run("bfloat16")
    assert relative_error(half, expected) < 2e-2
    assert "fmhaSoftmax" in program and "fmhaSoftmaxBackward" in program
    qkv, half_qkv = (g["blocks"][1]["attention"]["qkv"] for g in (single_grads, half_grads))
    assert relative_error(half_qkv["kernel"], qkv["kernel"]) < 5e-2


def test_training_steps_repeat_to_the_bit():
    config = tiny.config(model__dtype="bfloat16", model__width=64)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    source = data.make_source(config.data)

    def run():
        stream = data.make_batches(source, batch_size=16, seed=0, num_threads=0, prefetch_batches=0)
        state, step = initial_state(config, mesh), make_train_step(config, mesh)
        for _ in range(5):
            state, metrics = step(state, next(stream))
        return jax.device_get((state.params, metrics))

    jax.tree.map(np.testing.assert_array_equal, run(), run())
