"""Lists of images: folders, also hostile ones, and TFDS data sets."""

import errno
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flowdcn_jax.data import DataError, DataNotFoundError
from flowdcn_jax.data.image_files import BadImageError
from flowdcn_jax.data.labelled_images import FolderImages, open_labelled_images


def save(path, value=0, size=(12, 8)):
    """A PNG of one grey value, whatever the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path, "PNG")


def names(images):
    return [images.name(index) for index in range(len(images))]


def labels(images):
    return [images.read(index).label for index in range(len(images))]


def test_subfolders_are_the_classes_and_files_below_them_their_images(tmp_path):
    for value, name in enumerate(["b/2.jpg", "b/1.PNG", "a/x/y/3.webp", "c/4.jpeg"]):
        save(tmp_path / name, value)
    save(tmp_path / "loose.png")
    images = open_labelled_images(f"folder:{tmp_path}", split="train", data_dir=None)
    assert images.class_names == ("a", "b", "c") and images.num_classes == 3
    assert names(images) == ["a/x/y/3.webp", "b/1.PNG", "b/2.jpg", "c/4.jpeg"]
    assert labels(images) == [0, 1, 1, 2]
    values = [np.asarray(images.read(index).image)[0, 0, 0] for index in range(4)]
    assert values == [2, 1, 0, 3]
    assert images.read(0).image.size == (12, 8)
    assert images.notes == ()


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    for name in ("a/1.png", "a/.2.png", "a/.git/3.png", ".b/4.png", "a/notes.txt", "a/Thumbs.db"):
        save(tmp_path / name)
    images = FolderImages(tmp_path)
    assert names(images) == ["a/1.png"] and images.class_names == ("a",)
    assert images.notes == ("2 files without the extension of an image, ignored",)


def test_an_empty_class_keeps_its_label(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "c" / "2.png")
    (tmp_path / "b" / "nothing here").mkdir(parents=True)
    images = FolderImages(tmp_path)
    assert images.class_names == ("a", "b", "c") and labels(images) == [0, 2]
    assert images.notes == ("classes without images, which keep their labels: b",)


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    save(root / "a" / "deep" / "2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "deep" / "up").symlink_to(root / "a")
    (root / "a" / "round").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    images = FolderImages(root)
    assert names(images) == ["a/deep/2.png", "linked/1.png"] and labels(images) == [0, 1]
    assert images.notes[0] == left_out("a/deep/up, a/round")


def left_out(folders):
    return f"folders left out, as they are visited elsewhere or contain the classes: {folders}"


@pytest.mark.parametrize(
    "link, target, missing",
    [
        ("a/up", "..", "a/up"),
        ("a/up", "../..", "a/up"),
        ("a/side", "../b", "a/side"),
        ("loop", ".", "loop"),
        ("loop", "..", "loop"),
    ],
)
def test_links_to_the_root_or_to_other_classes_bring_no_image_into_a_wrong_class(
    tmp_path, link, target, missing
):
    root = tmp_path / "root"
    for name in ("a", "b"):
        save(root / name / f"{name}.png")
    (root / link).symlink_to(target)
    images = FolderImages(root)
    assert images.class_names == ("a", "b")
    assert names(images) == ["a/a.png", "b/b.png"] and labels(images) == [0, 1]
    assert images.notes == (left_out(missing),)


def test_a_folder_is_visited_once_for_each_class_that_links_to_it(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    for link in ("a/one", "a/two", "b/one"):
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(tmp_path / "elsewhere")
    images = FolderImages(root)
    assert names(images) == ["a/one/1.png", "b/one/1.png"] and labels(images) == [0, 1]
    assert images.notes == (left_out("a/two"),)


def test_two_classes_of_one_folder_are_noted(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "b").symlink_to("a")
    images = FolderImages(tmp_path)
    assert names(images) == ["a/1.png", "b/1.png"]
    assert images.notes == ("some classes are links to one folder: its images are in each of them",)


def test_links_that_lead_nowhere_or_to_themselves_cannot_be_read(tmp_path):
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "a" / "3.png")
    images = FolderImages(tmp_path)
    assert len(images) == 3
    for index, message in ((1, "No such file"), (2, "symbolic links")):
        with pytest.raises(BadImageError, match=f"cannot be read: .*{message}"):
            images.read(index)


def test_a_file_without_permission_cannot_be_read(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png")
    images = FolderImages(tmp_path)

    def denied(path):  # root may read everything, so chmod would test nothing
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BadImageError, match="cannot be read: Permission denied"):
        images.read(0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE])
def test_a_disk_or_system_that_fails_does_not_make_an_image_bad(tmp_path, monkeypatch, code):
    save(tmp_path / "a" / "1.png")
    images = FolderImages(tmp_path)

    def fails(path):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_bytes", fails)  # no file system here fails so when asked to
    with pytest.raises(OSError, match=os.strerror(code)):
        images.read(0)


def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    images = FolderImages(tmp_path)
    reader = threading.Thread(target=lambda: outcome.append(failure(images)), daemon=True)
    outcome = []
    reader.start()
    reader.join(10)
    assert outcome == ["not a regular file"]


def failure(images):
    with pytest.raises(BadImageError) as caught:
        images.read(0)
    return str(caught.value)


def test_a_huge_file_is_not_read(tmp_path):
    """It begins with an image, and its zeros take no space on the disk."""
    save(tmp_path / "a" / "1.png")
    os.truncate(tmp_path / "a" / "1.png", 2**29 + 1)
    assert failure(FolderImages(tmp_path)) == f"{2**29 + 1} bytes, more than {2**29}"


def test_a_folder_without_permission_stops_the_listing(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png")
    real = os.scandir

    def denied(path):  # root may list everything
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match="cannot list .*a: Permission denied"):
        FolderImages(tmp_path)


def test_names_in_any_script(tmp_path):
    for name in ("猫/gato ñandú.png", "собака/🐕.png", "a,b 'c'/%20.png"):
        save(tmp_path / name)
    images = FolderImages(tmp_path)
    assert images.class_names == ("a,b 'c'", "собака", "猫")
    assert labels(images) == [0, 1, 2]


@pytest.mark.parametrize("name", [b"two\nlines", b" padded"])
def test_class_names_that_tfds_cannot_keep_are_refused(tmp_path, name):
    os.mkdir(os.fsencode(tmp_path) + b"/" + name)
    with pytest.raises(DataError, match="the class folder"):
        FolderImages(tmp_path)


def test_thousands_of_classes(tmp_path):
    for label in range(2_000):
        (tmp_path / f"{label:04d}").mkdir()
    for label in (0, 700, 1_999):
        save(tmp_path / f"{label:04d}" / "1.png")
    images = FolderImages(tmp_path)
    assert images.num_classes == 2_000 and labels(images) == [0, 700, 1_999]
    assert "and 1992 more" in images.notes[0]


def test_the_fingerprint_tells_lists_apart(tmp_path):
    save(tmp_path / "a" / "1.png")
    first = FolderImages(tmp_path).fingerprint
    assert FolderImages(tmp_path).fingerprint == first
    save(tmp_path / "b" / "1.png")
    second = FolderImages(tmp_path).fingerprint
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "2.png")
    third = FolderImages(tmp_path).fingerprint
    save(tmp_path / "b" / "2.png", size=(99, 99))  # another image in its place
    fourth = FolderImages(tmp_path).fingerprint
    (tmp_path / "c").mkdir()  # without images, and after all others: no label changes
    fifth = FolderImages(tmp_path).fingerprint
    assert len({first, second, third, fourth, fifth}) == 5


def test_the_source_is_one_however_it_is_spelled(tmp_path, monkeypatch):
    save(tmp_path / "photos" / "a" / "1.png")
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    spellings = ["photos", "photos/", "./photos", "~/photos", "link", f"{tmp_path}//photos"]
    sources = {
        open_labelled_images(f"folder:{spelling}", split="train", data_dir=None).source
        for spelling in spellings
    }
    assert sources == {f"folder:{os.path.realpath(tmp_path / 'photos')}"}


@pytest.mark.parametrize(
    "split", ["", "a/../../x", "../x", "train+test", "train[", "train[:2][:1]", "a b", "train-2"]
)
@pytest.mark.parametrize("dataset", ["folder:no/such/folder", "imagenet2012"])
def test_a_split_that_is_no_name_is_refused_before_anything_else(tmp_path, dataset, split):
    with pytest.raises(DataError, match="the split is .*; expected a name of letters"):
        open_labelled_images(dataset, split=split, data_dir=tmp_path)


def test_a_folder_has_no_slices(tmp_path):
    save(tmp_path / "a" / "1.png")
    with pytest.raises(
        DataError, match=r"'train\[:100\]'; expected a name: a folder has no slices"
    ):
        open_labelled_images(f"folder:{tmp_path}", split="train[:100]", data_dir=None)


def test_a_folder_without_a_name_is_not_the_current_one(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'folder:' names no folder; expected folder:PATH"):
        open_labelled_images("folder:", split="train", data_dir=None)


@pytest.mark.parametrize("place", ["photos", "photos/latents", "photos/a/latents", "link/latents"])
def test_nothing_is_made_among_the_images(tmp_path, place):
    save(tmp_path / "photos" / "a" / "1.png")
    (tmp_path / "link").symlink_to("photos")
    options = dict(split="train", data_dir=None)
    dataset = f"folder:{tmp_path}/photos"
    with pytest.raises(DataError, match="where it would become a class"):
        open_labelled_images(dataset, output_dir=tmp_path / place, **options)
    assert len(open_labelled_images(dataset, output_dir=tmp_path / "photos2", **options)) == 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "no folder"),
        (lambda root: root.write_text("mine"), "no folder"),
        (lambda root: root.mkdir(), "no subfolders"),
        (lambda root: save(root / "1.png"), "no subfolders"),
        (lambda root: (root / "a").mkdir(parents=True), "1 classes and no image files"),
    ],
)
def test_folders_without_images_are_refused(tmp_path, make, message):
    make(tmp_path / "root")
    with pytest.raises(DataError if "no folder" not in message else DataNotFoundError) as caught:
        FolderImages(tmp_path / "root")
    assert message in str(caught.value)


class TinyPhotos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Three images as TFDS keeps them."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}
    FEATURES = {
        "image": tfds.features.Image(),
        "file_name": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=("cat", "dog")),
    }

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for key in range(3):
            file = io.BytesIO()
            Image.new("RGB", (6 + key, 5), (key,) * 3).save(file, "PNG")
            file.seek(0)
            example = {"image": file, "file_name": f"{key}.png", "label": key % 2}
            yield key, {name: example[name] for name in self.FEATURES}


def test_a_prepared_tfds_data_set(tmp_path):
    TinyPhotos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    images = open_labelled_images("tiny_photos", split="train[:2]", data_dir=tmp_path)
    assert len(images) == 2 and images.class_names == ("cat", "dog")
    read = [images.read(index) for index in range(2)]
    keys = [image.size[0] - 6 for image, _ in read]
    assert [label for _, label in read] == [key % 2 for key in keys]
    assert [np.asarray(image)[0, 0, 0] for image, _ in read] == keys
    assert images.name(1) == "record 1" and "tiny_photos" in images.fingerprint
    with pytest.raises(DataError, match="no split 'test'"):
        open_labelled_images("tiny_photos", split="test", data_dir=tmp_path)


def test_a_tfds_data_set_that_is_not_prepared_or_has_no_labels(tmp_path):
    with pytest.raises(
        DataNotFoundError, match="'imagenet2012' is not prepared in .*CLS-LOC/train.*TensorFlow"
    ):
        open_labelled_images("imagenet2012", split="train", data_dir=tmp_path)

    class Unlabelled(TinyPhotos, skip_registration=True):
        FEATURES = {"image": tfds.features.Image()}

    Unlabelled(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(DataError, match="'unlabelled' has no class `label`; it has .*image"):
        open_labelled_images("unlabelled", split="train", data_dir=tmp_path)
