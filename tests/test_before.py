"""Folders that an earlier version wrote: they are gone on with, and told apart.

tests/fixtures/before/make.py says how they were made. On the machine that made them every bit is
the same; on others floats are the same but for rounding.
"""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import forked, tiny
from tests.fixtures.before import make

NUMBERS = json.loads((make.HERE / "numbers.json").read_text())
SAME_MACHINE = make.machine().items() <= NUMBERS["made"].items()

MOMENTS = ("mean", "std", "mean_flipped", "std_flipped")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def unpack(name: str, folder: Path) -> Path:
    """A folder of fixtures/before, or some files of one, in `folder`."""
    with tarfile.open(make.HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder)
        return folder / archive.getnames()[0]


def run(command: list[str]) -> str:
    """What the command prints."""
    code, output = forked.run(command)
    assert code == 0, output
    return output


def assert_close(found, expected, *, rtol=0.0, atol=0.0):
    if SAME_MACHINE:
        rtol = atol = 0
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def assert_trained(workdir: Path, expected: dict) -> None:
    """The run's metrics and the EMA of its last step are the recorded ones."""
    found = make.metrics(workdir)
    assert found.keys() == expected["metrics"].keys()
    assert_close(list(found.values()), list(expected["metrics"].values()), rtol=1e-6)
    ema = make.ema(workdir, max(map(int, found)))
    assert_close(ema["squares"], expected["ema"]["squares"], rtol=1e-6)
    assert ema["checksums"].keys() == expected["ema"]["checksums"].keys()
    if SAME_MACHINE:
        assert ema["checksums"] == expected["ema"]["checksums"]


def arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def latents(data_dir: Path) -> list[dict]:
    folder = data_dir / "imagenet_latents" / "4x4x4" / "1.0.0"
    return list(tfds.builder_from_directory(folder).as_data_source("train"))


def train_on(workdir, data_dir, *, num_steps=3) -> list[str]:
    command = make.train_latents(workdir, num_steps=num_steps)
    return [*command, f"--config.data.data_dir={data_dir}"]


def test_a_run_goes_on(tmp_path):
    workdir = unpack("run", tmp_path)
    lines = (workdir / "metrics.jsonl").read_text()
    output = run(make.train_digits(workdir, train__num_steps=6))
    assert "going on from step 4" in output
    assert (workdir / "metrics.jsonl").read_text().startswith(lines)
    assert tiny.steps(workdir) == [4, 6]
    assert_trained(workdir, NUMBERS["run"])


@pytest.mark.parametrize("record", [(), pytest.param(("older_record",), marks=pytest.mark.slow)])
def test_a_run_on_latents_goes_on(tmp_path, record):
    for name in ("latents", "latents_run", *record):
        unpack(name, tmp_path)
    run(train_on(tmp_path / "latents_run", tmp_path / "latents"))
    assert_trained(tmp_path / "latents_run", NUMBERS["latents_run"])


def test_training_starts_from_converted_weights(tmp_path):
    for name in ("latents", "converted"):
        unpack(name, tmp_path)
    origin = (tmp_path / "converted" / "origin.json").read_text()
    run(train_on(tmp_path / "converted", tmp_path / "latents", num_steps=1))
    assert tiny.steps(tmp_path / "converted") == [0, 1]
    assert (tmp_path / "converted" / "origin.json").read_text() == origin
    assert_trained(tmp_path / "converted", NUMBERS["converted"])


def test_weights_are_exported(tmp_path):
    export = tmp_path / "out.safetensors"
    run(make.convert(f"--workdir={unpack('converted', tmp_path)}", f"--export={export}"))
    assert make.digest(export) == NUMBERS["export"]


def test_stopped_samples_go_on(tmp_path):
    workdir, folder = unpack("run", tmp_path), unpack("stopped_samples", tmp_path)
    (first,) = folder.glob("shards/0*.npz")
    there = arrays(first)
    output = run(make.sample(workdir))
    assert output.splitlines()[-1] == str(folder / "grid.png")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", "grid.png", "samples.npz", "settings.json"]
    )
    found, expected = (arrays(f / "samples.npz") for f in (folder, unpack("samples", tmp_path)))
    assert found.keys() == expected.keys() == {"arr_0", "arr_1"}
    for name in found:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name][: len(there[name])], there[name])
    np.testing.assert_array_equal(found["arr_1"], expected["arr_1"])
    assert_close(found["arr_0"].astype(int), expected["arr_0"].astype(int), atol=1)
    if SAME_MACHINE:
        ours, theirs = folder / "samples.npz", tmp_path / "samples" / "samples.npz"
        assert ours.read_bytes() == theirs.read_bytes()


def test_complete_samples_are_left_alone(tmp_path):
    workdir, folder = unpack("run", tmp_path), unpack("samples", tmp_path)
    before = tiny.files(folder)
    output = run(make.sample(workdir, f"--out={folder}"))
    assert output.splitlines()[-1] == str(folder / "grid.png")
    assert tiny.files(folder) == before


def test_latents_are_drawn(tmp_path):
    """Of converted weights: they are the EMA of latents_run."""
    run(make.sample_latents(unpack("converted", tmp_path), tmp_path / "out"))
    found, expected = make.drawn(tmp_path / "out"), NUMBERS["latents_run"]["drawn"]
    assert found["labels"] == expected["labels"]
    assert_close(found["squares"], expected["squares"], rtol=1e-5)


GENERATE = """
import flowdcn_jax, numpy
model = flowdcn_jax.load_trained({workdir!r})
options = dict(num_images=6, batch_size=2, sampler="euler_sde", num_steps=3, guidance=2, seed=5)
numpy.save({out!r}, flowdcn_jax.generate(model, classes=[3, 7], progress=False, **options))
"""


def test_generate_gives_the_images_of_the_folder(tmp_path):
    workdir, out = unpack("run", tmp_path), tmp_path / "images.npy"
    run(["-c", GENERATE.format(workdir=str(workdir), out=str(out))])
    found = np.load(out, allow_pickle=False)
    expected = arrays(unpack("samples", tmp_path) / "samples.npz")["arr_0"]
    assert found.dtype == expected.dtype
    assert_close(found.astype(int), expected.astype(int), atol=1)


def test_complete_latents_are_left_alone(tmp_path):
    photos, folder = unpack("photos", tmp_path), unpack("latents", tmp_path)
    make.rename_photos(folder, make.PHOTOS, photos)
    before = tiny.files(folder)
    output = run(make.cache(photos, folder))
    assert f"12 images in {folder / 'imagenet_latents' / '4x4x4'}" in output
    assert tiny.files(folder) == before


def test_stopped_latents_go_on(tmp_path):
    photos, folder = unpack("photos", tmp_path), unpack("stopped_latents", tmp_path)
    make.rename_photos(folder, make.PHOTOS, photos)
    part = arrays(folder / "incomplete.latents.train.32.square" / "part-00000.npz")
    run(make.cache(photos, folder))
    assert [path.name for path in folder.iterdir()] == ["imagenet_latents"]
    expected = latents(unpack("latents", tmp_path))
    found = latents(folder)
    assert len(found) == len(expected) == 12
    for index, (example, other) in enumerate(zip(found, expected, strict=True)):
        assert example.keys() == other.keys() == {"label", *MOMENTS}
        assert example["label"] == other["label"]
        for name in MOMENTS:
            assert_close(example[name], other[name], rtol=2e-3, atol=1e-3)
            if index < 4:
                np.testing.assert_array_equal(example[name], part[f"4x4/{name}"][index])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of all; tests leave them as they are."""
    root = tmp_path_factory.mktemp("before")
    names = ("run", "samples", "comparison", "photos", "latents", "latents_run", "converted")
    folders = {name: unpack(name, root) for name in (*names, "stopped_latents")}
    folders["older_run"] = unpack("latents_run", root / "older")
    unpack("older_record", root / "older")
    for name in ("other_latents", "other_scale"):
        folders[name] = Path(shutil.copytree(folders["latents"], root / name))
    make.rename_photos(folders["stopped_latents"], make.PHOTOS, folders["photos"])
    make.rename_photos(folders["other_latents"], make.PHOTOS, "/others")
    (manifest,) = folders["other_latents"].rglob("metadata.json")
    other = re.sub('"fingerprint": "[^"]*"', '"fingerprint": "0"', manifest.read_text())
    manifest.write_text(other)
    (manifest,) = folders["other_scale"].rglob("metadata.json")
    manifest.write_text(manifest.read_text().replace("0.18215", "0.13025"))
    (folders["begun"],) = folders["stopped_latents"].glob("incomplete.*")
    return folders


RUN, SAMPLES, COMPARISON = "{run}", "{samples}", "{comparison}"
GUIDANCE_OF_EACH = "; ".join(
    f"settings.{count} steps.guidance: 2.0 -> 3.0" for count in (2, 3, 4, 5, 8, 10)
)
OWN_SIT = ["train.py", f"--config={make.HERE / 'own_sit.py'}", f"--workdir={RUN}"]


@pytest.mark.parametrize(
    "command, message",
    [
        # Other settings, another model.
        (make.train_digits(RUN, model__width=32), "config.model.width: 16 -> 32"),
        (make.train_digits(RUN, seed=3), "config.seed: 0 -> 3"),
        (OWN_SIT, "config.model.name: 'flowdcn' -> 'sit'"),
        (train_on(RUN, "{latents}"), "config.data.name: 'digits' -> 'latents'"),
        (
            [*train_on("{converted}", "{latents}"), "--config.model.depth=2"],
            "config.model.depth: 1 -> 2",
        ),
        (make.sample(RUN, f"--out={SAMPLES}", "--guidance=3"), "(settings.guidance: 2.0 -> 3.0)"),
        (make.sample(RUN, f"--out={SAMPLES}", "--step=2"), "model.step: 4 -> 2"),
        (make.sample("{converted}", f"--out={SAMPLES}"), "model.step: 4 -> 0"),
        (
            make.compare(RUN, COMPARISON, "--guidance=3"),
            f"({GUIDANCE_OF_EACH})",
        ),
        (
            make.cache("{photos}", "{stopped_latents}", "--autoencoder_dtype=bfloat16"),
            "autoencoder.dtype: 'float32' -> 'bfloat16'",
        ),
        # Other data.
        (
            train_on("{latents_run}", "{other_latents}"),
            "' -> '0'. Use the old data",  # of data.settings.fingerprint
        ),
        (
            train_on("{older_run}", "{other_scale}"),
            "latents.scale: 0.18215 -> 0.13025",
        ),
        (make.cache("{photos}", "{latents}"), "dataset: 'folder:/photos' -> "),
        # A folder of another kind.
        (train_on("{latents_run}", SAMPLES), "latents are not prepared in {samples}"),
        (make.sample(SAMPLES), "{samples} holds no checkpoints; expected the --workdir of"),
        (make.sample("{latents}"), "{latents} holds no checkpoints"),
        (make.sample(RUN, f"--guide_workdir={SAMPLES}"), "{samples} holds no checkpoints"),
        (make.sample(RUN, f"--out={COMPARISON}"), "num_images: 1 -> 6"),
        (make.sample(RUN, "--out={begun}"), "num_images: None -> 6"),
        (make.compare(RUN, SAMPLES), "compare: None -> 'steps'"),
        (make.cache("{photos}", "{photos}"), "where it would become a class"),
        (
            make.convert(
                "--source={run}/metrics.jsonl",
                "--config=configs/digits.py",
                f"--workdir={RUN}",
            ),
            "--workdir={run} is not empty; expected a new or empty folder",
        ),
        (make.convert(f"--workdir={SAMPLES}", "--export={root}/x"), "{samples} holds no check"),
        (
            ["-m", "flowdcn_jax.tools.plot_metrics", f"--workdir={SAMPLES}"],
            "{samples}/metrics.jsonl does not exist; expected the --workdir of a training run",
        ),
    ],
)
def test_another_is_refused_and_left_alone(folders, command, message):
    root = folders["run"].parent
    before = tiny.files(root)
    names = {**folders, "root": root}
    code, output = forked.run([part.format_map(names) for part in command])
    assert code == 2, output
    *said, error = output.splitlines()
    assert error.startswith("error: ") and message.format_map(names) in error
    assert all(line.startswith("12 images of 10 classes in ") for line in said)
    assert tiny.files(root) == before
