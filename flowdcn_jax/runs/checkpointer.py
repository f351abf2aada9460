"""Checkpoints: Orbax, asynchronous, whole or not there, and checked when they are read.

A workdir holds checkpoints/<step>/ with items that are committed together: `state` (step,
parameters, optimizer), `ema`, `ema_<name>` of each other EMA, `run` (the config, the names of the
classes, and what tells the data set from others), and `checksums`.

A workdir of converted weights has a checkpoint 0 without `state`: training starts from its `ema`.
It is never deleted: what was trained from it is compared with it.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flowdcn_jax import ema
from flowdcn_jax.faults import MachineError, as_line, machine_status
from flowdcn_jax.runs.items import (
    FOLDER,
    WEIGHTS_STEP,
    CheckpointError,
    ReadItems,
    SavedRun,
    check_items,
    first_whole,
    item_of,
    none_whole,
    read_items,
    reader,
    restore_run,
    save_args,
)
from flowdcn_jax.runs.state import TrainState

DAMAGED_FOLDER = "damaged_checkpoints"


class SaveError(MachineError):
    """The machine did not take a checkpoint; the message names the folder and the cause."""


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

        Raises:
            SaveError: this save, or the one before, could not be written.
        """
        step = int(state.step)
        emas = {item_of(name): tree for name, tree in _emas(state).items()}
        items = {"state": _resumable(state), **emas}
        with self._reporting():
            if step not in self._manager.all_steps():
                args = save_args(items, config, class_names, data_identity)
                self._manager.save(step, args=args, force=True)

    def restore_newest(self, abstract: TrainState) -> TrainState | None:
        """The newest state that restores and matches its checksums, in `abstract`'s shardings.

        Newer ones that are damaged are named in a warning and, once an older one is restored, moved
        to damaged_checkpoints/. None if there is no checkpoint. Of one that holds weights alone
        they are both params and ema, and opt_state is None. An EMA that was not saved begins as a
        copy of the parameters, with a warning.

        Raises:
            CheckpointError: there are checkpoints, and not one of them is whole.
            MachineError: one cannot be read now, in this process or another; nothing is moved.
        """
        self._manager.reload()
        with reader(self.workdir / FOLDER) as manager:
            state, damaged = first_whole(
                self.workdir / FOLDER,
                sorted(self._manager.all_steps(), reverse=True),
                lambda step: _read_state(manager, step, abstract),
                lambda read: _checked_state(*read, abstract),
            )
        if state is None and not damaged:
            return None
        if state is None:
            raise CheckpointError(none_whole(self.workdir, damaged))
        if damaged and state.opt_state is None:
            raise CheckpointError(
                f"{none_whole(self.workdir, damaged)}; with these steps moved away, training "
                "starts afresh from the converted weights"
            )
        self._set_aside(damaged)
        return state

    def check(self) -> None:
        """Raises the SaveError of a save that has failed in the background; does not wait."""
        with self._reporting():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns once the save in progress, if any, is committed; or raises SaveError."""
        with self._reporting():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads; errors are `wait`'s to raise."""
        with contextlib.suppress(SaveError), self._reporting():
            self._manager.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax has none of its own
            status = machine_status(error)
            if status is None:
                raise
            raise SaveError(
                f"no checkpoint can be written to {self.workdir / FOLDER} ({as_line(error)}); "
                "those that are there are whole",
                status,
            ) from error

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


def _resumable(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _emas(state: TrainState) -> dict:
    return {ema.MAIN: state.ema, **state.other_emas}


def _read_state(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> tuple:
    run = restore_run(manager, step)
    wanted = {item_of(name): tree for name, tree in _emas(abstract).items() if name in run.emas}
    if not run.weights_only:
        wanted["state"] = _resumable(abstract)
    return step, run, read_items(manager, step, wanted)


def _checked_state(step: int, run: SavedRun, read: ReadItems, abstract: TrainState) -> TrainState:
    items = check_items(read)
    average = items[item_of(ema.MAIN)]
    fresh = {"step": jnp.asarray(step, jnp.int32), "params": average, "opt_state": None}
    resumed = items.get("state", fresh)
    others = {}
    for name in abstract.other_emas:
        if name not in run.emas and not run.weights_only:
            logging.warning("no EMA %s was saved: it begins as the parameters at %d", name, step)
        others[name] = items.get(item_of(name)) or jax.tree.map(jnp.copy, resumed["params"])
    return TrainState(**resumed, ema=average, other_emas=others)
