"""The authors' names, shapes and order, and the way there and back."""

import numpy as np
import pytest

from flowdcn_jax.config import load_config
from flowdcn_jax.published_weights import PublishedWeightsError
from flowdcn_jax.published_weights.names import official_tensors
from tests import official


@pytest.mark.parametrize("file", ["model.npz", "smax.npz", "sit.npz"])
def test_names_shapes_and_values_there_and_back(fixture_file, file):
    golden = fixture_file(file)
    expected = official.state_dict(golden)
    config = official.run_config(golden).model
    tensors = official_tensors(config, tokens_per_side=8)
    assert {name: value.shape for name, value in expected.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    if file != "sit.npz":  # whose own checkpoints name their EMA, so that its order does not matter
        assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        value = tensor.constant
        if tensor.path is not None:
            ours = tensor.to_ours(expected[name])
            assert ours.shape == tensor.our_shape and ours.flags.c_contiguous
            value = tensor.to_theirs(ours)
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(
    "config, message",
    [
        ("flowcnn_3x3", "name is 'flowcnn'; expected one of .*: flowdcn, sit"),
        ("s2_layer_norm", "norm is 'layer_norm'; expected 'rms_norm'"),
        ("s2_gelu", "mlp is 'gelu'; expected 'swiglu'"),
        ("sit_s2_plus", "norm is 'rms_norm'; expected 'layer_norm'"),
    ],
)
def test_models_that_nobody_published_are_named(config, message):
    config = load_config(config).model
    with pytest.raises(PublishedWeightsError, match=message):
        official_tensors(config, tokens_per_side=16)


def test_fixed_scale_priors_are_constants_that_the_authors_hold(golden):
    config = official.run_config(golden).model
    learned = official_tensors(config, tokens_per_side=8)
    config.learn_scale_prior = False
    fixed = official_tensors(config, tokens_per_side=8)
    assert {n: t.shape for n, t in fixed.items()} == {n: t.shape for n, t in learned.items()}
    radii = 1 / (1 + np.exp(-fixed["blocks.2.attn.deformables_scale"].constant.ravel()))
    np.testing.assert_allclose(radii, [0.25, 0.5, 0.75, 1], atol=2e-4)
