"""Whole runs on cached latents: training, its grids, and sample.py."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import data, sampling
from flowdcn_jax.autoencoders import WeightsNotFoundError
from flowdcn_jax.errors import ConfigError, UserError
from tests import tiny
from tests.autoencoders.conftest import SD_VAE

pytestmark = pytest.mark.usefixtures("quick_compilation")


def latents_config(data_dir, **overrides):
    config = tiny.config(train__num_steps=2, model__in_channels=4, **overrides)
    config.data.update(name="latents", data_dir=str(data_dir), image_size=64)
    config.autoencoder.update(name="preview", downsampling=8)
    return config


def write(folder, *, count=20, **manifest):
    generator = np.random.default_rng(0)
    moments = ("mean", "std", "mean_flipped", "std_flipped")
    examples = [
        {name: generator.random((8, 8, 4)) for name in moments} | {"label": index % 10}
        for index in range(count)
    ]
    data.write_latents(
        examples,
        data_dir=folder,
        latent_shape=(8, 8, 4),
        num_classes=10,
        metadata=tiny.manifest(**dict(name="taesd", scale=1.0) | manifest),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, taesd_folder):
    """A run on latents whose grids TAESD decoded."""
    folder = tmp_path_factory.mktemp("latents")
    write(folder)
    config = latents_config(folder, log__sample_every_steps=2)
    config.autoencoder.update(name="taesd", weights=str(taesd_folder))
    tiny.train(config, folder / "run")
    assert all(np.isfinite(row["loss"]) for row in tiny.metrics(folder / "run"))
    return folder / "run"


def test_runs_draw_pictures_with_the_decoder(trained, taesd_folder, tmp_path):
    """In training, and later with the weights in another place."""
    with Image.open(trained / "samples" / "step_00000002.png") as grid:
        assert grid.size == (2 * (64 + 2) + 2,) * 2
    (tmp_path / "moved").symlink_to(taesd_folder)
    grid = sampling.sample_to_folder(
        trained,
        autoencoder_weights=tmp_path / "moved",
        num_steps=1,
        image_size=(16, 32),
        num_images=3,
        out=tmp_path / "out",
    )
    with np.load(grid.parent / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (3, 16, 32, 3) and file["arr_0"].dtype == np.uint8
        assert len(np.unique(file["arr_0"])) > 10


def test_latents_are_written_without_a_decoder(trained, tmp_path):
    grid = sampling.sample_to_folder(
        trained,
        autoencoder="preview",
        num_steps=1,
        image_size=(64, 128),
        num_images=3,
        out=str(tmp_path),
    )
    with np.load(grid.parent / "samples.npz", allow_pickle=False) as file:
        assert file["latents"].shape == (3, 8, 16, 4) and file["latents"].dtype == np.float32
        assert "arr_0" not in file.files


def test_sampling_without_weights_is_one_error_and_writes_nothing(trained, tmp_path):
    """A UserError, which the commands print as a line."""
    model = sampling.load_trained(trained, autoencoder="sd_vae")
    with pytest.raises(UserError, match="config.autoencoder.weights is None.*sd-vae-ft-ema"):
        sampling.sample_to_folder(
            model, sampling.Settings(), sampling.Request(), out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_training_without_weights_stops_before_anything_is_written(tmp_path):
    config = latents_config(tmp_path)
    config.autoencoder.update(name="sd_vae", weights=str(tmp_path / "none"))
    with pytest.raises(WeightsNotFoundError, match="Fetch"):
        tiny.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def resume(run, data_dir):
    """The same command once more: the checks are made, and there is nothing left to do."""
    config = latents_config(data_dir, log__sample_every_steps=2)
    tiny.train(config, run)


def test_a_run_goes_on_with_its_latents_in_another_place(trained, tmp_path, caplog):
    shutil.copytree(trained.parent / "imagenet_latents", tmp_path / "imagenet_latents")
    resume(trained, tmp_path)
    assert "step 2 of 2 is done" in caplog.text


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(count=30), "data.num_examples.8x8x4: 20 -> 30"),
        (dict(dataset="x"), "data.settings.dataset: None -> x"),
        (dict(weights_sha256="1"), "data.settings.autoencoder.weights_sha256: None -> 1"),
    ],
)
def test_a_run_does_not_go_on_with_other_latents(trained, tmp_path, other, message):
    write(tmp_path, **other)
    with pytest.raises(ConfigError, match=f"on other data than .*data_dir gives: {message}. Use"):
        resume(trained, tmp_path)


@pytest.mark.parametrize("latent_scale", [1.0, 0.18215])
def test_an_old_run_goes_on_if_its_latents_were_scaled_alike(
    trained, tmp_path, caplog, latent_scale
):
    """One whose config had the scale, and no buckets; and whose data set had no identity."""

    def make_old(record):
        del record["data_identity"], record["config"]["data"]["aspect_buckets"]
        record["config"]["data"]["latent_scale"] = latent_scale

    old = shutil.copytree(trained, tmp_path / "old")
    tiny.rewrite_run(old, 2, make_old)
    if latent_scale == 1.0:
        resume(old, trained.parent)
        assert "step 2 of 2 is done" in caplog.text
        assert sampling.load_trained(old, autoencoder="preview").weights.step == 2
    else:
        with pytest.raises(ConfigError, match="other data .*latents.scale: 0.18215 -> 1.0. Use"):
            resume(old, trained.parent)


def test_what_cannot_decode_the_latents_is_refused(trained, tmp_path):
    folder = shutil.copytree(SD_VAE, tmp_path / "sd_vae")
    (folder / "config.json").chmod(0o644)
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | dict(scaling_factor=0.13025)))
    model = sampling.load_trained(trained, autoencoder="sd_vae", autoencoder_weights=SD_VAE)
    assert model.autoencoder.name == "sd_vae"  # one space
    message = "taesd with scale 1 .* sd_vae with scale 0.13025"
    with pytest.raises(ConfigError, match=message):
        _ = sampling.load_trained(
            trained, autoencoder="sd_vae", autoencoder_weights=folder
        ).autoencoder
    config = latents_config(trained.parent)
    config.autoencoder.update(name="sd_vae", weights=str(folder))
    with pytest.raises(ConfigError, match=message):
        tiny.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
