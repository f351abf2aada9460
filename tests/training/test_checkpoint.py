"""Checkpoints: exact on any number of devices, checked when read, and never lost."""

import functools
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import flowdcn_jax
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.sharding import make_mesh, state_sharding
from flowdcn_jax.runs.state import abstract_state, initial_state
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = tiny.config(model__width=64)
NAMES = tuple("0123456789")
IDENTITY = {"settings": {"autoencoder": {"scale": 0.18215}}, "num_examples": {"1x1x1": 3}}


def mesh_of(num_devices):
    return make_mesh(1, num_devices, jax.devices()[:num_devices])


@functools.cache
def fresh_state():
    return jax.device_get(initial_state(CONFIG, mesh_of(1)))


def state_at(step, num_devices=1):
    """A state that tells its step: every number of a fresh one is moved by it."""
    state = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(step), fresh_state())
    return jax.device_put(state, state_sharding(state, mesh_of(num_devices)))


def open_checkpointer(workdir, keep=3, keep_every_steps=None):
    return Checkpointer(workdir, keep=keep, keep_every_steps=keep_every_steps)


def save(workdir, *states, **options):
    checkpointer = open_checkpointer(workdir, **options)
    for state in states:
        checkpointer.save(state, CONFIG, NAMES, IDENTITY)
    checkpointer.close()


def restore(workdir, num_devices=1):
    checkpointer = open_checkpointer(workdir)
    try:
        return checkpointer.restore_newest(abstract_state(CONFIG, mesh_of(num_devices)))
    finally:
        checkpointer.close()


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1, 2 and 3; copy it before doing harm."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, *(state_at(step) for step in (1, 2, 3)))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_restores_exactly_on_fewer_and_more_devices(tmp_path):
    save(tmp_path, state_at(5, num_devices=8))
    for num_devices in (8, 4, 1):
        state = restore(tmp_path, num_devices)
        assert_same(state, state_at(5))
        kernel = state.params["blocks"][0]["modulation"]["kernel"]
        assert len(kernel.sharding.device_set) == num_devices


def test_an_empty_workdir_has_no_checkpoint(tmp_path):
    assert checkpoint.saved_run(tmp_path) is None
    assert restore(tmp_path) is None


def test_keeps_the_newest_and_every_so_many(tmp_path):
    save(tmp_path, *(state_at(step) for step in range(1, 8)), keep=2, keep_every_steps=3)
    assert tiny.steps(tmp_path) == [3, 6, 7]


def test_saving_a_step_twice_is_harmless(workdir):
    save(workdir, state_at(3))
    assert_same(restore(workdir), state_at(3))


def empty_step(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def missing_manifest(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def flipped_byte(item):
    """Changes one byte in the middle of the item's largest data file."""

    def damage(folder):
        files = (path for path in (folder / item).rglob("d/*") if path.is_file())
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0x10
        largest.write_bytes(content)

    return damage


def truncated_config(folder):
    path = folder / "run" / "metadata"
    path.write_text(path.read_text()[:-20])


def changed_config(folder):
    path = folder / "run" / "metadata"
    text = path.read_text()
    assert '"seed": 0' in text or '"seed":0' in text
    path.write_text(text.replace('"seed": 0', '"seed": 7').replace('"seed":0', '"seed":7'))


DAMAGES = [
    empty_step,
    missing_manifest,
    flipped_byte("state"),
    flipped_byte("ema"),
    truncated_config,
    changed_config,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_with_a_warning(workdir, damage, caplog):
    damage(workdir / "checkpoints" / "3")
    with caplog.at_level(logging.WARNING):
        state = restore(workdir)
    assert_same(state, state_at(2))
    assert str(workdir / "checkpoints" / "3") in caplog.text
    assert tiny.steps(workdir) == [1, 2]
    assert [path.name[:2] for path in (workdir / "damaged_checkpoints").iterdir()] == ["3-"]
    save(workdir, state_at(3))  # its number is free again
    assert_same(restore(workdir), state_at(3))


def test_with_no_whole_checkpoint_nothing_is_moved_or_started_afresh(workdir):
    for step in (1, 2, 3):
        missing_manifest(workdir / "checkpoints" / str(step))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint that can be read.*step 3"):
        restore(workdir)
    assert tiny.steps(workdir) == [1, 2, 3]


def test_load_model_reads_the_ema_alone(workdir):
    for step in (1, 2, 3):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    model, config = flowdcn_jax.load_model(workdir)
    np.testing.assert_array_equal(model.stem.kernel[...], state_at(3).ema["stem"]["kernel"])
    assert config.model.to_dict() == CONFIG.model.to_dict()
    x = np.ones((2, 8, 8, 1), np.float32)
    assert model(x, np.zeros(2, np.float32), np.array([0, 10])).shape == x.shape
    model, _ = flowdcn_jax.load_model(workdir, step=1)
    np.testing.assert_array_equal(model.stem.kernel[...], state_at(1).ema["stem"]["kernel"])


def test_load_model_passes_over_a_damaged_newest_but_not_the_step_asked_for(workdir, caplog):
    flipped_byte("ema")(workdir / "checkpoints" / "3")
    model, _ = flowdcn_jax.load_model(workdir)
    np.testing.assert_array_equal(model.stem.kernel[...], state_at(2).ema["stem"]["kernel"])
    assert "3 is damaged" in caplog.text
    assert tiny.steps(workdir) == [1, 2, 3]  # reading moves nothing
    with pytest.raises(checkpoint.CheckpointError, match="checksum mismatch in ema"):
        flowdcn_jax.load_model(workdir, step=3)


def test_missing_checkpoints_are_named(workdir, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"no step 9; there are \[1, 2, 3\]"):
        flowdcn_jax.load_model(workdir, step=9)
    with pytest.raises(checkpoint.CheckpointError, match="nowhere holds no checkpoints; expected"):
        flowdcn_jax.load_model(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="no finished checkpoint"):
        flowdcn_jax.load_model(tmp_path)


def test_checksums_see_any_changed_word_and_swaps():
    x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    flipped, swapped = x.copy(), x.copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    swapped[0, 0], swapped[2, 3] = x[2, 3], x[0, 0]
    sums = [checkpoint.checksum({"x": jax.numpy.asarray(a)})["x"] for a in (x, flipped, swapped)]
    assert len(set(sums)) == 3
    weights = 2 * np.arange(12, dtype=np.uint64) + 1
    assert sums[0] == int((x.view(np.uint32).ravel() * weights).sum() % 2**32)


def test_the_saved_config_is_the_runs(workdir):
    run = checkpoint.saved_run(workdir)
    assert run.config == json.loads(CONFIG.to_json())
    assert run.class_names == NAMES and not run.weights_only
    assert run.data_identity == IDENTITY
