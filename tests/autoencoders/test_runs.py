"""Whole runs on cached latents: training, its grids, and sample.py."""

import sys

import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import data, sampling
from flowdcn_jax.autoencoders import WeightsNotFoundError
from flowdcn_jax.training import loop
from tests import tiny


def latents_config(data_dir, **overrides):
    config = tiny.config(train__num_steps=2, model__in_channels=4, **overrides)
    config.data.update(name="imagenet_latents", data_dir=str(data_dir), image_size=64)
    config.autoencoder.update(name="none", downsampling=8)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, taesd_folder):
    """A run on latents whose grids TAESD decoded."""
    folder, generator = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    moments = ("mean", "std", "mean_flipped", "std_flipped")
    examples = [
        {name: generator.random((8, 8, 4)) for name in moments} | {"label": index % 10}
        for index in range(20)
    ]
    data.write_latents(examples, data_dir=folder, latent_shape=(8, 8, 4), num_classes=10)
    config = latents_config(folder, log__sample_every_steps=2)
    config.autoencoder.update(name="taesd", weights=str(taesd_folder))
    loop.train(config, str(folder / "run"))
    assert all(np.isfinite(row["loss"]) for row in tiny.metrics(folder / "run"))
    return folder / "run"


def test_runs_draw_pictures_with_the_decoder(trained, taesd_folder, tmp_path):
    """In training, and later with the weights in another place."""
    with Image.open(trained / "samples" / "step_00000002.png") as grid:
        assert grid.size == (2 * (64 + 2) + 2,) * 2
    (tmp_path / "moved").symlink_to(taesd_folder)
    grid = sampling.sample_to_folder(
        sampling.load_trained(trained, autoencoder_weights=str(tmp_path / "moved")),
        sampling.Settings(num_steps=1, image_size=(16, 32)),
        sampling.Request(num_images=3),
        out=str(tmp_path / "out"),
    )
    with np.load(grid.parent / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (3, 16, 32, 3) and file["arr_0"].dtype == np.uint8
        assert len(np.unique(file["arr_0"])) > 10


def test_latents_are_written_without_a_decoder(trained, tmp_path):
    grid = sampling.sample_to_folder(
        sampling.load_trained(trained, autoencoder="none"),
        sampling.Settings(num_steps=1, image_size=(64, 128)),
        sampling.Request(num_images=3),
        out=str(tmp_path),
    )
    with np.load(grid.parent / "samples.npz", allow_pickle=False) as file:
        assert file["latents"].shape == (3, 8, 16, 4) and file["latents"].dtype == np.float32
        assert "arr_0" not in file.files


def test_sample_command_without_weights_prints_one_error_and_writes_nothing(trained, tmp_path):
    command = [sys.executable, "sample.py", f"--workdir={trained}", f"--out={tmp_path / 'out'}"]
    code, output = tiny.run([*command, "--autoencoder=sd_vae"])
    assert code != 0 and "Traceback" not in output
    assert "config.autoencoder.weights is None" in output and "sd-vae-ft-ema" in output
    assert not (tmp_path / "out").exists()


def test_training_without_weights_stops_before_anything_is_written(tmp_path):
    config = latents_config(tmp_path)
    config.autoencoder.update(name="sd_vae", weights=str(tmp_path / "none"))
    with pytest.raises(WeightsNotFoundError, match="Fetch"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
