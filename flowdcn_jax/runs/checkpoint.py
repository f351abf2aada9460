"""Checkpoints: Orbax, asynchronous, whole or not there, and checked when they are read.

A workdir holds checkpoints/<step>/ with four items, committed together: `state` (step, parameters,
optimizer), `ema`, `run` (the config, the names of the classes, and what tells the data set from
others), and `checksums`. A checksum is a position-weighted sum of an array's bits, taken on the
devices before saving and again after restoring, so a flipped bit anywhere on the way is noticed,
whatever the number of devices on either side.

A workdir of converted weights has a checkpoint 0 without `state`: training starts from its `ema`.
It is never deleted: what was trained from it is compared with it.
"""

import json
import logging
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from flowdcn_jax.config import modernise
from flowdcn_jax.errors import UserError
from flowdcn_jax.runs.state import TrainState

FOLDER = "checkpoints"
WEIGHTS_STEP = 0  # of converted weights; training saves later ones
DAMAGED_FOLDER = "damaged_checkpoints"


class CheckpointError(UserError, RuntimeError):
    """No checkpoint could be used; the message names the folder, the step and the cause."""


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
        items = {"state": _resumable(state), "ema": state.ema}
        self._manager.save(
            step, args=_save_args(items, config, class_names, data_identity), force=True
        )

    def restore_newest(self, abstract: TrainState) -> TrainState | None:
        """The newest state that restores and matches its checksums, in `abstract`'s shardings.

        Newer ones that are damaged are named in a warning and, once an older one is restored, moved
        to damaged_checkpoints/. None if there is no checkpoint. Of one that holds weights alone
        they are both params and ema, and opt_state is None.

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
                wanted = {"ema": abstract.ema}
                if not _restore_run(self._manager, step).weights_only:
                    wanted["state"] = _resumable(abstract)
                items = _restore_items(self._manager, step, wanted)
                ema = items["ema"]
                fresh = {"step": jnp.asarray(step, jnp.int32), "params": ema, "opt_state": None}
                state = TrainState(**items.get("state", fresh), ema=ema)
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


class SavedRun(NamedTuple):
    """What a checkpoint tells about its run."""

    config: dict  # nested
    class_names: tuple[str, ...] | None
    data_identity: dict | None  # of `data.Source`; None: saved before there was one
    weights_only: bool  # converted weights: no training yet


def saved_run(workdir: str) -> SavedRun | None:
    """What the newest checkpoint with a readable config tells; None without checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none with a readable config.
    """
    folder = Path(workdir).absolute() / FOLDER
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    unreadable: dict[int, str] = {}
    with _reader(folder) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                return _restore_run(manager, step)
            except Exception as e:
                unreadable[step] = _first_line(e)
    if unreadable:
        raise CheckpointError(_none_whole(folder.parent, unreadable))
    return None


def read_run(workdir: str, step: int | None) -> SavedRun:
    """What a checkpoint tells about its run, without reading its arrays.

    Args:
        workdir: a training run's folder.
        step: the checkpoint; None: the newest with a readable config.

    Raises:
        CheckpointError: no checkpoint, not that step, or it is damaged.
    """
    return _read_newest(workdir, step, _restore_run)


def save_weights(workdir: str | Path, params: dict, config) -> None:
    """Writes weights alone to an empty workdir, as its checkpoint 0.

    Arrays are written one at a time and not compressed, which random bits hardly can be: it takes
    no more memory than the weights and the largest of them.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, save_concurrent_gb=1.01 * largest / 1e9
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("ema", ocp.args.PyTreeSave, handler)
    registry.add("run", ocp.args.JsonSave)
    registry.add("checksums", ocp.args.JsonSave)
    folder = Path(workdir).absolute() / FOLDER
    with ocp.CheckpointManager(folder, handler_registry=registry) as manager:
        args = _save_args({"ema": params}, config, None, None, ocp.args.PyTreeSave)
        manager.save(WEIGHTS_STEP, args=args)


class Weights(NamedTuple):
    """What a checkpoint holds for sampling."""

    step: int
    config: ConfigDict  # of the training run
    class_names: tuple[str, ...] | None
    params: dict
    data_identity: dict | None = None  # as in SavedRun


def restore_ema(workdir: str, step: int | None, abstract_params: Callable) -> Weights:
    """The EMA weights of one checkpoint, without the rest of its state.

    Args:
        workdir: a training run's folder.
        step: the checkpoint; None: the newest that is whole (damaged ones are warned of).
        abstract_params: function from the saved config to the parameters' ShapeDtypeStructs, with
            shardings.

    Raises:
        CheckpointError: no checkpoint, not that step (the message lists those there are), or it is
            damaged.
    """
    return _restore_weights(workdir, step, abstract_params, averaged=True)


def restore_params(workdir: str, step: int | None, abstract_params: Callable) -> Weights:
    """The weights that training goes on from, in place of their EMA; otherwise as restore_ema."""
    return _restore_weights(workdir, step, abstract_params, averaged=False)


def _restore_weights(
    workdir: str, step: int | None, abstract_params: Callable, *, averaged: bool
) -> Weights:
    def read(manager: ocp.CheckpointManager, candidate: int) -> Weights:
        run = _restore_run(manager, candidate)
        config = ConfigDict(run.config)
        params = abstract_params(config)
        if averaged or run.weights_only:
            params = _restore_items(manager, candidate, {"ema": params})["ema"]
        else:
            wanted = {"state": {"params": params}}
            items = _restore_items(manager, candidate, wanted, partial=True)
            params = items["state"]["params"]
        return Weights(candidate, config, run.class_names, params, run.data_identity)

    return _read_newest(workdir, step, read)


def _read_newest(workdir: str, step: int | None, read: Callable):
    """read(manager, step) of that step, or of the newest one that is whole."""
    folder = Path(workdir).absolute() / FOLDER
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.parent} holds no checkpoints; expected the --workdir of a training run"
        )
    with _reader(folder) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise CheckpointError(f"{folder.parent} holds no finished checkpoint yet")
        if step is not None and step not in steps:
            raise CheckpointError(f"{folder} has no step {step}; there are {sorted(steps)}")
        damaged: dict[int, str] = {}
        for candidate in steps if step is None else [step]:
            try:
                return read(manager, candidate)
            except Exception as e:
                damaged[candidate] = _first_line(e)
                logging.warning(
                    "checkpoint %s is damaged: %s", folder / str(candidate), damaged[candidate]
                )
        raise CheckpointError(_none_whole(folder.parent, damaged))


@jax.jit
def _array_checksum(x: jax.Array) -> jax.Array:
    bits = x if jnp.issubdtype(x.dtype, jnp.integer) else x.view(f"uint{8 * x.itemsize}")
    weight = jnp.ones(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        weight += index * jnp.uint32(2 * stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def checksum(tree) -> dict[str, int]:
    """A number for every array of `tree`, by path: sum of bits * (2 * position + 1) mod 2^32.

    The weights are odd, so a change of any one word changes the sum.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One compiled function a shape: all leaves in one would take a minute to compile on a GPU. One
    # at a time: of several processes on CPUs, more than 32 in flight wait for one another for ever.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(_array_checksum(leaf))
        for path, leaf in leaves
    }


def _text_checksum(tree: dict) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def _resumable(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _reader(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False))


def _save_args(
    items: dict,
    config,
    class_names: tuple[str, ...] | None,
    data_identity: dict | None,
    save: type = ocp.args.StandardSave,
) -> ocp.args.Composite:
    """What goes into a checkpoint: `items` (name -> tree of arrays), the run, and checksums."""
    run = {
        "config": json.loads(config.to_json()),
        "class_names": class_names,
        "data_identity": data_identity,
    }
    checksums = {name: checksum(item) for name, item in items.items()}
    checksums["run"] = _text_checksum(run)
    return ocp.args.Composite(
        **{name: save(item) for name, item in items.items()},
        run=ocp.args.JsonSave(run),
        checksums=ocp.args.JsonSave(checksums),
    )


def _restore_run(manager: ocp.CheckpointManager, step: int) -> SavedRun:
    items = dict(run=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore())
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    if restored.checksums["run"] != _text_checksum(restored.run):
        raise CheckpointError("checksum mismatch in run")
    names = restored.run["class_names"]
    return SavedRun(
        config=modernise(restored.run["config"]),
        class_names=tuple(names) if names else None,
        data_identity=restored.run.get("data_identity"),
        weights_only="state" not in restored.checksums,
    )


def _restore_items(
    manager: ocp.CheckpointManager, step: int, wanted: dict, *, partial: bool = False
) -> dict:
    """The items `wanted` (name -> abstract tree) of a step, checked against their checksums.

    partial: the trees may leave out some of what was saved at their top.
    """

    def restore_args(tree):
        if not partial:
            return ocp.args.StandardRestore(tree)
        options = ocp.checkpoint_utils.construct_restore_args(tree)
        return ocp.args.PyTreeRestore(tree, restore_args=options, partial_restore=True)

    items = {name: restore_args(tree) for name, tree in wanted.items()}
    args = ocp.args.Composite(**items, checksums=ocp.args.JsonRestore())
    restored = manager.restore(step, args=args)
    for name in wanted:
        saved, found = restored.checksums[name], checksum(restored[name])
        if partial:
            saved = {path: saved[path] for path in saved if path.split("/")[0] in wanted[name]}
        wrong = sorted(key for key in saved.keys() | found if saved.get(key) != found.get(key))
        if wrong:
            raise CheckpointError(f"checksum mismatch in {name}: {', '.join(wrong[:3])}")
    return {name: restored[name] for name in wanted}


def _all_processes(mine: bool) -> bool:
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.process_allgather(jnp.asarray(mine)).all())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _none_whole(workdir: Path, damaged: dict[int, str]) -> str:
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"{workdir} holds no checkpoint that can be read ({reasons})"
