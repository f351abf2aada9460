"""Curves with the spread of the seeds, and samples of the same noise side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.study.results import sample_key
from benchmarks.study.summary import Group, Record, Value, distance_name, minutes
from flowdcn_jax.files import atomic_write

PIXELS = 64  # of an image's side
SHOWN_IN_FEW_STEPS = 4  # images


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> Path:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    _pyplot().close(figure)
    return path


def _band(axes, xs, of_seeds: np.ndarray, label: str) -> None:
    """A curve of means, and a band from the lowest to the highest seed."""
    (line,) = axes.plot(xs, of_seeds.mean(0), ".-", markersize=4, linewidth=1.2, label=label)
    if len(of_seeds) > 1:
        low, high = of_seeds.min(0), of_seeds.max(0)
        axes.fill_between(xs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)


def plot_curves(group: Group, rates: Mapping[str, float], path: Path) -> Path:
    """Losses, and the distances in training against steps and minutes, as far as there are such."""
    taken = {name: [minutes(each, rates) for each in rows] for name, rows in group.rows.items()}
    count = 1
    if all(record["curve"] for record in group.records):
        count = 2 if any(None in of_row for of_row in taken.values()) else 3
    figure, panels = _pyplot().subplots(
        1, count, figsize=(4.6 * count, 4), dpi=110, layout="constrained", squeeze=False
    )
    losses, *distances = panels[0]
    for name, records in group.rows.items():
        steps = [step for step, _ in records[0]["losses"]]
        _band(losses, steps, _second(records, "losses"), name)
        for axes, unit in zip(distances, ("step", "minute"), strict=False):
            steps = np.array([step for step, _ in records[0]["curve"]])
            xs = steps if unit == "step" else steps * np.mean(taken[name]) / group.num_steps
            _band(axes, xs, _second(records, "curve"), name)
    lowest = min(min(loss for _, loss in record["losses"]) for record in group.records)
    losses.set(xlabel="step", ylabel="velocity loss", ylim=(0.99 * lowest, 1.15 * lowest))
    for axes, unit in zip(distances, ("step", "minutes of one GPU"), strict=False):
        name = distance_name(group.records[0])
        axes.set(xlabel=unit, ylabel=f"{name} of {group.measured['curve_images']} samples")
        axes.set_yscale("log")
    for axes in panels[0]:
        axes.grid(alpha=0.3, which="both")
    losses.legend(fontsize=8)
    return _save(figure, path)


def _second(records: Sequence[Record], key: str) -> np.ndarray:
    """[seeds, points] of the records' curves."""
    return np.array([[value for _, value in record[key]] for record in records])


def plot_few_steps(values: Mapping[int, Mapping[str, Value]], name: str, path: Path) -> Path:
    """The distance against the number of Euler steps."""
    figure, axes = _pyplot().subplots(figsize=(6, 4), dpi=110, layout="constrained")
    for row in next(iter(values.values())):
        of_seeds = np.array([of_row[row].of_seeds for of_row in values.values()]).T
        _band(axes, list(values), of_seeds, row)
    axes.set(xlabel="Euler steps", ylabel=name, xscale="log", yscale="log")
    axes.set_xticks(list(values), labels=list(map(str, values)))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, path)


def draw_samples(group: Group, samples: Mapping[str, np.ndarray], path: Path) -> Path:
    """A row of pictures a row of the table, of its first seed; a column has the same noise."""
    firsts = {name: records[0] for name, records in group.rows.items()}
    rows = {name: samples[sample_key(record)] for name, record in firsts.items()}
    return _save(_picture(list(rows.items()), titles=None), path)


def draw_few_steps(group: Group, samples: Mapping[str, np.ndarray], path: Path) -> Path:
    """A column a number of Euler steps; the rows of one image stand together, with one noise."""
    steps = [*group.measured["solver_steps"], group.measured["sampling_steps"]]
    labels = [f"{each} Euler steps" for each in steps[:-1]] + [""]
    rows = []
    for image in range(SHOWN_IN_FEW_STEPS):
        for name, records in group.rows.items():
            columns = [samples[sample_key(records[0], label)][image] for label in labels]
            rows.append((name, np.stack(columns)))
    return _save(_picture(rows, titles=[f"{each} steps" for each in steps]), path)


def _picture(rows: Sequence[tuple[str, np.ndarray]], *, titles: Sequence[str] | None):
    """Named rows of images, enlarged without smoothing."""
    columns = len(rows[0][1])
    dpi, margin = 100, 1.6  # inches, of the names
    size = (margin + columns * PIXELS / dpi, (len(rows) + 0.5) * PIXELS / dpi)
    figure, panels = _pyplot().subplots(
        len(rows), columns, figsize=size, dpi=dpi, squeeze=False, layout="constrained"
    )
    for (name, images), of_row in zip(rows, panels, strict=True):
        for image, axes in zip(images, of_row, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        label = dict(rotation=0, ha="right", va="center", fontsize=8)
        of_row[0].set_ylabel(name, **label)
    for title, axes in zip(titles or (), panels[0], strict=False):
        axes.set_title(title, fontsize=8)
    return figure
