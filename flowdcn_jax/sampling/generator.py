"""From parameters to arrays: settings fitted to a model, and the compiled function that draws."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from flowdcn_jax import samplers
from flowdcn_jax.autoencoders import Autoencoder, check_fits, decode_images, load_autoencoder
from flowdcn_jax.flow.guidance import guided_at, guided_velocity
from flowdcn_jax.flow.mean_flow import guides
from flowdcn_jax.images import grid_columns, make_grid
from flowdcn_jax.models import (
    abstract_model,
    apply_model,
    takes_max_scale_factor,
    takes_second_time,
)
from flowdcn_jax.models.resolution import max_scale_factor
from flowdcn_jax.runs.sharding import batch_sharding, replicated
from flowdcn_jax.sampling.classes import labels_in_turn
from flowdcn_jax.sampling.settings import SamplingError, Settings


class Guide(NamedTuple):
    """The weaker model of autoguidance."""

    config: ConfigDict  # of its training run
    params: Any


def fill_settings(
    settings: Settings, config: ConfigDict, *, guide: ConfigDict | None = None
) -> Settings:
    """The settings with what is None filled in, once they are known to go together and to fit.

    Args:
        settings: what was asked for.
        config: of the run.
        guide: config of the guide's run, if there is one.

    Raises:
        SamplingError: values that do not go together, a size that the model cannot make, an
            adjustment that it cannot use, or a guide that is not used or of another kind.
    """
    defaults = dict(
        image_size=(config.data.image_size,) * 2,
        sampler="mean_flow" if takes_second_time(config.model) else "euler",
        num_steps=config.sampling.num_steps,
        guidance=config.sampling.guidance,
        guidance_channels="all",
        resolution_adjustment="none",
        seed=config.sampling.seed,
    )
    unset = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **unset)
    _check_sampler(settings, config)
    try:
        _evaluation_times(settings)
        samplers.check_diffusion(settings.sampler, settings.diffusion)
    except ValueError as error:
        raise SamplingError(str(error)) from error
    height, width = settings.image_size
    stride = config.autoencoder.downsampling * config.model.patch_size
    if height % stride or width % stride:
        raise SamplingError(
            f"image_size is {height}x{width}; expected HxW, both multiples of {stride} "
            f"(autoencoder.downsampling={config.autoencoder.downsampling} times "
            f"model.patch_size={config.model.patch_size})"
        )
    adjustment = settings.resolution_adjustment
    if adjustment != "none" and not takes_max_scale_factor(config.model):
        raise SamplingError(
            f"resolution_adjustment is {adjustment!r}; expected none, since the model "
            f"{config.model.name!r} has no deformable blocks"
        )
    if guide is not None:
        _check_guide(config, guide, settings)
    return settings


def _check_sampler(settings: Settings, config: ConfigDict) -> None:
    """Raises SamplingError for a sampler of another objective's velocities, or guidance twice."""
    of_jumps = settings.sampler in samplers.OF_MEAN_VELOCITIES
    if settings.sampler in samplers.SAMPLERS and of_jumps != takes_second_time(config.model):
        kind = {True: "mean velocities of jumps", False: "velocities"}
        fitting = [s for s in samplers.SAMPLERS if (s in samplers.OF_MEAN_VELOCITIES) != of_jumps]
        raise SamplingError(
            f"sampler is {settings.sampler!r}, and the model was trained for {kind[not of_jumps]}; "
            f"expected {'one of ' * (len(fitting) > 1)}{', '.join(fitting)}"
        )
    if of_jumps and settings.guidance != 1 and guides(config.flow.mean_flow):
        raise SamplingError(
            f"guidance is {settings.guidance}; expected 1, since the model was trained with "
            "guidance in its target (config.flow.mean_flow), and its samples have it already"
        )


def count_evaluations(settings: Settings) -> tuple[int, int]:
    """(velocities, passes of one image through a model): guidance takes two passes.

    `settings` are filled.
    """
    times = _evaluation_times(settings)
    options = dict(scale=settings.guidance, interval=settings.guidance_interval)
    return len(times), sum(1 + guided_at(t, **options) for t in times)


def _evaluation_times(settings: Settings) -> np.ndarray:
    return samplers.evaluation_times(
        settings.sampler,
        settings.num_steps,
        last_step=settings.last_step,
        time_shift=settings.time_shift,
    )


def _check_guide(config: ConfigDict, guide: ConfigDict, settings: Settings) -> None:
    """Raises SamplingError unless the guide is used, and on the model's kind of images."""
    if settings.guidance == 1:
        raise SamplingError("guidance is 1; expected another number, since a guide is given")
    if takes_second_time(config.model) != takes_second_time(guide.model):
        raise SamplingError(
            "the guide was trained for another objective; expected config.flow.objective to be the "
            "model's"
        )
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


def image_keys(seed: int | jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(keys of the initial noise, keys of the steps' noise), [n] each.

    Image i's depend on the seed and on i alone.
    """
    initial, steps = jax.random.split(jax.random.key(seed))
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return fold(initial, indices), fold(steps, indices)


def make_generator(
    config: ConfigDict,
    mesh: Mesh,
    settings: Settings,
    *,
    guide: Guide | None = None,
    autoencoder: Autoencoder | None = None,
    keep: tuple[int, ...] | None = None,
) -> Callable:
    """A compiled function (params, indices [n], labels [n]) -> (x [n,h,w,C], images uint8).

    x is in the model's space; images are decoded by `autoencoder`, by default the one that
    config.autoencoder names. n is a multiple of the number of devices; rows are split over them.
    With `keep`, x and images are trajectories [n,len(keep),...]: see `samplers.solve`.
    The function is a functools.partial of a jitted one, so that its program can be looked at, and
    given another seed: `with_seed`.

    Raises:
        SamplingError: settings that are out of range, or not for this model or this guide.
        flowdcn_jax.errors.UserError: the autoencoder's weights are not there, or do not fit.
    """
    if autoencoder is None:
        autoencoder = load_autoencoder(config.autoencoder)
    check_fits(autoencoder, config)
    settings = fill_settings(settings, config, guide=guide and guide.config)
    network = _network(config, settings)
    guide_network = guide and _network(guide.config, settings)
    height, width = (side // config.autoencoder.downsampling for side in settings.image_size)
    shape = (height, width, config.model.in_channels)
    rows = batch_sharding(mesh)

    def generate(guide_params, decoder_params, seed, params, indices, labels):
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
        initial_keys, step_keys = image_keys(seed, indices)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(initial_keys)
        x = samplers.solve(
            velocity_fn,
            jax.lax.with_sharding_constraint(noise, rows),
            sampler=settings.sampler,
            num_steps=settings.num_steps,
            last_step=settings.last_step,
            time_shift=settings.time_shift,
            diffusion=settings.diffusion,
            key=step_keys,
            keep=keep,
        )
        decode = functools.partial(decode_images, autoencoder, decoder_params, mesh=mesh)
        if keep is None:
            return x, decode(x)
        return x.swapaxes(0, 1), jax.lax.map(decode, x).swapaxes(0, 1)

    compiled = jax.jit(generate, out_shardings=replicated(mesh))
    decoder_params = copy_to_devices(autoencoder.params, mesh)
    generator = functools.partial(compiled, guide and guide.params, decoder_params, None)
    return with_seed(generator, settings.seed)


def with_seed(generator: Callable, seed: int) -> Callable:
    """`make_generator`'s function for another seed; nothing compiles anew."""
    return functools.partial(generator.func, *generator.args[:-1], np.uint32(seed))


def copy_to_devices(params: dict, mesh: Mesh) -> dict:
    """`params` whole on every device; as they are if they lie there."""
    copied = replicated(mesh)
    if all(getattr(leaf, "sharding", None) == copied for leaf in jax.tree.leaves(params)):
        return params
    return jax.jit(lambda tree: tree, out_shardings=copied)(params)


def _network(config: ConfigDict, settings: Settings) -> Callable:
    """(params, x, t, y) -> velocity, of mean velocities (params, x, t, y, r).

    Deformable blocks get the resolution adjustment at t.
    """
    graphdef, _ = abstract_model(config.model)
    deformable = takes_max_scale_factor(config.model)  # a guide may be without
    stride = config.autoencoder.downsampling * config.model.patch_size
    height, width = settings.image_size

    def apply(params, x, t, y, r=None):
        factor = max_scale_factor(
            settings.resolution_adjustment if deformable else "none",
            t[0],  # a solver's t is the same in every row
            tokens=(height // stride, width // stride),
            training_tokens=config.data.image_size // stride,
            depth=config.model.depth,
        )
        return apply_model(graphdef, params, x, t, y, factor, r)

    return apply


def draw_batches(
    generator: Callable,
    params,
    labels: np.ndarray,
    *,
    ranges: list[tuple[int, int]],
    batch_size: int,
    progress: bool = True,
) -> Iterator[tuple[int, int, jax.Array, jax.Array]]:
    """(start, stop, x, images) of the images start ... stop - 1 of each range, a batch at a time.

    Image i has index i and class labels[i]. x and images may have more rows, copies that fill the
    last batch, so that nothing compiles twice. The next batch is under way on the devices while one
    is used. Process 0 alone shows progress.
    """

    def batches():
        for first, end in ranges:
            for start in range(first, end, batch_size):
                stop = min(start + batch_size, end)
                rows = np.minimum(np.arange(start, start + batch_size), stop - 1)
                yield start, stop, *generator(params, rows.astype(np.uint32), labels[rows])

    count = sum(end - first for first, end in ranges)
    with tqdm(
        total=len(labels),
        initial=len(labels) - count,
        unit="image",
        disable=not (progress and count) or jax.process_index() != 0,
        dynamic_ncols=True,
    ) as bar:
        for start, stop, x, images in _one_ahead(batches()):
            yield start, stop, x, images
            bar.update(stop - start)


def _one_ahead(items: Iterable) -> Iterator:
    """The items, each of them once the next one is made."""
    made = []
    for item in items:
        yield from made
        made = [item]
    yield from made


def generate_images(
    generator: Callable, params, labels: np.ndarray, *, batch_size: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(x, images) for labels [n], image i having index i, in batches of one size.

    batch_size is that of all devices together.
    """
    options = dict(ranges=[(0, len(labels))], batch_size=batch_size, progress=progress)
    parts = [
        [np.asarray(array)[: stop - start] for array in arrays]
        for start, stop, *arrays in draw_batches(generator, params, labels, **options)
    ]
    x, images = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return x, images


def grid_drawer(
    config: ConfigDict, mesh: Mesh, autoencoder: Autoencoder
) -> Callable[[Any], np.ndarray]:
    """A function of EMA parameters that draws a training run's grid, uint8 [H,W,3].

    Its seed, classes and number of images are config.sampling's. Every process calls it.
    """
    options = config.sampling
    generator = make_generator(config, mesh, Settings(), autoencoder=autoencoder)
    labels = labels_in_turn(options.classes, options.num_images, config.model.num_classes)
    batch_size = -(-len(labels) // mesh.size) * mesh.size
    columns = grid_columns(len(labels), len(options.classes) or config.model.num_classes)

    def draw(params) -> np.ndarray:
        _, images = generate_images(
            generator, params, labels, batch_size=batch_size, progress=False
        )
        return make_grid(images, columns=columns)

    return draw
