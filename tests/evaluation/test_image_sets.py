"""Images from files and data sets, and files that hold none."""

import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from flowdcn_jax.data import prepare_cifar10
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation import EvaluationError, open_images
from tests.data.conftest import CLASS_NAMES
from tests.data.test_labelled_images import TinyPhotos
from tests.evaluation import fakes


def read(images, *ranges):
    return np.concatenate(list(images.read(ranges or [range(images.count)])))


def test_npz_files_are_read_a_range_at_a_time(tmp_path):
    stored = fakes.random_images(20)
    images = open_images(fakes.save(tmp_path / "x.npz", stored, arr_1=np.arange(20)))
    assert (images.count, images.size, images.grey) == (20, (8, 9), False)
    np.testing.assert_array_equal(read(images), stored)
    found = read(images, range(2, 3), range(3, 9), range(18, 20))
    np.testing.assert_array_equal(found, stored[[2, *range(3, 9), 18, 19]])


def test_a_folder_of_sample_py_is_read_by_its_samples(tmp_path):
    stored = fakes.random_images(3)
    fakes.save(tmp_path / "samples.npz", stored)
    fakes.save(tmp_path / "other.npz", stored)
    (tmp_path / "settings.json").write_text('{"settings": {"guidance": 2.0}}')
    Image.fromarray(stored[0]).save(tmp_path / "grid.png")
    images = open_images(str(tmp_path))
    assert images.count == 3 and images.settings == {"settings": {"guidance": 2.0}}
    np.testing.assert_array_equal(read(images), stored)


def test_folders_of_image_files_are_read_at_any_depth(tmp_path):
    stored = fakes.random_images(5)
    for index, folder in enumerate(("b", "a", "a/x", ".", "c")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(stored[index]).save(tmp_path / folder / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    for source in (str(tmp_path), f"folder:{tmp_path}"):
        images = open_images(source)
        assert (images.count, images.size) == (5, (8, 9))
        np.testing.assert_array_equal(
            read(images, range(0, 2), range(2, 5)), stored[[3, 1, 2, 0, 4]]
        )


def test_image_size_cuts_out_squares_as_adm_does(tmp_path):
    for index, size in enumerate(((40, 30), (16, 50))):
        Image.fromarray(fakes.random_images(1, size=size)[0]).save(tmp_path / f"{index}.png")
    images = open_images(str(tmp_path), crop=8)
    assert read(images).shape == (2, 8, 8, 3) and images.crop == 8
    with pytest.raises(
        EvaluationError, match="1.png has 16x50 pixels, .*0.png 40x30; expected one"
    ):
        read(open_images(str(tmp_path)))


def test_digits_are_read_by_name_and_known_to_be_grey():
    images = open_images("digits", crop=16)
    assert (images.count, images.size, images.grey) == (1797, (16, 16), True)
    found = read(images, range(5, 9))
    assert found.dtype == np.uint8 and (found == found[..., :1]).all() and found.any()


def test_data_sets_that_tfds_has_prepared_are_read_by_name(tmp_path):
    TinyPhotos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    images = open_images("tiny_photos", crop=4, data_dir=str(tmp_path))
    assert (images.count, images.size) == (3, (4, 4))
    assert sorted(read(images)[:, 0, 0, 0]) == [0, 1, 2]


def test_cifar10_is_read_by_name(tmp_path):
    stored = fakes.random_images(20, size=(32, 32))
    for index, image in enumerate(stored):
        for split in ("train", "test"):
            path = tmp_path / "png" / split / CLASS_NAMES[index % 10] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    prepare_cifar10([tmp_path / "png"], data_dir=tmp_path)
    images = open_images("cifar10", split="train[:12]", data_dir=str(tmp_path))
    assert (images.count, images.size, images.grey) == (12, (32, 32), False)
    found = {image.tobytes() for image in read(images)}
    assert len(found) == 12 and found <= {image.tobytes() for image in stored}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, r"float32 .*uint8 \[N,H,W,3\].*127.5 x"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.int64)}, "int64 .* expected uint8"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, r"uint8 \[4, 8, 8\]; expected"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, r"\[4, 3, 8, 8\]; expected"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "0 bytes; expected .* images"),
        ({"arr_0": np.array([{}, 3])}, "arr_0 is pickled"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "y": np.array([{}])}, "y is pickled"),
        ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, "holds images; expected arr_0"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(EvaluationError, match=message) as caught:
        open_images(str(tmp_path / "x.npz"))
    assert "x.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_damaged_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    fakes.save(path, fakes.random_images(50))
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:3000], b"", b"text", whole[5000:]):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match="x.npz is damaged or cut short"):
            open_images(str(path))
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=fakes.random_images(50))
        checksum = struct.pack("<I", zipfile.ZipFile(path).getinfo("arr_0.npy").CRC)
        path.write_bytes(path.read_bytes().replace(checksum, b"sums"))
        for positions in (range(50), range(3)):
            with pytest.raises(EvaluationError, match="x.npz is damaged.*CRC"):
                read(open_images(str(path)), positions)
    with (
        zipfile.ZipFile(tmp_path / "short.npz", "w") as archive,
        archive.open("arr_0.npy", "w") as f,
    ):
        np.lib.format.write_array_header_1_0(
            f, {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)}
        )
        f.write(bytes(500))
    with pytest.raises(EvaluationError, match="short.npz: arr_0 is uint8 .* in 500 bytes"):
        open_images(str(tmp_path / "short.npz"))


def test_a_shard_of_another_size_or_cut_short_is_refused(tmp_path):
    fakes.save(tmp_path / "0.npz", fakes.random_images(3))
    fakes.save(tmp_path / "1.npz", fakes.random_images(3, size=(9, 9)))
    with pytest.raises(EvaluationError, match="1.npz holds images .*expected one size"):
        open_images(str(tmp_path))
    path = tmp_path / "1.npz"
    fakes.save(path, fakes.random_images(3))
    assert open_images(str(tmp_path)).count == 6
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(EvaluationError, match="1.npz is damaged"):
        open_images(str(tmp_path))


def test_image_files_that_are_damaged_are_named(tmp_path):
    Image.fromarray(fakes.random_images(1)[0]).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:90])
    with pytest.raises(EvaluationError, match="1.png cannot be used"):
        read(open_images(str(tmp_path)))


@pytest.mark.parametrize(
    "source, message",
    [
        ("no/such.npz", "no file or folder no/such.npz"),
        ("folder:none", "no file or folder none"),
        ("folder:", "'folder:' names no images"),
        ("no_such_set", "no_such_set.* is not prepared"),
        ("latents", "holds no pixels"),
    ],
)
def test_what_is_not_there_is_refused(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_images(source, data_dir=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="neither .npz files nor images"):
        open_images(str(tmp_path / "empty"))
