"""A feature network small enough for a test, whose features of an image never depend on others."""

import collections

import numpy as np

NUM_FEATURES, NUM_SPATIAL, NUM_CLASSES = 24, 12, 10

# The tiny config of a run that is evaluated, with samples that are more than their noise.
EVALUATED = dict(
    checkpoint__every_steps=3,
    evaluate__every_steps=4,
    evaluate__num_images=21,
    evaluate__num_steps=3,
    evaluate__guidance=1.5,
    evaluate__features="efficientnet_lite0",
    ema__decay=0.5,
    ema__others=("constant_0.9",),
    optimizer__learning_rate=0.05,
)


class FakeFeatures:
    """Stands in for `load_features`: some pixels, each scaled and bent by itself."""

    def __init__(
        self,
        batch_size=7,
        *,
        network="inception",
        num_features=NUM_FEATURES,
        published=True,
        **description,
    ):
        self.batch_size = batch_size
        self.num_features = num_features
        self.calls = 0
        fields = {
            "network": network,
            "protocol": "adm",
            "preprocessing": "none",
            "precision": "float32",
            "weights_sha256": "ab" * 32,
            "source_sha256": "6726825d" + 56 * "0" if published else None,
        } | description
        self.description = collections.namedtuple("Description", fields)(**fields)

    def __call__(self, images):
        assert images.dtype == np.uint8 and 0 < len(images) <= self.batch_size
        assert images.shape[3] == 3
        self.calls += 1
        outputs = {"features": self._of(images, self.num_features, 1.0)}
        if self.description.network == "inception":
            outputs["spatial"] = self._of(images, NUM_SPATIAL, 1.7)
            outputs["logits"] = 3 * self._of(images, NUM_CLASSES, 2.3)
            outputs["pool"] = outputs["features"]
        return outputs

    @staticmethod
    def _of(images, count, frequency):
        pixels = np.tile(images.reshape(len(images), -1), 9)[:, 3 : 3 + count].astype(np.float32)
        return np.sin(pixels * np.float32(frequency / 60)) + pixels / np.float32(255)


def load_features(name, *, weights, mesh):
    """What training would have of the real one."""
    assert weights is None
    return FakeFeatures(2 * mesh.size, network=name)


def outputs(images, **options):
    """All outputs of a fake network for images [N,H,W,3] at once."""
    return FakeFeatures(len(images), **options)(images)


def random_images(count, *, seed=0, size=(8, 9), channels=3, spread=256):
    """uint8 [count,*size,channels], of values below `spread`."""
    shape = (count, *size, channels)
    return np.random.default_rng(seed).integers(0, spread, shape).astype(np.uint8)


def save(path, images, **arrays):
    """Writes an .npz file and returns its path as text."""
    np.savez(path, arr_0=images, **arrays)
    return str(path)
