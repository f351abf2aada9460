"""SiT against the authors' model, and what its users rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowdcn_jax import models
from flowdcn_jax.config import load_config
from flowdcn_jax.models import layers, sit
from tests.comparison import relative_error
from tests.official import model_config, nhwc, to_tree
from tests.pallas_kernels.test_devices import fake_device

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def golden(fixture_file):
    return fixture_file("sit.npz")


@pytest.fixture(scope="module")
def params(golden):
    """The official tiny model's parameters, once they are known to fit."""
    tree = to_tree(golden)
    _, abstract = models.abstract_model(model_config(golden))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, abstract)
    return tree


def run(golden, params, x=None, **overrides):
    graphdef, _ = models.abstract_model(model_config(golden, **overrides))
    x = nhwc(golden["x"]) if x is None else x
    network = jax.jit(functools.partial(models.apply_model, graphdef))
    return network(params, x, golden["t"], golden["y"])


def test_output_matches_official(golden, params):
    assert relative_error(run(golden, params), nhwc(golden["out"])) < 1e-5


def test_positions_match_official(golden):
    ours = sit.position_embedding(8, 8, 48)
    np.testing.assert_allclose(ours.reshape(1, 64, 48), golden["param/pos_embed"], atol=1e-7)


def test_positions_of_other_sizes_are_the_same_coordinates():
    large = sit.position_embedding(16, 12, 48)
    np.testing.assert_array_equal(large[:8, :8], sit.position_embedding(8, 8, 48))
    np.testing.assert_array_equal(large[3, 9, :24], large[11, 9, :24])  # the column
    np.testing.assert_array_equal(large[3, 9, 24:], large[3, 2, 24:])  # the row


def test_bfloat16_is_close_to_float32(golden, params):
    out = run(golden, params, dtype="bfloat16")
    assert out.dtype == jnp.float32
    assert relative_error(out, nhwc(golden["out"])) < 2e-2


@pytest.mark.parametrize("options", [{}, dict(norm="rms_norm", mlp="swiglu")])
def test_initial_values(golden, options):
    config = model_config(golden, **options)
    model = models.build_model(config, rngs=nnx.Rngs(0))
    block = model.blocks[1]
    bound = np.sqrt(6 / (48 + 3 * 48))
    assert 0.9 * bound < np.abs(block.attention.qkv.kernel[...]).max() <= bound
    first = block.mlp.w1 if options else block.mlp.hidden
    assert 0.9 < np.abs(first.kernel[...]).max() / np.sqrt(6 / sum(first.kernel.shape)) <= 1
    assert 0.015 < np.std(model.time_embedder.hidden.kernel[...]) < 0.025
    for layer in (block.attention.qkv, block.attention.out, model.time_embedder.out, model.stem):
        assert not layer.bias[...].any()
    tokens, condition = jax.random.normal(jax.random.key(0), (2, 3, 48))[:, :, None], jnp.ones(48)
    tokens_after, pending = block(tokens, None, condition[None])
    np.testing.assert_array_equal(layers.add_residual(tokens_after, *pending), tokens)  # adaLN-zero
    assert not model.final.linear.kernel[...].any()


def test_float32_attention_is_not_rounded_to_tf32(golden, params):
    """Every product, in both directions, asks for full precision."""
    graphdef, _ = models.abstract_model(model_config(golden, depth=1))
    one_block = params | {"blocks": {0: params["blocks"][0]}}

    def loss(params):
        x = nhwc(golden["x"])
        return models.apply_model(graphdef, params, x, golden["t"], golden["y"]).sum()

    products = str(jax.make_jaxpr(jax.grad(loss))(one_block)).split("dot_general[")[1:]
    assert len(products) > 20
    highest = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert all(highest in product.partition("] ")[0] for product in products)


@pytest.mark.parametrize(
    "device, dtype, head_dim, expected",
    [
        (fake_device(), jnp.bfloat16, 64, "cudnn"),
        (fake_device(), jnp.bfloat16, 72, "cudnn"),
        (fake_device(), jnp.bfloat16, 20, "xla"),
        (fake_device(), jnp.bfloat16, 136, "xla"),
        (fake_device(), jnp.float32, 64, "xla"),
        (fake_device(capability="7.5"), jnp.bfloat16, 64, "xla"),
        (fake_device(version="rocm 70000"), jnp.bfloat16, 64, "xla"),
        (fake_device(platform="cpu"), jnp.bfloat16, 64, "xla"),
    ],
)
def test_where_cudnn_is_used(monkeypatch, device, dtype, head_dim, expected):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert sit.attention_implementation(jnp.dtype(dtype), head_dim) == expected
    assert sit.attention_implementation(dtype, head_dim) == expected


@pytest.mark.parametrize(
    "name, millions, gmacs, gmacs_512",
    [  # of the DiT paper (arXiv 2212.09748), whose networks SiT took over
        ("s2", 33, 6.06, None),
        pytest.param("b2", 130, 23.01, None, marks=pytest.mark.slow),
        pytest.param("l2", 458, 80.71, None, marks=pytest.mark.slow),
        ("xl2", 675, 118.64, 524.60),
    ],
)
def test_published_sizes(name, millions, gmacs, gmacs_512):
    """Published GMACs hold some elementwise work, 0.1 % at most."""
    config = load_config(f"sit_{name}").model
    graphdef, params = models.abstract_model(config)
    model = nnx.merge(graphdef, params)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6) == millions
    assert 0 <= gmacs / (model.forward_macs(32, 32) / 1e9) - 1 < 1e-3
    if gmacs_512:
        assert 0 <= gmacs_512 / (model.forward_macs(64, 64) / 1e9) - 1 < 1e-3


def test_unknown_options_are_named(golden):
    for key in ("norm", "mlp"):
        config = model_config(golden, **{key: "batch"})
        with pytest.raises(ValueError, match=f"{key} is 'batch'; expected one of"):
            models.build_model(config, rngs=nnx.Rngs(0))
