"""Cached latents: what is written, and what a visit draws."""

import json
import resource
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flowdcn_jax.data import (
    DataError,
    DataExistsError,
    DataNotFoundError,
    make_batches,
    randomness,
    write_latents,
)
from flowdcn_jax.data.latents import ImagenetLatents
from tests import tiny

SHAPE = (4, 6, 3)
COUNT = 40
SCALE = 0.18215


def example(index, shape=SHAPE):
    """Index i: mean i, std 1/2; mirror image: mean 100 + i, std 0."""
    full = lambda value: np.full(shape, value, np.float32)  # noqa: E731
    return {
        "mean": full(index),
        "std": full(0.5),
        "mean_flipped": full(100 + index),
        "std_flipped": full(0),
        "label": index % 7,
    }


def write(data_dir, examples=None, **overrides):
    options = {"latent_shape": SHAPE, "num_classes": 7, "metadata": tiny.manifest()} | overrides
    if examples is None:
        examples = [example(index) for index in range(COUNT)]
    return write_latents(examples, data_dir=data_dir, **options)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write(folder)
    return str(folder)


def test_no_download_is_announced(tmp_path, capsys):
    write(tmp_path)
    assert capsys.readouterr().out == ""


def test_source_describes_the_latents(data_dir, open_source):
    source = open_source("latents", data_dir=data_dir, random_flip=True)
    assert len(source) == COUNT
    assert source.image_shape == SHAPE
    assert source.num_classes == 7
    assert source.class_names is None
    assert source.flips
    batch = next(make_batches(source, batch_size=16, seed=0, num_threads=2, prefetch_batches=2))
    assert batch["image"].shape == (16, *SHAPE) and batch["image"].dtype == np.float32
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32


def test_a_visit_draws_mean_plus_std_times_noise_times_scale(data_dir, open_source):
    source = open_source("latents", data_dir=data_dir)
    positions = np.arange(2000)
    indices = positions % COUNT
    batch = source.read(indices, positions, 1)
    np.testing.assert_array_equal(batch["label"], indices % 7)
    noise = (batch["image"] / np.float32(SCALE) - indices[:, None, None, None]) / 0.5
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / noise.size)
    revisits = noise[indices == 5].reshape(-1, np.prod(SHAPE))
    assert len(np.unique(revisits, axis=0)) == len(revisits)  # a visit never repeats its noise


def test_scale_and_shift_are_those_of_the_encoder(tmp_path, open_source):
    """As `decode` undoes them: x / scale + shift is the latent."""
    manifest = tiny.manifest(scale=0.13025, shift=0.06)
    write(tmp_path, [example(3) | {"std": np.zeros(SHAPE)}], metadata=manifest)
    source = open_source("latents", data_dir=str(tmp_path))
    assert source.encoder == ("sd_vae", None, 0.13025, 0.06)
    x = source.read(np.array([0]), np.array([0]), 0)["image"]
    np.testing.assert_allclose(x, (3 - 0.06) * 0.13025, rtol=1e-6)


def test_a_shift_of_zero_changes_no_bit(data_dir, open_source):
    """The published models' latents: (mean + std * noise) * 0.18215 in float32."""
    source = open_source("latents", data_dir=data_dir)
    noise = np.empty((COUNT, *SHAPE), np.float32)
    randomness.fill_standard_normal(noise, np.arange(COUNT), seed=2)
    drawn = np.float16(0.5) * noise + np.arange(COUNT, dtype=np.float16)[:, None, None, None]
    x = source.read(np.arange(COUNT), np.arange(COUNT), 2)["image"]
    assert drawn.dtype == x.dtype == np.float32
    np.testing.assert_array_equal(x, drawn * np.float32(0.18215))


def test_what_is_drawn_does_not_change_so_that_old_runs_resume(data_dir, open_source):
    """Order, flips and noise: the first and third of these visits show the mirror image."""
    source = open_source("latents", data_dir=data_dir, random_flip=True)
    batches = make_batches(
        source, batch_size=6, seed=3, start_step=9, num_threads=0, prefetch_batches=0
    )
    batch = next(batches)
    assert batch["label"].tolist() == [5, 2, 3, 6, 6, 1]
    drawn = [20.400801, 2.9597938, 21.31155, 3.660965, 1.2072361, 1.4142977]
    np.testing.assert_array_equal(batch["image"][:, 1, 2, 0], np.array(drawn, np.float32))


NO_SHIFT = tiny.manifest()
del NO_SHIFT["settings"]["autoencoder"]["shift"]


@pytest.mark.parametrize("manifest", [{"note": 1}, NO_SHIFT, tiny.manifest(scale=0), None])
def test_latents_without_scale_and_shift_are_refused(manifest, tmp_path, open_source):
    message = "does not say which autoencoder encoded the latents.*cache them again .*shift"
    with pytest.raises(DataError, match=f"metadata {message}"):
        write(tmp_path, metadata=manifest)
    assert not list(tmp_path.iterdir())
    path = write(tmp_path) / "metadata.json"
    path.write_text(json.dumps(manifest)) if manifest else path.unlink()
    with pytest.raises(DataError, match=f"{path} {message}"):
        open_source("latents", data_dir=str(tmp_path))


def test_half_of_the_visits_use_the_moments_of_the_mirror_image(data_dir, open_source):
    source = open_source("latents", data_dir=data_dir, random_flip=True)
    positions = np.arange(2000)
    indices = positions % COUNT
    latents = source.read(indices, positions, 1)["image"] / np.float32(SCALE)
    mirrored = latents.mean(axis=(1, 2, 3)) > 70
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(positions))
    exact = np.broadcast_to((100 + indices[mirrored])[:, None, None, None], latents[mirrored].shape)
    np.testing.assert_allclose(latents[mirrored], exact, rtol=1e-6)  # its std is 0
    plain = latents[~mirrored] - indices[~mirrored][:, None, None, None]
    np.testing.assert_allclose(plain.std(), 0.5, rtol=0.02)


def test_draws_repeat_exactly_and_depend_on_seed_and_position_alone(data_dir, open_source):
    source = open_source("latents", data_dir=data_dir, random_flip=True)
    indices, positions = np.arange(COUNT), np.arange(COUNT) + 10**9
    first = source.read(indices, positions, 4)["image"]
    np.testing.assert_array_equal(source.read(indices, positions, 4)["image"], first)
    part = source.read(indices[20:30], positions[20:30], 4)["image"]
    np.testing.assert_array_equal(part, first[20:30])
    assert not np.array_equal(source.read(indices, positions, 5)["image"], first)
    assert not np.array_equal(source.read(indices, positions + COUNT, 4)["image"], first)


def test_batches_are_the_same_for_any_threads_and_processes(data_dir, open_source):
    source = open_source("latents", data_dir=data_dir, random_flip=True)

    def batches(count, **options):
        iterator = make_batches(
            source, batch_size=12, seed=2, prefetch_batches=4, **({"num_threads": 4} | options)
        )
        return [next(iterator)["image"] for _ in range(count)]

    expected = batches(8, num_threads=0)
    np.testing.assert_array_equal(batches(8), expected)
    np.testing.assert_array_equal(batches(3, start_step=5), expected[5:])
    halves = [batches(8, process_index=index, process_count=2) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), expected)


def test_moments_are_stored_in_half_precision(tmp_path, open_source):
    rng = np.random.default_rng(0)
    mean = rng.normal(size=SHAPE)
    examples = [example(0) | {"mean": mean, "std": np.full(SHAPE, 1e-6)}]
    write(tmp_path, examples, metadata=tiny.manifest(scale=1.0))
    source = open_source("latents", data_dir=str(tmp_path))
    latents = source.read(np.array([0]), np.array([0]), 0)["image"][0]
    np.testing.assert_allclose(latents, mean.astype(np.float16), atol=1e-5)


def test_many_shards_hold_each_example_once(tmp_path, open_source):
    examples = (example(index) for index in range(COUNT))
    folder = write(
        tmp_path,
        examples,
        num_examples=COUNT,
        metadata=tiny.manifest(scale=1.0),
        shard_bytes=6 * 4 * 2 * int(np.prod(SHAPE)),  # of four moments in float16
    )
    assert len(list(folder.glob("*.array_record*"))) == 7
    source = open_source("latents", data_dir=str(tmp_path))
    latents = source.read(np.arange(COUNT), np.arange(COUNT), 0)["image"]
    np.testing.assert_allclose(latents.mean(axis=(1, 2, 3)), np.arange(COUNT), atol=0.5)


def test_image_size_chooses_among_prepared_shapes(tmp_path, open_source):
    for side in (4, 8):
        shape = (side, side, 2)
        write(tmp_path, [example(0, shape)], latent_shape=shape)
    for side in (4, 8):
        source = open_source("latents", data_dir=str(tmp_path), image_size=8 * side)
        assert source.image_shape == (side, side, 2)
    for size in (4, 40):
        with pytest.raises(DataError, match=f"of image_size={size} .*4x4x2.*8x8x2"):
            open_source("latents", data_dir=str(tmp_path), image_size=size)
    for channels in (2, 5):
        write(tmp_path, [example(0, (9, 9, channels))], latent_shape=(9, 9, channels))
    for channels in (2, 5):
        source = open_source("latents", data_dir=str(tmp_path), image_size=72, channels=channels)
        assert source.image_shape == (9, 9, channels)
    with pytest.raises(DataError, match=r"0 of .*image_size=72 .* with 4 channels .*9x9x2.*9x9x5"):
        open_source("latents", data_dir=str(tmp_path), image_size=72, channels=4)
    folder = tmp_path / "imagenet_latents" / "4x4x2" / "1.0.0"
    assert open_source("latents", data_dir=str(folder)).image_shape == (4, 4, 2)


def test_not_prepared_says_where_it_looked(tmp_path, open_source):
    with pytest.raises(DataNotFoundError, match=f"not prepared in {tmp_path}.*cache_latents"):
        open_source("latents", data_dir=str(tmp_path))


def test_other_features_are_refused(tmp_path, open_source):
    moment = tfds.features.Tensor(shape=SHAPE, dtype=np.float32, encoding="bytes")
    features = dict.fromkeys(("mean", "std", "mean_flipped", "std_flipped"), moment)
    ImagenetLatents(
        {"train": [lambda: iter([(0, example(0))])]},
        features | {"label": tfds.features.ClassLabel(num_classes=7)},
        metadata=tiny.manifest(),
        data_dir=tmp_path,
        config_name="4x6x3",
    ).download_and_prepare()
    with pytest.raises(DataError, match="must be float16"):
        open_source("latents", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": np.zeros((2, 2, 3))}, r"example 1: mean is \(2, 2, 3\), expected \(4, 6, 3\)"),
        ({"mean": np.full(SHAPE, 1e6)}, "example 1: mean .* float16 cannot hold"),
        ({"std_flipped": np.full(SHAPE, np.nan)}, "example 1: std_flipped"),
        ({"std": np.full(SHAPE, -1.0)}, "example 1: std is negative"),
        ({"label": 7}, "example 1: label 7"),
    ],
)
def test_bad_examples_are_named_and_nothing_is_prepared(change, message, tmp_path, open_source):
    with pytest.raises(DataError, match=message):
        write(tmp_path, [example(0), example(1) | change, example(2)])
    assert not list(tmp_path.rglob("*array_record*"))
    with pytest.raises(DataNotFoundError):
        open_source("latents", data_dir=str(tmp_path))


@pytest.mark.parametrize("count, message", [(COUNT + 1, "ended after 40 of 41"), (39, "more")])
def test_a_wrong_number_of_examples_is_an_error(count, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write(tmp_path, num_examples=count)
    assert not list(tmp_path.rglob("*array_record*"))


@pytest.mark.parametrize(
    "examples, overrides, message",
    [
        (iter([]), {}, "need num_examples"),
        ([], {}, "at least one example"),
        ([example(0)], {"latent_shape": (4, 6)}, "latent_shape"),
    ],
)
def test_bad_arguments_of_write_latents(examples, overrides, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write(tmp_path, examples, **overrides)


def test_prepared_latents_are_not_overwritten(data_dir):
    with pytest.raises(DataExistsError, match="prepared already"):
        write(data_dir)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """A file may not become larger than 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(DataError, match="cannot be written: .*File too large"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write(tmp_path)


@pytest.mark.parametrize("split", ["", "a/../../x", "train[:3]"])
def test_a_split_that_is_no_name_is_refused(tmp_path, split):
    with pytest.raises(DataError, match="the split is .*; expected a name"):
        write(tmp_path / "data", split=split)
    assert not list(tmp_path.iterdir())


READ_AND_WRITE = """
import sys, time
sys.path.insert(0, sys.argv[1])  # a TensorFlow that fails when it is imported
import numpy as np
from configs import default
from flowdcn_jax.data import make_batches, make_source, write_latents
from tests import tiny

section = default.get_config().data
section.update(data_dir=sys.argv[2], image_size=32)
batches = make_batches(
    make_source(section), batch_size=4, seed=0, num_threads=1, prefetch_batches=1
)
print(next(batches)["image"].shape, flush=True)

def examples():
    moment = np.zeros((2, 2, 1))
    for index in range(1000):
        yield {"mean": moment, "std": moment, "mean_flipped": moment, "std_flipped": moment,
               "label": 0}
        if index == 500:
            print("half way", flush=True)
            time.sleep(60)

write_latents(examples(), num_examples=1000, data_dir=sys.argv[3], latent_shape=(2, 2, 1),
              num_classes=1, metadata=tiny.manifest())
"""


@pytest.fixture(scope="module")
def killed(data_dir, tmp_path_factory):
    """A process without TensorFlow that reads latents and is killed half way through writing some.

    Returns:
        (what it printed before, the data_dir it wrote to).
    """
    broken, written = tmp_path_factory.mktemp("broken"), tmp_path_factory.mktemp("written")
    (broken / "tensorflow").mkdir()
    (broken / "tensorflow" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    folders = map(str, (broken, data_dir, written))
    process = tiny.start([sys.executable, "-c", READ_AND_WRITE, *folders])
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1].endswith("half way"):
                break
    finally:
        process.kill()
        process.wait()
    return lines, written


def test_latents_are_read_and_written_without_tensorflow(killed):
    lines, written = killed
    assert "(4, 4, 6, 3)" in lines and lines[-1].endswith("half way"), lines
    assert list(written.rglob("*.array_record*")), "it was killed before it wrote anything"


def test_killed_half_way_leaves_nothing_that_looks_prepared(killed, open_source):
    _, written = killed
    with pytest.raises(DataNotFoundError, match="not prepared"):
        open_source("latents", data_dir=str(written))
