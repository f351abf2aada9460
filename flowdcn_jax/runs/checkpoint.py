"""Checkpoints: Orbax, asynchronous, whole or not there, and checked when they are read.

A workdir holds checkpoints/<step>/ with items that are committed together: `state` (step,
parameters, optimizer), `ema`, `ema_<name>` of each other EMA, `run` (the config, the names of the
classes, and what tells the data set from others), and `checksums`.

A workdir of converted weights has a checkpoint 0 without `state`: training starts from its `ema`.
It is never deleted: what was trained from it is compared with it.

EMAs that are made after training lie in posthoc_emas/<name>/<step>/, each a checkpoint of its own
with the items `ema_<name>`, `run` and `checksums`.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from flowdcn_jax import ema
from flowdcn_jax.runs.items import (
    CheckpointError,
    EmaError,
    SavedRun,
    checksum,
    item_of,
    reader,
    restore_items,
    restore_run,
    save_args,
)
from flowdcn_jax.runs.state import TrainState

__all__ = [
    "CheckpointError",
    "Checkpointer",
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

FOLDER = "checkpoints"
POSTHOC_FOLDER = "posthoc_emas"
WEIGHTS_STEP = 0  # of converted weights; training saves later ones
DAMAGED_FOLDER = "damaged_checkpoints"


class Checkpointer:
    """Saves a run's states in the background and restores the newest one that is whole.

    It keeps the newest `keep`, every `keep_every_steps`th, and converted weights.
    """

    def __init__(self, workdir: str, *, keep: int, keep_every_steps: int | None):
        self.workdir = Path(workdir).absolute()
        policies = [
            ocp.checkpoint_managers.LatestN(keep),
            ocp.checkpoint_managers.CustomSteps([WEIGHTS_STEP]),
        ]
        if keep_every_steps is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every_steps))
        self._manager = ocp.CheckpointManager(
            self.workdir / FOLDER,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        state: TrainState,
        config,
        class_names: tuple[str, ...] | None,
        data_identity: dict | None = None,
    ) -> None:
        """Starts saving; returns once the state is copied, so that it may be donated.

        `data_identity` is that of the training data (`data.Source`); None: nothing to compare.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        emas = {item_of(name): tree for name, tree in _emas(state).items()}
        items = {"state": _resumable(state), **emas}
        self._manager.save(
            step, args=save_args(items, config, class_names, data_identity), force=True
        )

    def restore_newest(self, abstract: TrainState) -> TrainState | None:
        """The newest state that restores and matches its checksums, in `abstract`'s shardings.

        Newer ones that are damaged are named in a warning and, once an older one is restored, moved
        to damaged_checkpoints/. None if there is no checkpoint. Of one that holds weights alone
        they are both params and ema, and opt_state is None. An EMA that was not saved begins as a
        copy of the parameters, with a warning.

        Raises:
            CheckpointError: there are checkpoints, and not one of them is whole.
        """
        self._manager.reload()
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step == WEIGHTS_STEP and damaged:
                raise CheckpointError(
                    f"{_none_whole(self.workdir, damaged)}; with these steps moved away, training "
                    "starts afresh from the converted weights"
                )
            state, error = None, ""
            try:
                state = _restore_state(self._manager, step, abstract)
            except Exception as e:  # whatever a damaged file makes Orbax raise
                error = _first_line(e)
            if _all_processes(state is not None):
                self._set_aside(damaged)
                return state
            damaged[step] = error or "another process could not read it"
            logging.warning(
                "checkpoint %s is damaged and is passed over: %s",
                self.workdir / FOLDER / str(step),
                damaged[step],
            )
        if damaged:
            raise CheckpointError(_none_whole(self.workdir, damaged))
        return None

    def wait(self) -> None:
        """Returns once the save in progress, if any, is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Moves damaged steps away: their numbers will be saved again."""
        if jax.process_index() == 0:
            for step in damaged:
                target = self.workdir / DAMAGED_FOLDER / f"{step}-{time.time_ns()}"
                target.parent.mkdir(exist_ok=True)
                (self.workdir / FOLDER / str(step)).rename(target)
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()


def saved_run(workdir: str) -> SavedRun | None:
    """What the newest checkpoint with a readable config tells; None without checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none with a readable config.
    """
    folder = Path(workdir).absolute() / FOLDER
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    unreadable: dict[int, str] = {}
    with reader(folder) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return restore_run(manager, step)
            except Exception as e:
                unreadable[step] = _first_line(e)
    if unreadable:
        raise CheckpointError(_none_whole(folder.parent, unreadable))
    return None


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
    return _read_newest(workdir, step, lambda manager, candidate, run: run, name)


def saved_emas(workdir: str) -> dict[int, tuple[str, ...]]:
    """The names of the EMAs that training saved, by step, of every checkpoint that tells them.

    Raises:
        CheckpointError: no checkpoint.
    """
    found = {}
    with reader(_existing(Path(workdir).absolute() / FOLDER)) as manager:
        for step in sorted(manager.all_steps()):
            with contextlib.suppress(Exception):  # damaged: `restore_ema` says so
                found[step] = restore_run(manager, step).emas
    return found


def posthoc_emas(workdir: str) -> dict[str, list[int]]:
    """The steps of the EMAs that were made after training, by name."""
    made: dict[str, list[int]] = {}
    for path in (Path(workdir) / POSTHOC_FOLDER).glob("*/*"):
        if path.name.isdecimal():  # not one that is being written
            made.setdefault(path.parent.name, []).append(int(path.name))
    return {name: sorted(steps) for name, steps in sorted(made.items())}


def save_weights(workdir: str | Path, params: dict, config) -> None:
    """Writes weights alone to an empty workdir, as its checkpoint 0.

    Arrays are written one at a time and not compressed, which random bits hardly can be: it takes
    no more memory than the weights and the largest of them.
    """
    weights = Weights(WEIGHTS_STEP, config, None, params)
    _save_alone(Path(workdir).absolute() / FOLDER, ema.MAIN, weights)


def save_posthoc_ema(workdir: str | Path, name: str, weights: "Weights") -> Path:
    """Writes an EMA that was made of a run's others, where `restore_ema` finds it by its name.

    Returns:
        Its folder, which must not be there yet. Memory is as in `save_weights`.
    """
    folder = Path(workdir).absolute() / POSTHOC_FOLDER / name
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

    def read(manager: ocp.CheckpointManager, candidate: int, run: SavedRun) -> Weights:
        config = ConfigDict(run.config)
        params = abstract_params(config)
        if name is not None or run.weights_only:
            item = item_of(name or ema.MAIN)
            params = restore_items(manager, candidate, {item: params})[item]
        else:
            wanted = {"state": {"params": params}}
            items = restore_items(manager, candidate, wanted, partial=True)
            params = items["state"]["params"]
        return Weights(candidate, config, run.class_names, params, run.data_identity)

    return _read_newest(workdir, step, read, name or ema.MAIN)


def _read_newest(workdir: str, step: int | None, read: Callable, name: str):
    """read(manager, step, run) of that step, or of the newest one that is whole.

    `name` is of an EMA that it must hold: saved in training, or made after it.
    """
    made = posthoc_emas(workdir)
    if name in made and (step is None or step in made[name]):
        folder = Path(workdir).absolute() / POSTHOC_FOLDER / name
    else:
        folder = _existing(Path(workdir).absolute() / FOLDER)
    with reader(folder) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise CheckpointError(f"{folder.parent} holds no finished checkpoint yet")
        if step is not None and step not in steps:
            raise CheckpointError(f"{folder} has no step {step}; there are {sorted(steps)}")
        damaged: dict[int, str] = {}
        for candidate in steps if step is None else [step]:
            try:
                run = restore_run(manager, candidate)
                if name not in run.emas:
                    later = [f"{other} of {steps}" for other, steps in made.items()]
                    raise EmaError(
                        f"step {candidate} of {workdir} has no EMA {name!r}; there are "
                        f"{', '.join(run.emas)}; made after training: {', '.join(later) or 'none'}"
                    )
                return read(manager, candidate, run)
            except EmaError:
                raise
            except Exception as e:
                damaged[candidate] = _first_line(e)
                logging.warning(
                    "checkpoint %s is damaged: %s", folder / str(candidate), damaged[candidate]
                )
        raise CheckpointError(_none_whole(folder.parent, damaged))


def _resumable(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _emas(state: TrainState) -> dict:
    return {ema.MAIN: state.ema, **state.other_emas}


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


def _restore_state(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
    run = restore_run(manager, step)
    wanted = {item_of(name): tree for name, tree in _emas(abstract).items() if name in run.emas}
    if not run.weights_only:
        wanted["state"] = _resumable(abstract)
    items = restore_items(manager, step, wanted)
    average = items[item_of(ema.MAIN)]
    fresh = {"step": jnp.asarray(step, jnp.int32), "params": average, "opt_state": None}
    resumed = items.get("state", fresh)
    others = {}
    for name in abstract.other_emas:
        if name not in run.emas and not run.weights_only:
            logging.warning("no EMA %s was saved: it begins as the parameters at %d", name, step)
        others[name] = items.get(item_of(name)) or jax.tree.map(jnp.copy, resumed["params"])
    return TrainState(**resumed, ema=average, other_emas=others)


def _all_processes(mine: bool) -> bool:
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(jnp.asarray(mine)).all())


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.parent} holds no checkpoints; expected the --workdir of a training run"
        )
    return folder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _none_whole(workdir: Path, damaged: dict[int, str]) -> str:
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"{workdir} holds no checkpoint that can be read ({reasons})"
