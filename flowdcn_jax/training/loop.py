"""The training run: stages in the order in which they happen, then the loop."""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from flowdcn_jax import data, sampling
from flowdcn_jax.autoencoders import Autoencoder, check_fits, load_autoencoder
from flowdcn_jax.errors import ConfigError, UserError
from flowdcn_jax.images import grid_columns, make_grid, save_png
from flowdcn_jax.models import forward_macs
from flowdcn_jax.runs.workdir import workdir_lock
from flowdcn_jax.training import checkpoint
from flowdcn_jax.training.metrics import MetricWriter, Stopwatch, model_flops_utilisation
from flowdcn_jax.training.preemption import Preemption
from flowdcn_jax.training.sharding import batch_sharding, make_mesh
from flowdcn_jax.training.state import (
    TrainState,
    abstract_state,
    initial_state,
    state_from_weights,
)
from flowdcn_jax.training.step import make_train_step
from flowdcn_jax.validation import check_resumable, check_same_data, validate

DEVICE_PREFETCH = 2  # batches on the devices ahead of the step
SAMPLES_FOLDER = "samples"


class NonFiniteError(UserError, RuntimeError):
    """The loss or the gradient became infinite or NaN; the message says where and what to do."""


def train(config, workdir: str) -> bool:
    """Trains until config.train.num_steps, or until asked to stop; goes on where a run stopped.

    Converted weights in `workdir` are started from, whatever the data, with a fresh optimizer.
    Nothing but the lock is written to `workdir` before the config, the autoencoder, the data and
    the checkpoints are found good. Call it from the main thread, which gets the signals.

    Returns:
        Whether the last step is done. If not, SIGTERM or Ctrl-C came, and a checkpoint was saved.

    Raises:
        flowdcn_jax.runs.workdir.WorkdirError: another run is at work in `workdir`.
        flowdcn_jax.errors.ConfigError: a value, or a difference from the run in `workdir`.
        flowdcn_jax.autoencoders.AutoencoderError: weights that are missing or of no use.
        flowdcn_jax.training.checkpoint.CheckpointError: not one checkpoint there can be read.
        NonFiniteError: the loss or gradient norm was not finite.
    """
    validate(config, jax.device_count(), jax.process_count())
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    autoencoder = load_autoencoder(config.autoencoder)
    source = data.make_source(config.data, channels=config.model.in_channels)
    check_fits(autoencoder, config, origin=source.encoder)
    check_source(config, source)
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be made a folder: {error}") from error
    with workdir_lock(Path(workdir)):
        return _train_alone(config, workdir, mesh, source, autoencoder)


def _train_alone(config, workdir: str, mesh, source, autoencoder: Autoencoder) -> bool:
    """The rest of `train`, in a workdir that no other run changes."""
    saved = checkpoint.saved_run(workdir)
    if saved is not None:
        check_resumable(saved.config, config, weights_only=saved.weights_only)
        check_same_data(saved, source)
    checkpointer = checkpoint.Checkpointer(
        workdir, keep=config.checkpoint.keep, keep_every_steps=config.checkpoint.keep_every_steps
    )
    try:
        state = checkpointer.restore_newest(abstract_state(config, mesh))
        if state is None:
            state = initial_state(config, mesh)
        elif state.opt_state is None:
            logging.warning("starting from the converted weights in %s", workdir)
            state = state_from_weights(config, mesh, state.params)
        return _Run(config, workdir, mesh, source, checkpointer, autoencoder).train(state)
    finally:
        checkpointer.close()


def check_source(config, source) -> None:
    """The data set must give what the model takes.

    Raises:
        ConfigError: a shape or the number of classes differs.
    """
    buckets = data.aspect_buckets(config.data)
    sizes = buckets.sizes if buckets else [(config.data.image_size,) * 2]
    stride = config.autoencoder.downsampling
    expected = [
        (height // stride, width // stride, config.model.in_channels) for height, width in sizes
    ]
    for bucket in data.buckets_of(source):
        if tuple(bucket.image_shape) not in expected:
            raise ConfigError(
                f"config.data.name={config.data.name!r} gives arrays of shape "
                f"{tuple(bucket.image_shape)}; the model expects "
                f"{' or '.join(map(str, expected))} (data.image_size and data.aspect_buckets / "
                "autoencoder.downsampling, model.in_channels)"
            )
    if source.num_classes != config.model.num_classes:
        raise ConfigError(
            f"config.model.num_classes is {config.model.num_classes}; expected "
            f"{source.num_classes}, as in the data set {config.data.name!r}"
        )


def on_devices(local_batches: Iterator[data.Batch], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, DEVICE_PREFETCH of them ahead, from each process's rows."""
    sharding = batch_sharding(mesh)
    ahead = collections.deque()
    for arrays in local_batches:
        ahead.append(
            {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
        )
        if len(ahead) > DEVICE_PREFETCH:
            yield ahead.popleft()


class _Run:
    """One process's run of the loop: what it reads from and reports to."""

    def __init__(self, config, workdir: str, mesh, source, checkpointer, autoencoder: Autoencoder):
        self.config = config
        self.workdir = Path(workdir)
        self.mesh = mesh
        self.source = source
        self.checkpointer = checkpointer
        self.autoencoder = autoencoder
        self.on_device: list[tuple[int, dict]] = []  # (step, metrics) not fetched yet
        self.window: list[dict] = []  # metrics fetched since the last logging step
        macs = sum(
            len(bucket) / len(source) * forward_macs(config.model, *bucket.image_shape[:2])
            for bucket in data.buckets_of(source)
        )
        self.train_flops_per_image = 3 * 2 * macs  # backward costs two forwards; 2 FLOPs a MAC

    def train(self, state: TrainState) -> bool:
        """Returns whether the last step is done."""
        config, num_steps = self.config, self.config.train.num_steps
        step = start_step = int(state.step)
        if start_step >= num_steps:
            logging.warning("step %d of %d is done: nothing to do", start_step, num_steps)
            return True
        with (
            Preemption() as preemption,
            contextlib.closing(
                MetricWriter(self.workdir, start_step=start_step, num_steps=num_steps)
            ) as writer,
        ):
            if start_step:
                writer.message(f"going on from step {start_step}")
            batches = self._batches(start_step)
            batch = next(batches)
            train_steps = self._compile_steps(state, writer)
            draw_samples = self._sample_drawer(writer)
            stopwatch = Stopwatch()
            while True:
                state, metrics = train_steps[batch["image"].shape](state, batch)
                step += 1
                self.on_device.append((step, metrics))
                writer.advance()
                stop = preemption.reached(step)
                if _due(config.log.every_steps, step, num_steps) or stop:
                    self._fetch_metrics()
                    writer.write(step, self._summary(stopwatch))
                if _due(config.log.sample_every_steps, step, num_steps) and not stop:
                    self._fetch_metrics()
                    with stopwatch.pause():
                        draw_samples(step, state.ema)
                if _due(config.checkpoint.every_steps, step, num_steps) or stop:
                    self._fetch_metrics()
                    with stopwatch.pause():
                        self.checkpointer.save(
                            state, config, self.source.class_names, self.source.identity
                        )
                if stop or step == num_steps:
                    break
                with stopwatch.data_wait():
                    batch = next(batches)
            self.checkpointer.wait()
            if step < num_steps:
                writer.message(f"asked to stop: saved step {step}; the same command goes on")
        return step == num_steps

    def _compile_steps(self, state: TrainState, writer: MetricWriter) -> dict[tuple, Callable]:
        """The train step, compiled for each shape [B,H,W,C] of batches, by that shape.

        The shapes are compiled side by side: one after the other takes minutes on a GPU.
        """
        writer.message(f"compiling the train step for mesh {dict(self.mesh.shape)}")
        train_step = make_train_step(self.config, self.mesh)
        rows, sharding = self.config.train.batch_size, batch_sharding(self.mesh)
        buckets = data.buckets_of(self.source)
        start_s = time.perf_counter()
        compiling, compiled = {}, {}
        with ThreadPoolExecutor() as pool:  # a compilation keeps one core busy, and no more
            for bucket in buckets:
                shape = (rows, *bucket.image_shape)
                batch = {
                    "image": jax.ShapeDtypeStruct(shape, bucket.image_dtype, sharding=sharding),
                    "label": jax.ShapeDtypeStruct((rows,), np.int32, sharding=sharding),
                }
                compiling[shape] = pool.submit(train_step.lower(state, batch).compile)
            for number, (bucket, shape) in enumerate(zip(buckets, compiling, strict=True), start=1):
                compiled[shape] = compiling[shape].result()
                if len(buckets) > 1:
                    writer.message(
                        f"compiled {number} of {len(buckets)} shapes: {bucket.image_shape}, "
                        f"{len(bucket)} images (after {time.perf_counter() - start_s:.0f} s)"
                    )
        return compiled

    def _batches(self, start_step: int) -> Iterator[dict[str, jax.Array]]:
        """The stream of global batches, on the devices."""
        local_batches = data.make_batches(
            self.source,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self.config.data.num_threads,
            prefetch_batches=self.config.data.prefetch_batches,
        )
        return on_devices(local_batches, self.mesh)

    def _fetch_metrics(self) -> None:
        """Waits for the steps so far; a checkpoint or log entry never gets past a non-finite one.

        Raises:
            NonFiniteError: at the first step whose loss or gradient is not finite.
        """
        rows = jax.device_get(self.on_device)
        self.on_device = []
        for step, metrics in rows:
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
                raise NonFiniteError(
                    f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, "
                    f"learning rate {metrics['learning_rate']:.3g}. Checkpoints are all from "
                    "before it. Go on from the newest with a lower "
                    "--config.optimizer.learning_rate or with --config.optimizer.clip_norm=1; "
                    "--config.model.dtype=float32 tells whether bfloat16 is the cause"
                )
            self.window.append(metrics)

    def _summary(self, stopwatch: Stopwatch) -> dict[str, float]:
        """The metrics of the window, which it empties: means, and the speed."""
        elapsed_s, data_wait = stopwatch.restart()
        images_per_s = len(self.window) * self.config.train.batch_size / elapsed_s
        summary = {
            "loss": float(np.mean([metrics["loss"] for metrics in self.window])),
            "grad_norm": float(np.mean([metrics["grad_norm"] for metrics in self.window])),
            "learning_rate": float(self.window[-1]["learning_rate"]),
            "images_per_s": images_per_s,
            "data_wait": data_wait,
        }
        utilisation = model_flops_utilisation(images_per_s, self.train_flops_per_image)
        if utilisation is not None:
            summary["model_flops_utilisation"] = utilisation
        self.window = []
        return summary

    def _sample_drawer(self, writer: MetricWriter) -> Callable[[int, dict], None]:
        """A function (step, EMA parameters) that draws the grid of fixed seeds and classes."""
        config = self.config
        options = config.sampling
        settings = sampling.Settings(
            num_steps=options.num_steps, guidance=options.guidance, seed=options.seed
        )
        generator = sampling.make_generator(
            config, self.mesh, settings, autoencoder=self.autoencoder
        )
        labels = sampling.labels_in_turn(
            options.classes, options.num_images, config.model.num_classes
        )
        batch_size = -(-len(labels) // self.mesh.size) * self.mesh.size
        columns = grid_columns(len(labels), len(options.classes) or config.model.num_classes)

        def draw(step: int, ema) -> None:
            _, images = sampling.generate_images(
                generator, ema, labels, batch_size=batch_size, progress=False
            )
            if jax.process_index() == 0:
                grid = make_grid(images, columns=columns)
                save_png(self.workdir / SAMPLES_FOLDER / f"step_{step:08d}.png", grid)
                writer.write_image(step, "samples", grid)

        return draw


def _due(every_steps: int, step: int, num_steps: int) -> bool:
    """Every so many steps and at the last one; never if every_steps is 0."""
    return every_steps > 0 and (step % every_steps == 0 or step == num_steps)
