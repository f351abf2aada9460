"""An autoencoder with random weights, for timing: the work is that of the real ones."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from flowdcn_jax.autoencoders import Autoencoder, kl


def random_kl(sizes: kl.KLSizes, *, dtype: Any) -> Autoencoder:
    """AutoencoderKL of these sizes, with normal kernels of variance 1 / fan-in.

    The layers start at zero, to be loaded; nothing but zeros would go through them.
    """
    graphdef, state = nnx.split(kl.AutoencoderKL(sizes, dtype=dtype, rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.Array) -> np.ndarray:
        if path[-1].key != "kernel":
            return np.asarray(leaf)
        deviation = math.prod(leaf.shape[:-1]) ** -0.5
        return deviation * generator.standard_normal(leaf.shape, np.float32)

    return Autoencoder(
        name="sd_vae",
        downsampling=sizes.downsampling,
        channels=sizes.latent_channels,
        scale=0.18215,
        shift=0.0,
        params=jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state)),
        weights_sha256=None,
        encode=lambda params, images: nnx.merge(graphdef, params).encode(images),
        decode=lambda params, x: nnx.merge(graphdef, params).decode(x),
    )
