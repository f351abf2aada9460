"""From records to docs/study.md: tables, what agrees with the paper, plots and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study import plots, summary
from benchmarks.study.plan import Plan
from benchmarks.study.results import Results
from benchmarks.study.summary import Group, Value
from benchmarks.study.tables import Table
from flowdcn_jax.files import atomic_write

_HEAD = """# The paper's claims on CIFAR-10

`python -m benchmarks.study` writes this page from the records in `{folder}/`; no figure in it was
typed. Its options, and a plan of all runs: `--help`, `--table=models,ablations,recipe,few_steps
--dry_run`. Records also hold every key of a run's config, its curves, its commands and versions.

A run is trained by `train.py` on CIFAR-10's training images (32x32, mirrored half of the time) and
drawn by Euler steps of even length with one guidance for all t. Of the guidances and EMAs that are
tried on few samples the best one draws the samples that are measured. FD-*network* is the Fréchet
distance of that network's features; it compares the rows of a table, and is no FID. Whoever has
Inception's weights gets FID with `--features=inception --weights=FILE`. After ± stands the standard
deviation of seeds, whose number follows in brackets.

"images/s" and "minutes" are those of training on one GPU that nothing else uses, without
compilation and evaluations.
"""
_SHARED = """
These runs shared a GPU with others. Rates are those of the same steps alone on one, on latents with
as many tokens (`python -m benchmarks.training --passes=train --sizes=256x256 --models=...`); where
there is none, it is not known.
"""
RATES_FILE = "rates.json"  # of benchmarks.training --out


def write(out: Path, tables: Mapping[str, Table]) -> list[Path]:
    """Writes the page beside the folder of the results, plots and pictures into it.

    Returns:
        The paths of what was written, the page last; none without results.
    """
    found = {name: Results(out, name) for name in tables}
    if not any(results.records for results in found.values()):
        return []
    rates = summary.read_rates(out / RATES_FILE)
    written, sections = [], []
    for name, table in tables.items():
        of_table = summary.groups(table, found[name].records)
        for place, group in enumerate(of_table):
            suffix = f"_{place + 1}" if len(of_table) > 1 else ""
            stem = f"{name}{suffix}"
            pictures = _draw(group, found[name], rates, out, stem)
            sections.append(_section(name, table, group, rates, out, pictures))
            written += pictures.values()
        halved = [line for claim in table.in_half for line in summary.in_half(claim, of_table)]
        if halved:
            sections.append("\n".join([f"## {table.title}, in half the steps", "", *halved, ""]))
    page = out.parent / f"{out.name}.md"
    with atomic_write(page) as file:
        file.write("\n".join([_HEAD.format(folder=out.name), *sections]).encode())
    return [*written, page]


def _draw(
    group: Group, results: Results, rates: Mapping[str, float], out: Path, stem: str
) -> dict[str, Path]:
    """The plots and pictures of a group, by what is said of them."""
    if steps := summary.in_few_steps(group):
        name = summary.distance_name(group.records[0])
        return {
            "Distance against steps": plots.plot_few_steps(steps, name, out / f"{stem}.png"),
            "The same noise in each row of an image": plots.draw_few_steps(
                group, results.samples, out / f"{stem}_samples.png"
            ),
        }
    return {
        "Curves": plots.plot_curves(group, rates, out / f"{stem}_curves.png"),
        "The first ten samples; a column has the same noise": plots.draw_samples(
            group, results.samples, out / f"{stem}_samples.png"
        ),
    }


def _section(
    name: str,
    table: Table,
    group: Group,
    rates: Mapping[str, float],
    out: Path,
    pictures: Mapping[str, Path],
) -> str:
    parts = [f"## {table.title}, {group.num_steps} steps", "", table.text, ""]
    compared = _compared(group, rates)
    parts += _markdown(group, rates, compared)
    parts += _claims(table, compared)
    parts += [_conditions(group), "", "```bash", _command(name, group), "```", ""]
    for text, path in pictures.items():
        parts += [f"![{text}]({out.name}/{path.name})", ""]
    return "\n".join(parts)


def _compared(group: Group, rates: Mapping[str, float]) -> dict[str, Mapping[str, Value]]:
    """What claims are held to, by its name."""
    if steps := summary.in_few_steps(group):
        return {f"{each} Euler steps": values for each, values in steps.items()}
    compared: dict[str, Mapping[str, Value]] = {"equal steps": summary.final_distances(group)}
    if timed := summary.equal_time(group, rates):
        compared[f"equal time, {timed[0]:.1f} minutes, in training"] = timed[1]
    return compared | summary.of_shapes(group)


def _markdown(
    group: Group, rates: Mapping[str, float], compared: Mapping[str, Mapping[str, Value]]
) -> list[str]:
    """The table: a line a row, of all its seeds."""
    first = group.records[0]
    distance = summary.distance_name(first)
    heads = ["", "parameters (M)", "images/s", "minutes", "guidance, EMA"]
    few = bool(group.measured["solver_steps"])
    figures = {} if few else {"final": [n for n in first["figures"] if n != distance]}
    heads += [f"{distance}: {kind}" for kind in compared] + figures.get("final", [])
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, records in group.rows.items():
        cells = [name, f"{records[0]['parameters'] / 1e6:.1f}"]
        cells.append(_shown([summary.images_per_s(each, rates) for each in records], "{:.0f}"))
        cells.append(_shown([summary.minutes(each, rates) for each in records], "{:.1f}"))
        chosen = (f"{each['chosen']['guidance']:g}, {each['chosen']['ema']}" for each in records)
        cells.append("; ".join(dict.fromkeys(chosen)))
        cells += [str(values[name]) for values in compared.values()]
        for figure in figures.get("final", []):
            cells.append(_shown([record["figures"][figure] for record in records]))
        lines.append(f"| {' | '.join(cells)} |")
    if any(record["processes_a_gpu"] > 1 for record in group.records):
        lines.append(_SHARED.rstrip())
    return [*lines, ""]


def _claims(table: Table, compared: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """A line a claim and figure."""
    lines = []
    for claim in table.claims:
        for kind, values in compared.items():
            if (answer := summary.verdict(claim, values)) is not None:
                lines.append(f"- {claim.text}, at {kind}: {answer}.")
    return [*lines, ""] if lines else []


def _conditions(group: Group) -> str:
    """On what, of how many images and when."""
    measured, machines = group.measured, [record["machine"] for record in group.records]
    devices = sorted({device for machine in machines for device in machine["devices"]})
    drivers = sorted({f"driver {machine['driver']}" for machine in machines if machine["driver"]})
    versions = sorted(
        {
            f"{name} {machine['versions'][name]}"
            for machine in machines
            for name in ("jax", "flax", "flowdcn_jax")
        }
    )
    dates = sorted({machine["date"].split()[0] for machine in machines})
    record = group.records[0]
    tried = ", ".join(f"{each:g}" for each in measured["guidances"])
    told = [
        f"{record['num_samples']} samples of {measured['sampling_steps']} Euler steps against "
        f"{record['num_references']} images; guidances tried on {measured['search_images']} "
        f"samples each: {tried}.",
    ]
    if measured["curve"]:
        told.append(
            f"In training: {measured['curve_images']} samples, guidance "
            f"{measured['curve_guidance']:g}."
        )
    told.append(f"{', '.join([*devices, *drivers, *versions, *dates])}; one process a run.")
    return " ".join(told)


def _command(name: str, group: Group) -> str:
    """What makes the records again."""
    changed = {
        key: group.measured[key]
        for key, unset in Plan().decides().items()
        if group.measured[key] != unset
    }
    flags = [f"--{key}={_flag(value)}" for key, value in changed.items()]
    parts = ["python -m benchmarks.study", f"--table={name}", f"--num_steps={group.num_steps}"]
    parts += [*flags, "--workdir=WORKDIR", "--data_dir=DATA_DIR", "--weights=FILE"]
    return " ".join(parts)


def _flag(value) -> str:
    return ",".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)


def _shown(values: Sequence[float | None], form: str = "{:.4g}") -> str:
    """The mean; a dash where one is not known."""
    return "-" if None in values else form.format(sum(values) / len(values))
