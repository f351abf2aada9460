"""Power-function EMAs of any width, made after training of those that a run saved.

EDM2 (arXiv 2312.02696), section 3.2: the EMA wanted is a sum of snapshots, which are the EMAs of
two widths or more in the run's checkpoints.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flowdcn_jax import ema
from flowdcn_jax.errors import UserError
from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.sharding import make_mesh, with_sharding

MAX_ERROR = 0.02  # of a profile, of its own length; 8 even snapshots between two widths give 0.01


class PosthocError(UserError):
    """The EMA cannot be made of what the run saved; the message says what would do."""


class Snapshot(NamedTuple):
    """One EMA in one checkpoint."""

    name: str
    width: float
    step: int


class PosthocEma(NamedTuple):
    """An EMA that was made after training, and how."""

    name: str  # for sample.py --ema=NAME
    step: int
    folder: Path
    num_snapshots: int
    error: float  # of its profile, of its own length: 0.01 is a hundredth


def make_posthoc_ema(
    workdir: str | Path,
    width: float,
    *,
    step: int | None = None,
    progress: Callable[[list[Snapshot]], list[Snapshot]] = list,
) -> PosthocEma:
    """Makes a power-function EMA and saves it where sampling finds it by its name.

    Snapshots are read one at a time and added up in float64, which takes less than 20 bytes a
    parameter.

    Args:
        workdir: a training run's folder; it is not locked, and training may go on.
        width: standard deviation of the profile over its length, `step`.
        step: the checkpoint that it belongs to; None: the newest.
        progress: wraps the snapshots while they are read, as tqdm does.

    Raises:
        PosthocError: a width that the run's snapshots do not give, or that is there already.
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint, or a damaged one.
    """
    workdir = str(workdir)
    if not 0 < width <= ema.MAX_WIDTH:
        raise PosthocError(
            f"width is {width}; expected a number above 0 and up to {ema.MAX_WIDTH:.4f}"
        )
    run = checkpoint.read_run(workdir, step)
    saved = checkpoint.saved_emas(workdir)
    step = max(saved) if step is None else step
    name = f"power_{np.format_float_positional(width, trim='-')}"
    snapshots = _snapshots(workdir, saved, step)
    there = [each.name for each in snapshots if (each.step, each.width) == (step, width)]
    if step in checkpoint.posthoc_emas(workdir).get(name, []):
        there.append(name)
    if there:
        raise PosthocError(f"{workdir} has {there[0]} of step {step}: sample.py --ema={there[0]}")
    coefficients, error = ema.synthesis(
        width, step, [(each.width, each.step) for each in snapshots]
    )
    if error > MAX_ERROR:
        names = ", ".join(sorted({each.name for each in snapshots}))
        count = len({each.step for each in snapshots})
        raise PosthocError(
            f"width {width} cannot be made at step {step} of the {count} checkpoints that hold "
            f"{names}: the profile would be off by {error:.1%}, and {MAX_ERROR:.0%} is allowed. "
            "Take a width between theirs, or keep more checkpoints in training "
            "(config.checkpoint.keep_every_steps)"
        )
    params = _weighted_sum(workdir, progress(snapshots), coefficients)
    weights = checkpoint.Weights(
        step, ConfigDict(run.config), run.class_names, params, run.data_identity
    )
    folder = checkpoint.save_posthoc_ema(workdir, name, weights)
    return PosthocEma(name, step, folder, len(snapshots), error)


def _snapshots(workdir: str, saved: dict[int, tuple[str, ...]], last: int) -> list[Snapshot]:
    """The power-function EMAs in the checkpoints up to step `last`.

    Raises:
        PosthocError: they are not of two widths.
    """
    found = []
    for step in sorted(step for step in saved if step <= last):
        for name in saved[step]:
            average = None if name == ema.MAIN else ema.parse_name(name)
            if average is not None and average.kind == "power":
                found.append(Snapshot(name, average.value, step))
    names = sorted({each.name for each in found})
    if len({each.width for each in found}) < 2:
        raise PosthocError(
            f"{workdir} holds {' and '.join(names) or 'no power-function EMA'} up to step {last}; "
            "expected power-function EMAs of two widths, which training saves with "
            "--config.ema.others=\"('power_0.05', 'power_0.1')\""
        )
    first = {name: min(each.step for each in found if each.name == name) for name in names}
    if len(set(first.values())) > 1:
        logging.warning("EMAs that began at different steps give no exact result: %s", first)
    return found


def _weighted_sum(workdir: str, snapshots: list[Snapshot], coefficients: np.ndarray):
    """The sum of coefficient * snapshot, nested dicts of float32 in the host's memory."""
    mesh = make_mesh(devices=jax.local_devices()[:1])

    def abstract_params(config: ConfigDict):
        return with_sharding(abstract_model(config.model)[1], mesh)

    def add(sums: list[np.ndarray] | None, snapshot: Snapshot, coefficient: float):
        weights = checkpoint.restore_ema(
            workdir, snapshot.step, abstract_params, name=snapshot.name
        )
        leaves, structure = jax.tree.flatten(weights.params)
        sums = [np.zeros(leaf.shape, np.float64) for leaf in leaves] if sums is None else sums
        for total, leaf in zip(sums, leaves, strict=True):
            total += coefficient * np.asarray(leaf, np.float64)
        return sums, structure

    sums, structure = None, None
    for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
        sums, structure = add(sums, snapshot, coefficient)
    for number, total in enumerate(sums):  # one after the other, for memory
        sums[number] = total.astype(np.float32)
    return jax.tree.unflatten(structure, sums)
