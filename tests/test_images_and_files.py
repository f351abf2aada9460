"""Grids, PNGs and files that are whole or not there."""

import os

import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import images
from flowdcn_jax.files import atomic_write
from flowdcn_jax.training.metrics import drop_later_lines


def test_grid_places_images_row_by_row_and_enlarges_small_ones():
    pictures = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.full(
        (5, 4, 8, 1), 50, np.uint8
    )
    grid = images.make_grid(pictures, columns=3, gap=1)
    factor = images.MIN_GRID_SIDE // 4
    height, width = 4 * factor + 1, 8 * factor + 1
    assert grid.shape == (2 * height + 1, 3 * width + 1, 3)
    assert (grid[1:height, 1:width] == 0).all()
    assert (grid[height + 1 : 2 * height, width + 1 : 2 * width] == 200).all()
    assert (grid[height + 1 :, 2 * width + 1 :] == 255).all()  # no sixth image


def test_captions_are_written_under_images_of_any_size_and_long_ones_cut():
    pictures = [np.zeros((64, 80, 3), np.uint8), np.zeros((100, 64, 1), np.uint8)]
    options = dict(columns=2, gap=2)
    plain = images.make_grid(pictures, **options)
    assert plain.shape == (104, 166, 3)
    grid = images.make_grid(pictures, **options, captions=["dog", "cat"])
    assert grid.shape == (104 + images.CAPTION_HEIGHT, 166, 3)
    assert (grid[66 : 66 + images.CAPTION_HEIGHT, :82] < 255).any()  # under the shorter one
    assert (grid[102 : 102 + images.CAPTION_HEIGHT, 84:] < 255).any()
    two = images.make_grid(pictures, **options, captions=["dog\nbarks", "cat"])
    assert two.shape == (104 + 2 * images.CAPTION_HEIGHT, 166, 3)
    assert (two[66 + images.CAPTION_HEIGHT : 66 + 2 * images.CAPTION_HEIGHT, :82] < 255).any()
    long = images.make_grid(pictures, **options, captions=["dog", "a very long name " * 9])
    assert long.shape[1] == 2 * (160 + 2) + 2
    assert (long[102 : 102 + images.CAPTION_HEIGHT, -2:] == 255).all()


def test_png_metadata(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    images.save_png(tmp_path / "a.png", picture, {"seed": 3, "class": "crane (bird)"})
    assert images.read_metadata(tmp_path / "a.png") == {"seed": 3, "class": "crane (bird)"}
    images.save_png(tmp_path / "b.png", picture)
    assert images.read_metadata(tmp_path / "b.png") == {}


def test_grid_columns():
    assert images.grid_columns(60, 10) == 10
    assert images.grid_columns(64, 1000) == 8
    assert images.grid_columns(1, 10) == 1


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_png_round_trip(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images.save_png(tmp_path / "new" / "a.png", picture)
    read = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    np.testing.assert_array_equal(read, picture.reshape(read.shape))


def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_metrics_of_abandoned_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n\0\0\n{"ste')
    drop_later_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_later_lines(tmp_path / "none", 2)
