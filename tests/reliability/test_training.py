"""What ends or disturbs a training run: nothing of it is lost, and nothing good called damaged."""

import contextlib
import errno
import signal

import jax
import pytest

from flowdcn_jax import faults
from flowdcn_jax.data import DataError
from flowdcn_jax.data.sources import PixelSource
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.faults import MAKE_ROOM, TRY_AGAIN, MachineError
from flowdcn_jax.runs import items
from flowdcn_jax.runs.checkpointer import SaveError
from flowdcn_jax.runs.contents import DATA, IMAGES, check_is_for
from flowdcn_jax.sampling.folder import OutputFolder
from flowdcn_jax.sampling.settings import SamplingError
from flowdcn_jax.training import loop, saving
from flowdcn_jax.training.metrics import NonFiniteError
from flowdcn_jax.training.preemption import Preemption
from tests import tiny
from tests.faults import full_disk
from tests.training.test_checkpoint import open_checkpointer, restore, save, state_at

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    tiny.train(tiny.config(train__num_steps=6, checkpoint__every_steps=6), workdir)
    return workdir


def fail_reading(monkeypatch, first_position, times):
    """Batches from a position of the stream on cannot be read, so many times."""
    read, left = PixelSource.read, [times]

    def failing(self, indices, positions, seed):
        if positions[0] >= first_position and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", "/data/shard-3")
        return read(self, indices, positions, seed)

    monkeypatch.setattr(PixelSource, "read", failing)


def test_a_read_that_fails_once_is_tried_again(whole, tmp_path, monkeypatch, caplog):
    fail_reading(monkeypatch, 16 * 4, times=2)
    tiny.train(tiny.config(train__num_steps=6, checkpoint__every_steps=6), tmp_path)
    assert tiny.numbers(tmp_path) == tiny.numbers(whole)
    assert caplog.text.count("/data/shard-3: Input/output error; trying again in 0 s") == 2


def test_a_read_that_keeps_failing_saves_the_last_step_and_names_the_file(
    whole, tmp_path, monkeypatch, caplog
):
    config = tiny.config(train__num_steps=6, checkpoint__every_steps=6)
    with monkeypatch.context() as patch:
        fail_reading(patch, 16 * 5, times=10**6)
        with pytest.raises(OSError) as caught:
            tiny.train(config, tmp_path)
    (saved,) = tiny.steps(tmp_path)
    assert 1 <= saved <= 5 and f"saved step {saved} first" in caplog.text
    assert faults.status_of(caught.value) == TRY_AGAIN
    assert faults.as_line(caught.value) == "/data/shard-3: Input/output error"
    tiny.train(config, tmp_path)
    assert tiny.numbers(tmp_path) == tiny.numbers(whole)


def test_any_other_error_saves_the_last_step_and_time_saves_in_between(tmp_path, caplog):
    """The clock is looked at with every line of metrics, here after steps 2 and 4."""

    def drawer(config, mesh, autoencoder):
        return lambda ema: {}["no such key"]

    config = tiny.config(
        train__num_steps=6,
        checkpoint__every_steps=100,
        checkpoint__every_minutes=1e-9,
        log__every_steps=2,
        log__sample_every_steps=3,
    )
    with pytest.raises(KeyError, match="no such key"):
        loop.train(config, str(tmp_path), drawer, None, devices=jax.devices()[:1])
    assert tiny.steps(tmp_path) == [2, 3] and "saved step 3 first" in caplog.text


def test_what_cannot_be_saved_or_is_not_finite_is_not_saved(caplog):
    def fail() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TypeError), saving.saved_on_failure(fail):
        raise TypeError
    assert "the last step could not be saved: No space left on device" in caplog.text
    for kind in (NonFiniteError, SaveError):
        with pytest.raises(kind), saving.saved_on_failure(lambda: pytest.fail("saved")):
            raise kind("not this")


def test_the_clock_of_checkpoints(monkeypatch):
    clock = saving.SaveClock(2.0)
    start = saving.time.monotonic()
    monkeypatch.setattr(saving.time, "monotonic", lambda: start + 121)
    assert clock.due()
    clock.restart()
    assert not clock.due() and not saving.SaveClock(None).due()
    monkeypatch.setattr(saving, "first_says", lambda here: not here)  # another process's counts
    assert clock.due()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        MemoryError(),
        ValueError("DEADLINE_EXCEEDED: Error opening driver"),
        ValueError('Error reading local file "/x/d/1": Too many open files [os_error_code=24]'),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."),
    ],
)
def test_what_the_machine_did_is_no_damage(tmp_path_factory, monkeypatch, error):
    workdir = tmp_path_factory.getbasetemp() / "restored"
    if not workdir.exists():
        save(workdir, state_at(1), state_at(2))
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise error

        patch.setattr(items.ocp.CheckpointManager, "restore", fail)
        with pytest.raises(MachineError, match="2 cannot be read now .*nothing was moved, and the"):
            restore(workdir)
    assert tiny.steps(workdir) == [1, 2] and not (workdir / "damaged_checkpoints").exists()
    assert int(restore(workdir).step) == 2


def test_a_full_disk_names_the_folder_and_leaves_older_checkpoints_whole(tmp_path):
    save(tmp_path, state_at(1))
    checkpointer = open_checkpointer(tmp_path)
    with pytest.raises(SaveError, match=f"written to {tmp_path}/checkpoints .*File too large") as e:
        with full_disk(0), contextlib.closing(checkpointer):
            checkpointer.save(state_at(2), tiny.config(model__width=64), None)
            checkpointer.wait()
    assert faults.status_of(e.value) == MAKE_ROOM
    assert tiny.steps(tmp_path) == [1] and int(restore(tmp_path).step) == 1


def test_a_closed_terminal_asks_to_stop_and_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert preemption.reached(1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.reached(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_folders_of_other_things_are_not_written_into(whole, tmp_path):
    for name in ("samples.npz", "compare_steps.png"):
        (tmp_path / name).mkdir(parents=True)
        for dry_run in (False, True):
            with pytest.raises(ConfigError, match=f"holds images that were drawn .{name}.; expe"):
                tiny.train(tiny.config(), tmp_path, dry_run=dry_run)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).rmdir()
    (tmp_path / "imagenet_latents").mkdir()
    with pytest.raises(DataError, match="--out=.* holds prepared data .imagenet_latents.; expect"):
        check_is_for(tmp_path, IMAGES, flag="--out", error=DataError)
    with pytest.raises(DataError, match="--data_dir=.* holds a training run .checkpoints."):
        check_is_for(whole, DATA, flag="--data_dir", error=DataError)
    check_is_for(tmp_path / "new", IMAGES, flag="--out", error=DataError)
    with pytest.raises(SamplingError, match="--out=.* holds a training run .checkpoints.; expect"):
        OutputFolder(whole).open({"seed": 0})
    assert not (whole / "settings.json").exists()
