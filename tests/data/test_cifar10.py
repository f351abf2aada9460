"""CIFAR-10: preparing it from each form, reading it, and refusing what is not it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flowdcn_jax.data import DataError, DataNotFoundError, prepare_cifar10
from flowdcn_jax.data.cifar10 import find_splits
from tests.data.conftest import CLASS_NAMES, COUNTS

FORMS = ("npz", "folders", "binary")


def read_all(source, seed=0):
    indices = np.arange(len(source))
    return source.read(indices, indices, seed)


def match_up(images, originals):
    """For each image the nearest original: TFDS shuffles while it writes."""
    distance = np.abs(images[:, None].astype(int) - originals[None].astype(int)).mean((2, 3, 4))
    return distance.argmin(axis=1), distance.min(axis=1)


@pytest.fixture
def prepared_dir(write_cifar10, tmp_path):
    data_dir = tmp_path / "data"
    prepare_cifar10([write_cifar10("binary")], data_dir=data_dir)
    return data_dir


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_images(form, write_cifar10, tiny_cifar10, tmp_path, open_source):
    folder, written = prepare_cifar10([write_cifar10(form)], data_dir=tmp_path)
    assert written and folder == tmp_path / "cifar10_local" / "1.0.0"
    for split, count in COUNTS.items():
        source = open_source("cifar10", data_dir=str(tmp_path), split=split)
        assert len(source) == count
        assert source.image_shape == (32, 32, 3)
        assert source.num_classes == 10
        assert source.class_names == CLASS_NAMES
        batch = read_all(source)
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        images, labels = tiny_cifar10[split]
        order, distance = match_up(batch["image"], images)
        assert sorted(order) == list(range(count))
        assert distance.max() <= (3 if form == "npz" else 0)  # JPEG is lossy
        np.testing.assert_array_equal(batch["label"], labels[order])


def test_npz_files_may_be_named_one_by_one(write_cifar10):
    folder = write_cifar10("npz")
    splits = find_splits([folder / "tiny_test.npz", folder / "tiny_train.npz"])
    assert {split: files.count for split, files in splits.items()} == COUNTS


def test_flips_show_half_of_the_visits_mirrored(prepared_dir, open_source):
    plain = open_source("cifar10", data_dir=str(prepared_dir))
    flipping = open_source("cifar10", data_dir=str(prepared_dir), random_flip=True)
    assert flipping.flips and not plain.flips
    positions = np.arange(3000)
    indices = positions % len(plain)
    expected, batch = (source.read(indices, positions, 9) for source in (plain, flipping))
    same = (batch["image"] == expected["image"]).all(axis=(1, 2, 3))
    mirrored = (batch["image"] == expected["image"][:, :, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, ~mirrored)
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(positions))
    np.testing.assert_array_equal(batch["label"], expected["label"])
    again = flipping.read(indices[100:200], positions[100:200], 9)
    np.testing.assert_array_equal(again["image"], batch["image"][100:200])
    np.testing.assert_array_equal(read_all(plain)["image"], read_all(plain, seed=1)["image"])


def test_a_slice_of_a_split(prepared_dir, open_source):
    with pytest.raises(DataError, match="train\\[:x\\]"):
        open_source("cifar10", data_dir=str(prepared_dir), split="train[:x]")
    assert len(open_source("cifar10", data_dir=str(prepared_dir), split="train[:7]")) == 7


def test_the_identity_is_that_of_the_images_whatever_folder_they_lie_in(
    prepared_dir, open_source, tmp_path
):
    shutil.copytree(prepared_dir, tmp_path / "copy")
    source, copy = (
        open_source("cifar10", data_dir=str(d)) for d in (prepared_dir, tmp_path / "copy")
    )
    assert source.identity == copy.identity and source.identity["num_examples"] == COUNTS["train"]
    fewer = open_source("cifar10", data_dir=str(prepared_dir), split="train[:7]").identity
    other = open_source("cifar10", data_dir=str(prepared_dir), split="train[1:8]").identity
    assert fewer["num_examples"] == other["num_examples"] and fewer["sha256"] != other["sha256"]
    digits = [open_source("digits", image_size=size).identity for size in (8, 16)]
    assert digits[0] == digits[1]  # it does not depend on how Pillow enlarges them


def test_larger_images_are_those_resized(prepared_dir, open_source):
    sources = [
        open_source("cifar10", data_dir=str(prepared_dir), image_size=size) for size in (32, 64)
    ]
    assert sources[1].image_shape == (64, 64, 3)
    assert sources[0].identity == sources[1].identity
    small, large = (read_all(source) for source in sources)
    np.testing.assert_array_equal(small["label"], large["label"])
    means = large["image"].reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(means - small["image"]).mean() < 8


def test_default_folder_is_the_one_of_tfds(prepared_dir, open_source, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_dir))
    assert len(open_source("cifar10")) == COUNTS["train"]


def test_cifar10_prepared_by_tfds_itself_is_read(tiny_cifar10, tmp_path, open_source):
    images, labels = tiny_cifar10["train"]

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")
        url_infos = {}

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=CLASS_NAMES),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                png.seek(0)
                yield key, {"id": str(key), "image": png, "label": label}

    Cifar10(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    batch = read_all(open_source("cifar10", data_dir=str(tmp_path)))
    order, distance = match_up(batch["image"], images)
    assert distance.max() == 0 and sorted(order) == list(range(len(images)))
    np.testing.assert_array_equal(batch["label"], labels[order])


def test_not_prepared_says_where_it_looked_and_what_to_run(tmp_path, open_source):
    command = (
        "python -m flowdcn_jax.tools.prepare_data --dataset=cifar10 "
        f"--source=<file or folder> --data_dir={tmp_path}"
    )
    with pytest.raises(DataNotFoundError, match=re.escape(command)):
        open_source("cifar10", data_dir=str(tmp_path))


def test_missing_files_other_formats_and_splits_are_named(prepared_dir, open_source):
    folder = prepared_dir / "cifar10_local" / "1.0.0"
    with pytest.raises(DataError, match=r"no split 'val'.*\['test', 'train'\]"):
        open_source("cifar10", data_dir=str(prepared_dir), split="val")
    for size in (31, 257):
        with pytest.raises(DataError, match="image_size of cifar10 is 32, or up to 256 resized"):
            open_source("cifar10", data_dir=str(prepared_dir), image_size=size)
    with pytest.raises(DataError, match="'cifar10_local', not imagenet_latents"):
        open_source("latents", data_dir=str(folder))
    next(folder.glob("*train.array_record*")).unlink()
    with pytest.raises(DataNotFoundError, match="cifar10_local-train.array_record"):
        open_source("cifar10", data_dir=str(prepared_dir))
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="tfrecord, which needs TensorFlow"):
        open_source("cifar10", data_dir=str(prepared_dir))


# --- sources that are not CIFAR-10 -------------------------------------------------------------


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta", "cifar.pkl"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match="fetch the binary version"):
            find_splits([source])


def test_npz_with_pickled_objects_is_refused(tmp_path):
    arrays = {key: np.array([{}], dtype=object) for key in ("jpeg_bytes", "offsets", "labels")}
    np.savez(tmp_path / "train.npz", class_names=np.array(CLASS_NAMES), **arrays)
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        find_splits([tmp_path / "train.npz"])


def damage_npz(folder, **arrays):
    path = folder / "tiny_train.npz"
    with np.load(path) as archive:
        content = {key: archive[key] for key in archive.files}
    np.savez(path, **(content | arrays))


@pytest.mark.parametrize(
    "form, damage, message",
    [
        ("npz", lambda f: (f / "tiny_train.npz").unlink(), "no train split"),
        ("npz", lambda f: (f / "tiny_train.npz").write_bytes(b"PK"), "not an .npz of JPEGs"),
        ("npz", lambda f: os.truncate(f / "tiny_train.npz", 9000), "not an .npz of JPEGs"),
        ("npz", lambda f: damage_npz(f, labels=np.full(30, 10)), "labels must be 0 .. 9"),
        ("npz", lambda f: damage_npz(f, labels=np.arange(10)), "one more than the labels"),
        ("npz", lambda f: damage_npz(f, jpeg_bytes=np.zeros(9, np.uint8)), "do not span"),
        ("npz", lambda f: damage_npz(f, class_names=np.array(["cat"])), "CIFAR-10 has 10"),
        ("npz", lambda f: shutil.copy(f / "tiny_train.npz", f / "train2.npz"), "more than one"),
        ("folders", lambda f: (f / "train" / "cat").rename(f / "train" / "lion"), "differently"),
        ("folders", lambda f: shutil.rmtree(f / "train" / "cat"), "CIFAR-10 has 10"),
        ("binary", lambda f: (f / "batches.meta.txt").unlink(), "no batches.meta.txt"),
        ("binary", lambda f: os.truncate(f / "data_batch_1.bin", 5000), "cut short"),
    ],
)
def test_damaged_sources_are_named(form, damage, message, write_cifar10):
    folder = write_cifar10(form)
    damage(folder)
    with pytest.raises((DataError, DataNotFoundError), match=message):
        find_splits([folder])


def test_a_bad_image_is_named_and_leaves_nothing_prepared(write_cifar10, tmp_path, open_source):
    folder, data_dir = write_cifar10("folders"), tmp_path / "data"
    bad = folder / "train" / "cat" / "0003.png"
    for content, message in ((b"not an image", "cannot decode"), (None, r"is \(16, 16, 3\)")):
        if content:
            bad.write_bytes(content)
        else:
            Image.new("RGB", (16, 16)).save(bad)
        with pytest.raises(DataError, match=message) as error:
            prepare_cifar10([folder], data_dir=data_dir)
        assert str(bad) in str(error.value)
        with pytest.raises(DataNotFoundError, match="not prepared"):
            open_source("cifar10", data_dir=str(data_dir))


# --- the command -------------------------------------------------------------------------------


RUN_COMMANDS = """
import json, runpy, sys
from absl import flags
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["prepare_data", "--dataset=cifar10", *arguments]
    try:
        runpy.run_module("flowdcn_jax.tools.prepare_data", run_name="__main__")
    except SystemExit as exit:
        print("status", exit.code or 0, flush=True)
    for name in ("dataset", "source", "data_dir"):  # the next command defines them anew
        delattr(flags.FLAGS, name)
"""


def test_the_command_prepares_once_and_reports_bad_sources(
    write_cifar10, tmp_path, open_source, repository
):
    """Three commands in one process: to start one takes two seconds."""
    folder, data_dir = write_cifar10("npz"), tmp_path / "data"
    files = f"{folder}/tiny_train.npz,{folder}/tiny_test.npz"
    bad_dir = tmp_path / "bad"
    arguments = [
        [f"--source={files}", f"--data_dir={data_dir}"],
        ["--source=gone", f"--data_dir={data_dir}"],
        [f"--source={tmp_path}/gone", f"--data_dir={bad_dir}"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=repository,
    )
    prepared = data_dir / "cifar10_local" / "1.0.0"
    assert result.stdout.splitlines() == [
        f"cifar10 prepared in {prepared}",
        "status 0",
        f"cifar10 was already prepared in {prepared}",
        "status 0",
        "status 2",
    ], result
    assert result.stderr.splitlines()[-1] == f"error: no such file or folder: {tmp_path}/gone"
    assert "Traceback" not in result.stderr and not bad_dir.exists()
    assert sorted(path.name for path in data_dir.iterdir()) == ["cifar10_local"]
    assert len(open_source("cifar10", data_dir=str(data_dir))) == COUNTS["train"]


def test_what_is_prepared_is_left_alone(prepared_dir, write_cifar10):
    written = {path: path.stat().st_mtime_ns for path in prepared_dir.rglob("*")}
    folder, anew = prepare_cifar10([write_cifar10("npz")], data_dir=prepared_dir)
    assert not anew and folder == prepared_dir / "cifar10_local" / "1.0.0"
    assert written == {path: path.stat().st_mtime_ns for path in prepared_dir.rglob("*")}


# --- the real files ----------------------------------------------------------------------------


def test_real_cifar10_files():
    folder = os.environ.get("FLOWDCN_TEST_DATA")
    if not folder or not Path(folder, "cifar10_jpeg_train.npz").is_file():
        pytest.skip("set FLOWDCN_TEST_DATA to the folder of cifar10_jpeg_{train,test}.npz")
    started = time.monotonic()
    splits = find_splits([folder])
    assert {split: files.count for split, files in splits.items()} == {
        "train": 50_000,
        "test": 10_000,
    }
    assert splits["train"].class_names == CLASS_NAMES
    labels = []
    for index, (image, label) in enumerate(splits["train"].read()):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        labels.append(label)
        if index == 999:
            break
    assert np.bincount(labels, minlength=10).min() > 50  # shuffled, so all classes come early
    assert time.monotonic() - started < 30
