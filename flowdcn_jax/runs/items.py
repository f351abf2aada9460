"""The items of a checkpoint: what each holds, the checksums that go with them, reading and writing.

`runs.checkpointer` says which items there are. A checksum is a position-weighted sum of an array's
bits, taken on the devices before saving and again after restoring, so a flipped bit anywhere on the
way is noticed, whatever the number of devices on either side.
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flowdcn_jax import ema
from flowdcn_jax.config import modernise
from flowdcn_jax.errors import UserError

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
    """A manager that changes nothing in a folder of checkpoints."""
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False))


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
        raise CheckpointError("checksum mismatch in run")
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


def restore_items(
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


def first_line(error: Exception) -> str:
    """What is said of a step that could not be read."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def none_whole(workdir: Path, damaged: dict[int, str]) -> str:
    """What is said of a workdir of which no step could be read; `damaged` has the causes."""
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    return f"{workdir} holds no checkpoint that can be read ({reasons})"
