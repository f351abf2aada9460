"""EfficientNet-Lite0 (tensorflow/tpu, models/official/efficientnet/lite): an ImageNet classifier.

A small feature network with weights under an open licence. No published figure is of its features:
they compare one's own runs. Modules have the names of the PyTorch port, efficientnet-lite-pytorch.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.evaluation.features import layers

STEM_WIDTH = 32
NUM_FEATURES = 1280
NUM_CLASSES = 1000

OUTPUTS = {
    "features": "the mean over the last convolution's 7x7 places: 1280",
    "logits": "the classifier's, with its bias, in ImageNet's order: 1000",
}


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    kernel_size: int
    stride: int
    expansion: int
    width: int
    num_blocks: int


STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


class Block(nnx.Module):
    """Wider, depthwise, narrower again; the input is added where the shape stays the same."""

    def __init__(self, in_features: int, stage: Stage, stride: int, *, dtype, rngs: nnx.Rngs):
        width, norm = in_features * stage.expansion, dict(dtype=dtype, rngs=rngs)
        conv = dict(use_bias=False, **norm)
        depthwise = dict(strides=stride, feature_group_count=width, **conv)
        self.expands = stage.expansion > 1
        self.adds_input = stride == 1 and in_features == stage.width
        if self.expands:
            self._expand_conv = layers.conv(in_features, width, (1, 1), **conv)
            self._bn0 = layers.batch_norm(width, **norm)
        self._depthwise_conv = layers.conv(width, width, (stage.kernel_size,) * 2, **depthwise)
        self._bn1 = layers.batch_norm(width, **norm)
        self._project_conv = layers.conv(width, stage.width, (1, 1), **conv)
        self._bn2 = layers.batch_norm(stage.width, **norm)

    def __call__(self, x: Array) -> Array:
        hidden = nnx.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = nnx.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds_input else hidden


class EfficientNetLite0(nnx.Module):
    """Normalised images [N,224,224,3] to OUTPUTS."""

    def __init__(self, *, dtype, rngs: nnx.Rngs):
        norm = dict(dtype=dtype, rngs=rngs)
        conv = dict(use_bias=False, **norm)
        self._conv_stem = layers.conv(3, STEM_WIDTH, (3, 3), strides=2, **conv)
        self._bn0 = layers.batch_norm(STEM_WIDTH, **norm)
        width, blocks = STEM_WIDTH, []
        for stage in STAGES:
            for index in range(stage.num_blocks):
                blocks.append(Block(width, stage, 1 if index else stage.stride, **norm))
                width = stage.width
        self._blocks = nnx.List(blocks)
        self._conv_head = layers.conv(width, NUM_FEATURES, (1, 1), **conv)
        self._bn1 = layers.batch_norm(NUM_FEATURES, **norm)
        self._fc = layers.linear(NUM_FEATURES, NUM_CLASSES, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> dict[str, Array]:
        x = nnx.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = nnx.relu6(self._bn1(self._conv_head(x)))
        features = x.astype(jnp.float32).mean((1, 2))
        return {"features": features, "logits": self._fc(features)}
