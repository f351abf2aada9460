"""Numbers of a table from its records: means and spreads, equal GPU time, what agrees."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.study.tables import CIFAR10, Claim, Table

Record = Mapping[str, Any]

_OF_A_STEP = ("train.batch_size", "train.accumulation_steps", "optimizer.name")


class Value(NamedTuple):
    """A figure of a row: of one seed, or of several."""

    of_seeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_seeds)

    def __str__(self) -> str:
        """The mean, and the standard deviation of the seeds if there are several."""
        if len(self.of_seeds) == 1:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {statistics.stdev(self.of_seeds):.2f} ({len(self.of_seeds)})"


class Group(NamedTuple):
    """Records of a table that can be compared: as long trained, and measured alike."""

    num_steps: int
    measured: Mapping[str, Any]
    rows: Mapping[str, Sequence[Record]]  # by name, in the table's order

    @property
    def records(self) -> list[Record]:
        return [record for records in self.rows.values() for record in records]


def groups(table: Table, records: Iterable[Record]) -> list[Group]:
    """The records in groups, the longest training last; rows that the table lost are left out."""
    found: dict[str, list[Record]] = {}
    for record in records:
        settings = record["settings"]
        key = (settings["num_steps"], *sorted(_alike(settings["measured"]).items()))
        found.setdefault(repr(key), []).append(record)
    made = []
    for group in found.values():
        by_name: dict[str, list[Record]] = {}
        for row in table.rows:
            of_row = [record for record in group if record["row"] == row.name]
            if of_row:
                by_name[row.name] = sorted(of_row, key=lambda each: each["settings"]["seed"])
        if by_name:
            settings = group[0]["settings"]
            made.append(Group(settings["num_steps"], settings["measured"], by_name))
    return sorted(made, key=lambda group: group.num_steps)


def distance_name(record: Record) -> str:
    """What the Fréchet distance is called; it comes first among the figures."""
    return next(iter(record["figures"]))


def final_distances(group: Group) -> dict[str, Value]:
    """Of each row the distance of its last samples."""
    return {
        name: Value(tuple(record["figures"][distance_name(record)] for record in records))
        for name, records in group.rows.items()
    }


def read_rates(path: Path) -> dict[str, float]:
    """Images a second by name of a config, of a file of benchmarks.training; none without it.

    Of steps of training on one device with CIFAR-10's number of tokens.
    """
    if not path.exists():
        return {}
    return {
        row["model"]: row["images_per_s"]
        for row in json.loads(path.read_text())["results"]
        if (row["pass"], row["image_size"], row["mesh"]) == ("train", 256, {"data": 1, "fsdp": 1})
        and row["images_per_s"]
    }


def images_per_s(record: Record, rates: Mapping[str, float]) -> float | None:
    """The rate of a run's training on a GPU that nothing else uses; None: it is not known.

    A run's own rate is that if it did not share the GPU. Otherwise it is that of its config among
    `rates`, unless the run changes what a step computes.
    """
    if record["processes_a_gpu"] == 1:
        return record["images_per_s"]
    changes = set(record["settings"]["changes"]) - set(CIFAR10)
    if any(key.startswith("model.") or key in _OF_A_STEP for key in changes):
        return None
    return rates.get(record["settings"]["config"])


def minutes(record: Record, rates: Mapping[str, float]) -> float | None:
    """Of training, without evaluations and compilation, at the rate of `images_per_s`."""
    rate = images_per_s(record, rates)
    if rate is None:
        return None
    batch_size = record["config"]["train"]["batch_size"]
    return record["settings"]["num_steps"] * batch_size / rate / 60


def equal_time(group: Group, rates: Mapping[str, float]) -> tuple[float, dict[str, Value]] | None:
    """(minutes of the row that was done first, of each row the distance in training by then).

    Interpolated between two evaluations. The learning rate must be constant for that: a run that
    ended then would have the same weights. None: without curves, or without all rates.
    """
    taken = {
        name: [minutes(record, rates) for record in records] for name, records in group.rows.items()
    }
    if any(None in of_row for of_row in taken.values()):
        return None
    if not all(len(record["curve"]) > 1 for record in group.records):
        return None
    if any(record["config"]["optimizer"]["schedule"] != "constant" for record in group.records):
        return None
    first = min(statistics.fmean(of_row) for of_row in taken.values())

    def by_then(record: Record) -> float:
        steps, distances = zip(*record["curve"], strict=True)
        step = group.num_steps * first / minutes(record, rates)
        return float(np.interp(step, steps, distances))

    return first, {
        name: Value(tuple(map(by_then, records))) for name, records in group.rows.items()
    }


def in_few_steps(group: Group) -> dict[int, dict[str, Value]]:
    """By the number of Euler steps, of each row the distance."""
    return {
        steps: {
            name: Value(tuple(dict(record["solver_steps"])[steps] for record in records))
            for name, records in group.rows.items()
        }
        for steps in group.measured["solver_steps"]
    }


def of_shapes(group: Group) -> dict[str, dict[str, Value]]:
    """By the name of the shape, of each row the distance."""
    return {
        shape["name"]: {
            name: Value(tuple(record["shapes"][shape["name"]] for record in records))
            for name, records in group.rows.items()
        }
        for shape in group.measured.get("shapes", ())
    }


def in_half(claim: Claim, found: Sequence[Group]) -> list[str]:
    """What is said of a claim whose better row has half the steps: a line a pair of groups."""
    lines = []
    for half in found:
        for whole in found:
            if whole.num_steps != 2 * half.num_steps or _alike(whole.measured) != _alike(
                half.measured
            ):
                continue
            values = {
                row: distances[row]
                for row, distances in (
                    (claim.better, final_distances(half)),
                    (claim.worse, final_distances(whole)),
                )
                if row in distances
            }
            if (answer := verdict(claim, values)) is not None:
                steps = f"{half.num_steps} steps against {whole.num_steps}"
                lines.append(f"- {claim.text}, at {steps}: {answer}.")
    return lines


def _alike(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same of records that are compared."""
    return {name: each for name, each in measured.items() if name != "emas"}


def verdict(claim: Claim, values: Mapping[str, Value]) -> str | None:
    """What the figures say of a claim; None: a row is missing."""
    if claim.better not in values or claim.worse not in values:
        return None
    better, worse = values[claim.better], values[claim.worse]
    if max(better.of_seeds) < min(worse.of_seeds):
        answer = "agrees"
    elif min(better.of_seeds) > max(worse.of_seeds):
        answer = "does not agree"
    else:
        answer = "not told: the seeds overlap"
    few = min(len(better.of_seeds), len(worse.of_seeds)) == 1
    return f"{answer} ({better} against {worse}{'; one seed, spread not known' if few else ''})"
