"""What bfloat16 must not touch: gradients' sums, the condition and the last Linear."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowdcn_jax import models
from flowdcn_jax.config import model_config
from flowdcn_jax.models import products
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state
from flowdcn_jax.training.step import make_train_step
from tests import tiny
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dict(width=16, depth=1, in_channels=1, num_classes=10, dtype="bfloat16")
PARTS = {"flowdcn": dict(num_groups=2), "flowcnn": dict(num_groups=2), "sit": dict(num_heads=2)}
MOSTLY = [x if x != "flowcnn" else pytest.param(x, marks=pytest.mark.slow) for x in PARTS]


def config(name, **overrides):
    return tiny.config(model=model_config(name) | SMALL | PARTS[name] | overrides)


def traced(config, mesh):
    """A step, traced for a batch of 16 digits."""
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.uint8, sharding=batch_sharding(mesh)),
        "label": jax.ShapeDtypeStruct((16,), jnp.int32, sharding=batch_sharding(mesh)),
    }
    return make_train_step(config, mesh).trace(abstract_state(config, mesh), batch)


@pytest.mark.parametrize("name", MOSTLY)
def test_devices_add_gradients_up_in_float32(name):
    text = traced(config(name), make_mesh(8, 1)).lower().compile().as_text()
    reduces = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert reduces
    for line in reduces:  # CPUs widen those of 16 bits, and rename what adds
        assert "promoted" not in line and "bf16[" not in line


def test_with_the_option_devices_add_rounded_gradients_up(tmp_path):
    """As the partitioner leaves it: CPUs widen the sums afterwards. SiT's norms have no scales."""
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    rounded = config("sit", gradient_dtype="bfloat16")
    traced(rounded, make_mesh(8, 1)).lower().compile(compiler_options=dump)
    (path,) = tmp_path.glob("*after_spmd-partitioning*")
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-reduce", path.read_text())
    parameters = len(jax.tree.leaves(models.abstract_model(rounded.model)[1]))
    assert [dtype for dtype, _ in sums].count("bf16") == parameters
    assert [each for each in sums if each[0] != "bf16"] == [("f32", "")]  # the loss


@pytest.mark.parametrize("name", ["flowdcn", "flowcnn"])
def test_the_option_is_of_every_product_with_parameters(name):
    mesh = make_mesh(1, 1, jax.devices()[:1])
    assert "parameter_product" in str(traced(config(name), mesh).jaxpr)
    rounded = str(traced(config(name, gradient_dtype="bfloat16"), mesh).jaxpr)
    assert not re.search(r"[^_]parameter_product|parameter_convolution", rounded)
    dtypes = re.findall(r"exact_parameter_product\[\s*gradient_dtype=(\w+)", rounded)
    assert dtypes and set(dtypes) == {"bfloat16"}


def test_eight_devices_give_the_gradients_of_one():
    norms = []
    for devices in (1, 8):
        mesh = make_mesh(devices, 1, jax.devices()[:devices])
        state = initial_state(config("flowdcn"), mesh)
        batch = {
            "image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8),
            "label": np.arange(16, dtype=np.int32) % 10,
        }
        step = make_train_step(config("flowdcn"), mesh)
        _, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        norms.append(float(metrics["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("name", MOSTLY)
def test_the_condition_and_the_last_linear_are_float32(name):
    narrow, exact = (config(name, dtype=dtype).model for dtype in ("bfloat16", "float32"))
    params = models.random_params(models.abstract_model(exact)[1])
    networks = [nnx.merge(models.abstract_model(c)[0], params) for c in (narrow, exact)]
    times = jnp.arange(250) / 250
    embedded, right = (network.time_embedder(times) for network in networks)
    steps = jnp.diff(right, axis=0)
    assert embedded.dtype == jnp.float32
    assert float(jnp.abs(embedded - right).max()) < 0.01 * float(jnp.abs(steps).mean())
    final = networks[0].final(
        jnp.ones((2, 4, 4, 16), jnp.bfloat16), networks[0].class_embedder(jnp.array([1, 2]))
    )
    assert final.dtype == jnp.float32
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([1, 2])
    out, expected = (network(x, jnp.array([0.1, 0.9]), y) for network in networks)
    assert relative_error(out, expected) < 5e-2


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


CASES = {
    "product": (lambda x, k: products.product(x, k), (4, 6, 16), (16, 8)),
    "convolution": (
        lambda x, k: products.convolution(x, k, groups=2),
        (2, 5, 4, 16),
        (3, 3, 8, 16),
    ),
    "bias": (lambda x, k: products.add_bias(x, k), (4, 6, 16), (16,)),
}
EXACT = {
    "product": (
        lambda x, k: products.product(x, k, gradient_dtype=jnp.bfloat16),
        (4, 6, 16),
        (16, 8),
    ),
    "bias": (
        lambda x, k: products.add_bias(x, k, gradient_dtype=jnp.bfloat16),
        (4, 6, 16),
        (16,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_float32_up_to_the_operands_rounding(name):
    function, x_shape, k_shape = CASES[name]
    x, k = draw(1, *x_shape).astype(jnp.bfloat16), draw(2, *k_shape)

    def loss(x, k):
        return jnp.sum(jnp.sin(function(x, k).astype(jnp.float32)))

    of_x, of_k = jax.grad(loss, (0, 1))(x, k)
    assert of_x.dtype == jnp.bfloat16 and of_k.dtype == jnp.float32
    wide = x.astype(jnp.float32)
    for found, expected in zip((of_x, of_k), jax.grad(loss, (0, 1))(wide, k), strict=True):
        assert relative_error(found.astype(jnp.float32), expected) < 3e-2
    tangents = jax.jvp(loss, (x, k), (x, k))[1], jax.jvp(loss, (wide, k), (wide, k))[1]
    assert float(tangents[0]) == pytest.approx(float(tangents[1]), rel=5e-2)
    rematerialised = jax.grad(jax.checkpoint(loss), 1)(x, k)
    np.testing.assert_array_equal(rematerialised, of_k)
    each = jax.vmap(lambda k: jax.grad(loss, 1)(x, k))(jnp.stack([k, 2 * k]))
    assert relative_error(each[0], of_k) < 1e-2
    mapped = jax.vmap(lambda x: function(x, k))(jnp.stack([x, x]))
    np.testing.assert_array_equal(mapped[1], function(x, k))


@pytest.mark.parametrize("name", EXACT)
def test_rounded_gradients_of_float32_leave_all_else_as_it_is(name):
    function, x_shape, k_shape = EXACT[name]
    x, k = draw(1, *x_shape), draw(2, *k_shape)
    plain = {"product": jnp.matmul, "bias": jnp.add}[name]
    values, gradients = [], []
    for each in (function, plain):
        with jax.default_matmul_precision("highest"):
            value, pull = jax.vjp(each, x, k)
        values.append(value)
        gradients.append(pull(jnp.cos(value)))
    assert relative_error(*values) < 1e-6
    (of_x, of_k), (right_x, right_k) = gradients
    assert relative_error(of_x, right_x) < 1e-6
    assert of_k.dtype == jnp.float32 and 1e-5 < relative_error(of_k, right_k) < 2e-2
    np.testing.assert_array_equal(of_k, of_k.astype(jnp.bfloat16))
    jax.jvp(function, (x, k), (x, k))
    mapped = jax.vmap(lambda x: function(x, k))(jnp.stack([x, x]))
    assert relative_error(mapped[1], values[0]) < 1e-6


def test_a_gradients_sum_is_not_rounded():
    """Ones of 4096 rows: bfloat16 would stop at 256 where it adds, and round where it stores."""
    x = jnp.ones((4097, 1), jnp.bfloat16)
    gradient = jax.grad(lambda k: jnp.sum(products.product(x, k).astype(jnp.float32)))(
        jnp.ones((1, 1))
    )
    assert float(gradient[0, 0]) == 4097
