"""Folders, images, data sets, paths and keys as users have them."""

import os
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin

from flowdcn_jax.config import load_config, optional_keys, validate
from flowdcn_jax.data import DataError, make_source, write_latents
from flowdcn_jax.data.image_files import BadImageError, decode_rgb
from flowdcn_jax.data.labelled_images import FolderImages, open_labelled_images
from flowdcn_jax.errors import ConfigError, UserError
from flowdcn_jax.files import local_path
from flowdcn_jax.options import options_of
from flowdcn_jax.runs import record
from flowdcn_jax.runs.checkpoint import SavedRun
from flowdcn_jax.sampling.settings import Output
from tests import tiny
from tests.data.image_files import colours, encoded
from tests.data.test_labelled_images import labels, names, save


def test_numeric_classes_are_in_the_order_of_their_numbers(tmp_path):
    for number in (0, 1, 2, 10, 11):
        save(tmp_path / str(number) / "1.png")
    assert FolderImages(tmp_path).class_names == ("0", "1", "2", "10", "11")
    save(tmp_path / "a" / "1.png")
    assert FolderImages(tmp_path).class_names == ("0", "1", "10", "11", "2", "a")


def test_folders_of_the_system_are_left_out_and_named(tmp_path, monkeypatch):
    for name in ("n01/1.png", "n02/2.png", "n02/@eaDir/2.png", "__MACOSX/n01/._1.png"):
        save(tmp_path / name)
    (tmp_path / "lost+found").mkdir()
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    images = FolderImages(tmp_path)
    assert images.class_names == ("n01", "n02") and labels(images) == [0, 1]
    assert images.notes == ("folders of the system, left out: __MACOSX, lost+found, n02/@eaDir",)
    assert not any("lost+found" in path for path in listed)  # which only root may list


def test_a_list_of_classes_fixes_them_and_their_order(tmp_path):
    for name in ("root/b/1.png", "root/a/2.png", "root/new/3.png"):
        save(tmp_path / name)
    (tmp_path / "list").write_text("\ufeffb\nlater\n\na\n")

    def opened(dataset="folder:" + str(tmp_path / "root"), file="list"):
        return open_labelled_images(
            dataset, split="train", data_dir=None, class_list=tmp_path / file
        )

    images = opened()
    assert images.class_names == ("b", "later", "a") and names(images) == ["b/1.png", "a/2.png"]
    assert labels(images) == [0, 2]
    assert "classes without images, which keep their labels: later" in images.notes
    assert "folders that the list of classes leaves out: new" in images.notes
    for content, message in (
        ("a\na\n", "names a twice"),
        ("", "holds no names"),
        ("c\n", "none of the classes listed"),
    ):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(DataError, match=message):
            opened(file="bad")
    with pytest.raises(DataError, match="'imagenet2012' has its own"):
        opened("imagenet2012")


def test_names_of_any_bytes_are_read_and_shown_with_escapes(tmp_path):
    root = os.fsencode(tmp_path) + b"/h\xe4user"
    folder = root + b"/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xfc.png", "wb") as file:
        file.write(encoded(Image.fromarray(colours())))
    images = FolderImages(local_path(os.fsdecode(root)))
    assert images.class_names == ("caf\\xe9",) and names(images) == ["caf\\xe9/\\xfc.png"]
    assert images.source.endswith("h\\xe4user") and images.read(0).label == 0


ASCII = """
import sys
from pathlib import Path
from flowdcn_jax import command
from flowdcn_jax.data import make_source, write_latents
from flowdcn_jax.data.labelled_images import FolderImages
from tests.reliability.test_inputs import EXAMPLES, source_of
from tests import tiny

def main():
    images = FolderImages(Path(sys.argv[0]) / "photos")
    print(images.source, images.name(0))
    write_latents(EXAMPLES, data_dir=Path(sys.argv[0]) / "latents", latent_shape=(2, 2, 1),
        num_classes=1, class_names=images.class_names,
        metadata=tiny.manifest(dataset=images.source))
    print(source_of(Path(sys.argv[0]) / "latents").class_names)

sys.argv = sys.argv[1:]
command.run(main)
"""
MOMENT = np.ones((2, 2, 1))
EXAMPLES = [dict(mean=MOMENT, std=MOMENT, mean_flipped=MOMENT, std_flipped=MOMENT, label=0)] * 40


def source_of(data_dir, image_size=16):
    keys = dict(name="latents", data_dir=str(data_dir), split="train", image_size=image_size)
    buckets = dict(count=0, min_aspect=0.5, max_aspect=2.0, side_multiple=8)
    return make_source(ConfigDict(keys | dict(random_flip=True, aspect_buckets=buckets)))


def test_cyrillic_under_an_ascii_locale(tmp_path):
    """From the listing to the names that are stored."""
    save(tmp_path / "photos" / "кот" / "1.png")
    environment = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    command = [sys.executable, "-c", ASCII, str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=tiny.REPOSITORY, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert b"\\u043a\\u043e\\u0442" in result.stdout, result.stdout
    assert source_of(tmp_path / "latents").class_names == ("кот",)


@pytest.fixture
def latents(tmp_path):
    """Latents in three shards, and the second of them."""
    folder = write_latents(
        EXAMPLES * 3,
        data_dir=tmp_path,
        latent_shape=(2, 2, 1),
        num_classes=1,
        metadata=tiny.manifest(),
        shard_bytes=40 * 32,
    )
    return tmp_path, sorted(folder.glob("*array_record*"))[1]


def flips(content):
    changed = bytearray(content)
    for place in random.Random(1).sample([i for i, byte in enumerate(content) if byte], 30):
        changed[place] ^= 255  # the rest fills up the last block
    return bytes(changed)


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], flips, lambda c: b""])
def test_a_damaged_shard_is_named(latents, damage):
    data_dir, shard = latents
    shard.write_bytes(damage(shard.read_bytes()))
    source, everything = source_of(data_dir), np.arange(120)
    source.read(everything[:40], everything[:40], 0)
    with pytest.raises(DataError, match=f"^{shard} is damaged .*put an undamaged copy in its pl"):
        source.read(everything, everything, 0)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
def test_damaged_descriptions_of_data_are_named(latents, name):
    data_dir, shard = latents
    (shard.parent / name).write_bytes(b'{"a": ')
    with pytest.raises(DataError, match="damaged"):
        source_of(data_dir)


def with_chunk(kind, content):
    png = encoded(Image.fromarray(colours()))
    chunk = kind + content
    length, check = len(content).to_bytes(4), zlib.crc32(chunk).to_bytes(4)
    return png[:33] + length + chunk + check + png[33:]


@pytest.mark.parametrize(
    "encoded_png",
    [
        with_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 * 2**20))),
        with_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(3 * 2**20))),
        with_chunk(b"tEXt", b"comment\0" + b"a" * (3 * 2**20)),
        with_chunk(b"iTXt", b"comment\0\1\0\0\0" + zlib.compress(b"a" * (3 * 2**20))),
        with_chunk(b"tEXt", b"comment\0" + b"a" * (PngImagePlugin.MAX_TEXT_MEMORY + 1)),
    ],
)
def test_metadata_never_decides_whether_pixels_are_used(encoded_png):
    np.testing.assert_array_equal(np.asarray(decode_rgb(encoded_png)), colours())
    with pytest.raises(BadImageError):
        decode_rgb(encoded_png[:-40])


@pytest.mark.parametrize("url", ["gs://b/run", "s3://b/run", "hdfs://h/x", "gs:/b/run"])
def test_urls_are_no_folders(url):
    with pytest.raises(UserError, match=f"^{url} is not a path of this machine.*mount {url[:3]}"):
        local_path(url)
    for key in ("data.data_dir", "autoencoder.weights"):
        config = load_config("digits")
        config.update_from_flattened_dict({key: url})
        with pytest.raises(UserError, match="not a path of this machine"):
            validate(config, 1, 1)
    with pytest.raises(UserError, match="not a path of this machine"):
        Output(out=url)


def test_the_tilde_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x") == tmp_path / "x" == Output(out="~/x").out
    assert str(local_path("a:b/~c")) == "a:b/~c"


def test_keys_of_which_none_is_a_value():
    declared = {"optimizer.clip_norm", "checkpoint.every_minutes", "data.data_dir"}
    assert declared <= optional_keys() and options_of(Output)["out"].optional
    for value, message in ((float("inf"), "inf"), (float("nan"), "nan")):
        config = load_config("digits")
        config.sampling.guidance = value
        with pytest.raises(ConfigError, match=f"guidance is {message}; expected"):
            validate(config, 1, 1)


def test_the_identity_of_data_is_not_its_path():
    def source(dataset, fingerprint):
        identity = {"settings": {"dataset": dataset, "fingerprint": fingerprint}}
        return type("Source", (), dict(identity=identity, encoder=None))

    run = SavedRun({"data": {}}, None, source("folder:/old", "a").identity, False, ("ema",))
    record.check_same_data(run, source("folder:/new", "a"))
    with pytest.raises(ConfigError, match="fingerprint: 'a' -> 'b'"):
        record.check_same_data(run, source("folder:/old", "b"))
