"""The Inception-v3 of 2015-12-05, by which FID, sFID and the Inception score are defined.

It is the graph that ADM's evaluator runs (classify_image_graph_def.pb), under the names of its port
to PyTorch, which pytorch-fid and torch-fidelity share. It is not torchvision's network: averages
leave the padding out, the last block takes a maximum, and there are 1008 classes.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.evaluation.features import layers

NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # of mixed_6/conv, the first branch of Mixed_6d

OUTPUTS = {
    "features": "pool_3, the mean over Mixed_7c's 8x8 places: 2048 (FID)",
    "pool": "the same",
    "spatial": "mixed_6/conv, the first 7 channels of Mixed_6d: 17x17x7 = 2023 by rows, columns, "
    "channels, as in ADM's reference files (sFID)",
    "logits": "pool times the classifier's weight, without its bias: 1008 (Inception score)",
}


class Layer(NamedTuple):
    """A convolution, its batch norm and ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# What comes one after the other; layers in a list within it stand side by side.
Chain = list["Layer | Callable | list[Layer]"]

SQUARE, ROW, COLUMN = (3, 3), (1, 7), (7, 1)
HALVING = (SQUARE, 2, "VALID")
average = partial(
    nnx.avg_pool, window_shape=SQUARE, strides=(1, 1), padding="SAME", count_include_pad=False
)
maximum = partial(nnx.max_pool, window_shape=SQUARE, strides=(1, 1), padding="SAME")
halve = partial(nnx.max_pool, window_shape=SQUARE, strides=(2, 2))


def numbered(name: str, *options: tuple) -> Chain:
    """Layers with the names name_1, name_2 and so on."""
    return [Layer(f"{name}_{number}", *rest) for number, rest in enumerate(options, start=1)]


def crossed(name: str) -> list[Layer]:
    """Two layers side by side, the pieces of a 3x3 convolution."""
    return [Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))]


def block_a(pool_width: int) -> list[Chain]:
    return [
        [Layer("branch1x1", 64)],
        numbered("branch5x5", (48,), (64, (5, 5))),
        numbered("branch3x3dbl", (64,), (96, SQUARE), (96, SQUARE)),
        [average, Layer("branch_pool", pool_width)],
    ]


def block_c(width: int) -> list[Chain]:
    double = ((width,), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW))
    return [
        [Layer("branch1x1", 192)],
        numbered("branch7x7", (width,), (width, ROW), (192, COLUMN)),
        numbered("branch7x7dbl", *double),
        [average, Layer("branch_pool", 192)],
    ]


def block_e(pool: Callable) -> list[Chain]:
    return [
        [Layer("branch1x1", 320)],
        [*numbered("branch3x3", (384,)), crossed("branch3x3_2")],
        [*numbered("branch3x3dbl", (448,), (384, SQUARE)), crossed("branch3x3dbl_3")],
        [pool, Layer("branch_pool", 192)],
    ]


STEM: Chain = [
    Layer("Conv2d_1a_3x3", 32, *HALVING),
    Layer("Conv2d_2a_3x3", 32, SQUARE, padding="VALID"),
    Layer("Conv2d_2b_3x3", 64, SQUARE),
    halve,
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, SQUARE, padding="VALID"),
    halve,
]
# Blocks, each of branches whose outputs are put side by side.
BLOCKS: dict[str, list[Chain]] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": [
        [Layer("branch3x3", 384, *HALVING)],
        numbered("branch3x3dbl", (64,), (96, SQUARE), (96, *HALVING)),
        [halve],
    ],
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": [
        numbered("branch3x3", (192,), (320, *HALVING)),
        numbered("branch7x7x3", (192,), (192, ROW), (192, COLUMN), (192, *HALVING)),
        [halve],
    ],
    "Mixed_7b": block_e(average),
    "Mixed_7c": block_e(maximum),
}


class ConvNormRelu(nnx.Module):
    """What a Layer describes."""

    def __init__(self, in_features: int, layer: Layer, *, dtype, rngs: nnx.Rngs):
        self.conv = layers.conv(
            in_features,
            layer.width,
            layer.kernel,
            strides=layer.stride,
            padding=layer.padding,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn = layers.batch_norm(layer.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.bn(self.conv(x)))


def add_layers(module: nnx.Module, chain: Chain, width: int, *, dtype, rngs: nnx.Rngs) -> int:
    """Makes the layers of a chain attributes of a module; returns the width of what comes out."""
    for step in chain:
        side_by_side = step if isinstance(step, list) else [step]
        found = [layer for layer in side_by_side if isinstance(layer, Layer)]
        for layer in found:
            setattr(module, layer.name, ConvNormRelu(width, layer, dtype=dtype, rngs=rngs))
        width = sum(layer.width for layer in found) or width  # poolings leave it as it is
    return width


def run_chain(module: nnx.Module, chain: Chain, x: Array) -> Array:
    """What comes out of a chain whose layers are attributes of a module."""

    def run(x: Array, step) -> Array:
        if isinstance(step, list):
            return jnp.concatenate([run(x, layer) for layer in step], axis=-1)
        return getattr(module, step.name)(x) if isinstance(step, Layer) else step(x)

    return reduce(run, chain, x)


class Block(nnx.Module):
    """A block of BLOCKS."""

    def __init__(self, name: str, in_features: int, *, dtype, rngs: nnx.Rngs):
        self.name, options = name, dict(dtype=dtype, rngs=rngs)
        self.width = sum([add_layers(self, c, in_features, **options) for c in BLOCKS[name]])

    def __call__(self, x: Array) -> Array:
        return jnp.concatenate([run_chain(self, c, x) for c in BLOCKS[self.name]], axis=-1)


class Inception(nnx.Module):
    """Normalised images [N,299,299,3] to OUTPUTS."""

    def __init__(self, *, dtype, rngs: nnx.Rngs):
        width = add_layers(self, STEM, 3, dtype=dtype, rngs=rngs)
        for name in BLOCKS:
            block = Block(name, width, dtype=dtype, rngs=rngs)
            setattr(self, name, block)
            width = block.width
        self.fc = layers.linear(width, NUM_CLASSES, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> dict[str, Array]:
        x = run_chain(self, STEM, x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL_CHANNELS].astype(jnp.float32).reshape(x.shape[0], -1)
        pool = x.astype(jnp.float32).mean((1, 2))
        logits = pool @ self.fc.kernel[...]
        return {"features": pool, "pool": pool, "spatial": spatial, "logits": logits}
