"""Figures of several sets of samples against one reference: a table, a plot and files."""

from pathlib import Path
from typing import Any

from flowdcn_jax.command import write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.evaluation.reference_files import write_statistics
from flowdcn_jax.evaluation.report import Report, aligned
from flowdcn_jax.files import atomic_write

# What the plot's horizontal axis is, if it differs between rows; the first of these.
_AXES = ("guidance", "num_steps", "step", "ema")


class Comparison:
    """Reports on samples that differ in some options, a row each.

    With FILE.json to write, each row is written as it comes: FILE.json with all rows so far,
    FILE.png with the first figure (the Fréchet distance) of each, FILE.reference.npz, and
    FILE.OPTION_VALUE.samples.npz with the row's own numbers.
    """

    def __init__(self, path: Path | None = None):
        """`path`: FILE.json; None: nothing is written."""
        self.rows: list[tuple[dict[str, Any], Report]] = []
        self._path = path
        self._described: list[dict[str, Any]] = []

    def add(self, varied: dict[str, Any], report: Report) -> None:
        """Adds a row, and writes it.

        Args:
            varied: the values of the options that differ between rows, the same options in each.
            report: its samples against the reference of the other rows.

        Raises:
            EvaluationError, OSError: the files cannot be written.
        """
        self.rows.append((varied, report))
        if self._path is None:
            return
        stem = self._path.name.removesuffix(".json")
        label = ".".join(f"{name}_{value}" for name, value in varied.items())
        files = {
            "samples": self._path.with_name(f"{stem}.{label}.samples.npz"),
            "reference": self._path.with_name(f"{stem}.reference.npz"),
        }
        write_statistics(files["samples"], report.samples)
        if len(self.rows) == 1:
            write_statistics(files["reference"], report.references)
        self._described.append({"options": varied} | report.as_dict(files))
        write_json(self._path, {"rows": self._described, "machine": describe_machine()})
        self.plot(self._path.with_name(f"{stem}.png"))

    def table(self) -> str:
        """The figures for a screen, a row of the comparison a line; then what is to be known."""
        varied, first = self.rows[0]
        lines = [(*varied, *(figure.name for figure in first.figures), "samples", "reference", "")]
        notes: dict[str, None] = {}
        for values, report in self.rows:
            shown = [f"{value}" for value in values.values()]
            shown += [figure.shown for figure in report.figures]
            counts = (report.samples.count, report.references.count)
            shown += ["-" if count is None else f"{count}" for count in counts]
            lines.append((*shown, ""))
            notes |= {f"{each.name}: {each.note}": None for each in report.figures if each.note}
            notes |= dict.fromkeys(report.notes)
        return "\n".join([*aligned(lines), *(f"note: {note}" for note in notes)])

    def plot(self, path: Path) -> None:
        """Writes a PNG of each row's first figure, against guidance if that differs."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        varied, first = self.rows[0]
        axis = next(name for name in _AXES if name in varied)
        curves: dict[str, list[tuple[Any, float]]] = {}
        for values, report in self.rows:
            others = {name: value for name, value in values.items() if name != axis}
            label = ", ".join(f"{name} {value}" for name, value in others.items())
            curves.setdefault(label, []).append((values[axis], report.figures[0].value))
        figure, axes = pyplot.subplots(figsize=(6, 4), dpi=120, layout="constrained")
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1.2, label=label)
        counts = [f"{count}" for count in (first.samples.count, first.references.count) if count]
        axes.set(xlabel=axis, ylabel=first.figures[0].name, title=" against ".join(counts))
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
        pyplot.close(figure)
