"""What the cases of a campaign gave: a file that is gone on with, and its summary."""

import collections
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from flowdcn_jax.environment import describe_machine
from flowdcn_jax.files import atomic_write

FAILED = "FAILED"  # begins the outcome of a case that is none of those promised


class Results:
    """One line a case, in OUT/results.jsonl; cases that are there are not run again."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self.cases = [json.loads(line) for line in lines if line.endswith("}")]
        self._done = {(case["part"], case["number"]) for case in self.cases}

    def run(self, part: str, count: int, case: Callable[[int], tuple[str, str]]) -> None:
        """Runs cases 0 ... count - 1 of a part: each gives (kind, outcome)."""
        for number in range(count):
            if (part, number) in self._done:
                continue
            start_s = time.perf_counter()
            try:
                kind, outcome = case(number)
            except AssertionError as error:
                text = " ".join(str(error).split())[:2000]
                kind, outcome = getattr(error, "kind", "?"), f"{FAILED}: {text}"
            except Exception:
                kind, outcome = "?", f"{FAILED}: {traceback.format_exc()[-2000:]}"
            seconds = round(time.perf_counter() - start_s, 3)
            self.add(part=part, number=number, kind=kind, outcome=outcome, seconds=seconds)
            if outcome.startswith(FAILED):
                print(f"{part} {number} {kind}: {outcome}", flush=True)

    def add(self, **case) -> None:
        """Keeps a case."""
        self.cases.append(case)
        with self._path.open("a") as file:
            file.write(json.dumps(case) + "\n")

    def summary(self) -> dict:
        """{part: {"cases", "failed", "minutes", "outcomes": {kind: {outcome: count}}}}."""
        parts: dict[str, dict] = {}
        for case in self.cases:
            empty = {"cases": 0, "failed": 0, "minutes": 0.0, "outcomes": {}}
            part = parts.setdefault(case["part"], empty)
            part["cases"] += 1
            part["failed"] += case["outcome"].startswith(FAILED)
            part["minutes"] += case["seconds"] / 60
            outcomes = part["outcomes"].setdefault(case["kind"], collections.Counter())
            outcomes[case["outcome"].partition(":")[0]] += 1
        for part in parts.values():
            part["minutes"] = round(part["minutes"], 1)
            part["outcomes"] = {kind: dict(n) for kind, n in sorted(part["outcomes"].items())}
        return {"machine": describe_machine(), "parts": parts}

    def write(self) -> None:
        """OUT/summary.json and OUT/summary.md."""
        summary = self.summary()
        lines = ["| part | cases | failed | minutes | outcomes |", "|" + " --- |" * 5]
        for name, part in summary["parts"].items():
            total = collections.Counter()
            for outcomes in part["outcomes"].values():
                total.update(outcomes)
            told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(total.items()))
            lines.append(
                f"| {name} | {part['cases']} | {part['failed']} | {part['minutes']} | {told} |"
            )
        for name, text in (
            ("summary.json", json.dumps(summary, indent=1)),
            ("summary.md", "\n".join(lines)),
        ):
            with atomic_write(self.folder / name) as file:
                file.write(f"{text}\n".encode())
