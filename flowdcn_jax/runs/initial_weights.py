"""A run that begins with another run's weights: which, what must match, and the record of it.

The model must be the same but for its number of classes, and for a second time that it may take
where the other took none; resolution, data and everything else may differ. The table of the classes
is made anew where the classes are others, and so is the embedder of the second time.
"""

import functools
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flowdcn_jax import ema
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import local_path
from flowdcn_jax.models import abstract_model, init_params
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.checkpoint import SavedRun
from flowdcn_jax.runs.folder import differences
from flowdcn_jax.runs.items import item_of
from flowdcn_jax.runs.record import fixed_values
from flowdcn_jax.runs.sharding import state_sharding, with_sharding

PARAMS = "params"  # the name of the weights that training goes on from; no EMA has it
CLASS_TABLE = "class_embedder"
CLASSES = "model.num_classes"
SPAN_EMBEDDER = "span_embedder"
SECOND_TIME = "model.second_time"


class InitialWeightsError(UserError):
    """Weights that a run cannot begin with; the message says what was expected."""


class InitFrom(NamedTuple):
    """Which weights of another run a run begins with: train.py's flags."""

    workdir: str  # of a run, or of converted weights
    step: int | None = None  # the checkpoint; None: the newest
    weights: str = ema.MAIN  # the name of an EMA, or PARAMS


def find(
    choice: InitFrom | None,
    config,
    class_names: tuple[str, ...] | None,
    *,
    workdir: Path,
    saved: SavedRun | None,
) -> dict[str, Any] | None:
    """The record of the weights that a run begins, or began, with; None: initial values.

    No array is read.

    Args:
        choice: what was asked for.
        config: of the run.
        class_names: of its data.
        workdir: of the run.
        saved: what its newest checkpoint tells, if there is one.

    Returns:
        {"workdir", "step" and "weights" as in `InitFrom`, "checksum" of the weights, "class_table":
        "kept" or "new", "span_embedder": "new" if that is so, "differs": other differences of the
        configs}.

    Raises:
        InitialWeightsError: another model, weights that are not there, or a run that began
            otherwise.
        flowdcn_jax.runs.checkpoint.CheckpointError: no such checkpoint or EMA, or it is damaged.
    """
    if saved is not None and not saved.weights_only:
        if choice is not None:
            _check_began_so(choice, saved.origin)
        return saved.origin
    if choice is None:
        return None
    choice = choice._replace(workdir=str(local_path(choice.workdir)))
    flag = f"--init_from={choice.workdir}"
    if saved is not None:
        raise InitialWeightsError(
            f"{flag}: {workdir} holds converted weights, from which its run starts; expected "
            "another --workdir"
        )
    if os.path.realpath(choice.workdir) == os.path.realpath(workdir):
        raise InitialWeightsError(f"{flag} is the --workdir too; expected another run's")
    run = _read_run(choice)
    before, now = fixed_values(run.config), fixed_values(json.loads(config.to_json()))
    found = {
        key: differences(before.get(key), now.get(key), f"config.{key}")
        for key in sorted(before.keys() | now.keys())
    }
    anew = now[SECOND_TIME] and not before[SECOND_TIME]
    may_differ = {CLASSES} | ({SECOND_TIME} if anew else set())
    of_model = [key for key in found if key.startswith("model.") and key not in may_differ]
    if wrong := [text for key in of_model for text in found[key]]:
        raise InitialWeightsError(
            f"{flag} has another model: {'; '.join(wrong)}. Expected the same but for the number "
            "of classes, or a second time that it does not take yet"
        )
    renamed = run.class_names and class_names and tuple(class_names) != run.class_names
    return {
        "workdir": choice.workdir,
        "step": run.step,
        "weights": choice.weights,
        "checksum": _digest(run, choice.weights),
        "class_table": "new" if found[CLASSES] or renamed else "kept",
        **({SPAN_EMBEDDER: "new"} if anew else {}),
        "differs": [text for texts in found.values() for text in texts],
    }


def restore(origin: dict[str, Any], config, mesh: Mesh) -> Any:
    """The weights of `find`'s record, with a table of the classes that fits the run.

    Returns:
        Nested dicts of float32, sharded as a state is.

    Raises:
        flowdcn_jax.runs.checkpoint.CheckpointError: they are damaged.
    """

    def abstract_params(saved_config):
        return with_sharding(abstract_model(saved_config.model)[1], mesh)

    read = functools.partial(checkpoint.restore_ema, name=origin["weights"])
    if origin["weights"] == PARAMS:
        read = checkpoint.restore_params
    params = read(origin["workdir"], origin["step"], abstract_params).params
    if origin["class_table"] == "new":
        params[CLASS_TABLE] = _initial_part(CLASS_TABLE, config, mesh)
    if SPAN_EMBEDDER in origin:
        params[SPAN_EMBEDDER] = _initial_part(SPAN_EMBEDDER, config, mesh)
    return params


def as_text(origin: dict[str, Any]) -> str:
    """The record as people read it."""
    tables = {
        "new": "the table of the classes is made anew",
        "kept": "the table of the classes is kept",
    }
    table = tables[origin["class_table"]]
    if SPAN_EMBEDDER in origin:
        table += ", the embedder of the second time is made anew"
    differs = "; ".join(origin["differs"]) or "nothing that a run keeps"
    return (
        f"begins with the weights {origin['weights']} of step {origin['step']} of "
        f"{origin['workdir']}: {table}; differs: {differs}"
    )


def _read_run(choice: InitFrom) -> SavedRun:
    name = ema.MAIN if choice.weights == PARAMS else choice.weights
    run = checkpoint.read_run(choice.workdir, choice.step, name=name)
    if choice.weights == PARAMS and run.weights_only:
        raise InitialWeightsError(
            f"--init_weights is {PARAMS}; expected {' or '.join(run.emas)}, since step {run.step} "
            f"of {choice.workdir} holds no other weights"
        )
    return run


def _check_began_so(choice: InitFrom, origin: dict[str, Any] | None) -> None:
    """Refuses to go on with a run under flags that say that it began otherwise."""
    remedy = "Leave --init_from out to go on with it, or name another --workdir"
    if origin is None:
        raise InitialWeightsError(
            f"--init_from={choice.workdir}: the workdir holds a run that began with initial "
            f"values. {remedy}"
        )
    asked = {"step": origin["step"] if choice.step is None else choice.step}
    asked["weights"] = choice.weights
    wrong = differences({key: origin[key] for key in asked}, asked, "init")
    if not wrong:
        try:
            found = _digest(_read_run(choice._replace(step=origin["step"])), choice.weights)
        except UserError as error:  # it may be gone: all that is needed lies in the workdir
            logging.warning("--init_from=%s is not compared: %s", choice.workdir, error)
            return
        wrong = differences({"checksum": origin["checksum"]}, {"checksum": found}, "init")
    if wrong:
        raise InitialWeightsError(
            f"--init_from={choice.workdir}: the workdir holds a run that began with other weights "
            f"({'; '.join(wrong)}), those of {origin['workdir']}. {remedy}"
        )


def _digest(run: SavedRun, weights: str) -> str:
    """Eight hexadecimal digits that tell weights from others, of the checksums of their arrays."""
    if weights == PARAMS:
        prefix = f"{PARAMS}/"
        sums = {
            path.removeprefix(prefix): number
            for path, number in run.checksums["state"].items()
            if path.startswith(prefix)
        }
    else:
        sums = run.checksums[item_of(weights)]
    return f"{zlib.crc32(json.dumps(sums, sort_keys=True).encode()):08x}"


def _initial_part(name: str, config, mesh: Mesh) -> Any:
    """A part of the parameters as a fresh run of this config has it."""
    shape = abstract_model(config.model)[1][name]
    init = jax.jit(
        lambda key: init_params(config.model, key)[name],
        out_shardings=state_sharding(shape, mesh),
    )
    return init(jax.random.key(config.seed))
