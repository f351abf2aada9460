"""Samples that are drawn while they are measured: of a run's checkpoint, and in training.

No file holds them. Each process draws those that it measures, on devices of its own, so that its
threads have no other process to wait for.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flowdcn_jax.autoencoders import Autoencoder
from flowdcn_jax.evaluation.features import load_features
from flowdcn_jax.evaluation.image_sets import PIXEL_SIZES, ImageSet, open_images
from flowdcn_jax.evaluation.reference_files import open_side
from flowdcn_jax.evaluation.report import check_sides, evaluate
from flowdcn_jax.evaluation.settings import EvaluationError
from flowdcn_jax.evaluation.statistics import Statistics
from flowdcn_jax.runs.sharding import make_mesh, replicated
from flowdcn_jax.sampling.classes import labels_in_turn
from flowdcn_jax.sampling.drawing import image_record, stored_rows
from flowdcn_jax.sampling.generator import copy_to_devices, draw_batches, make_generator
from flowdcn_jax.sampling.settings import Request, Settings
from flowdcn_jax.sampling.trained_model import TrainedModel


def drawn_images(model: TrainedModel, request: Request, settings: Settings) -> ImageSet:
    """The images that sample.py would write, drawn when they are read.

    Args:
        model: on this process's own devices: of `load_trained` with such a mesh.
        request: which images, and how many at a time.
        settings: see `Settings`.

    Raises:
        SamplingError: values that the model cannot serve.
        EvaluationError: nothing decodes the model's latents.
        flowdcn_jax.runs.checkpoint.CheckpointError: the checkpoint is damaged.
    """
    settings = model.fill_settings(settings)
    labels = model.labels(request, seed=settings.seed)
    rows = stored_rows(model, settings)
    if "latents" in rows:
        raise EvaluationError(
            f"{model.checkpoint.workdir} makes latents, and has no decoder; expected --autoencoder "
            "and --autoencoder_weights"
        )
    height, width, channels = next(iter(rows.values())).shape
    draw = functools.partial(
        _draw,
        model.generator(settings),
        model.weights.params,
        labels,
        model.round_size(len(labels), batch_size=request.batch_size),
    )
    return ImageSet(
        source=f"{model.checkpoint.workdir} step {model.weights.step}",
        count=len(labels),
        size=(height, width),
        read=draw,
        grey=channels == 1,
        settings=image_record(model, labels, settings),
    )


def evaluator(
    config: Any, mesh: Mesh, autoencoder: Autoencoder
) -> Callable[[Any], dict[str, float]]:
    """A function from EMA parameters to the figures of samples, by the names that logs have.

    It draws config.evaluate.num_images samples of all classes in turn, always with the same noise.
    All processes call it. The reference is read when it is called first.

    Args:
        config: of a training run.
        mesh: the run's.
        autoencoder: what decodes.

    Raises:
        EvaluationError: the reference cannot be used, or there is none.
        flowdcn_jax.errors.UserError: weights that are missing or of no use.
    """
    options = config.evaluate
    reference = _open_reference(config)
    own = [each for each in mesh.devices.flat if each.process_index == jax.process_index()]
    local = make_mesh(devices=own)
    settings = Settings(num_steps=options.num_steps, guidance=options.guidance)
    generator = make_generator(config, local, settings, autoencoder=autoencoder)
    labels = labels_in_turn((), options.num_images, config.model.num_classes)
    # As many as a step of training has, with gradients.
    rows = config.train.batch_size // (config.train.accumulation_steps * mesh.size)
    side, channels = config.data.image_size, _channels(config, autoencoder)
    features = load_features(options.features, weights=options.weights, mesh=local)

    def samples(params: Any) -> ImageSet:
        draw = functools.partial(_draw, generator, params, labels, rows * local.size)
        return ImageSet("EMA samples", len(labels), (side, side), draw, grey=channels == 1)

    check_sides(samples(None), reference, features)

    def measure(params: Any) -> dict[str, float]:
        nonlocal reference
        params = _own_copy(copy_to_devices(params, mesh), local)
        how = dict(num_features=options.num_images, title=None)
        report = evaluate(samples(params), reference, features, **how)
        reference = report.references
        found = {_logged_name(each.name): each.value for each in report.figures}
        return {name: value for name, value in found.items() if value is not None}

    return measure


def _draw(
    generator: Callable, params: Any, labels: np.ndarray, batch_size: int, ranges: Iterable[range]
) -> Iterator[np.ndarray]:
    """`ImageSet.read`: draws batch_size images at a time, whatever the ranges are.

    The devices are at work on the next batch while one is waited for.
    """
    ranges = list(ranges)
    indices = np.concatenate([np.arange(each.start, each.stop) for each in ranges])

    def draw_own(params: Any, rows: np.ndarray, of_rows: np.ndarray):
        return generator(params, indices[rows].astype(np.uint32), of_rows)

    batches = draw_batches(
        draw_own,
        params,
        labels[indices],
        ranges=[(0, len(indices))],
        batch_size=batch_size,
        progress=False,
    )
    rows = itertools.chain.from_iterable(
        np.asarray(images)[: stop - start] for start, stop, _, images in batches
    )
    for each in ranges:
        images = np.stack(list(itertools.islice(rows, len(each))))
        yield np.broadcast_to(images, (*images.shape[:3], 3))


def _open_reference(config: Any) -> ImageSet | Statistics:
    """What config.evaluate.reference names; by default the images that training sees."""
    data, reference = config.data, config.evaluate.reference
    if reference is not None:
        return open_side(reference)
    if data.name not in PIXEL_SIZES:
        raise EvaluationError(
            f"config.evaluate.reference is None, and the data set {data.name!r} holds no pixels; "
            "expected images or statistics"
        )
    return open_images(data.name, crop=data.image_size, split=data.split, data_dir=data.data_dir)


def _channels(config: Any, autoencoder: Autoencoder) -> int:
    """Channels of the images that samples become."""
    side = config.data.image_size // config.autoencoder.downsampling
    x = jax.ShapeDtypeStruct((1, side, side, config.model.in_channels), np.float32)
    channels = jax.eval_shape(autoencoder.decode, autoencoder.params, x).shape[3]
    if config.autoencoder.name == "preview":
        raise EvaluationError(
            "config.evaluate.every_steps is given, and config.autoencoder.name is 'preview', which "
            "decodes nothing; expected a decoder"
        )
    return channels


def _own_copy(params: Any, local: Mesh) -> Any:
    """Of parameters that lie whole on every device those on this process's, without copying."""

    def own(leaf: jax.Array) -> jax.Array:
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(local), parts)

    return jax.tree.map(own, params)


def _logged_name(name: str) -> str:
    """A figure's name as TensorBoard takes it."""
    return re.sub(r"[^\w-]+", "_", name).strip("_")
