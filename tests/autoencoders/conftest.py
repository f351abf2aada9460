"""Weights to test with: the golden SD-VAE, and random tiny autoencoders as files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from flowdcn_jax.autoencoders import load_autoencoder, tiny
from tests.conftest import FIXTURES

SD_VAE = FIXTURES / "tiny_sd_vae"
WIDTH = 8  # of random tiny autoencoders; published ones have 64
CHANNELS = {"taesd": 4, "taef1": 16, "taef2": 32}


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


@pytest.fixture(scope="session")
def load():
    """load_autoencoder with every key given."""

    def load(name, weights=None, *, dtype="float32", downsampling=8):
        return load_autoencoder(
            ConfigDict(dict(name=name, weights=weights, dtype=dtype, downsampling=downsampling))
        )

    return load


@functools.cache
def parameter_shapes(name: str) -> dict[tuple, tuple[int, ...]]:
    """Of a tiny autoencoder's parameters, by path."""
    sizes = tiny.TinySizes(
        image_channels=3,
        latent_channels=CHANNELS[name],
        width=WIDTH,
        midblock_norm=name == "taef2",
    )
    abstract = nnx.eval_shape(
        lambda: tiny.AutoencoderTiny(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(abstract)))
    return {path: leaf.shape for path, leaf in flat.items()}


def random_tensors(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny autoencoder's tensors by the names of taesd.py, with "encoder." or "decoder."."""
    generator, tensors = np.random.default_rng(seed), {}
    for path, shape in parameter_shapes(name).items():
        shape = shape if len(shape) == 1 else (*shape[:-3:-1], *shape[:-2])
        values = 0.5 * generator.normal(size=shape) * np.prod(shape[1:]) ** -0.5
        tensors[tiny.taesd_name(path)] = values.astype(np.float32)
    tensors["decoder.19.bias"][:] = 0.5  # most pixels are then within the range
    return tensors


def write_pair(tensors, folder, name) -> None:
    """NAME_encoder.safetensors and NAME_decoder.safetensors, as taesd.py reads them."""
    for half in ("encoder", "decoder"):
        part = {k.removeprefix(f"{half}."): v for k, v in tensors.items() if k.startswith(half)}
        save_file(part, folder / f"{name}_{half}.safetensors")


def write_single(tensors, path) -> None:
    """One file with the names of diffusers."""
    renamed = {}
    for name, tensor in tensors.items():
        half, index, rest = name.split(".", 2)
        renamed[f"{half}.layers.{int(index) - (half == 'decoder')}.{rest}"] = tensor
    save_file(renamed, path)


@pytest.fixture(scope="session")
def taesd_folder(tmp_path_factory):
    """Random TAESD weights as a pair of files."""
    folder = tmp_path_factory.mktemp("taesd")
    write_pair(random_tensors("taesd"), folder, "taesd")
    return folder


def encode(autoencoder, images):
    return jax.jit(autoencoder.encode)(autoencoder.params, images)


def decode(autoencoder, x):
    return jax.jit(autoencoder.decode)(autoencoder.params, x)
