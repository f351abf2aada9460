"""The command: a kill and its resumption, and errors in one line."""

import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.caching.conftest import read_back
from tests.conftest import FIXTURES


def command(root, data_dir, *extra):
    return [
        sys.executable,
        "-m",
        "flowdcn_jax.tools.cache_latents",
        f"--dataset=folder:{root}",
        "--autoencoder=sd_vae",
        f"--autoencoder_weights={FIXTURES / 'tiny_sd_vae'}",
        "--image_size=32",
        "--batch_size=16",
        f"--data_dir={data_dir}",
        *extra,
    ]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """600 small images: three parts of the work."""
    root = tmp_path_factory.mktemp("photos")
    (root / "a").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (600, 2, 2, 3), np.uint8)
    for index, pixels in enumerate(colours):
        image = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BILINEAR)
        image.save(root / "a" / f"{index:03d}.png")
    return root


def test_a_killed_command_goes_on_with_the_parts_that_are_missing(photos, tmp_path):
    parts = tmp_path / "killed" / "incomplete.latents.train.32.square"
    process = tiny.start(command(photos, tmp_path / "killed"))
    deadline = time.monotonic() + 120
    while not (parts / "part-00000.npz").exists():
        assert process.poll() is None and time.monotonic() < deadline, tiny.finish(process)[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    code, output = tiny.finish(process)
    assert code == -signal.SIGKILL, output
    assert not (parts / "part-00002.npz").exists(), "the kill came too late to test anything"
    assert not read_back(tmp_path / "killed")

    written = (parts / "part-00000.npz").stat().st_mtime_ns
    same_file = tmp_path / "part"
    same_file.hardlink_to(parts / "part-00000.npz")
    code, output = tiny.run(command(f"{photos.parent}/./{photos.name}/", tmp_path / "killed"))
    assert code == 0, output
    assert "600 images in" in output
    assert same_file.stat().st_mtime_ns == written and not parts.exists()
    (examples,) = read_back(tmp_path / "killed").values()
    reds = [example["mean"][..., 0].astype(np.float32).std() for example in examples]
    assert len(examples) == 600 and len(set(reds)) == 600  # no image twice


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--dataset=folder:no/such/folder"], "error: no folder no/such/folder; expected one with"),
        (["--image_size=60"], "error: images of 60x60 pixels do not fit the autoencoder 'sd_vae'"),
        (["--shard_index=1"], "error: --shard_index is 1; expected 0 .. 0, below --num_shards"),
        (["--autoencoder=vae"], "flag --autoencoder=vae: value should be one of"),
        (["stray"], "error: unexpected arguments"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(extra, message, photos, tmp_path):
    code, output = tiny.run(command(photos, tmp_path / "data", *extra))
    assert code != 0 and message in output
    assert "Traceback" not in output
    assert not (tmp_path / "data").exists()


def test_latents_are_not_made_among_the_photos(photos):
    code, output = tiny.run(command(photos, photos / "latents"))
    assert code == 2
    assert "where it would become a class" in output and not (photos / "latents").exists()
