"""What all commands share: outputs that nobody reads, statuses, paths, processes of one job."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
import types

import pytest

from flowdcn_jax import faults
from flowdcn_jax.command import _Output
from flowdcn_jax.errors import UserError
from tests import tiny
from tests.training.test_checkpoint import save, state_at

WRITES = """
import sys, time
from flowdcn_jax import command

def main():
    for number in range(200):
        print("x" * 100, flush=True)
        print("y" * 100, file=sys.stderr)
    open(sys.argv[0], "w").write("done")

sys.argv = sys.argv[1:]
command.run(main)
"""


def test_an_output_that_nobody_reads_ends_nothing(tmp_path):
    file = tmp_path / "done"
    command = [sys.executable, "-c", WRITES, str(file)]
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tiny.REPOSITORY)
    with subprocess.Popen(command, **both) as process:
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.wait() == 0
    assert file.read_text() == "done"


def test_a_lost_terminal_ends_nothing_and_a_full_disk_is_told():
    class Stream:
        def __init__(self, code):
            self.code = code

        def write(self, text):
            raise OSError(self.code, os.strerror(self.code))

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    assert _Output(Stream(errno.EIO)).write("text") == 4
    with pytest.raises(OSError, match="No space"):
        _Output(Stream(errno.ENOSPC)).write("text")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("bad"), 2, "bad"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\udce4"), 2, "a\\xe4: No such file"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 74, "/x: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 75, "Input/output error"),
        (ValueError("UNAVAILABLE: CUDA_ERROR_ECC_UNCORRECTABLE"), 75, "ValueError: UNAVAILABLE"),
        (ValueError("Writing /w/a.x: Disk quota exceeded [5]"), 74, "/w/a.x: Disk quota exceeded"),
        (MemoryError(), 75, "out of memory"),
        (TypeError("a bug"), None, "TypeError: a bug"),
    ],
)
def test_statuses_tell_what_to_do(error, status, line):
    assert faults.status_of(error) == status and faults.as_line(error).startswith(line)
    if status != 2:  # whatever it became on its way
        try:
            raise UserError("cannot go on") from error
        except UserError as wrapped:
            assert faults.status_of(wrapped) == (status or 2)
    assert not faults.is_damage(error) or isinstance(error, FileNotFoundError)


@pytest.mark.parametrize(
    "command, message",
    [
        (["train.py", "--config=configs/digits.py", "--workdir=gs://b/run"], "mount gs://b"),
        (["sample.py", "--workdir=s3://b/run"], "mount s3://b"),
        (
            [
                "-m",
                "flowdcn_jax.tools.cache_latents",
                "--dataset=folder:/x",
                "--autoencoder=taesd",
                "--data_dir=gs://b/lat",
            ],
            "mount gs://b",
        ),
        (["-m", "flowdcn_jax.tools.convert_checkpoint", "--source=gs://b/x.pth"], "mount gs://b"),
        (
            [
                "-m",
                "flowdcn_jax.tools.convert_checkpoint",
                "--source=x.pth",
                "--workdir=x",
                "--config=configs/xl2.py",
                "--config.sampling.classes=('cat',)",
            ],
            "config.sampling.classes is ('cat',); expected class numbers from 0 to 999",
        ),
        (
            ["train.py", "--config=configs/digits.py", "--workdir=x", "--config.seed=None"],
            "config.seed is None; expected 0 or its like",
        ),
    ],
)
def test_bad_values_are_refused_before_any_work(command, message, tmp_path):
    code, output = tiny.run([sys.executable, *command])
    assert code == 2 and output.startswith("error: ") and output.count("\n") == 1, output
    assert message in output
    assert not any((tiny.REPOSITORY / name).exists() for name in ("x", "gs:", "s3:", "~"))


def test_a_config_may_import_what_lies_beside_it_and_unset_keys(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sizes\nfrom flowdcn_jax.config import load_config\ndef get_config():\n"
        "    config = load_config('digits')\n    config.optimizer.clip_norm = sizes.CLIP\n"
        "    return config\n"
    )
    (tmp_path / "sizes.py").write_text("CLIP = 1.0\n")
    program = (
        "from flowdcn_jax import command, config_flag\n"
        "flag = config_flag.define_config_flag()\n"
        "command.run(lambda: print(flag.value.optimizer.clip_norm, config_flag.overrides()))"
    )
    for extra, expected in (
        ([], "1.0 {}"),
        (["--config.optimizer.clip_norm=None"], "None {'optimizer.clip_norm': None}"),
    ):
        arguments = ["-c", program, f"--config={tmp_path}/mine.py", *extra]
        assert tiny.run([sys.executable, *arguments]) == (0, f"{expected}\n")


def test_commands_run_from_any_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(tiny.REPOSITORY)}  # as an installed package
    command = [sys.executable, "-m", "flowdcn_jax.tools.train", "--config=s2", "--workdir=gs://b/x"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == 2 and b"mount gs://b" in result.stderr, result.stderr


JOB = """
import os, signal, sys
from flowdcn_jax import command, errors, peers
command.define_device_flags()
how, who = sys.argv.pop(1).split(":")
peers.LOST_S, peers.BEAT_S = 4.0, 0.5

def main():
    import jax
    jax.config.update("jax_platforms", "cpu")
    command.use_devices()
    import numpy as np
    from jax.experimental import multihost_utils
    if how == "restore":
        from flowdcn_jax import faults
        from flowdcn_jax.runs import checkpoint
        faults.WAITS_S = (0,)
        def fail(*_):
            raise OSError(5, "Input/output error", "/nfs/x")
        if jax.process_index() == int(who):
            checkpoint.restore_run = fail
        checkpoint.read_run(os.environ["WORKDIR"], None)
    for step in range(10_000):
        multihost_utils.broadcast_one_to_all(np.asarray(step))
        if step == 5 and jax.process_index() == int(who):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device", "/full")

command.run(main)
"""


def run_job(how):
    address = f"--coordinator_address=127.0.0.1:{tiny.free_port()}"
    flags = ["--distributed", address, "--num_processes=2"]
    processes = [
        tiny.start([sys.executable, "-c", JOB, how, *flags, f"--process_id={i}"]) for i in (0, 1)
    ]
    return [tiny.finish(process, timeout_s=60) for process in processes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, state_at(1), state_at(2))
    return workdir


@pytest.mark.parametrize(
    "how, statuses, lines",
    [
        ("kill:1", (75, -9), ("process 1 on .* has said nothing for 4 s; the same command", "")),
        ("kill:0", (-9, 75), ("", "process 1 on .* has lost process 0, .*the same command goes")),
        ("restore:1", (75, 75), ("2 cannot be read now .another pro", "/nfs/x.*nothing was moved")),
        ("raise:1", (74, 74), ("process 1 on .*: /full: No space left on dev", "error: /full: No")),
    ],
)
def test_where_one_process_ends_all_end_and_say_why(how, statuses, lines, saved, monkeypatch):
    monkeypatch.setenv("WORKDIR", str(saved))
    start_s = time.monotonic()
    results = run_job(how)
    assert time.monotonic() - start_s < 55
    assert tuple(status for status, _ in results) == statuses, results
    for (_, output), line in zip(results, lines, strict=True):
        errors = [each for each in output.splitlines() if each.startswith("error: ")]
        assert len(errors) == bool(line), output
        if line:
            assert re.search(line, errors[0]), output
    assert tiny.steps(saved) == [1, 2] and not (saved / "damaged_checkpoints").exists()


def test_what_a_retry_mends_is_not_printed_by_threads_of_libraries(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(threading, "excepthook", printed.append)
    faults.hush()
    mended = (
        OSError(errno.EMFILE, "too many"),
        Exception("Encountered error while reading array index: 1"),
    )
    for error in (*mended, ValueError("a bug")):
        for hook in (sys.unraisablehook, threading.excepthook):
            hook(types.SimpleNamespace(exc_value=error))
    assert [str(each.exc_value) for each in printed] == ["a bug"] * 2
