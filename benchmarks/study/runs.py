"""A row with one seed: its settings, and the public commands that train, draw and measure it."""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Plan
from benchmarks.study.tables import InData, Row, Table
from flowdcn_jax.config import load_config, lookup
from flowdcn_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]
LOG_STEPS = 50  # between lines of metrics
SNAPSHOTS = 8  # checkpoints of which an EMA of another width is made after training

# (name, command without --out, whether it takes one) -> FILE.json of a command that is done
Call = Callable[..., Path]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the study.

    Attributes:
        table: name of its table.
        row: how it is trained.
        seed: config.seed.
        of: its table.
        plan: how long, and on what it is measured.
    """

    table: str
    row: Row
    seed: int
    of: Table
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps or self.of.num_steps

    @property
    def evaluations(self) -> int:
        """How often figures are taken in training."""
        return self.plan.curve_points if self.of.curves else 0

    @property
    def training(self) -> dict[str, Any]:
        """What decides the weights, as JSON takes it; runs of several tables may share them."""
        changes = json.loads(json.dumps(dict(self.row.changes)))
        return {
            "config": self.row.config,
            "changes": changes,
            "seed": self.seed,
            "num_steps": self.num_steps,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the figures: results with the same ones are not made again."""
        measured = self.plan.decides() | {"emas": list(self.row.emas)}
        measured |= {"solver_steps": list(self.of.solver_steps), "curve": self.evaluations}
        if self.of.shapes:
            measured["shapes"] = [vars(shape) for shape in self.of.shapes]
        return self.training | {"measured": measured}

    def folder(self, workdir: Path) -> Path:
        """Of its training and its evaluations, in the study's."""
        slug = re.sub(r"\W+", "-", self.row.name.lower()).strip("-")
        decides = self.training | {"curve": self._curve_keys(None), "emas": self._widths_after()}
        return workdir / "runs" / f"{slug}-seed{self.seed}-{digest(decides)}"

    def train_command(self, folder: Path, reference: Path | None) -> list[str]:
        """train.py with every key of the row; `reference` is that of figures in training."""
        changes = {key: self.plan.located(value) for key, value in self.row.changes.items()}
        keys = {"data.data_dir": self.plan.data_dir} | changes
        keys |= {
            "seed": self.seed,
            "train.num_steps": self.num_steps,
            "log.every_steps": max(1, min(LOG_STEPS, self.num_steps // 10)),
            "log.sample_every_steps": 0,
            "checkpoint.every_steps": self.num_steps,
        }
        if self._widths_after():
            every = max(1, self.num_steps // SNAPSHOTS)
            keys |= {"checkpoint.every_steps": every, "checkpoint.keep_every_steps": every}
        keys |= self._curve_keys(reference)
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        return [*_python("train.py"), f"--config={self.row.config}", f"--workdir={folder}", *flags]

    def _curve_keys(self, reference: Path | None) -> dict[str, Any]:
        """The keys of the figures in training."""
        if not self.evaluations:
            return {}
        return {
            "evaluate.every_steps": -(-self.num_steps // self.evaluations),
            "evaluate.num_images": self.plan.curve_images,
            "evaluate.num_steps": self.plan.sampling_steps,
            "evaluate.guidance": self.plan.curve_guidance,
            "evaluate.features": self.plan.features,
            "evaluate.weights": reference and self.plan.weights,
            "evaluate.reference": reference,
        }

    def _widths_after(self) -> list[str]:
        """Names of the EMAs that are made after training."""
        tracked = ("ema", *self.row.changes.get("ema.others", ()))
        return [name for name in self.row.emas if name not in tracked]

    def evaluate_command(self, folder: Path, reference: Path, **options: Any) -> list[str]:
        """evaluate.py, which draws with the run's weights, with options by name."""
        flags = [f"--{name}={_text(value)}" for name, value in options.items()]
        return [
            *_python("evaluate.py"),
            f"--samples={folder}",
            f"--reference={reference}",
            f"--features={self.plan.features}",
            f"--weights={self.plan.weights}",
            f"--batch_size={self.plan.draw_batch_size}",
            *flags,
        ]

    def perform(
        self, folder: Path, reference_file: Callable[[str], Path], call: Call
    ) -> dict[str, Any]:
        """Trains and measures; returns the files with what came of it, and what was chosen.

        Args:
            folder: its own.
            reference_file: gives the statistics of images, once they are made.
            call: runs a command, unless it was done before.
        """
        in_training = reference_file(self.of.data) if self.evaluations else None
        call("train", self.train_command(folder, in_training))
        for name in self._widths_after():
            width = name.removeprefix("power_")
            tool = _python("-m", "flowdcn_jax.tools.reconstruct_ema")
            call(name, [*tool, f"--workdir={folder}", f"--width={width}"])
        reference = reference_file(self.of.data)
        options = dict(num_steps=self.plan.sampling_steps)
        chosen, search = {"guidance": self.plan.guidances[0], "ema": self.row.emas[0]}, []
        if len(self.plan.guidances) * len(self.row.emas) > 1:
            choices = dict(guidance=self.plan.guidances, ema=self.row.emas)
            tried = options | choices | {"num_images": self.plan.search_images}
            command = self.evaluate_command(folder, reference, **tried)
            search = read_search(call("search", command, out=True), chosen)
            chosen = min(search, key=lambda each: each["distance"])["options"]
        drawn = dict(num_images=self.plan.num_images, keep_samples=True, **chosen)
        files = {
            "final": call(
                "final", self.evaluate_command(folder, reference, **options | drawn), out=True
            )
        }
        if steps := self.of.solver_steps:
            command = self.evaluate_command(folder, reference, num_steps=steps, **drawn)
            files["solver_steps"] = call("solver_steps", command, out=True)
        for shape in self.of.shapes:
            drawn |= dict(
                image_size=shape.image_size, resolution_adjustment=shape.adjustment, **options
            )
            command = self.evaluate_command(folder, reference_file(shape.data), **drawn)
            files[shape.name] = call(f"{shape.image_size}_{shape.adjustment}", command, out=True)
        return {"files": files, "chosen": chosen, "search": search}


def runs_of(name: str, table: Table, plan: Plan) -> Iterator[Run]:
    """The runs of a table: a seed of each row, then the next one of those that have more."""
    most = max(len(row.seeds) for row in table.rows)
    for place in range(most):
        for row in table.rows:
            if place < len(row.seeds):
                yield Run(name, row, row.seeds[place], table, plan)


def reference_command(plan: Plan, data: str, out: Path) -> list[str]:
    """reference_stats of a data set's training images, or of a folder of images."""
    images = f"folder:{plan.located(data)}" if isinstance(data, InData) else data
    command = [*_python("-m", "flowdcn_jax.tools.reference_stats"), f"--images={images}"]
    command += [f"--features={plan.features}", f"--weights={plan.weights}", f"--out={out}"]
    return command + ([f"--data_dir={plan.data_dir}"] if plan.data_dir else [])


def read_search(path: Path, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"options": {"guidance": ..., "ema": ...}, "distance": ...}] of a file of evaluate.py."""
    return [
        {"options": dict(given) | row["options"], "distance": row["figures"][0]["value"]}
        for row in json.loads(path.read_text())["rows"]
    ]


def check(run: Run) -> None:
    """Raises UserError unless the row's config has its keys."""
    config = load_config(run.row.config)
    for key in run.row.changes:
        try:
            lookup(config, key)
        except KeyError as error:
            raise UserError(
                f"row {run.row.name!r} of {run.table} changes {key}; expected a key of the config "
                f"{run.row.config!r}"
            ) from error


def digest(value: Any) -> str:
    """Eight hexadecimal digits that tell JSON values apart."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _python(*command: str) -> list[str]:
    return [sys.executable, *command]


def _text(value: Any) -> str:
    """A flag's value; of several, with commas between them."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
