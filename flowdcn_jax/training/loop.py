"""The training run: stages in the order in which they happen, then the loop."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flowdcn_jax.autoencoders import Autoencoder, check_fits, load_autoencoder
from flowdcn_jax.config import validate
from flowdcn_jax.data import buckets_of, make_source
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.files import local_path
from flowdcn_jax.images import save_png
from flowdcn_jax.runs import checkpoint, description, record
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.contents import RUN, check_is_for
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import TrainState, abstract_state, initial_state, state_from_weights
from flowdcn_jax.runs.workdir import workdir_lock
from flowdcn_jax.training import inputs
from flowdcn_jax.training.metrics import (
    MetricWriter,
    Profiler,
    Stopwatch,
    check_finite,
    check_wandb,
    summarise,
    train_flops_per_image,
)
from flowdcn_jax.training.preemption import Preemption
from flowdcn_jax.training.saving import SaveClock, saved_on_failure
from flowdcn_jax.training.step import make_train_step

SAMPLES_FOLDER = "samples"

# (config, mesh, autoencoder) -> function of the EMA parameters -> a picture, uint8 [H,W,3]
MakeGridDrawer = Callable[[Any, Mesh, Autoencoder], Callable[[Any], np.ndarray]]
# (config, mesh, autoencoder) -> function of the EMA parameters -> figures by name
MakeEvaluator = Callable[[Any, Mesh, Autoencoder], Callable[[Any], dict[str, float]]]


def train(
    config,
    workdir: str,
    make_grid_drawer: MakeGridDrawer,
    make_evaluator: MakeEvaluator,
    *,
    devices: Sequence[jax.Device] | None = None,
    changed: dict[str, Any] | None = None,
    dry_run: bool = False,
    profile_steps: int = 0,
) -> bool:
    """Trains until config.train.num_steps, or until asked to stop; goes on where a run stopped.

    Converted weights in `workdir` are started from, whatever the data, with a fresh optimizer.
    Nothing but the lock is written to `workdir` before the config, the autoencoder, the data, what
    config.evaluate names and the checkpoints are found good. Call it from the main thread, which
    gets the signals.

    Args:
        config: see `flowdcn_jax.config`.
        workdir: the run's folder.
        make_grid_drawer: what draws grids, such as `sampling.grid_drawer`; all processes call what
            it gives.
        make_evaluator: what measures samples, such as `evaluation.evaluator`, if
            config.evaluate.every_steps asks for it; all processes call what it gives.
        devices: to train on; by default all of all processes.
        changed: what the user set beside the config's file, for the description of the run.
        dry_run: return after all checks and compilation, with nothing written.
        profile_steps: steps of which a trace is written to WORKDIR/profile.

    Returns:
        Whether the last step is done. If not, SIGTERM, SIGHUP or Ctrl-C came, and a checkpoint was
        saved. An exception that ends the loop leaves one too, if that can be done.

    Raises:
        flowdcn_jax.runs.workdir.WorkdirError: another run is at work in `workdir`.
        flowdcn_jax.errors.ConfigError: a value, or a difference from the run in `workdir`.
        flowdcn_jax.autoencoders.AutoencoderError: weights that are missing or of no use.
        flowdcn_jax.runs.checkpoint.CheckpointError: not one checkpoint there can be read.
        flowdcn_jax.training.metrics.NonFiniteError: the loss or gradient norm was not finite.
    """
    devices = jax.devices() if devices is None else devices
    validate(config, len(devices), jax.process_count())
    check_wandb(config.log)
    folder = local_path(workdir)
    main, num_steps = jax.process_index() == 0, config.train.num_steps
    say = print if main else lambda *text: None
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)

    # What it learns from, and what turns its samples into pictures.
    autoencoder = load_autoencoder(config.autoencoder)
    source = make_source(config.data, channels=config.model.in_channels)
    check_fits(autoencoder, config, origin=source.encoder)
    inputs.check_source(config, source)
    measure = None
    if config.evaluate.every_steps:
        measure = make_evaluator(config, mesh, autoencoder)

    with contextlib.ExitStack() as stack:
        # The run's folder, which from here on is this process's, and what it holds.
        check_is_for(folder, RUN, flag="--workdir", error=ConfigError)
        if not dry_run:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"--workdir={workdir} cannot be made a folder: {error}"
                ) from error
            stack.enter_context(workdir_lock(folder))
        saved = checkpoint.saved_run(folder)
        if saved is not None:
            record.check_resumable(saved.config, config, weights_only=saved.weights_only)
            record.check_same_data(saved, source)
        abstract = abstract_state(config, mesh)
        told = description.describe(config, changed or {}, mesh, abstract.params)
        say(description.as_text(told))

        # The state to go on from.
        step = start_step = 0
        if not dry_run:
            keep, keep_every_steps = config.checkpoint.keep, config.checkpoint.keep_every_steps
            checkpointer = Checkpointer(folder, keep=keep, keep_every_steps=keep_every_steps)
            stack.callback(checkpointer.close)
            state = starting_state(config, mesh, checkpointer)
            step = start_step = int(state.step)
        if start_step >= num_steps:
            logging.warning("step %d of %d is done: nothing to do", start_step, num_steps)
            return True

        # The step, compiled for each shape of batch.
        say(f"compiling the train step for mesh {dict(mesh.shape)}")
        lower = functools.partial(make_train_step(config, mesh).lower, abstract)
        train_steps = compile_steps(
            list(map(lower, inputs.batch_shapes(config, source, mesh))), source, say=say
        )
        if dry_run:
            return True

        # What reports of it.
        draw_grid = make_grid_drawer(config, mesh, autoencoder)
        flops_per_image = train_flops_per_image(config, source)
        if main:
            description.write(folder, told)
        preemption = stack.enter_context(Preemption())
        writer = MetricWriter(folder, config, start_step=start_step)
        stack.callback(writer.close)
        profiler = Profiler(folder, start_step=start_step, num_steps=profile_steps)
        stack.callback(profiler.close)
        if start_step:
            writer.message(f"going on from step {start_step}")

        stream = inputs.batches(config, source, mesh, start_step=start_step)
        batch = next(stream)
        unread, window = [], []  # metrics: on the devices, and fetched since the last line
        stopwatch = Stopwatch()
        clock = SaveClock(config.checkpoint.every_minutes)

        def save_finished() -> int:
            check_finite(jax.device_get(unread))
            checkpointer.save(state, config, source.class_names, source.identity)
            checkpointer.wait()
            return int(state.step)

        stack.enter_context(saved_on_failure(save_finished))
        while True:
            state, metrics = train_steps[batch["image"].shape](state, batch)
            step += 1
            unread.append((step, metrics))
            writer.advance()
            checkpointer.check()
            stop = preemption.reached(step)
            evaluate = not stop and _due(config.evaluate.every_steps, step, num_steps)
            log = stop or evaluate or _due(config.log.every_steps, step, num_steps)
            draw = not stop and _due(config.log.sample_every_steps, step, num_steps)
            save = stop or _due(config.checkpoint.every_steps, step, num_steps)
            save = save or (log and clock.due())
            if log or draw or save:  # nothing gets past a step that is not finite
                window += check_finite(jax.device_get(unread))
                unread = []
            if log:
                summary = summarise(window, config, stopwatch, flops_per_image)
                window = []
                if evaluate:
                    with stopwatch.pause():
                        figures = measure(state.ema)
                    shown = ", ".join(f"{name} {value:.5g}" for name, value in figures.items())
                    samples = config.evaluate.num_images
                    writer.message(f"step {step}: {shown} ({samples} samples)")
                    summary |= figures
                writer.write(step, summary)
            if draw:
                with stopwatch.pause():
                    grid = draw_grid(state.ema)
                    if main:
                        save_png(folder / SAMPLES_FOLDER / f"step_{step:08d}.png", grid)
                    writer.write_image(step, "samples", grid)
            if save:
                with stopwatch.pause():
                    checkpointer.save(state, config, source.class_names, source.identity)
                    clock.restart()
            with stopwatch.pause():
                if message := profiler.after(step, state):
                    writer.message(message)
            if stop or step == num_steps:
                break
            with stopwatch.data_wait():
                batch = next(stream)
        checkpointer.wait()
        if step < num_steps:
            writer.message(f"asked to stop: saved step {step}; the same command goes on")
        return step == num_steps


def starting_state(config, mesh: Mesh, checkpointer: Checkpointer) -> TrainState:
    """What a run in the checkpointer's workdir begins with: restored, or a step 0.

    At step 0 the parameters are the converted weights that lie there, or initial values.

    Raises:
        flowdcn_jax.runs.checkpoint.CheckpointError: not one checkpoint there can be read.
    """
    state = checkpointer.restore_newest(abstract_state(config, mesh))
    if state is None:
        return initial_state(config, mesh)
    if state.opt_state is None:
        logging.warning("starting from the converted weights in %s", checkpointer.workdir)
        return state_from_weights(config, mesh, state.params)
    return state


def compile_steps(
    lowered: list[jax.stages.Lowered], source, *, say: Callable
) -> dict[tuple, Callable]:
    """The train step, lowered for each shape [B,H,W,C] of batches, compiled, by that shape.

    They are compiled side by side: one after the other takes minutes on a GPU.
    """
    start_s = time.perf_counter()
    compiled = {}
    with ThreadPoolExecutor() as pool:  # a compilation keeps one core busy, and no more
        compiling = [pool.submit(each.compile) for each in lowered]
        for bucket, program, each in zip(buckets_of(source), compiling, lowered, strict=True):
            _, batch = each.args_info[0]
            compiled[batch["image"].shape] = program.result()
            if len(lowered) > 1:
                say(
                    f"compiled {len(compiled)} of {len(lowered)} shapes: {bucket.image_shape}, "
                    f"{len(bucket)} images (after {time.perf_counter() - start_s:.0f} s)"
                )
    return compiled


def _due(every_steps: int, step: int, num_steps: int) -> bool:
    """Every so many steps and at the last one; never if every_steps is 0."""
    return every_steps > 0 and (step % every_steps == 0 or step == num_steps)
