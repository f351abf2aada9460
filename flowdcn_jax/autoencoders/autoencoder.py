"""Autoencoders: what each offers, the one that a config names, and pictures made with it."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowdcn_jax.autoencoders import kl, tiny
from flowdcn_jax.autoencoders.weights import (
    AutoencoderError,
    Files,
    find_files,
    place_tensors,
    read_config,
    read_tensors,
)
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.precision import compute_dtype

PUBLISHED_DOWNSAMPLING = 8
"""Image pixels a latent pixel, each side, of all published autoencoders here."""

LATENT_PREVIEW_RANGE = 3.0  # scaled latents have a standard deviation near 1
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

# Decoded at a time on each device: 16 images of 256x256, 4 of 512x512, 1 of 1024x1024.
PIXELS_PER_SLICE = 2**20


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Between images and the space that the model works in: x = (latents - shift) * scale.

    `encode` and `decode` are pure and can be compiled. Give them `params` as an argument, put on
    the devices once: as they are here, in host memory, every call would copy them there.

    Attributes:
        name: of config.autoencoder.
        downsampling: image pixels a latent pixel, each side.
        encode: (params, images [B,H,W,3] float32 in [-1,1]) -> (mean, std), unscaled latents
            [B,H/f,W/f,C] float32; std is zero where the autoencoder is deterministic.
        decode: (params, x [B,h,w,C] in the model's space) -> images [B,f h,f w,3], float32 in
            [-1,1].
        channels: of the latents; None: any number.
        scale: factor that brings latents near unit variance.
        shift: taken from the latents before that.
        params: nested dicts of float32 NumPy arrays; {} where there is nothing to load.
        weights_sha256: of the weight files' bytes, one file after the other; None without files.
    """

    name: str
    downsampling: int
    encode: Callable[[Any, Array], tuple[Array, Array]]
    decode: Callable[[Any, Array], Array]
    channels: int | None = None
    scale: float = 1.0
    shift: float = 0.0
    params: Any = dataclasses.field(default_factory=dict)
    weights_sha256: str | None = None


class Family(NamedTuple):
    """A network, and how its published weights are read."""

    network: type[nnx.Module]  # its name is what config.json calls it
    find_sizes: Callable  # (tensors, contents of config.json, source) -> the network's sizes
    naming: Callable  # tensors -> function from a parameter's path to its tensor's name


class Published(NamedTuple):
    """What is known of published weights without reading them."""

    family: Family
    how_to_get: str  # what to fetch from where
    by_name: str  # what flowdcn_jax.named_weights calls them
    files: tuple[Files, ...]  # what to look for in a folder, the preferred first
    channels: int  # of the latents
    scale: float  # x = (latents - shift) * scale, where no config.json says otherwise
    shift: float
    space: str  # autoencoders of one space decode what the others encode


class LatentOrigin(Protocol):
    """What encoded latents: an `Autoencoder`, or what a data set keeps of one."""

    name: str
    weights_sha256: str | None
    scale: float
    shift: float


KL = Family(kl.AutoencoderKL, kl.find_sizes, kl.naming)
TINY = Family(tiny.AutoencoderTiny, tiny.find_sizes, tiny.naming)


def _tiny(name: str, *, fetch: str, channels: int, space: str) -> Published:
    """TAESD and its relatives work in the scaled space itself: scale 1, shift 0."""
    pair = {"encoder.": f"{name}_encoder.safetensors", "decoder.": f"{name}_decoder.safetensors"}
    return Published(
        family=TINY,
        how_to_get=f"{fetch} from https://huggingface.co/madebyollin/{name}",
        by_name=name,
        files=({"": DIFFUSERS_FILE}, {"": f"{name}.safetensors"}, pair),
        channels=channels,
        scale=1.0,
        shift=0.0,
        space=space,
    )


PUBLISHED = {
    "sd_vae": Published(
        family=KL,
        how_to_get=f"{DIFFUSERS_FILE} and config.json from "
        "https://huggingface.co/stabilityai/sd-vae-ft-ema (or sd-vae-ft-mse)",
        by_name="sd-vae-ft-ema",
        files=({"": DIFFUSERS_FILE},),
        channels=4,
        scale=0.18215,
        shift=0.0,
        space="sd",
    ),
    "taesd": _tiny("taesd", fetch=DIFFUSERS_FILE, channels=4, space="sd"),
    "taef1": _tiny("taef1", fetch=DIFFUSERS_FILE, channels=16, space="flux1"),
    "taef2": _tiny("taef2", fetch="taef2.safetensors", channels=32, space="flux2"),
}


def load_autoencoder(config) -> Autoencoder:
    """The autoencoder that `config` (config.autoencoder) names, with its weights.

    Args:
        config: reads
            `name`: "identity": the model works on pixels in [-1,1]; "preview": on latents, and
                there is no decoder: its pictures are three of their channels; "sd_vae":
                AutoencoderKL as diffusers stores it; "taesd", "taef1", "taef2": the tiny ones, as
                taesd.py or diffusers' AutoencoderTiny stores them;
            `downsampling`: must be the autoencoder's;
            `weights`: a safetensors file that holds encoder and decoder; or a folder that holds
                `diffusion_pytorch_model.safetensors`, else NAME.safetensors, else
                NAME_encoder.safetensors and NAME_decoder.safetensors (the last two: tiny ones
                only). A config.json beside the file is read too;
            `dtype`: compute dtype, "float32", "bfloat16" or "auto".
            identity and preview read the first two alone.

    Raises:
        flowdcn_jax.errors.ConfigError: unknown name, or another downsampling.
        WeightsNotFoundError: no weights there; the message tells what to fetch from where.
        AutoencoderError: weights that are damaged, or of another autoencoder.
    """
    if config.name not in AUTOENCODERS:
        raise ConfigError(
            f"config.autoencoder.name is {config.name!r}; expected one of "
            f"{', '.join(sorted(AUTOENCODERS))}"
        )
    autoencoder = AUTOENCODERS[config.name](config)
    if config.downsampling != autoencoder.downsampling:
        raise ConfigError(
            f"config.autoencoder.downsampling is {config.downsampling}; expected "
            f"{autoencoder.downsampling}, that of config.autoencoder.name={config.name!r}"
        )
    return autoencoder


def check_fits(autoencoder: Autoencoder, config, *, origin: LatentOrigin | None = None) -> None:
    """Checks that the autoencoder decodes what the model of `config` draws.

    An autoencoder decodes its own latents, and those of another one in the same space; both have
    the published scale and shift then.  Of its own, other weights are warned of: the decoders of
    sd-vae-ft-ema and sd-vae-ft-mse share an encoder.

    Args:
        autoencoder: identity and preview fit all.
        config: its `model.in_channels` is read.
        origin: what encoded the latents that the model is trained on; None: not known, or pixels.

    Raises:
        flowdcn_jax.errors.ConfigError: the number of channels, or the space of the latents differs.
    """
    if autoencoder.name not in PUBLISHED:
        return
    if config.model.in_channels != autoencoder.channels:
        raise ConfigError(
            f"config.model.in_channels is {config.model.in_channels}; expected "
            f"{autoencoder.channels}, the latent channels of "
            f"config.autoencoder.name={autoencoder.name!r}"
        )
    if origin is None:
        return
    if origin.name != autoencoder.name:
        _check_space(autoencoder, origin)
    elif (origin.scale, origin.shift) != (autoencoder.scale, autoencoder.shift):
        raise ConfigError(
            f"config.autoencoder.weights are {_described(autoencoder)}; expected those of the "
            f"training data's latents, {_described(origin)}"
        )
    elif None not in (digests := (origin.weights_sha256, autoencoder.weights_sha256)):
        if len(set(digests)) > 1:
            logging.warning(
                "the training data's latents were encoded by %s with weights of SHA-256 %s; "
                "config.autoencoder.weights have %s",
                autoencoder.name,
                *digests,
            )


def _check_space(autoencoder: Autoencoder, origin: LatentOrigin) -> None:
    """Raises ConfigError unless both are published autoencoders of one space, unchanged."""
    spaces = set()
    for either in (autoencoder, origin):
        known = PUBLISHED.get(either.name)
        published = known and (known.scale, known.shift) == (either.scale, either.shift)
        spaces.add(known.space if published else either.name)
    if len(spaces) > 1:
        raise ConfigError(
            f"config.autoencoder.name is {autoencoder.name!r}; expected what decodes the training "
            f"data's latents, which {_described(origin)} encoded. config.autoencoder.weights are "
            f"{_described(autoencoder)}; 'preview' draws without a decoder"
        )


def _described(origin: LatentOrigin) -> str:
    return f"{origin.name} with scale {origin.scale:g} and shift {origin.shift:g}"


def _load_identity(config) -> Autoencoder:
    return Autoencoder(
        name=config.name,
        downsampling=1,
        encode=lambda params, images: (images, jnp.zeros_like(images)),
        decode=lambda params, x: jnp.clip(x, -1, 1),
    )


def _load_preview(config) -> Autoencoder:
    def encode(params, images):
        raise AutoencoderError("config.autoencoder.name is 'preview', which cannot encode images")

    return Autoencoder(
        name=config.name,
        downsampling=config.downsampling,
        encode=encode,
        decode=lambda params, x: preview_latents(x),
    )


def _load_published(config) -> Autoencoder:
    known = PUBLISHED[config.name]
    how_to_get = (
        f"Fetch {known.how_to_get} (python -m flowdcn_jax.tools.weights fetch {known.by_name} "
        "does, and prints the folder) and set config.autoencoder.weights to the folder "
        "(sample.py, cache_latents: --autoencoder_weights)"
    )
    files = find_files(config.weights, known.files, how_to_get)
    source = " and ".join(map(str, files.values()))
    tensors, digest = read_tensors(files)
    if known.family is KL:
        tensors = kl.from_ldm(tensors)
    folder = next(iter(files.values())).parent
    described = read_config(folder, known.family.network.__name__)
    sizes = known.family.find_sizes(tensors, described, source)
    if (sizes.image_channels, sizes.latent_channels) != (3, known.channels):
        raise AutoencoderError(
            f"{source} goes from {sizes.image_channels} image channels to {sizes.latent_channels} "
            f"latent channels; config.autoencoder.name={config.name!r} goes from 3 to "
            f"{known.channels}"
        )

    scale = float(described.get("scaling_factor") or known.scale)
    shift = float(described.get("shift_factor") or known.shift)
    abstract, encode, decode = _functions(
        known.family.network, sizes, compute_dtype(config.dtype), scale, shift
    )
    return Autoencoder(
        name=config.name,
        downsampling=sizes.downsampling,
        encode=encode,
        decode=decode,
        channels=sizes.latent_channels,
        scale=scale,
        shift=shift,
        params=place_tensors(abstract, tensors, known.family.naming(tensors), source),
        weights_sha256=digest,
    )


@functools.lru_cache
def _functions(
    network: type[nnx.Module], sizes: NamedTuple, dtype: Any, scale: float, shift: float
) -> tuple[dict, Callable, Callable]:
    """(shapes of the parameters, encode, decode): the same functions where the arguments are.

    So a network is traced once, and JAX compiles no function twice, however often it is loaded.
    """
    abstract = nnx.eval_shape(lambda: network(sizes, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def encode(params, images: Array) -> tuple[Array, Array]:
        _check_sides(images, sizes.downsampling)
        return nnx.merge(graphdef, params).encode(images)

    def decode(params, x: Array) -> Array:
        return jnp.clip(nnx.merge(graphdef, params).decode(x / scale + shift), -1, 1)

    return nnx.to_pure_dict(state), encode, decode


def _check_sides(images: Array, downsampling: int) -> None:
    height, width = images.shape[1:3]
    if height % downsampling or width % downsampling or not height * width:
        raise AutoencoderError(
            f"images are {height}x{width}; expected sides that are multiples of {downsampling}"
        )


AUTOENCODERS = {
    "identity": _load_identity,
    "preview": _load_preview,
    "sd_vae": _load_published,
    "taesd": _load_published,
    "taef1": _load_published,
    "taef2": _load_published,
}
"""The autoencoders by the names of config.autoencoder.name; `load_autoencoder` loads one."""


def to_unit_range(images: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1,1]; latents (floats) pass as they are."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images.astype(jnp.float32)


def decode_pixels(x: Array) -> Array:
    """[-1,1] float [B,H,W,C] -> uint8 [B,H,W,C]."""
    return jnp.round(jnp.clip(x * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def preview_latents(x: Array) -> Array:
    """Latents [B,h,w,C] -> [B,h,w,3] in [-1,1]: three channels, +-3 filling the range."""
    channels = jnp.minimum(jnp.arange(3), x.shape[-1] - 1)
    return jnp.clip(x[..., channels] / LATENT_PREVIEW_RANGE, -1, 1)


def decode_images(autoencoder: Autoencoder, params: Any, x: Array, *, mesh: Mesh) -> Array:
    """Pictures of x, uint8, in slices of at most PIXELS_PER_SLICE a device.

    Rows are decoded on the device that holds them. To be called under jit.

    Args:
        autoencoder: its `decode` is called.
        params: the autoencoder's, on the devices.
        x: [B,h,w,C] in the model's space, split over all axes of `mesh`; B is a multiple of the
            number of devices.
        mesh: the devices.
    """
    rows, shape = x.shape[0] // mesh.size, x.shape[1:]
    pixels = shape[0] * shape[1] * autoencoder.downsampling**2
    num_slices = math.ceil(rows / max(1, PIXELS_PER_SLICE // pixels))
    slice_rows = math.ceil(rows / num_slices)
    filled = num_slices * slice_rows  # rows of a device, with zeros at the end

    x = x.reshape(mesh.size, rows, *shape)
    x = jnp.pad(x, [(0, 0), (0, filled - rows)] + [(0, 0)] * len(shape))
    x = x.reshape(mesh.size, num_slices, slice_rows, *shape).swapaxes(0, 1)
    x = x.reshape(num_slices, mesh.size * slice_rows, *shape)
    by_row = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    x = jax.lax.with_sharding_constraint(x, by_row)
    images = jax.lax.map(lambda part: decode_pixels(autoencoder.decode(params, part)), x)

    shape = images.shape[2:]
    images = images.reshape(num_slices, mesh.size, slice_rows, *shape).swapaxes(0, 1)
    return images.reshape(mesh.size, filled, *shape)[:, :rows].reshape(mesh.size * rows, *shape)
