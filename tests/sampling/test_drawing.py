"""Whole sampling runs: any devices, stopped and gone on with, as a file, an array or a strip."""

import contextlib
import dataclasses
import json
import resource
import shutil
import signal
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image

import flowdcn_jax
from flowdcn_jax import samplers, sampling
from flowdcn_jax.images import read_metadata
from flowdcn_jax.runs.checkpoint import CheckpointError
from flowdcn_jax.sampling.drawing import find_folder, make_record
from flowdcn_jax.sampling.pictures import COMPARISONS, strip_captions, strip_columns
from flowdcn_jax.sampling.trained_model import describe
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

COUNT = 24
SETTINGS = dict(sampler="euler_sde", num_steps=3, guidance=2.0, seed=5)
RUN = SETTINGS | dict(num_images=COUNT, classes="all", batch_size=5)
# On eight devices these are one round, in which three have nothing of their own to draw.


def sample(model, out, **options):
    """The bytes of samples.npz."""
    sampling.sample_to_folder(model, **RUN | options, out=out)
    return (out / "samples.npz").read_bytes()


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def reference(latents_model, tmp_path_factory):
    """The folder of COUNT latents, in which pixels would hide rounding, drawn by one device."""
    folder = tmp_path_factory.mktemp("reference")
    sample(latents_model(1), folder)
    return folder


@pytest.fixture
def stopped(reference, tmp_path):
    """The reference's folder as if stopped after two shards, of which the first holds zeros."""
    folder = shutil.copytree(reference, tmp_path / "stopped")
    drawn = arrays(folder / "samples.npz")
    for file in ("samples.npz", "grid.png"):
        (folder / file).unlink()
    (folder / "shards").mkdir()
    for start, stop in ((0, 5), (10, 15)):
        shard = {name: array[start:stop] * (start > 0) for name, array in drawn.items()}
        np.savez(folder / "shards" / f"{start:08d}-{stop:08d}.npz", **shard)
    return folder


@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_same_bytes_for_any_number_of_devices(latents_model, reference, tmp_path, num_devices):
    drawn = sample(latents_model(num_devices), tmp_path)
    assert drawn == (reference / "samples.npz").read_bytes()


def test_devices_draw_as_many_at_a_time_however_many_there_are(latents_model):
    """For rounding depends on it; also where one device could draw all."""
    for num_devices in (1, 2, 8):
        model = latents_model(num_devices)
        assert model.round_size(24, batch_size=5) == 5 * num_devices
        assert model.round_size(3, batch_size=64) == 3 * num_devices


def test_a_stopped_run_goes_on_and_draws_only_what_is_missing(latents_model, reference, stopped):
    sample(latents_model(1), stopped)
    first, second = (arrays(folder / "samples.npz") for folder in (reference, stopped))
    for name in ("latents", "labels"):
        assert not second[name][:5].any()  # the shard that was there
        np.testing.assert_array_equal(second[name][5:], first[name][5:])
    assert (stopped / "grid.png").exists() and not (stopped / "shards").exists()

    before = tiny.files(stopped)
    sample(latents_model(1), stopped)
    assert tiny.files(stopped) == before  # nothing was left to do


def command(workdir, out, *flags):
    options = [f"--{name}={value}" for name, value in RUN.items()]
    base = [sys.executable, "sample.py", f"--workdir={workdir}", f"--out={out}"]
    return [*base, "--autoencoder=none", *options, *flags]


def test_a_killed_command_goes_on_in_two_processes(workdir, reference, tmp_path):
    for _ in range(5):  # it may be faster than the signal
        process = tiny.start(command(workdir, tmp_path))
        deadline = time.monotonic() + 120
        while not any((tmp_path / "shards").glob("*-*.npz")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (tmp_path / "samples.npz").exists():
            break
        shutil.rmtree(tmp_path)
    assert any((tmp_path / "shards").iterdir())

    address = f"--coordinator_address=127.0.0.1:{tiny.free_port()}"
    flags = ["--distributed", address, "--num_processes=2"]
    processes = [
        tiny.start(command(workdir, tmp_path, *flags, f"--process_id={i}"), num_devices=2)
        for i in range(2)
    ]
    (code, output), (other_code, other_output) = map(tiny.finish, processes)
    assert (code, other_code) == (0, 0), output + other_output
    assert (tmp_path / "samples.npz").read_bytes() == (reference / "samples.npz").read_bytes()
    assert "grid.png" in output and "grid.png" not in other_output


@pytest.fixture
def in_two_processes(monkeypatch):
    """Calls a function as process 0, then as process 1, which receives what 0 has broadcast.

    Gives what each returned or raised. It stands for two real processes, which take ten seconds a
    case; the test above starts them once.
    """

    def call(function):
        sent, outcomes = [], []

        def broadcast(array):
            if jax.process_index() == 0:
                sent.append(array)
                return array
            return sent.pop(0)

        with monkeypatch.context() as patch:
            patch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
            patch.setattr(jax, "process_count", lambda: 2)
            for index in range(2):
                patch.setattr(jax, "process_index", lambda index=index: index)
                try:
                    outcomes.append(function())
                except sampling.SamplingError as error:
                    outcomes.append(str(error))
        assert not sent
        return outcomes

    return call


def test_processes_agree_on_what_is_missing_and_stop_together(
    latents_model, stopped, in_two_processes
):
    model = latents_model(1)
    assert model.record["model"]["step"] == 3  # read by one process
    outcomes = in_two_processes(lambda: sampling.sample_to_folder(model, **RUN, out=stopped))
    # If the second looked itself, it would find nothing missing, and receive too little.
    assert outcomes == [stopped / "grid.png"] * 2
    other_seed = RUN | dict(seed=6)
    refused, other = in_two_processes(
        lambda: sampling.sample_to_folder(model, **other_seed, out=stopped)
    )
    assert "holds another run's images (settings.seed: 5 -> 6)" in refused
    assert other == "process 0 had to stop; its own message says why"


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """As on a full disk, no file can grow beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("failing", ["shard", "joined file", "picture"])
def test_a_disk_that_cannot_be_written_stops_all_processes(
    latents_model, reference, stopped, in_two_processes, failing
):
    model, limit = latents_model(1), 2**30
    assert model.record["model"]["step"] == 3  # read by one process
    if failing == "shard":
        shutil.rmtree(stopped / "shards")
        (stopped / "shards").write_text("no folder")
    elif failing == "joined file":
        limit = (reference / "samples.npz").stat().st_size - 1
    else:
        (stopped / "images").write_text("no folder")
    with file_size_limit(limit):
        outcome, other = in_two_processes(
            lambda: sampling.sample_to_folder(model, **RUN, save_images=True, out=stopped)
        )
    assert "stopped cannot be read or written: " in outcome and "same command goes on" in outcome
    assert other == "process 0 had to stop; its own message says why"
    assert (stopped / "samples.npz").exists() == (failing == "picture")


def test_generate_gives_the_commands_images(model, tmp_path):
    sampling.sample_to_folder(model, num_images=8, classes="all", out=tmp_path)
    images = flowdcn_jax.generate(model, num_images=8, classes="all", progress=False)
    drawn = arrays(tmp_path / "samples.npz")
    np.testing.assert_array_equal(images, drawn["arr_0"])
    assert images.dtype == np.uint8 and drawn["arr_1"].tolist() == list(range(8))


def test_a_loaded_model_is_read_and_compiled_once(workdir, one_device, tmp_path, capsys):
    copy = shutil.copytree(workdir / "checkpoints", tmp_path / "run" / "checkpoints").parent
    model, unused = (flowdcn_jax.load_trained(copy, mesh=one_device) for _ in range(2))
    first = flowdcn_jax.generate(model, num_images=8)
    assert "euler, 2 steps: an image takes 2 evaluations of" in capsys.readouterr().out
    shutil.rmtree(copy)
    again = flowdcn_jax.generate(model, num_images=8, num_steps=2, guidance=2.0, seed=0)
    np.testing.assert_array_equal(again, first)  # the config's settings in other words
    filled = [model.fill_settings(sampling.Settings(seed=seed)) for seed in (0, 7)]
    assert len({model.generator(settings).func for settings in filled}) == 1
    assert unused.config.model.width == 16  # the config alone was read
    with pytest.raises(CheckpointError):
        flowdcn_jax.generate(unused)
    with pytest.raises(sampling.SamplingError, match="step is 2; expected none beside a model"):
        flowdcn_jax.generate(model, step=2)


def test_a_guide_is_compared_with_the_model_as_it_was_trained(workdir, one_device):
    model = sampling.load_trained(workdir, mesh=one_device, guide_step=2, autoencoder="none")
    settings = model.fill_settings(sampling.Settings(**SETTINGS))
    assert model.generator(settings).func is model.generator(settings).func


def test_what_is_not_given_is_the_runs(model):
    settings = model.fill_settings(sampling.Settings())
    assert (settings.num_steps, settings.guidance, settings.seed) == (2, 2.0, 0)  # tiny digits
    assert (settings.sampler, settings.image_size) == ("euler", (8, 8))
    assert len(model.labels(sampling.Request(), seed=0)) == 4
    with mock.patch.object(model.config.sampling, "classes", (3, 7)):  # the grids' alone
        labels = model.labels(sampling.Request(num_images=23), seed=0)
    assert labels.tolist() == [*range(10), *range(10), 0, 1, 2]
    given = sampling.Settings(num_steps=3, guidance=0.0, seed=5, image_size="8x12")
    assert model.fill_settings(given) == sampling.Settings(
        num_steps=3,
        guidance=0,
        seed=np.int64(5),
        image_size=[8, 12],
        sampler="euler",
        guidance_channels="all",
        resolution_adjustment="none",
    )


def record_of(model, labels, **options):
    settings = dataclasses.asdict(model.fill_settings(sampling.Settings(**options)))
    return make_record(model, labels, {"settings": settings})


def test_the_default_folder_is_the_settings_own(workdir, model, one_device):
    labels = model.labels(sampling.Request(classes=["three", 1], num_images=4), seed=0)
    assert labels.tolist() == [3, 1, 3, 1]
    path = find_folder(model.samples, record_of(model, labels, **SETTINGS))
    assert path.parent == workdir / "samples" and path.name.startswith("step_00000003_")
    earlier = sampling.load_trained(workdir, step=2, mesh=one_device)
    guided = sampling.load_trained(workdir, guide_step=2, mesh=one_device)
    for other in (
        *(record_of(each, labels, **SETTINGS) for each in (earlier, guided)),
        record_of(model, labels[:3], **SETTINGS),
        record_of(model, labels[::-1], **SETTINGS),
        record_of(model, labels),
    ):
        assert find_folder(model.samples, other) != path


@pytest.mark.parametrize("word", ["none", "preview"])
def test_folders_of_older_versions_are_gone_on_with(latents_model, workdir, reference, word):
    """Whatever they call latents without a decoder; their digests are others, too."""
    record = json.loads((reference / "settings.json").read_text())
    assert record["autoencoder"]["name"] in ("none", "preview")
    record["autoencoder"]["name"] = word
    folder = shutil.copytree(reference, workdir / "samples" / "step_00000003_01234567")
    try:
        (folder / "settings.json").write_text(json.dumps(record))
        (workdir / "samples" / "step_00000003_00000000").mkdir()  # that of a killed command
        (folder / "samples.npz").unlink()
        grid = sampling.sample_to_folder(latents_model(1), **RUN)
        assert grid == folder / "grid.png"
        drawn = (folder / "samples.npz").read_bytes()
        assert drawn == (reference / "samples.npz").read_bytes()
        assert json.loads((folder / "settings.json").read_text()) == record
        other = sampling.sample_to_folder(latents_model(1), **RUN | dict(num_images=5))
        assert other.parent != folder
    finally:
        shutil.rmtree(workdir / "samples")


def test_latents_without_a_decoder_have_two_names(workdir, one_device):
    """In flags and configs, as in records."""
    first, second = (
        sampling.load_trained(workdir, mesh=one_device, autoencoder=word).config.autoencoder.name
        for word in ("none", "preview")
    )
    assert first == second


def test_the_record_holds_all_that_the_images_depend_on(model):
    def record(*, guide=False, sha256=None, scale=1.0, **overrides):
        """Of a run with the same parameters and another config."""
        config = tiny.config(**overrides)
        other = model.weights._replace(config=config)
        autoencoder = dataclasses.replace(model.autoencoder, weights_sha256=sha256, scale=scale)
        networks = (model.weights, other) if guide else (other, None)
        return describe(*networks, autoencoder, config.autoencoder)

    assert record() == model.record
    assert record(model__dtype="auto") == record(model__dtype="float32")  # on CPUs
    assert record(autoencoder__weights="here") == record(autoencoder__weights="elsewhere")
    for guide in (False, True):
        for key, value in (
            ("model__boundary", "truncate"),
            ("model__max_scale", 2.0),
            ("model__norm", "layer_norm"),
            ("model__dtype", "bfloat16"),
            ("data__image_size", 16),
        ):
            assert record(guide=guide, **{key: value}) != record(guide=guide), key
    for options in (dict(sha256="5f"), dict(scale=0.5), dict(autoencoder__dtype="bfloat16")):
        assert record(**options) != record()


def test_pngs_say_what_they_are(model, tmp_path):
    options = dict(num_images=8, seed=0, out=tmp_path)
    sampling.sample_to_folder(model, classes=["three", 1], save_images=True, **options)
    metadata = read_metadata(tmp_path / "images" / "00002.png")
    expected = {"index": 2, "class": 3, "class_name": "three"}
    assert {key: metadata[key] for key in expected} == expected
    for path in ("grid.png", "images/00002.png"):
        metadata = read_metadata(tmp_path / path)
        assert metadata["request"] == {"classes": ["three", "1"], "labels": "balanced"}
        assert metadata["flowdcn_jax"] == flowdcn_jax.__version__
        assert metadata["settings"]["seed"] == 0
    assert "request" not in json.loads((tmp_path / "settings.json").read_text())
    sampling.sample_to_folder(model, classes="3,1", **options)  # the same, in other words


def test_a_strip_shows_each_value_in_a_column(model, tmp_path, capsys):
    """And its folder is for no other strip, and for no run's images."""
    options = dict(compare="resolution_adjustment", image_size="6x14", num_images=8)
    path = sampling.sample_to_folder(model, classes="one", out=tmp_path / "strip", **options)
    assert path == tmp_path / "strip" / "compare_resolution_adjustment.png"
    width, height = Image.open(path).size
    assert width > 3 * 14 * 11 and height > 8 * 6 * 11  # enlarged to be seen
    metadata = read_metadata(path)
    assert metadata["compare"] == "resolution_adjustment"
    assert metadata["request"] == {"classes": ["one"], "labels": "balanced"}
    kinds = ["none", "paper", "released"]
    assert {
        name: settings["resolution_adjustment"] for name, settings in metadata["settings"].items()
    } == dict(zip(kinds, kinds, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"resolution_adjustment: {kind}, 2 evals" for kind in kinds]

    first = path.read_bytes()
    again = sampling.sample_to_folder(model, classes="one", out=tmp_path / "strip", **options)
    assert again.read_bytes() == first
    names = sorted(path.name for path in (tmp_path / "strip").iterdir())
    assert names == [".lock", "compare_resolution_adjustment.png", "settings.json"]
    for changed, difference in (
        (options | dict(seed=7), "seed: 0 -> 7"),
        (dict(compare="steps"), "compare: 'resolution_adjustment' -> 'steps'"),
        ({}, "compare: 'resolution_adjustment' -> None"),
    ):
        with pytest.raises(sampling.SamplingError, match=rf"another run's images \(.*{difference}"):
            sampling.sample_to_folder(model, classes="one", out=tmp_path / "strip", **changed)


def test_a_strip_does_not_replace_other_pictures(model, reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "run")
    with pytest.raises(sampling.SamplingError, match="compare: None -> 'steps'"):
        sampling.sample_to_folder(model, compare="steps", out=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "grid.png").write_text("mine")
    for options in (dict(compare="steps"), {}):
        with pytest.raises(sampling.SamplingError, match="mine holds grid.png and no settings"):
            sampling.sample_to_folder(model, out=tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "grid.png").read_text() == "mine"


@pytest.mark.parametrize(
    "kind, columns, options",
    [
        ("steps", 7, dict(sampler="neural")),
        ("steps", 6, {}),
        ("samplers", 9, dict(num_steps=50, diffusion="constant")),
        ("samplers", 10, dict(num_steps=5)),
        ("image_size", 4, {}),
        ("resolution_adjustment", 3, dict(image_size="8x12")),
    ],
)
def test_the_columns_of_a_strip_differ_in_what_it_compares(model, kind, columns, options):
    settings, _ = strip_columns(kind, sampling.Settings(**options), model.config)
    assert len(settings) == len(set(settings.values())) == columns
    field = COMPARISONS[kind].field
    alike = {dataclasses.replace(s, diffusion=None, **{field: None}) for s in settings.values()}
    assert len(alike) == 1
    for column in settings.values():
        assert model.fill_settings(column) == column


def test_a_strip_of_samplers_names_evaluations_and_what_it_leaves_out(model, tmp_path, capsys):
    settings = sampling.Settings(diffusion="zero", num_steps=50, seed=5)
    columns, _ = strip_columns("samplers", settings, model.config)
    left_out = ("adams1", "neural", *samplers.OF_MEAN_VELOCITIES)
    evaluations = dict.fromkeys([s for s in samplers.SAMPLERS if s not in left_out], 50)
    evaluations["heun"] = 99
    captions = strip_captions(columns, ["one", "two"])
    assert captions[:9] == [f"{s}\n{n} evals, one" for s, n in evaluations.items()]
    assert captions[9] == "euler\n50 evals, two"
    assert {column.seed for column in columns.values()} == {5}
    assert [c.diffusion for c in columns.values()] == [None] * 6 + ["zero"] * 3

    (tmp_path / "file").write_text("mine")
    with pytest.raises(sampling.SamplingError, match="file cannot be made a folder"):
        sampling.sample_to_folder(model, compare="samplers", num_steps=50, out=tmp_path / "file")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "samplers: adams1 is left out: it is euler"
    assert "neural is left out: num_steps is 50; the sampler 'neural' has one of 5" in lines[1]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("steps", dict(num_steps=5)),
        ("samplers", dict(sampler="euler")),
        ("image_size", dict(image_size=(8, 8))),
        ("resolution_adjustment", dict(resolution_adjustment="none", image_size=(8, 12))),
    ],
)
def test_a_comparison_goes_through_its_option_alone(model, tmp_path, kind, options):
    with pytest.raises(sampling.SamplingError, match=f"expected none, since compare={kind} goes"):
        sampling.sample_to_folder(model, compare=kind, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
