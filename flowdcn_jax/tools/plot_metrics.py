"""Draws the loss curves of runs: python -m flowdcn_jax.tools.plot_metrics --workdir=DIR

--workdir may be given several times, to compare runs, and --metric=FID or another name in
metrics.jsonl draws that. Writes --out, by default loss.png (or FID.png) in the first workdir.
"""

from pathlib import Path

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.command import check_writable
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write
from flowdcn_jax.training.metrics import METRICS_FILE, read_rows

_WORKDIRS = command.define_paths("workdir", "Folder of a run.", required=True)
_METRIC = flags.DEFINE_string("metric", "loss", "Name in metrics.jsonl.")
_OUT = command.define_path("out", "PNG to write; by default in the first workdir.")


def read_metric(workdir: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric of a run.

    What every line has is a mean since the line before: means over less than half of the usual
    stretch, as around a stop, are noisier and left out. What some lines have (figures of
    evaluations) is of these steps.

    Raises:
        UserError: the folder holds no metrics, or no such metric.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the --workdir of a training run")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no metrics yet")
    named = [row for row in rows if name in row]
    if not named:
        expected = ", ".join(dict.fromkeys(key for row in rows for key in row if key != "step"))
        raise UserError(f"{path} holds no {name!r}; expected one of {expected}")
    if len(named) < len(rows):
        return [row["step"] for row in named], [row[name] for row in named]
    starts = [0, *(row["step"] for row in rows[:-1])]
    stretches = [row["step"] - start for row, start in zip(rows, starts, strict=True)]
    whole = [row for row, n in zip(rows, stretches, strict=True) if 2 * n >= max(stretches)]
    return [row["step"] for row in whole], [row[name] for row in whole]


def plot_metric(workdirs: list[str], name: str, out: Path) -> None:
    """Writes a PNG with one curve a run; first losses, far above the rest, may leave the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    curves = [(Path(workdir).name, *read_metric(workdir, name)) for workdir in workdirs]
    for run, steps, values in curves:
        axes.plot(steps, values, label=run, linewidth=1.2, marker="." if len(steps) < 50 else "")
    axes.set(xlabel="step", ylabel=name)
    if name == "loss":
        losses = sorted(loss for _, _, losses in curves for loss in losses)
        top = losses[int(0.95 * (len(losses) - 1))]
        axes.set_ylim(losses[0] - 0.1 * (top - losses[0]), top + 0.3 * (top - losses[0]) + 1e-9)
        axes.set_ylabel("velocity loss (mean since the last logging step)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(out) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def main() -> None:
    name = f"{_METRIC.value}.png"
    out = Path(_OUT.value) if _OUT.value else Path(_WORKDIRS.value[0]) / name
    check_writable(out, flag="out")
    plot_metric(_WORKDIRS.value, _METRIC.value, out)
    print(out)


if __name__ == "__main__":
    command.run(main)
