"""DINOv2 (Oquab et al., arXiv 2304.07193): the vision transformer by which FD-DINOv2 is defined.

Published figures are of ViT-L/14 without registers, with the preprocessing of EDM2 (NVlabs/edm2,
calculate_metrics.py).
"""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flowdcn_jax.evaluation.features import layers
from flowdcn_jax.evaluation.features.weights import FeaturesError, Tensors
from flowdcn_jax.models.sit import attention_implementation

PATCH = (14, 14)  # pixels
GRID = 16  # patches a side of an image of 224 pixels
HEAD_WIDTH = 64  # of all published sizes
POSITION_OFFSET = 0.1  # the authors add it to the grid's side before they take the scale
POSITION_CUBIC = -0.75  # PyTorch's a, where it resizes without antialias

OUTPUTS = {"features": "the class token after the last LayerNorm, not normalised"}

# The names in facebookresearch/dinov2 and in transformers -> those here.
_RENAMED = {
    r"^patch_embed\.proj\.": "patch_embed.",
    r"\.mlp\.": ".",
    r"\.gamma$": "",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.attention\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1",
    r"^layernorm\.": "norm.",
}


class Sizes(NamedTuple):
    """What the architecture leaves open."""

    width: int
    depth: int
    num_heads: int


VIT_L = Sizes(width=1024, depth=24, num_heads=16)


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens; the softmax is float32."""

    def __init__(self, width: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = layers.linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = layers.linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[N,T,d] -> [N,T,d]."""
        head_width = x.shape[-1] // self.num_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, head_width)
        mixed = jax.nn.dot_product_attention(
            *jnp.moveaxis(qkv, 2, 0),
            implementation=attention_implementation(qkv.dtype, head_width),
        )
        return self.proj(mixed.reshape(x.shape))


class Block(nnx.Module):
    """x += scale * attention(norm(x)), then the same with an MLP. The sums are float32."""

    def __init__(self, width: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        options = dict(dtype=dtype, rngs=rngs)
        self.norm1 = layers.layer_norm(width, **options)
        self.attn = Attention(width, num_heads, **options)
        self.ls1 = nnx.Param(jnp.zeros(width))
        self.norm2 = layers.layer_norm(width, **options)
        self.fc1 = layers.linear(width, 4 * width, **options)
        self.fc2 = layers.linear(4 * width, width, **options)
        self.ls2 = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        """float32 [N,T,d] -> [N,T,d]."""
        x = x + self.ls1[...] * self.attn(self.norm1(x))
        hidden = nnx.gelu(self.fc1(self.norm2(x)), approximate=False)
        return x + self.ls2[...] * self.fc2(hidden)


class DINOv2(nnx.Module):
    """Normalised images [N,224,224,3] to OUTPUTS."""

    def __init__(self, sizes: Sizes, *, dtype, rngs: nnx.Rngs):
        width, depth, num_heads = sizes
        options = dict(dtype=dtype, rngs=rngs)
        self.patch_embed = layers.conv(3, width, PATCH, strides=PATCH, **options)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 1 + GRID**2, width)))
        self.blocks = nnx.List([Block(width, num_heads, **options) for _ in range(depth)])
        self.norm = layers.layer_norm(width, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> dict[str, Array]:
        patches = self.patch_embed(x).astype(jnp.float32)
        patches = patches.reshape(x.shape[0], GRID**2, -1)
        first = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, patches.shape[2]))
        x = jnp.concatenate([first, patches], axis=1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return {"features": self.norm(x[:, 0])}


def read(tensors: Tensors, path: Path) -> tuple[Callable[..., DINOv2], Tensors]:
    """(builder, a tensor a parameter), from the tensors of the authors or of transformers.

    The sizes are those that the tensors show, with the heads of the config.json beside the file.
    Without one, as beside the authors' files, heads are HEAD_WIDTH wide.

    Raises:
        FeaturesError: no table of positions, or one or a config.json that cannot be used.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    renamed.pop("mask_token", None)  # of training: no patch is masked here
    for query in [name for name in renamed if ".attn.query." in name]:
        names = [query.replace("query", part) for part in ("query", "key", "value")]
        parts = [renamed.pop(name) for name in names if name in renamed]
        renamed[query.replace("query", "qkv")] = np.concatenate(parts)
    if "pos_embed" not in renamed:
        raise FeaturesError(f"{path} is no DINOv2: it lacks pos_embed")
    renamed["pos_embed"] = table = fit_positions(renamed["pos_embed"], source=str(path))
    width = table.shape[-1]
    blocks = {name.split(".")[1] for name in renamed if name.startswith("blocks.")}
    num_heads = _configured_heads(path.with_name("config.json")) or width // HEAD_WIDTH
    return partial(DINOv2, Sizes(width, len(blocks), num_heads)), renamed


def _configured_heads(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text())["num_attention_heads"])
    except (ValueError, TypeError, KeyError) as error:
        raise FeaturesError(f"{path} is not the config.json of a DINOv2: {error!r}") from error


def fit_positions(table: np.ndarray, *, source: str) -> np.ndarray:
    """The learned positions [1,1+n*n,d] for images of 224 pixels, as the authors' code fits them.

    It takes the scale (GRID + 0.1) / n, where others take GRID / n and get other features.

    Raises:
        FeaturesError: a table of another shape.
    """
    side = math.isqrt(table.shape[1] - 1) if table.ndim == 3 and table.shape[1] > 1 else 0
    if side == 0 or table.shape[:2] != (1, 1 + side**2):
        expected = "(1, 1 + n * n, width)"
        raise FeaturesError(f"pos_embed of {source} has shape {table.shape}; expected {expected}")
    if side == GRID:
        return table
    matrix = cubic_matrix(side, GRID, scale=(GRID + POSITION_OFFSET) / side)
    grid = np.float64(table[0, 1:]).reshape(side, side, -1)
    grid = np.einsum("yh,xw,hwd->yxd", matrix, matrix, grid, optimize=True)
    return np.concatenate([table[:, :1], np.float32(grid.reshape(1, GRID**2, -1))], axis=1)


def cubic_matrix(size: int, new_size: int, *, scale: float) -> np.ndarray:
    """PyTorch's bicubic resize without antialias along one axis: weights [new_size,size].

    Four taps around (i + 0.5) / scale - 0.5; those beyond the border fall on it.
    """
    place = (np.arange(new_size) + 0.5) / scale - 0.5
    below, pixels, a = np.floor(place).astype(int), np.eye(size), POSITION_CUBIC
    matrix = np.zeros((new_size, size))
    for tap in (below - 1, below, below + 1, below + 2):
        x = np.abs(place - tap)  # Keys' kernel of it
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        weights = np.where(x <= 1, near, far)
        matrix += weights[:, None] * pixels[np.clip(tap, 0, size - 1)]
    return matrix
