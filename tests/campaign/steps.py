"""Many tiny steps: the memory, open files and threads of the process stay what they were."""

import json
import os
import time
from pathlib import Path

from flowdcn_jax.files import atomic_write
from tests import forked, tiny

SAMPLE_S = 2.0
GROWTH = 1.05  # of the memory, from a quarter of the steps on


def run(folder: Path, num_steps: int) -> tuple[str, str]:
    """Trains in another process, looks at it every SAMPLE_S, and draws what it saw."""
    workdir = folder / "steps"
    output = folder / "steps.txt"
    output.write_text("")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    options = dict(train__num_steps=num_steps, log__every_steps=100, checkpoint__every_steps=2_000)
    command = tiny.train_command(workdir, **options)[1:]
    process = forked.start(command, str(output))
    rows = []
    while process.exitcode is None:
        rows.append(_look(process.pid, workdir))
        process.join(SAMPLE_S)
    assert process.exitcode == 0, output.read_text()[-2000:]
    rows = [row for row in rows if row]
    with atomic_write(folder / "steps.json") as file:
        file.write(json.dumps(rows).encode())
    _draw(folder, rows)
    settled = [row for row in rows if row["step"] >= num_steps / 4]
    first, last = settled[: len(settled) // 3], settled[-len(settled) // 3 :]
    for name in ("megabytes", "files", "threads"):
        before, after = (sum(row[name] for row in part) / len(part) for part in (first, last))
        assert after <= GROWTH * before + 2, f"{name} rose from {before:.1f} to {after:.1f}"
    return f"{num_steps} steps", "memory, files and threads flat"


def _look(pid: int, workdir: Path) -> dict | None:
    metrics = workdir / "metrics.jsonl"
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        last = metrics.read_text().splitlines()[-1]
        return {
            "seconds": time.monotonic(),
            "step": json.loads(last)["step"],
            "megabytes": int(fields["VmRSS"].split()[0]) / 1024,
            "files": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": int(fields["Threads"]),
        }
    except (OSError, KeyError, IndexError, ValueError):  # not there yet, or ending
        return None


def _draw(folder: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, figsize=(7, 6), dpi=110, sharex=True)
    for axes, name, label in zip(
        panels,
        ("megabytes", "files", "threads"),
        ("resident memory, MB", "open files", "threads"),
        strict=True,
    ):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1)
        axes.set_ylim(0)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    figure.tight_layout()
    with atomic_write(folder / "steps.png") as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)
