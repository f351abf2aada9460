"""From weights to arrays: restoring a model, and the compiled function that draws with it."""

import collections
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax import samplers
from flowdcn_jax.autoencoders import Autoencoder, check_fits, decode_images, load_autoencoder
from flowdcn_jax.flow.guidance import guided_velocity
from flowdcn_jax.models import abstract_model, apply_model, takes_max_scale_factor
from flowdcn_jax.models.resolution import max_scale_factor
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated
from flowdcn_jax.sampling.settings import SamplingError, Settings


def load_weights(
    workdir: str, step: int | None, mesh: Mesh, *, ema: str = "ema"
) -> checkpoint.Weights:
    """The EMA weights of a training run, of the EMA of a name, copied to every device of `mesh`.

    Raises:
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """

    def abstract_params(config: ConfigDict):
        _, params = abstract_model(config.model)
        sharding = replicated(mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params
        )

    return checkpoint.restore_ema(workdir, step, abstract_params, name=ema)


def load_model(workdir: str | Path, step: int | None = None) -> tuple[nnx.Module, ConfigDict]:
    """The model of a training run with its EMA weights, and the run's config.

    Args:
        workdir: the --workdir of the run.
        step: the checkpoint to read; the newest by default.

    Returns:
        (model, config): model(x [B,H,W,C], t [B], y [B]) -> velocity [B,H,W,C].

    Raises:
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    mesh = make_mesh(devices=jax.local_devices()[:1])
    weights = load_weights(str(workdir), step, mesh)
    graphdef, _ = abstract_model(weights.config.model)
    return nnx.merge(graphdef, weights.params), weights.config


def stream_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """(initial noise's key, the steps' noise's key): image i's keys are folds of these by i."""
    initial, steps = jax.random.split(jax.random.key(seed))
    return initial, steps


def initial_noise(seed: int, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise [n,*shape]: image i's depends on the seed and on i alone."""
    key, _ = stream_keys(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


def step_noise_keys(seed: int, indices: jax.Array) -> jax.Array:
    """Keys [n] of the SDE samplers' noise: image i's depends on the seed and on i alone."""
    _, key = stream_keys(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def make_generator(
    config: ConfigDict,
    mesh: Mesh,
    settings: Settings,
    *,
    guide: checkpoint.Weights | None = None,
    autoencoder: Autoencoder | None = None,
) -> Callable:
    """A compiled function (params, indices [n], labels [n]) -> (x [n,h,w,C], images uint8).

    x is in the model's space; images are decoded by `autoencoder`, by default the one that
    config.autoencoder names. n is a multiple of the number of devices; rows are split over them.
    `guide` is the weaker model of autoguidance. The function is a functools.partial of a
    jitted one, so that its program can be looked at.

    Raises:
        SamplingError: settings that are out of range, or not for this model or this guide.
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
    """
    if autoencoder is None:
        autoencoder = load_autoencoder(config.autoencoder)
    check_fits(autoencoder, config)
    settings = settings.for_model(config)
    network = _network(config, settings)
    guide_params, guide_network = None, None
    if guide is not None:
        check_guide(config, guide.config, settings)
        guide_params, guide_network = guide.params, _network(guide.config, settings)
    height, width = (side // config.autoencoder.downsampling for side in settings.image_size)
    shape = (height, width, config.model.in_channels)
    rows = batch_sharding(mesh)

    def generate(guide_params, decoder_params, params, indices, labels):
        velocity_fn = guided_velocity(
            functools.partial(network, params),
            jax.lax.with_sharding_constraint(labels, rows),
            null_class=config.model.num_classes,
            scale=settings.guidance,
            channels=settings.guidance_channels,
            interval=settings.guidance_interval,
            schedule=settings.guidance_schedule,
            guide=guide_network and functools.partial(guide_network, guide_params),
        )
        noise = initial_noise(settings.seed, indices, shape)
        x = samplers.solve(
            velocity_fn,
            jax.lax.with_sharding_constraint(noise, rows),
            sampler=settings.sampler,
            num_steps=settings.num_steps,
            last_step=settings.last_step,
            time_shift=settings.time_shift,
            diffusion=settings.diffusion,
            key=step_noise_keys(settings.seed, indices),
        )
        return x, decode_images(autoencoder, decoder_params, x, mesh=mesh)

    compiled = jax.jit(generate, out_shardings=replicated(mesh))
    return functools.partial(compiled, guide_params, copy_to_devices(autoencoder.params, mesh))


def copy_to_devices(params: dict, mesh: Mesh) -> dict:
    """`params` whole on every device; as they are if they lie there."""
    copied = replicated(mesh)
    if all(getattr(leaf, "sharding", None) == copied for leaf in jax.tree.leaves(params)):
        return params
    return jax.jit(lambda tree: tree, out_shardings=copied)(params)


def check_guide(config: ConfigDict, guide: ConfigDict, settings: Settings) -> None:
    """Raises SamplingError unless the guide is used, and on the model's kind of images."""
    if settings.guidance == 1:
        raise SamplingError("guidance is 1; expected another number, since a guide is given")
    for section, key in (
        ("model", "in_channels"),
        ("model", "num_classes"),
        ("autoencoder", "name"),
        ("autoencoder", "downsampling"),
    ):
        own, other = config[section][key], guide[section][key]
        if own != other:
            raise SamplingError(
                f"the guide's config.{section}.{key} is {other!r}; expected {own!r}, the model's"
            )
    patch_size = guide.model.patch_size
    if config.model.patch_size % patch_size:
        raise SamplingError(
            f"the guide's config.model.patch_size is {patch_size}; expected a divisor of "
            f"{config.model.patch_size}, the model's"
        )


def _network(config: ConfigDict, settings: Settings) -> Callable:
    """(params, x, t, y) -> velocity; deformable blocks get the resolution adjustment at t."""
    graphdef, _ = abstract_model(config.model)
    deformable = takes_max_scale_factor(config.model)  # a guide may be without
    stride = config.autoencoder.downsampling * config.model.patch_size
    height, width = settings.image_size

    def apply(params, x, t, y):
        factor = max_scale_factor(
            settings.resolution_adjustment if deformable else "none",
            t[0],  # a solver's t is the same in every row
            tokens=(height // stride, width // stride),
            training_tokens=config.data.image_size // stride,
            depth=config.model.depth,
        )
        return apply_model(graphdef, params, x, t, y, factor)

    return apply


def device_batch_size(batch_size: int, num_images: int) -> int:
    """Images that a device draws at a time: the same for any number of devices, as rounding is.

    So a last round may draw copies, on devices that would have nothing to do.
    """
    return min(batch_size, num_images)


def draw_batches(
    generator: Callable,
    params,
    labels: np.ndarray,
    *,
    ranges: list[tuple[int, int]],
    batch_size: int,
) -> Iterator[tuple[int, int, jax.Array, jax.Array]]:
    """(start, stop, x, images) of the images start ... stop - 1 of each range, a batch at a time.

    Image i has index i and class labels[i]. x and images may have more rows, copies that fill the
    last batch, so that nothing compiles twice. The next batch is under way on the devices while one
    is used.
    """
    ahead = collections.deque()
    for first, end in ranges:
        for start in range(first, end, batch_size):
            stop = min(start + batch_size, end)
            rows = np.minimum(np.arange(start, start + batch_size), stop - 1)
            x, images = generator(params, rows.astype(np.uint32), labels[rows])
            ahead.append((start, stop, x, images))
            if len(ahead) > 1:
                yield ahead.popleft()
    yield from ahead


def generate_images(
    generator: Callable, params, labels: np.ndarray, *, batch_size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(x, images) for labels [n], image i having index i, in batches of one size.

    batch_size is that of all devices together. Process 0 alone shows progress.
    """
    parts = []
    whole = [(0, len(labels))]
    hidden = not progress or jax.process_index() != 0
    with tqdm(total=len(labels), unit="image", disable=hidden, dynamic_ncols=True) as bar:
        for start, stop, *arrays in draw_batches(
            generator, params, labels, ranges=whole, batch_size=batch_size
        ):
            parts.append([np.asarray(array)[: stop - start] for array in arrays])
            bar.update(stop - start)
    x, images = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return x, images
