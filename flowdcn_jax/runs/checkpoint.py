"""Weights in a run's folder, without the rest of the state: reading, saving, what there is.

`runs.checkpointer` says what a checkpoint holds. EMAs that are made after training lie in
posthoc_emas/<name>/<step>/, each a checkpoint of its own with the items `ema_<name>`, `run` and
`checksums`.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from flowdcn_jax import ema
from flowdcn_jax.files import local_path
from flowdcn_jax.runs.items import (
    FOLDER,
    WEIGHTS_STEP,
    CheckpointError,
    EmaError,
    SavedRun,
    check_items,
    checksum,
    first_whole,
    item_of,
    none_whole,
    read_items,
    reader,
    restore_run,
    save_args,
)

__all__ = [
    "CheckpointError",
    "EmaError",
    "SavedRun",
    "Weights",
    "checksum",
    "posthoc_emas",
    "read_run",
    "restore_ema",
    "restore_params",
    "save_posthoc_ema",
    "save_weights",
    "saved_emas",
    "saved_run",
]

POSTHOC_FOLDER = "posthoc_emas"


def saved_run(workdir: str) -> SavedRun | None:
    """What the newest checkpoint with a readable config tells; None without checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none with a readable config.
    """
    folder = local_path(workdir).absolute() / FOLDER
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    with reader(folder) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        run, unreadable = first_whole(
            folder, steps, functools.partial(restore_run, manager), lambda run: run
        )
    if unreadable and run is None:
        raise CheckpointError(none_whole(folder.parent, unreadable))
    return run


def read_run(workdir: str, step: int | None, *, name: str = ema.MAIN) -> SavedRun:
    """What a checkpoint tells about its run, without reading its arrays.

    Args:
        workdir: a training run's folder.
        step: the checkpoint; None: the newest with a readable config.
        name: of an EMA that it must hold; as in `restore_ema`.

    Raises:
        CheckpointError: no checkpoint, not that step, or it is damaged.
        EmaError: it holds no EMA of that name.
    """
    return _read_newest(workdir, step, lambda manager, candidate, run: run, lambda run: run, name)


def saved_emas(workdir: str) -> dict[int, tuple[str, ...]]:
    """The names of the EMAs that training saved, by step, of every checkpoint that tells them.

    Raises:
        CheckpointError: no checkpoint.
    """
    found = {}
    with reader(_existing(local_path(workdir).absolute() / FOLDER)) as manager:
        for step in sorted(manager.all_steps()):
            with contextlib.suppress(Exception):  # damaged: `restore_ema` says so
                found[step] = restore_run(manager, step).emas
    return found


def posthoc_emas(workdir: str) -> dict[str, list[int]]:
    """The steps of the EMAs that were made after training, by name."""
    made: dict[str, list[int]] = {}
    for path in (local_path(workdir) / POSTHOC_FOLDER).glob("*/*"):
        if path.name.isdecimal():  # not one that is being written
            made.setdefault(path.parent.name, []).append(int(path.name))
    return {name: sorted(steps) for name, steps in sorted(made.items())}


def save_weights(workdir: str | Path, params: dict, config) -> None:
    """Writes weights alone to an empty workdir, as its checkpoint 0.

    Arrays are written one at a time and not compressed, which random bits hardly can be: it takes
    no more memory than the weights and the largest of them.
    """
    weights = Weights(WEIGHTS_STEP, config, None, params)
    _save_alone(local_path(workdir).absolute() / FOLDER, ema.MAIN, weights)


def save_posthoc_ema(workdir: str | Path, name: str, weights: "Weights") -> Path:
    """Writes an EMA that was made of a run's others, where `restore_ema` finds it by its name.

    Returns:
        Its folder, which must not be there yet. Memory is as in `save_weights`.
    """
    folder = local_path(workdir).absolute() / POSTHOC_FOLDER / name
    _save_alone(folder, name, weights)
    return folder / str(weights.step)


class Weights(NamedTuple):
    """What a checkpoint holds for sampling."""

    step: int
    config: ConfigDict  # of the training run
    class_names: tuple[str, ...] | None
    params: dict
    data_identity: dict | None = None  # as in SavedRun


def restore_ema(
    workdir: str, step: int | None, abstract_params: Callable, *, name: str = ema.MAIN
) -> Weights:
    """The EMA weights of one checkpoint, without the rest of its state.

    Args:
        workdir: a training run's folder.
        step: the checkpoint; None: the newest that is whole (damaged ones are warned of).
        abstract_params: function from the saved config to the parameters' ShapeDtypeStructs, with
            shardings.
        name: of the EMA: one that was saved in training (config.ema), or made after it.

    Raises:
        CheckpointError: no checkpoint, not that step (the message lists those there are), or it is
            damaged.
        EmaError: it holds no EMA of that name.
    """
    return _restore_weights(workdir, step, abstract_params, name)


def restore_params(workdir: str, step: int | None, abstract_params: Callable) -> Weights:
    """The weights that training goes on from, in place of their EMA; otherwise as restore_ema."""
    return _restore_weights(workdir, step, abstract_params, None)


def _restore_weights(
    workdir: str, step: int | None, abstract_params: Callable, name: str | None
) -> Weights:
    """The EMA of a name; None: the parameters, or the EMA where there is no more than that."""

    def read(manager: ocp.CheckpointManager, candidate: int, run: SavedRun) -> tuple:
        config = ConfigDict(run.config)
        params = abstract_params(config)
        if name is not None or run.weights_only:
            items = read_items(manager, candidate, {item_of(name or ema.MAIN): params})
        else:
            wanted = {"state": {"params": params}}
            items = read_items(manager, candidate, wanted, partial=True)
        return candidate, config, run, items

    def check(read: tuple) -> Weights:
        candidate, config, run, items = read
        (params,) = check_items(items).values()
        params = params["params"] if items.partial else params
        return Weights(candidate, config, run.class_names, params, run.data_identity)

    return _read_newest(workdir, step, read, check, name or ema.MAIN)


def _read_newest(workdir: str, step: int | None, read: Callable, check: Callable, name: str):
    """check(read(manager, step, run)) of that step, or of the newest one that is whole.

    `name` is of an EMA that it must hold: saved in training, or made after it.
    """
    made = posthoc_emas(workdir)
    if name in made and (step is None or step in made[name]):
        folder = local_path(workdir).absolute() / POSTHOC_FOLDER / name
    else:
        folder = _existing(local_path(workdir).absolute() / FOLDER)
    with reader(folder) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise CheckpointError(f"{folder.parent} holds no finished checkpoint yet")
        if step is not None and step not in steps:
            raise CheckpointError(f"{folder} has no step {step}; there are {sorted(steps)}")

        def read_whole(candidate: int) -> Any:
            run = restore_run(manager, candidate)
            if name not in run.emas:
                later = [f"{other} of {steps}" for other, steps in made.items()]
                raise EmaError(
                    f"step {candidate} of {workdir} has no EMA {name!r}; there are "
                    f"{', '.join(run.emas)}; made after training: {', '.join(later) or 'none'}"
                )
            return read(manager, candidate, run)

        found, damaged = first_whole(folder, steps if step is None else [step], read_whole, check)
    if found is None:
        raise CheckpointError(none_whole(folder.parent, damaged))
    return found


def _save_alone(folder: Path, name: str, weights: "Weights") -> None:
    """Writes a checkpoint of one EMA and nothing else, one array at a time."""
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(weights.params))
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, save_concurrent_gb=1.01 * largest / 1e9
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(item_of(name), ocp.args.PyTreeSave, handler)
    registry.add("run", ocp.args.JsonSave)
    registry.add("checksums", ocp.args.JsonSave)
    told = weights.config, weights.class_names, weights.data_identity
    with ocp.CheckpointManager(folder, handler_registry=registry) as manager:
        args = save_args({item_of(name): weights.params}, *told, ocp.args.PyTreeSave)
        manager.save(weights.step, args=args)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.parent} holds no checkpoints; expected the --workdir of a training run"
        )
    return folder
