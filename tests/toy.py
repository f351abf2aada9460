"""A network of a few operations with parameters of every kind, for tests of what trains it.

Its steps run in milliseconds without being compiled: see `observe` in tests/training/test_keys.py.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp
from flax import nnx

from flowdcn_jax import models
from flowdcn_jax.config import model_config
from flowdcn_jax.models import layers
from tests import tiny


class ToyBlock(nnx.Module):
    """x + Linear(RMSNorm(x))"""

    def __init__(self, width: int, **shared):
        self.norm = layers.rms_norm(width, **shared)
        self.linear = layers.Linear(width, width, **shared)

    def __call__(self, x):
        return x + self.linear(self.norm(x))


class ToyNetwork(nnx.Module):
    """A velocity network that looks at single patches; its kernels have one shape."""

    takes_max_scale_factor = False

    def __init__(self, options: models.NetworkOptions, *, rngs: nnx.Rngs):
        self.patch_size, width = options.patch_size, options.width
        features = options.patch_size**2 * options.in_channels
        shared = dict(dtype=options.compute_dtype, rngs=rngs)
        self.stem = layers.Linear(features, width, **shared)
        self.class_embedder = layers.ClassEmbedder(options.num_classes, width, rngs=rngs)
        self.blocks = nnx.List(ToyBlock(width, **shared) for _ in range(options.depth))
        self.final = layers.Linear(width, features, **shared)

    def __call__(self, x, t, y):
        condition = self.class_embedder(y) + t[:, None]
        x = nnx.silu(self.stem(layers.patchify(x, self.patch_size)) + condition[:, None, None])
        for block in self.blocks:
            x = block(x)
        return layers.unpatchify(self.final(x), self.patch_size).astype(jnp.float32)

    def forward_macs(self, height: int, width: int) -> int:
        """Of the three Linears, for each patch."""
        patches = (height // self.patch_size) * (width // self.patch_size)
        return patches * (2 + len(self.blocks)) * self.stem.kernel.size


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The network is config.model.name="toy"."""
    toy = models.Model(ToyNetwork, models.NetworkOptions)
    with mock.patch.dict(models.MODELS, toy=toy):
        yield


def config(**overrides):
    """tests.tiny's config with the toy for its model; within `registered` alone."""
    model = dict(width=16, depth=1, patch_size=4, in_channels=1, num_classes=10, dtype="float32")
    for key in [key for key in overrides if key.startswith("model__")]:
        model[key.removeprefix("model__")] = overrides.pop(key)
    result = tiny.config(**overrides).unlock()
    result.model = model_config("toy") | model
    return result.lock()
