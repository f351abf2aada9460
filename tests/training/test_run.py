"""Whole runs of train.py: going on after any kind of stop, and stopping at the right moment."""

import errno
import fcntl
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import flowdcn_jax
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.models import parameter_count
from flowdcn_jax.runs.workdir import WorkdirError, workdir_lock
from flowdcn_jax.training.metrics import NonFiniteError, check_finite
from flowdcn_jax.training.preemption import Preemption
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
        tiny.train(tiny.config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_non_finite_step_stops_the_run_before_the_next_checkpoint(tmp_path):
    """Parameters that one step of this length away are so large that the next loss overflows."""
    config = tiny.config(
        train__num_steps=8,
        checkpoint__every_steps=3,
        log__every_steps=100,
        optimizer__warmup_steps=0,
        optimizer__learning_rate=1e-9,
    )
    config.train.num_steps = 3
    tiny.train(config, tmp_path)
    config.train.num_steps = 8
    config.optimizer.learning_rate = 1e30
    with pytest.raises(NonFiniteError, match="step 5: .*(nan|inf).*learning_rate") as caught:
        tiny.train(config, tmp_path)
    assert "clip_norm" in str(caught.value)
    assert tiny.steps(tmp_path) == [3]


@pytest.mark.parametrize("poisoned", ["loss", "grad_norm"])
def test_the_first_step_that_is_not_finite_is_named(poisoned):
    row = dict(loss=np.float32(1), grad_norm=np.float32(1), learning_rate=np.float32(0.1))
    assert check_finite([(1, row), (2, row)]) == [row, row]
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteError, match=f"^step 2: .*{value}.*learning rate 0.1"):
            check_finite([(1, row), (2, row | {poisoned: np.float32(value)}), (3, row)])


def test_a_run_logs_saves_and_draws(tmp_path):
    config = tiny.config(log__sample_every_steps=3, train__num_steps=6, log__every_steps=2)
    tiny.train(config, tmp_path)
    rows = tiny.metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = {"loss", "grad_norm", "learning_rate", "images_per_s", "data_wait"}
    assert names <= rows[0].keys() and 0 <= rows[0]["data_wait"] <= 1
    assert tiny.steps(tmp_path) == [2, 4, 6]
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step_00000003.png", "step_00000006.png"]
    assert list((tmp_path / "tensorboard").glob("events*"))

    before = tiny.files(tmp_path)
    assert tiny.train(config, tmp_path)  # nothing left to do
    assert tiny.files(tmp_path) == before


def test_a_run_goes_on_with_more_steps_and_other_devices(tmp_path):
    config = tiny.config(model__width=64, train__num_steps=2)
    config.mesh.update(data=1, fsdp=8)
    tiny.train(config, tmp_path, one_device=False)
    config.train.num_steps = 4
    config.mesh.update(data=8, fsdp=1)
    tiny.train(config, tmp_path, one_device=False)
    assert [row["step"] for row in tiny.metrics(tmp_path)] == [1, 2, 3, 4]

    straight = tmp_path / "straight"
    config.checkpoint.every_steps = 4
    tiny.train(config, straight, one_device=False)
    losses = [[row["loss"] for row in tiny.metrics(folder)] for folder in (tmp_path, straight)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_grids_are_drawn_with_the_ema(tmp_path):
    seen = []

    def drawer(config, mesh, autoencoder):
        def draw(ema):
            seen.append(np.asarray(ema["stem"]["kernel"]))
            return np.zeros((8, 8, 3), np.uint8)

        return draw

    config = tiny.config(train__num_steps=2, log__sample_every_steps=2)
    tiny.train(config, tmp_path, make_grid_drawer=drawer)
    model, _ = flowdcn_jax.load_model(tmp_path)
    np.testing.assert_array_equal(seen, [model.stem.kernel[...]])


def test_a_run_tells_what_it_is(tmp_path, capsys):
    config = tiny.config(train__num_steps=2)
    tiny.train(config, tmp_path, changed={"train.num_steps": 2})
    printed = capsys.readouterr().out
    assert "train: batch_size=16 num_steps=2* accumulation_steps=1" in printed
    assert "on 1 x cpu (data=1 x fsdp=1), flowdcn_jax " in printed
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["config"]["model"]["width"] == 16 and told["changed"] == {"train.num_steps": 2}
    params = flowdcn_jax.load_model(tmp_path)[0]
    assert told["parameters"] == parameter_count(nnx.to_pure_dict(nnx.state(params)))
    assert told["mesh"] == {"data": 1, "fsdp": 1} and told["machine"]["versions"]["jax"]


def test_a_dry_run_checks_and_compiles_and_writes_nothing(tmp_path, capsys):
    config = tiny.config()
    assert tiny.train(config, tmp_path / "run", dry_run=True)
    assert "compiling the train step" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    tiny.train(tiny.config(train__num_steps=2), tmp_path / "run")
    before = tiny.files(tmp_path / "run")
    config.model.width = 32
    with pytest.raises(ConfigError, match="config.model.width: 16 -> 32"):
        tiny.train(config, tmp_path / "run", dry_run=True)
    assert tiny.files(tmp_path / "run") == before


@pytest.mark.slow
def test_a_trace_is_of_as_many_steps_as_asked_for(tmp_path, capsys):
    tiny.train(tiny.config(), tmp_path, profile_steps=2)
    assert f"wrote a trace of 2 steps to {tmp_path / 'profile'}" in "".join(capsys.readouterr())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_runs_are_logged_to_weights_and_biases_where_a_key_asks_for_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny.config(train__num_steps=2, log__wandb_project="flowdcn")
    tiny.train(config, tmp_path)
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    identifier = (tmp_path / "wandb_run_id").read_text()
    assert first.name.endswith(identifier)
    logged = next(first.glob("run-*.wandb")).read_bytes()
    for name in (b"grad_norm", b"images_per_s", b"flowdcn"):
        assert name in logged
    config.train.num_steps = 4
    tiny.train(config, tmp_path)  # one run there too
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identifier}"))) >= 1


def test_weights_and_biases_must_be_installed_where_a_key_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny.config(log__wandb_project="flowdcn")
    with pytest.raises(ConfigError, match="'flowdcn', and the package wandb is not installed"):
        tiny.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
