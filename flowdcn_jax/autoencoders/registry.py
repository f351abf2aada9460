"""From the `autoencoder` section of a config to an autoencoder."""

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.autoencoders import kl, tiny
from flowdcn_jax.autoencoders.interface import Autoencoder, preview_latents
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

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


class Family(NamedTuple):
    """A network, and how its published weights are read."""

    network: type[nnx.Module]  # its name is what config.json calls it
    find_sizes: Callable  # (tensors, contents of config.json, source) -> the network's sizes
    naming: Callable  # tensors -> function from a parameter's path to its tensor's name


class Published(NamedTuple):
    """What is known of published weights without reading them."""

    family: Family
    how_to_get: str  # what to fetch from where
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
            `name`: "identity": the model works on pixels in [-1,1]; "none": on latents, and there
                is no decoder, so that its pictures are three latent channels, which is a preview;
                "sd_vae": AutoencoderKL as diffusers stores it; "taesd", "taef1", "taef2": the
                tiny ones, as taesd.py or diffusers' AutoencoderTiny stores them;
            `downsampling`: must be the autoencoder's;
            `weights`: a safetensors file that holds encoder and decoder; or a folder that holds
                `diffusion_pytorch_model.safetensors`, else NAME.safetensors, else
                NAME_encoder.safetensors and NAME_decoder.safetensors (the last two: tiny ones
                only). A config.json beside the file is read too;
            `dtype`: compute dtype, "float32", "bfloat16" or "auto".
            identity and none read the first two alone.

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
        autoencoder: identity and none fit all.
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
            f"{_described(autoencoder)}; 'none' draws without a decoder"
        )


def _described(origin: LatentOrigin) -> str:
    return f"{origin.name} with scale {origin.scale:g} and shift {origin.shift:g}"


def _load_identity(config) -> Autoencoder:
    return Autoencoder(
        name=config.name,
        downsampling=1,
        channels=None,
        scale=1.0,
        shift=0.0,
        params={},
        weights_sha256=None,
        encode=lambda params, images: (images, jnp.zeros_like(images)),
        decode=lambda params, x: jnp.clip(x, -1, 1),
    )


def _load_none(config) -> Autoencoder:
    def encode(params, images):
        raise AutoencoderError("config.autoencoder.name is 'none', which cannot encode images")

    return Autoencoder(
        name=config.name,
        downsampling=config.downsampling,
        channels=None,
        scale=1.0,
        shift=0.0,
        params={},
        weights_sha256=None,
        encode=encode,
        decode=lambda params, x: preview_latents(x),
    )


def _load_published(config) -> Autoencoder:
    known = PUBLISHED[config.name]
    how_to_get = (
        f"Fetch {known.how_to_get} and set config.autoencoder.weights to the folder "
        "(sample.py, cache_latents: --autoencoder_weights)"
    )
    files = find_files(config.weights, known.files, how_to_get)
    source = " and ".join(map(str, files.values()))
    tensors, digest = read_tensors(files)
    folder = next(iter(files.values())).parent
    described = read_config(folder, known.family.network.__name__)
    sizes = known.family.find_sizes(tensors, described, source)
    if (sizes.image_channels, sizes.latent_channels) != (3, known.channels):
        raise AutoencoderError(
            f"{source} goes from {sizes.image_channels} image channels to {sizes.latent_channels} "
            f"latent channels; config.autoencoder.name={config.name!r} goes from 3 to "
            f"{known.channels}"
        )

    dtype = compute_dtype(config.dtype)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: known.family.network(sizes, dtype=dtype, rngs=nnx.Rngs(0)))
    )
    tensor_name = known.family.naming(tensors)
    params = place_tensors(nnx.to_pure_dict(state), tensors, tensor_name, source)
    scale = float(described.get("scaling_factor") or known.scale)
    shift = float(described.get("shift_factor") or known.shift)

    def encode(params, images: Array) -> tuple[Array, Array]:
        _check_sides(images, sizes.downsampling)
        return nnx.merge(graphdef, params).encode(images)

    def decode(params, x: Array) -> Array:
        return jnp.clip(nnx.merge(graphdef, params).decode(x / scale + shift), -1, 1)

    return Autoencoder(
        name=config.name,
        downsampling=sizes.downsampling,
        channels=sizes.latent_channels,
        scale=scale,
        shift=shift,
        params=params,
        weights_sha256=digest,
        encode=encode,
        decode=decode,
    )


def _check_sides(images: Array, downsampling: int) -> None:
    height, width = images.shape[1:3]
    if height % downsampling or width % downsampling or not height * width:
        raise AutoencoderError(
            f"images are {height}x{width}; expected sides that are multiples of {downsampling}"
        )


AUTOENCODERS = {
    "identity": _load_identity,
    "preview": _load_none,
    "sd_vae": _load_published,
    "taesd": _load_published,
    "taef1": _load_published,
    "taef2": _load_published,
}
