"""SIGKILL at random moments of training and saving, in one process and in one of two.

An episode is a run in a workdir of its own that is killed again and again until its last step is
done. After each kill: what was committed before is still there, nothing that was found at the next
start is damaged, and nothing half-written stays once a run has ended. At the end of an episode
every loss and the last checkpoint are those of a run that was never killed, bit by bit.
"""

import functools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

from flowdcn_jax.training.metrics import METRICS_FILE, read_rows
from tests import forked, tiny

OPTIONS = dict(train__num_steps=120, checkpoint__every_steps=5, model__width=64)
PAIR = dict(OPTIONS, mesh__data=2, mesh__fsdp=1)
MAX_WAIT_S = 120.0
# With a shorter silence than a user would wait for.
PROGRAM = """
import sys
from flowdcn_jax import command, peers
peers.LOST_S, peers.BEAT_S = 3.0, 0.5
from flowdcn_jax.tools import train
sys.argv[0] = "train.py"
command.run(train.main)
"""


def root() -> Path:
    """The campaign's folder."""
    return Path(os.environ["FLOWDCN_CAMPAIGN"])


@functools.cache
def reference(pair: bool) -> tuple[list, dict]:
    """(losses, checksums of the last checkpoint) of a run that was not killed."""
    workdir = root() / ("reference_pair" if pair else "reference")
    options = PAIR if pair else OPTIONS
    if last_step(workdir) < options["train__num_steps"]:
        shutil.rmtree(workdir, ignore_errors=True)
        for process in start(workdir, pair):
            status, output = finish(process)
            assert status == 0, output
    return told(workdir, options["train__num_steps"])


def told(workdir: Path, step: int) -> tuple[list, dict]:
    checksums = workdir / "checkpoints" / str(step) / "checksums" / "metadata"
    return tiny.numbers(workdir), json.loads(checksums.read_text())


def last_step(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    return max(tiny.steps(workdir), default=0) if folder.is_dir() else 0


def start(workdir: Path, pair: bool) -> list:
    """The run's process, or its two, each with the path of what it prints as `output`."""
    # Programs are compiled once for the whole campaign.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root() / "compiled")
    address = f"--coordinator_address=127.0.0.1:{tiny.free_port()}"
    processes = []
    for number in range(2 if pair else 1):
        extra = ["--distributed", address, "--num_processes=2", f"--process_id={number}"]
        options = PAIR if pair else OPTIONS
        flags = tiny.train_command(workdir, *(extra if pair else []), **options)[2:]
        output = Path(f"{workdir}.{number}.txt")
        output.write_text("")
        process = forked.start(["-c", PROGRAM, *flags], str(output))
        process.output = output
        processes.append(process)
    return processes


def finish(process) -> tuple[int, str]:
    """(status, what it printed)"""
    process.join(MAX_WAIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1, f"it did not end in {MAX_WAIT_S} s: {process.output.read_text()}"
    return process.exitcode, process.output.read_text()


def case(number: int) -> tuple[str, str]:
    """One kill of a run in one process."""
    return _kill("kills", number, pair=False)


def pair_case(number: int) -> tuple[str, str]:
    """One kill of one of two processes."""
    return _kill("pairs", number, pair=True)


def _kill(part: str, number: int, *, pair: bool) -> tuple[str, str]:
    generator = random.Random(f"{part}{number}")
    losses, checksums = reference(pair)
    workdir = root() / part
    before = last_step(workdir)
    processes = start(workdir, pair)
    early = generator.random() < 0.1  # of them before the first step
    deadline = time.monotonic() + MAX_WAIT_S
    while not early and "step/s" not in processes[0].output.read_text():
        if processes[0].exitcode is not None:
            break
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.01)
    time.sleep(generator.uniform(0, 4.0 if early else 1.5))
    victim = generator.randrange(len(processes))
    processes[victim].kill()
    results = [finish(process) for process in processes]
    outputs = "\n".join(output for _, output in results)
    for index, (status, output) in enumerate(results):
        expected = (0, -signal.SIGKILL) if index == victim else (0, 75)
        assert status in expected, f"status {status}: {output[-1500:]}"
    assert "damaged" not in outputs, outputs[-1500:]
    assert "Traceback" not in outputs, outputs[-1500:]
    assert last_step(workdir) >= before, f"step {before} was lost; there is {last_step(workdir)}"
    rows = read_rows(workdir / METRICS_FILE) if (workdir / METRICS_FILE).exists() else []
    found = [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
    assert found == losses[: len(found)], "the losses differ"
    kind = "before the first step" if early else "training or saving"
    if last_step(workdir) == OPTIONS["train__num_steps"]:
        _check_end(workdir, losses, checksums)
        shutil.rmtree(workdir)
        return kind, "at its end, every bit the same"
    return kind, "goes on, every loss the same so far"


def _check_end(workdir: Path, losses: list, checksums: dict) -> None:
    found = told(workdir, OPTIONS["train__num_steps"])
    assert found[0] == losses, "the losses differ"
    for item in ("state", "ema"):
        assert found[1][item] == checksums[item], f"{item} differs"
