"""Faults of the operating system in a training run, through a library that LD_PRELOAD loads.

A run goes on from two checkpoints while calls on its files fail: once, a few times, or for good.
Then it ends with a line and a status that says what to do, or it does not end at all; and with the
fault gone, it goes on to the bits of a run without.
"""

import functools
import os
import random
import shutil
import subprocess
from pathlib import Path

from tests import forked, tiny
from tests.campaign.kills import last_step, root, told

OPTIONS = dict(train__num_steps=12, checkpoint__every_steps=3, model__width=32)
KINDS = {
    "no space on writes": 1,
    "I/O error on writes": 2,
    "I/O error on reads": 3,
    "too many open files": 4,
    "interrupted calls": 5,
    "short writes": 6,
    "I/O error on fsync": 7,
    "clock jumps": 8,
}
LIMIT_S = 400
STATUSES = {0: "not stopped", 75: "one line, 75", 74: "one line, 74", 2: "one line, 2"}
# The faults begin once the libraries are there, for paths of the run.
PROGRAM = """
import ctypes, sys
from flowdcn_jax import command
from flowdcn_jax.tools import train
from flowdcn_jax.training import loop
kind, at, count = map(int, sys.argv.pop(1).split(","))
workdir = next(a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))
arm = ctypes.CDLL(None).fault_arm
arm(kind, at, count, workdir.encode())
sys.argv[0] = "train.py"
command.run(train.main)
"""


@functools.cache
def library() -> Path:
    """The shim, compiled."""
    path = root() / "shim.so"
    source = Path(__file__).parent / "shim.c"
    compile_it = ["cc", "-O1", "-shared", "-fPIC", "-o", str(path), str(source), "-ldl"]
    subprocess.run(compile_it, check=True)
    return path


def preload() -> None:
    """Has the process that all others are forked from load the shim; it has not begun yet."""
    os.environ["LD_PRELOAD"] = str(library())


@functools.cache
def begun() -> Path:
    """A run of six steps, which the cases copy."""
    workdir = root() / "system_begun"
    if last_step(workdir) != 6:
        shutil.rmtree(workdir, ignore_errors=True)
        status, output = _train(workdir, None, train__num_steps=6)
        assert status == 0, output
    return workdir


@functools.cache
def whole() -> tuple[list, dict]:
    """What the run gives without faults."""
    workdir = root() / "system_whole"
    if not workdir.is_dir() or last_step(workdir) != 12:
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(begun(), workdir)
        status, output = _train(workdir, None)
        assert status == 0, output
    return told(workdir, 12)


def case(number: int) -> tuple[str, str]:
    """(the fault, what came of it)."""
    generator = random.Random(f"system{number}")
    kind = list(KINDS)[number % len(KINDS)]
    count = generator.choice((1, 1, 2, 10**9))
    if kind == "interrupted calls":  # no system interrupts a call for good
        count = min(count, 50)
    at = int(10 ** generator.uniform(0, 3.3))
    workdir = root() / "system"
    shutil.rmtree(workdir, ignore_errors=True)
    losses, checksums = whole()
    shutil.copytree(begun(), workdir)
    fault = f"{KINDS[kind]},{at},{count}"
    status, output = _train(workdir, fault)
    try:
        _check(workdir, status, output)
        after, end = _train(workdir, None)
        assert after == 0 and "damaged" not in end, f"afterwards: {after}, {end[-1500:]}"
        found = told(workdir, 12)
        assert found[0] == losses, "the losses differ"
        for item in ("state", "ema"):
            assert found[1][item] == checksums[item], f"{item} differs"
    except AssertionError as error:
        raise AssertionError(f"{kind} ({fault}): {error}") from error
    return kind, STATUSES[status]


def _check(workdir: Path, status: int, output: str) -> None:
    assert status in STATUSES, f"status {status}: {output[-1500:]}"
    assert "Traceback" not in output, output[-3000:]
    assert "damaged" not in output, output[-1500:]
    errors = [line for line in output.splitlines() if line.strip().startswith("error: ")]
    assert len(errors) == (status != 0), f"{len(errors)} lines: {output[-1500:]}"
    assert last_step(workdir) >= 6, f"step 6 was lost; there is {last_step(workdir)}"


def _train(workdir: Path, fault: str | None, **options) -> tuple[int, str]:
    """(status, what it printed) of the run, in a process that the shim was loaded into."""
    assert os.environ.get("LD_PRELOAD") == str(library()), "it is loaded before the first fork"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root() / "compiled")
    flags = tiny.train_command(workdir, **OPTIONS | options)[2:]
    command = ["-c", PROGRAM, fault or "0,0,0", *flags]
    status, output = forked.run(command, timeout_s=LIMIT_S)
    if status is None or status < 0:
        return -1, f"it did not end in {LIMIT_S} s: {output}"
    return status, output
