"""The paper's claims on CIFAR-10, a table a command.

    python -m benchmarks.study --table=models --workdir=DIR --weights=FILE --data_dir=DIR
    python -m benchmarks.study --table=recipe --dry_run        # the runs and their minutes
    python -m benchmarks.study                                 # docs/study.md from what is there

Each run is trained by train.py, drawn and measured by evaluate.py, in processes of their own: one a
GPU, or --side_by_side of them. Results are kept in --out, a record a run; runs whose record is
there are not made again, and others go on where they stopped. Then the tables, plots and pictures
are written anew.

Exit status: 0 done; 2 bad input; 75 --minutes are over, or somebody asked to stop: the same command
goes on; 1 a run failed, and what is said of it names its log.
"""

from pathlib import Path

from absl import flags

from benchmarks.study.plan import Plan
from benchmarks.study.tables import TABLES
from flowdcn_jax import command
from flowdcn_jax.errors import UserError
from flowdcn_jax.options import instance_of

_TABLE = flags.DEFINE_list("table", [], f"Which: some of {', '.join(TABLES)}.")
_WORKDIR = command.define_path("workdir", "Folder of the runs, which may be large.")
_OUT = command.define_path("out", "Folder of the results; docs/study by default.")
_ROWS = flags.DEFINE_list("rows", None, "Names of the rows to run; all by default.")
_SEEDS = flags.DEFINE_integer("seeds", None, "Seeds of a row at most.", 1)
_MINUTES = flags.DEFINE_float("minutes", None, "Wall time after which it stops.", 0)
_SIDE_BY_SIDE = flags.DEFINE_integer("side_by_side", 1, "Processes at a time on one GPU.", 1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the runs and what they would take.")
_PLAN = command.option_flags(Plan)


def main() -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the processes that are started have the GPUs
    from benchmarks.study import report, study
    from benchmarks.study.runs import REPOSITORY

    plan = instance_of(Plan, _PLAN())
    out = Path(_OUT.value or REPOSITORY / "docs" / "study")
    unknown = [name for name in _TABLE.value if name not in TABLES]
    if unknown:
        raise UserError(f"--table names {unknown[0]!r}; expected some of {', '.join(TABLES)}")
    chosen = {name: TABLES[name] for name in _TABLE.value}
    runs = study.choose(chosen, plan, _ROWS.value, _SEEDS.value)
    if _DRY_RUN.value:
        print(study.planned(runs, out, side_by_side=_SIDE_BY_SIDE.value))
        return 0
    status = 0
    if runs:
        if _WORKDIR.value is None:
            raise UserError("--workdir is missing; expected a folder for the runs")
        status = study.perform(
            runs,
            out,
            Path(_WORKDIR.value),
            side_by_side=_SIDE_BY_SIDE.value,
            minutes=_MINUTES.value,
        )
    written = report.write(out, TABLES)
    if not runs and not written:
        raise UserError(f"--out={out} holds no results; expected some, or --table to make them")
    print("\n".join(map(str, written)))
    return status


if __name__ == "__main__":
    command.run(main)
