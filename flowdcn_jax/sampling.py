"""From weights to pictures: restoring a model and drawing images with it."""

import functools
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax import samplers
from flowdcn_jax.autoencoders import Autoencoder, check_fits, decode_images, load_autoencoder
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write
from flowdcn_jax.flow.guidance import guided_velocity
from flowdcn_jax.images import grid_columns, make_grid, save_png
from flowdcn_jax.models import abstract_model, apply_model
from flowdcn_jax.training import checkpoint
from flowdcn_jax.training.sharding import batch_sharding, make_mesh, replicated


class SamplingError(UserError, ValueError):
    """A request that the model cannot serve; the message names the value and the choices."""


def load_weights(workdir: str, step: int | None, mesh: Mesh) -> checkpoint.Weights:
    """The EMA weights of a training run, copied to every device of `mesh`.

    Raises:
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """

    def abstract_params(config: ConfigDict):
        _, params = abstract_model(config.model)
        sharding = replicated(mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params
        )

    return checkpoint.restore_ema(workdir, step, abstract_params)


def load_model(workdir: str | Path, step: int | None = None) -> tuple[nnx.Module, ConfigDict]:
    """The model of a training run with its EMA weights, and the run's config.

    Args:
        workdir: the --workdir of the run.
        step: the checkpoint to read; the newest by default.

    Returns:
        (model, config): model(x [B,H,W,C], t [B], y [B]) -> velocity [B,H,W,C].

    Raises:
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    mesh = make_mesh(devices=jax.local_devices()[:1])
    weights = load_weights(str(workdir), step, mesh)
    graphdef, _ = abstract_model(weights.config.model)
    return nnx.merge(graphdef, weights.params), weights.config


def initial_noise(seed: int, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise [n,*shape]: image i's depends on the seed and on i alone."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


def make_generator(
    config,
    mesh: Mesh,
    *,
    size: tuple[int, int],
    num_steps: int,
    guidance: float,
    seed: int,
    autoencoder: Autoencoder | None = None,
) -> Callable:
    """A compiled function (params, indices [n], labels [n]) -> (x [n,h,w,C], images uint8).

    x is in the model's space; images are decoded by `autoencoder`, by default the one that
    config.autoencoder names. n is a multiple of the number of devices; rows are split over them.
    `size` (height, width) is in image pixels.

    Raises:
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
    """
    if autoencoder is None:
        autoencoder = load_autoencoder(config.autoencoder)
    check_fits(autoencoder, config)
    graphdef, _ = abstract_model(config.model)
    downsampling = config.autoencoder.downsampling
    shape = (size[0] // downsampling, size[1] // downsampling, config.model.in_channels)
    times = samplers.uniform_times(num_steps)

    def generate(decoder_params, params, indices, labels):
        def velocity_fn(x, t, y):
            return apply_model(graphdef, params, x, t, y)

        guided = guided_velocity(velocity_fn, null_class=config.model.num_classes, scale=guidance)
        rows = batch_sharding(mesh)
        noise = jax.lax.with_sharding_constraint(initial_noise(seed, indices, shape), rows)
        x = samplers.euler(guided, noise, jax.lax.with_sharding_constraint(labels, rows), times)
        return x, decode_images(autoencoder, decoder_params, x, mesh=mesh)

    copied = replicated(mesh)
    decoder_params = jax.jit(lambda tree: tree, out_shardings=copied)(autoencoder.params)
    return functools.partial(jax.jit(generate, out_shardings=copied), decoder_params)


def generate_images(
    generator: Callable, params, labels: np.ndarray, *, batch_size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(x, images) for labels [n], image i having index i, in batches of one size.

    The last batch is filled up with copies that are thrown away, so that nothing compiles twice.
    """
    count = len(labels)
    padded = math.ceil(count / batch_size) * batch_size
    indices = np.minimum(np.arange(padded), count - 1)
    parts = []
    bar = tqdm(total=count, unit="image", disable=not progress, dynamic_ncols=True)
    for start in range(0, padded, batch_size):
        rows = indices[start : start + batch_size]
        x, images = generator(params, rows.astype(np.uint32), labels[rows])
        kept = min(batch_size, count - start)
        parts.append((np.asarray(x)[:kept], np.asarray(images)[:kept]))
        bar.update(kept)
    bar.close()
    return np.concatenate([x for x, _ in parts]), np.concatenate([image for _, image in parts])


def labels_in_turn(classes: tuple[int, ...], num_images: int, num_classes: int) -> np.ndarray:
    """Labels [num_images]: image i is of class i modulo the classes asked for (all if none)."""
    chosen = np.asarray(classes if len(classes) else range(num_classes), np.int32)
    return chosen[np.arange(num_images) % len(chosen)]


def parse_classes(classes: list[str], num_classes: int, names: tuple[str, ...] | None) -> list[int]:
    """Class numbers from numbers or names.

    Raises:
        SamplingError: a number out of range or an unknown name; the message gives the choices.
    """
    choices = f"numbers from 0 to {num_classes - 1}"
    if names:
        close = "" if len(names) > 20 else f" ({', '.join(names)})"
        choices += f", or names of classes{close}"
    numbers = []
    for text in classes:
        text = text.strip()
        if names and text in names:
            numbers.append(names.index(text))
        elif text.isdecimal() and int(text) < num_classes:
            numbers.append(int(text))
        else:
            raise SamplingError(f"--classes names {text!r}; expected {choices}")
    return numbers


def parse_size(image_size: str | None, config) -> tuple[int, int]:
    """(height, width) in pixels of "HxW"; the size of training for None.

    Raises:
        SamplingError: not of that form, or a side that the model cannot make.
    """
    if image_size is None:
        return (config.data.image_size,) * 2
    stride = config.autoencoder.downsampling * config.model.patch_size
    match = re.fullmatch(r"(\d+)x(\d+)", image_size)
    size = tuple(int(side) for side in match.groups()) if match else (0, 0)
    if min(size) < 1 or any(side % stride for side in size):
        raise SamplingError(
            f"--image_size is {image_size!r}; expected HxW, both multiples of {stride} "
            f"(autoencoder.downsampling={config.autoencoder.downsampling} times "
            f"model.patch_size={config.model.patch_size})"
        )
    return size


def with_autoencoder(config: ConfigDict, name: str | None, weights: str | None) -> ConfigDict:
    """A copy of a run's config that decodes with another autoencoder, or with weights elsewhere.

    Another `name` has its own weights: those of the config are then left out.
    """
    config = config.copy_and_resolve_references()
    if name not in (None, config.autoencoder.name):
        config.autoencoder.update(name=name, weights=None)
    if weights is not None:
        config.autoencoder.weights = weights
    return config


def sample_to_folder(
    workdir: str,
    *,
    step: int | None = None,
    classes: list[str] | None = None,
    num_images: int = 64,
    num_steps: int = 50,
    guidance: float = 1.375,
    image_size: str | None = None,
    seed: int = 0,
    out: str | None = None,
    save_images: bool = False,
    batch_size: int = 64,
    autoencoder: str | None = None,
    autoencoder_weights: str | None = None,
) -> Path:
    """What sample.py does, with its flags as arguments; returns the path of the grid.

    batch_size is the largest number of images that a device draws at a time.

    Raises:
        SamplingError: classes, image_size or out cannot be used.
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    for name, value, minimum in (
        ("num_images", num_images, 1),
        ("num_steps", num_steps, 1),
        ("guidance", guidance, 0),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        if not (value >= minimum and math.isfinite(value)):
            raise SamplingError(f"--{name} is {value}; expected at least {minimum}")
    if seed >= 2**32:
        raise SamplingError(f"--seed is {seed}; expected a number below 2**32")
    mesh = make_mesh()
    weights = load_weights(workdir, step, mesh)
    config = with_autoencoder(weights.config, autoencoder, autoencoder_weights)
    decoder = load_autoencoder(config.autoencoder)
    check_fits(decoder, config)
    num_classes = config.model.num_classes
    chosen = tuple(config.sampling.classes)
    if classes is not None:
        chosen = tuple(parse_classes(classes, num_classes, weights.class_names))
    size = parse_size(image_size, config)
    folder = Path(out) if out else Path(workdir) / "samples" / f"step_{weights.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # found out now, not after the work
    except OSError as error:
        raise SamplingError(f"--out={folder} cannot be made a folder: {error}") from error

    labels = labels_in_turn(chosen, num_images, num_classes)
    generator = make_generator(
        config,
        mesh,
        size=size,
        num_steps=num_steps,
        guidance=guidance,
        seed=seed,
        autoencoder=decoder,
    )
    per_device = min(batch_size, math.ceil(num_images / mesh.size))
    x, images = generate_images(
        generator, weights.params, labels, batch_size=per_device * mesh.size, progress=True
    )
    grid = make_grid(images, columns=grid_columns(num_images, len(chosen) or num_classes))
    if config.autoencoder.name == "none":
        logging.warning("latents, and no decoder: the pictures show three latent channels")
        arrays = {"latents": x, "labels": labels}
    else:
        arrays = {"arr_0": images, "arr_1": labels}
    with atomic_write(folder / "samples.npz") as file:
        np.savez(file, **arrays)
    if save_images:
        for index, image in enumerate(images):
            save_png(folder / "images" / f"{index:05d}.png", image)
    save_png(folder / "grid.png", grid)
    return folder / "grid.png"
