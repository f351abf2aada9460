"""Whole runs of train.py: going on after any kind of stop, and stopping at the right moment."""

import errno
import fcntl
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import flowdcn_jax
from flowdcn_jax import sampling
from flowdcn_jax.runs.workdir import WorkdirError, workdir_lock
from flowdcn_jax.training import loop
from flowdcn_jax.training.preemption import Preemption
from flowdcn_jax.training.sharding import make_mesh
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A checkpoint of 20 MB takes long enough to write for a kill to hit it.
SLOW_TO_SAVE = dict(model__width=256, train__num_steps=6, checkpoint__every_steps=3)


def wait_for(condition, process, timeout_s=120):
    """Polls until `condition` holds; fails if the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, tiny.finish(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def being_saved(workdir, step):
    return any(Path(workdir).glob(f"checkpoints/{step}.orbax-checkpoint-tmp*"))


def finished(workdir, step):
    return (Path(workdir) / "checkpoints" / str(step)).is_dir()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, output = tiny.run(tiny.train_command(workdir, **SLOW_TO_SAVE))
    assert code == 0, output
    assert tiny.steps(workdir) == [3, 6]
    return workdir


def test_killed_during_a_save_and_resumed_is_bit_identical(uninterrupted, tmp_path):
    command = tiny.train_command(tmp_path, **SLOW_TO_SAVE)
    process = tiny.start(command)
    wait_for(lambda: finished(tmp_path, 3) and being_saved(tmp_path, 6), process)
    process.send_signal(signal.SIGKILL)
    code, output = tiny.finish(process)
    assert code == -signal.SIGKILL, output
    assert tiny.steps(tmp_path) == [3], "the kill came after the save; nothing was tested"
    assert tiny.checksums(tmp_path, 3) == tiny.checksums(uninterrupted, 3)

    code, output = tiny.run(command)
    assert code == 0, output
    assert "going on from step 3" in output
    assert tiny.steps(tmp_path) == [3, 6]
    assert tiny.checksums(tmp_path, 6) == tiny.checksums(uninterrupted, 6)
    assert tiny.numbers(tmp_path) == tiny.numbers(uninterrupted)
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    ours, theirs = (flowdcn_jax.load_model(folder)[0] for folder in (tmp_path, uninterrupted))
    np.testing.assert_array_equal(ours.stem.kernel[...], theirs.stem.kernel[...])


ENDLESS = dict(train__num_steps=100_000, checkpoint__every_steps=50_000)
STOPPED = 75


def start_endless(workdir):
    """A run that is on its way, and how many rows of metrics there are by then."""
    before = len(tiny.numbers(workdir)) if (workdir / "metrics.jsonl").exists() else 0
    process = tiny.start(tiny.train_command(workdir, **ENDLESS))
    wait_for(
        lambda: (workdir / "metrics.jsonl").exists() and len(tiny.numbers(workdir)) > before + 3,
        process,
    )
    return process, len(tiny.numbers(workdir))


def test_a_second_run_is_refused_and_sigterm_and_ctrl_c_save(tmp_path):
    """And the same command goes on."""
    process, _ = start_endless(tmp_path)
    code, output = tiny.run(tiny.train_command(tmp_path, **ENDLESS))
    assert code == 2 and output.count("\n") == 1
    assert f"error: --workdir={tmp_path} is in use by another run (process {process.pid}" in output

    process.send_signal(signal.SIGTERM)
    code, output = tiny.finish(process)
    assert code == STOPPED, output
    (first,) = tiny.steps(tmp_path)
    assert f"saved step {first}" in output
    assert tiny.metrics(tmp_path)[-1]["step"] == first

    process, rows = start_endless(tmp_path)
    process.send_signal(signal.SIGINT)
    code, output = tiny.finish(process)
    assert code == STOPPED and "Traceback" not in output, output
    second = tiny.steps(tmp_path)[-1]
    assert tiny.steps(tmp_path) == [first, second] and second > rows
    assert f"going on from step {first}" in output
    assert "interrupted: saving" in output and f"saved step {second}" in output
    assert [row["step"] for row in tiny.metrics(tmp_path)] == list(range(1, second + 1))


INTERRUPTED_TWICE = """
import signal
from flowdcn_jax.training.preemption import Preemption
with Preemption() as preemption:
    assert not preemption.reached(1)
    signal.raise_signal(signal.SIGINT)
    print("asked:", preemption.reached(1), flush=True)
    signal.raise_signal(signal.SIGINT)
    print("still there")
"""


def test_a_second_ctrl_c_ends_at_once():
    code, output = tiny.run([sys.executable, "-c", INTERRUPTED_TWICE])
    assert code == -signal.SIGINT
    assert "asked: True" in output and "still there" not in output


def test_signals_are_as_before_once_training_is_over():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Preemption():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with workdir_lock(tmp_path):
        assert "start no second run there ([Errno 37] No locks available)" in caplog.text


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(WorkdirError, match="cannot be written: .*Is a directory"):
        loop.train(tiny.config(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.fixture
def one_device(monkeypatch):
    """Runs in this process use one of the eight devices."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda *sizes: mesh)


@pytest.mark.parametrize("poisoned", ["loss", "grad_norm"])
def test_a_non_finite_step_stops_the_run_before_the_next_checkpoint(
    tmp_path, monkeypatch, one_device, poisoned
):
    real = loop._Run._compile_steps

    def poisoning(self, state, writer):
        ((shape, step_fn),) = real(self, state, writer).items()

        def poison(state, batch):
            state, metrics = step_fn(state, batch)
            return state, metrics | ({poisoned: np.float32(np.nan)} if state.step >= 4 else {})

        return {shape: poison}

    monkeypatch.setattr(loop._Run, "_compile_steps", poisoning)
    config = tiny.config(train__num_steps=8, checkpoint__every_steps=3, log__every_steps=100)
    with pytest.raises(loop.NonFiniteError, match="step 4: .*nan.*learning_rate") as caught:
        loop.train(config, str(tmp_path))
    assert "clip_norm" in str(caught.value)
    assert tiny.steps(tmp_path) == [3]


def test_a_run_logs_saves_and_draws(tmp_path):
    config = tiny.config(log__sample_every_steps=3, train__num_steps=6, log__every_steps=2)
    loop.train(config, str(tmp_path))
    rows = tiny.metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = {"loss", "grad_norm", "learning_rate", "images_per_s", "data_wait"}
    assert names <= rows[0].keys() and 0 <= rows[0]["data_wait"] <= 1
    assert tiny.steps(tmp_path) == [2, 4, 6]
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step_00000003.png", "step_00000006.png"]
    assert list((tmp_path / "tensorboard").glob("events*"))

    before = tiny.files(tmp_path)
    assert loop.train(config, str(tmp_path))  # nothing left to do
    assert tiny.files(tmp_path) == before


def test_a_run_goes_on_with_more_steps_and_other_devices(tmp_path):
    config = tiny.config(model__width=64, train__num_steps=2)
    config.mesh.update(data=1, fsdp=8)
    loop.train(config, str(tmp_path))
    config.train.num_steps = 4
    config.mesh.update(data=8, fsdp=1)
    loop.train(config, str(tmp_path))
    assert [row["step"] for row in tiny.metrics(tmp_path)] == [1, 2, 3, 4]

    straight = tmp_path / "straight"
    config.checkpoint.every_steps = 4
    loop.train(config, str(straight))
    losses = [[row["loss"] for row in tiny.metrics(folder)] for folder in (tmp_path, straight)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_grids_are_drawn_with_the_ema(tmp_path, monkeypatch, one_device):
    real, seen = sampling.generate_images, []

    def watched(generator, params, *args, **options):
        seen.append(np.asarray(params["stem"]["kernel"]))
        return real(generator, params, *args, **options)

    monkeypatch.setattr(sampling, "generate_images", watched)
    loop.train(tiny.config(train__num_steps=2, log__sample_every_steps=2), str(tmp_path))
    model, _ = flowdcn_jax.load_model(tmp_path)
    np.testing.assert_array_equal(seen, [model.stem.kernel[...]])
