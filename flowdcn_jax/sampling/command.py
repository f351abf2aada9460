"""What sample.py does."""

import logging
import math
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from flowdcn_jax.autoencoders import check_fits, load_autoencoder
from flowdcn_jax.files import atomic_write
from flowdcn_jax.images import grid_columns, make_grid, save_png
from flowdcn_jax.sampling.classes import labels_in_turn, parse_classes
from flowdcn_jax.sampling.generator import generate_images, load_weights, make_generator
from flowdcn_jax.sampling.settings import (
    SamplingError,
    Settings,
    check_number,
    parse_interval,
    parse_size,
)
from flowdcn_jax.training.sharding import make_mesh


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
    sampler: str = "euler",
    num_steps: int = 50,
    last_step: float | None = None,
    time_shift: float = 1.0,
    diffusion: str | None = None,
    guidance: float = 1.375,
    guidance_channels: str = "all",
    guidance_interval: list[str] | None = None,
    guidance_schedule: str = "constant",
    guide_workdir: str | None = None,
    guide_step: int | None = None,
    image_size: str | None = None,
    resolution_adjustment: str = "none",
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
        SamplingError: a value cannot be used.
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
        flowdcn_jax.training.checkpoint.CheckpointError: no such checkpoint, or it is damaged.
    """
    check_number("num_images", num_images, minimum=1)
    check_number("batch_size", batch_size, minimum=1)
    settings = Settings(
        image_size=parse_size(image_size),
        sampler=sampler,
        num_steps=num_steps,
        last_step=last_step,
        time_shift=time_shift,
        diffusion=diffusion,
        guidance=guidance,
        guidance_channels=guidance_channels,
        guidance_interval=parse_interval(guidance_interval),
        guidance_schedule=guidance_schedule,
        resolution_adjustment=resolution_adjustment,
        seed=seed,
    )
    mesh = make_mesh()
    weights = load_weights(workdir, step, mesh)
    config = with_autoencoder(weights.config, autoencoder, autoencoder_weights)
    decoder = load_autoencoder(config.autoencoder)
    check_fits(decoder, config)
    guide = None
    if guide_workdir is not None or guide_step is not None:
        guide = load_weights(guide_workdir or workdir, guide_step, mesh)
    generator = make_generator(config, mesh, settings, guide=guide, autoencoder=decoder)
    num_classes = config.model.num_classes
    chosen = tuple(config.sampling.classes)
    if classes is not None:
        chosen = tuple(parse_classes(classes, num_classes, weights.class_names))
    folder = Path(out) if out else Path(workdir) / "samples" / f"step_{weights.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # found out now, not after the work
    except OSError as error:
        raise SamplingError(f"--out={folder} cannot be made a folder: {error}") from error

    velocities, passes = settings.num_evaluations()
    print(f"{sampler}: {velocities} evaluations of the velocity, {passes} of a model, an image")
    labels = labels_in_turn(chosen, num_images, num_classes)
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
