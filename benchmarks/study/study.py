"""Which runs, what they would take, and their way from a command to a record."""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study.plan import Plan
from benchmarks.study.results import Results, record_of
from benchmarks.study.runs import REPOSITORY, Run, check, reference_command, runs_of
from benchmarks.study.schedule import (
    Failed,
    Schedule,
    Start,
    environments,
    start_process,
)
from benchmarks.study.tables import Table
from flowdcn_jax.command import STOPPED
from flowdcn_jax.config import load_config
from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import TRY_AGAIN
from flowdcn_jax.models import forward_macs

# One H200, 2026-11-28 (docs/performance.md): images/s of FlowDCN-S/2's training, and its GMACs.
_TRAINED_PER_S, _GMACS = 9178, 4.80
_START_S = 20  # of a process, until it computes
_COMPILE_S = 45  # a step of training; a sampler takes half
_FIGURES_S = 10  # features, and the distances on the CPU


def choose(
    tables: Mapping[str, Table],
    plan: Plan,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
) -> list[Run]:
    """The runs of tables, those named by `rows`, and of each the first `seeds`.

    Raises:
        UserError: a row that is in none of the tables, or a key that its config does not have.
    """
    names = [row.name for table in tables.values() for row in table.rows]
    if unknown := [name for name in rows or () if name not in names]:
        raise UserError(f"--rows names {unknown[0]!r}; expected some of {', '.join(names)}")
    runs = [
        run
        for name, table in tables.items()
        for run in runs_of(name, table, plan)
        if (not rows or run.row.name in rows) and run.seed in run.row.seeds[:seeds]
    ]
    for run in runs:
        check(run)
    return runs


def planned(runs: Sequence[Run], out: Path, *, side_by_side: int = 1) -> str:
    """The plan of runs as a table in Markdown: what each takes by estimate, and what is done."""
    results = {run.table: Results(out, run.table) for run in runs}
    lines = ["| table | run | steps | minutes, about | |", "| --- " * 5 + "|"]
    total, places, folders = 0.0, len(environments(side_by_side)), set()
    for run in runs:
        done = results[run.table].holds(run)
        trained = run.folder(Path()) in folders  # by another table
        minutes = 0.0 if done else _minutes(run, trained=trained)
        folders.add(run.folder(Path()))
        total += minutes
        cells = (run.table, run.name, f"{run.num_steps}", f"{minutes:.1f}", "done" if done else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\n{total:.0f} minutes of one process after the other; {places} at a time.")
    return "\n".join(lines)


def _minutes(run: Run, *, trained: bool) -> float:
    """By the rates of an H200 that the run does not share."""
    config = load_config(run.row.config)
    config.update_from_flattened_dict(dict(run.row.changes))
    side = config.data.image_size // config.autoencoder.downsampling
    gmacs = forward_macs(config.model, side, side) / 1e9
    trained_per_s = _TRAINED_PER_S * _GMACS / gmacs
    passes_per_s = 3 * trained_per_s  # backward costs two forwards
    plan, distinct = run.plan, len(run.plan.guidances) * len(run.row.emas)
    drawn = distinct * plan.search_images + plan.num_images
    passes = 2 * plan.sampling_steps * (drawn + run.evaluations * plan.curve_images)
    passes += 2 * sum(run.of.solver_steps) * plan.num_images
    passes += 2 * plan.sampling_steps * len(run.of.shapes) * plan.num_images
    seconds = passes / passes_per_s
    more = len(run.of.solver_steps) + len(run.of.shapes)
    seconds += 2 * _START_S + _COMPILE_S / 2 * (len(plan.guidances) + 1 + more)
    seconds += _FIGURES_S * (distinct + 1 + run.evaluations + more)
    if not trained:
        seconds += _START_S + _COMPILE_S
        seconds += run.num_steps * config.train.batch_size / trained_per_s
    return seconds / 60


def perform(
    runs: Sequence[Run],
    out: Path,
    workdir: Path,
    *,
    side_by_side: int = 1,
    minutes: float | None = None,
    start: Start = start_process,
) -> int:
    """Makes the runs that are not done, and keeps a record of each; returns the exit status.

    Args:
        runs: in the order of their turn.
        out: folder of the results.
        workdir: of what they write, which may be deleted once they have a record.
        side_by_side: processes at a time on one GPU.
        minutes: wall time after which it stops; None: when all is done.
        start: what starts a process.

    Raises:
        UserError: no weights of the feature network are named, or no data_dir that is needed.
    """
    workdir = workdir.absolute()  # commands run in the project's folder
    results = {run.table: Results(out, run.table) for run in runs}
    waiting = [run for run in runs if not results[run.table].holds(run)]
    for run in waiting:
        for value in (*run.row.changes.values(), run.of.data):
            run.plan.located(value)
    if waiting and waiting[0].plan.weights is None:
        raise UserError(
            f"--weights is missing; expected those of {waiting[0].plan.features}, which "
            "docs/evaluation.md says how to convert"
        )
    places = environments(side_by_side)
    shared = Counter(place.get("CUDA_VISIBLE_DEVICES") for place in places)
    schedule = Schedule(places, minutes=minutes, start=start)

    making = threading.Lock()  # one reference at a time; whoever needs it waits for it

    def reference_file(plan: Plan, environment: dict[str, str], data: str) -> Path:
        path = workdir / "references" / f"{data}_{plan.features}.npz"
        with making:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _say(f"the reference: {data}")
                command = reference_command(plan, data, path)
                schedule.wait(command, environment, path.with_suffix(".log"))
        return path

    def make(group: list[Run]):
        def job(environment: dict[str, str]) -> None:
            for run in group:
                folder, commands = run.folder(workdir), []
                place = workdir / "commands" / folder.name
                _say(f"{run.table}: {run.name}")
                call = schedule.caller(place, environment, commands)
                made = run.perform(
                    folder, functools.partial(reference_file, run.plan, environment), call
                )
                record, samples = record_of(
                    run,
                    folder,
                    made,
                    processes_a_gpu=max(shared.values()),
                    commands=commands,
                    names=_paths(workdir, run.plan),
                )
                results[run.table].add(run, record, samples)
                first = next(iter(record["figures"].items()))
                _say(f"{run.table}: {run.name} is done: {first[0]} {first[1]:.2f}")

        return job

    groups: dict[Path, list[Run]] = {}  # those that share a training, one after the other
    for run in waiting:
        groups.setdefault(run.folder(workdir), []).append(run)
    errors = schedule.run([make(group) for group in groups.values()])
    for error in errors:
        if not isinstance(error, Failed):
            raise error
        _say(f"error: {error}")
    if errors:
        return TRY_AGAIN if all(error.status == TRY_AGAIN for error in errors) else 1
    return STOPPED if schedule.stopped else 0


def _paths(workdir: Path, plan: Plan) -> dict[str, str]:
    """What records call the paths of this machine; longer ones first."""
    paths = {str(workdir): "WORKDIR", str(plan.weights): "WEIGHTS", str(REPOSITORY): "."}
    if plan.data_dir:
        paths[plan.data_dir] = "DATA_DIR"
    return dict(sorted(paths.items(), key=lambda each: -len(each[0])))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
