"""On a GPU: the golden features in float32 (no TF32), TF32 and bfloat16 beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.comparison import relative_error
from tests.evaluation.conftest import TINY_DINOV2

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options, tolerance",
    [({}, 1e-4), (dict(fast=True), 1e-2), (dict(dtype="bfloat16"), 5e-2)],
)
def test_inception_matches_torch_fidelity(inception_file, fixture_file, load, options, tolerance):
    golden = fixture_file("inception.npz")
    inception = load("inception", inception_file, **options)
    for size in ("64", "256", "rect", "299"):
        outputs = inception(golden[f"{size}/images"])
        assert relative_error(outputs["pool"], golden[f"{size}/pool"]) < tolerance
        assert relative_error(outputs["logits"], golden[f"{size}/logits_unbiased"]) < tolerance


@pytest.mark.parametrize(
    "options, tolerance",
    [({}, 1e-4), (dict(fast=True), 1e-2), (dict(dtype="bfloat16"), 5e-2)],
)
def test_dinov2_matches_edm2(fixture_file, load, options, tolerance):
    golden = fixture_file("dinov2.npz")
    dinov2 = load("dinov2", TINY_DINOV2, **options)
    for size in ("32x32", "256x256", "300x200"):
        features = dinov2(golden[f"{size}/images"])["features"]
        assert relative_error(features, golden[f"{size}/cls"]) < tolerance


def test_dinov2_uses_cudnn_in_bfloat16_alone(load):
    for dtype in ("float32", "bfloat16"):
        dinov2 = load("dinov2", TINY_DINOV2, dtype=dtype)
        x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        # Private: which kernel attention takes is read off the program.
        program = dinov2._run.lower(dinov2._params, x).compile().as_text()
        assert ("fmha" in program) == (dtype == "bfloat16")


def test_padding_does_not_change_features(load):
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 30, 3), np.uint8)
    dinov2 = load("dinov2", TINY_DINOV2, batch_size=4)
    features = dinov2(images)["features"]
    assert relative_error(dinov2(images[4:5])["features"], features[4:5]) < 1e-6
