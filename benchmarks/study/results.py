"""What came of the runs: a JSON file a table, and a few samples of each run beside it.

    TABLE.json          a record a run: settings, curves, figures, machine, commands
    TABLE_samples.npz   of each run its first images, one of each class: uint8 [N,H,W,3]

Both are small, are kept in the repository, and are whole or not there. A run whose record is there
with the same settings is done, on whatever machine.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.runs import Run
from flowdcn_jax.command import write_json
from flowdcn_jax.files import atomic_write
from flowdcn_jax.training.metrics import METRICS_FILE, read_rows

SHOWN_IMAGES = 10  # of a run
CURVE_POINTS = 50  # of a curve of losses


class Results:
    """The records of one table; several threads may add to them."""

    def __init__(self, folder: Path, table: str):
        """Reads those that are there."""
        self.path = folder / f"{table}.json"
        self.samples_path = folder / f"{table}_samples.npz"
        self.records: list[dict[str, Any]] = []
        self.samples: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        if self.path.exists():
            self.records = json.loads(self.path.read_text())["runs"]
        if self.samples_path.exists():
            with np.load(self.samples_path, allow_pickle=False) as file:
                self.samples = {name: file[name] for name in file.files}

    def holds(self, run: Run) -> bool:
        """Whether a run is done."""
        return any(_is_of(record, run) for record in self.records)

    def add(self, run: Run, record: dict[str, Any], samples: Mapping[str, np.ndarray]) -> None:
        """Adds what came of a run, and writes both files."""
        with self._lock:
            self.samples |= {sample_key(record, label): rows for label, rows in samples.items()}
            self.records.append(record)
            with atomic_write(self.samples_path) as file:
                np.savez_compressed(file, **self.samples)
            write_json(self.path, {"runs": self.records})


def sample_key(record: Mapping[str, Any], label: str = "") -> str:
    """Under which a run's samples are kept; `label` tells several of a run apart."""
    settings = record["settings"]
    parts = (record["row"], f"seed {settings['seed']}", f"{settings['num_steps']} steps", label)
    return ", ".join(part for part in parts if part)


def _is_of(record: Mapping[str, Any], run: Run) -> bool:
    return record["row"] == run.row.name and record["settings"] == run.settings


def record_of(
    run: Run,
    folder: Path,
    made: Mapping[str, Any],
    *,
    processes_a_gpu: int,
    commands: list[str],
    names: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the record of a run, its samples by label), from the files of its commands.

    Args:
        run: which is done.
        folder: its own.
        made: of `Run.perform`.
        processes_a_gpu: that had one at a time.
        commands: that were run, as text.
        names: of paths of this machine, what the record calls them.
    """
    told = json.loads((folder / "config.json").read_text())
    rows = read_rows(folder / METRICS_FILE)
    final = json.loads(made["files"]["final"].read_text())
    figures = {each["name"]: each["value"] for each in final["figures"]}
    samples = {"": _first_images(final)}
    record = {
        "row": run.row.name,
        "settings": run.settings,
        "parameters": told["parameters"],
        "images_per_s": float(np.median([row["images_per_s"] for row in rows])),
        "processes_a_gpu": processes_a_gpu,
        "losses": _thinned(rows),
        "curve": _curve(rows),
        "search": made["search"],
        "chosen": made["chosen"],
        "figures": figures,
        "num_samples": final["samples"]["count"],
        "num_references": final["reference"]["count"],
        "network": final["network"],
        "config": _renamed(told["config"], names),
        "machine": told["machine"],
        "commands": _renamed(commands, names),
    }
    if (path := made["files"].get("solver_steps")) is not None:
        record["solver_steps"] = []
        for row in json.loads(path.read_text())["rows"]:
            steps, distance = row["options"]["num_steps"], row["figures"][0]["value"]
            record["solver_steps"].append([steps, distance])
            samples[f"{steps} Euler steps"] = _first_images(row)
    for shape in run.of.shapes:
        evaluated = json.loads(made["files"][shape.name].read_text())
        record.setdefault("shapes", {})[shape.name] = evaluated["figures"][0]["value"]
        samples[shape.name] = _first_images(evaluated)
    return record, samples


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A value of JSON's types with other names for some paths, in whatever text they are."""
    text = json.dumps(value)
    for path, name in names.items():
        text = text.replace(json.dumps(path)[1:-1], name)
    return json.loads(text)


def _thinned(rows: list[dict[str, Any]]) -> list[list[float]]:
    """[step, mean loss of the steps up to it since the last one], at most CURVE_POINTS of them."""
    parts = np.array_split(np.arange(len(rows)), min(CURVE_POINTS, len(rows)))
    return [
        [rows[part[-1]]["step"], float(np.mean([rows[place]["loss"] for place in part]))]
        for part in parts
    ]


def _curve(rows: list[dict[str, Any]]) -> list[list[float]]:
    """[step, Fréchet distance] of the evaluations in training."""
    found = []
    for row in rows:
        names = [name for name in row if name.startswith(("FD-", "FID"))]
        found += [[row["step"], row[name]] for name in names[:1]]
    return found


def _first_images(evaluated: Mapping[str, Any]) -> np.ndarray:
    """uint8 [N,H,W,3]: the first samples of an evaluation that kept them."""
    with np.load(evaluated["samples"]["images"]["source"], allow_pickle=False) as file:
        images = file["arr_0"][:SHOWN_IMAGES]
    return np.broadcast_to(images, (*images.shape[:3], 3))
