"""The items of a checkpoint: what each holds, the checksums that go with them, reading and writing.

`runs.checkpointer` says which items there are. A checksum is a position-weighted sum of an array's
bits, taken on the devices before saving and again after restoring, so a flipped bit anywhere on the
way is noticed, whatever the number of devices on either side.
"""

import dataclasses
import functools
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flowdcn_jax import ema
from flowdcn_jax.config import modernise
from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import DamagedError, MachineError, is_damage, machine_status, retried
from flowdcn_jax.runs.processes import first_list, highest

FOLDER = "checkpoints"
WEIGHTS_STEP = 0  # of converted weights; training saves later ones
_EMA_PREFIX = f"{ema.MAIN}_"


class CheckpointError(UserError, RuntimeError):
    """No checkpoint could be used; the message names the folder, the step and the cause."""


class EmaError(CheckpointError):
    """There is no EMA of a name; the message says which there are."""


class SavedRun(NamedTuple):
    """What a checkpoint tells about its run."""

    config: dict  # nested
    class_names: tuple[str, ...] | None
    data_identity: dict | None  # of `data.Source`; None: saved before there was one
    weights_only: bool  # converted weights: no training yet
    emas: tuple[str, ...]  # their names


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


def text_checksum(tree: dict) -> int:
    """CRC-32 of a tree of JSON's types, whatever the order of its keys."""
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def item_of(name: str) -> str:
    """The item of the EMA of that name."""
    return ema.MAIN if name == ema.MAIN else f"{_EMA_PREFIX}{name}"


def reader(folder: Path) -> ocp.CheckpointManager:
    """A manager that changes nothing in a folder of checkpoints, and waits for no other process.

    One that could not read would leave the others waiting: see `first_whole`.
    """
    options = ocp.CheckpointManagerOptions(create=False)
    if jax.process_count() > 1:
        number = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"alone{number}"
        )
        options = dataclasses.replace(options, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder, options=options)


def first_whole(
    folder: Path, steps: list[int], read: Callable[[int], Any], check: Callable[[Any], Any]
) -> tuple[Any, dict[int, str]]:
    """What `check` makes of the first of `steps` that every process can read.

    All processes call it, and get the same step: each says what it met before any of them goes on.
    Steps that one of them finds damaged are passed over, with a warning.

    Args:
        folder: of checkpoints.
        steps: to try, in order; process 0's count.
        read: from a step to what was read; waits for no other process.
        check: from that to the result; raises DamagedError, in all processes alike.

    Returns:
        (the result, or None; {step that was passed over: why}).

    Raises:
        MachineError: a process could not read, now.
    """
    damaged: dict[int, str] = {}
    for step in first_list(steps):
        path, found, problem, status = folder / str(step), None, "", 0
        try:
            found = retried(functools.partial(read, step), what=str(path))
        except Exception as error:
            problem = first_line(error)
            status = -1 if is_damage(error) else machine_status(error)
            if status is None:
                raise
        if (worst := highest(status)) > 0:
            problem = problem or "another process says why"
            raise MachineError(
                f"checkpoint {path} cannot be read now ({problem}); nothing was moved, and the "
                "same command goes on",
                worst,
            )
        if -highest(-status) == 0:
            try:
                return check(found), damaged
            except DamagedError as error:
                problem = str(error)
        damaged[step] = problem or "another process could not read it"
        logging.warning("checkpoint %s is damaged and is passed over: %s", path, damaged[step])
    return None, damaged


def save_args(
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
    checksums["run"] = text_checksum(run)
    return ocp.args.Composite(
        **{name: save(item) for name, item in items.items()},
        run=ocp.args.JsonSave(run),
        checksums=ocp.args.JsonSave(checksums),
    )


def restore_run(manager: ocp.CheckpointManager, step: int) -> SavedRun:
    """What a step tells about its run, checked against its checksum."""
    items = dict(run=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore())
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    if restored.checksums["run"] != text_checksum(restored.run):
        raise DamagedError("checksum mismatch in run")
    names = restored.run["class_names"]
    return SavedRun(
        config=modernise(restored.run["config"]),
        class_names=tuple(names) if names else None,
        data_identity=restored.run.get("data_identity"),
        weights_only="state" not in restored.checksums,
        emas=tuple(
            item.removeprefix(_EMA_PREFIX)
            for item in sorted(restored.checksums)
            if item == ema.MAIN or item.startswith(_EMA_PREFIX)
        ),
    )


class ReadItems(NamedTuple):
    """Items that are read and not yet checked."""

    items: dict  # name -> tree
    checksums: dict  # that were saved
    partial: bool


def read_items(
    manager: ocp.CheckpointManager, step: int, wanted: dict, *, partial: bool = False
) -> ReadItems:
    """The items `wanted` (name -> abstract tree) of a step.

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
    return ReadItems({name: restored[name] for name in wanted}, restored.checksums, partial)


def check_items(read: ReadItems) -> dict:
    """The items, once they match their checksums; all processes call it.

    Raises:
        DamagedError: they do not.
    """
    for name, tree in read.items.items():
        saved, found = read.checksums.get(name, {}), checksum(tree)
        if read.partial:
            saved = {path: saved[path] for path in saved if path.split("/")[0] in tree}
        wrong = sorted(key for key in saved.keys() | found if saved.get(key) != found.get(key))
        if wrong:
            raise DamagedError(f"checksum mismatch in {name}: {', '.join(wrong[:3])}")
    return read.items


def first_line(error: Exception) -> str:
    """What is said of a step that could not be read."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def none_whole(workdir: Path, damaged: dict[int, str]) -> str:
    """What is said of a workdir of which no step could be read; `damaged` has the causes."""
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"{workdir} holds no checkpoint that can be read ({reasons})"
