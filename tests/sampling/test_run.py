"""Whole sampling runs: any devices, stopped and gone on with, as a file, an array or a strip."""

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

import flowdcn_jax
from flowdcn_jax import samplers, sampling
from flowdcn_jax.images import make_grid, read_metadata
from flowdcn_jax.sampling import run, trained_model
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.training.sharding import make_mesh
from tests import tiny

SETTINGS = sampling.Settings(sampler="euler_sde", num_steps=3, guidance=2.0, seed=5)
COUNT = 24


def sample(workdir, out, num_devices=1, *, autoencoder=None, save_images=False, **request):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    model = sampling.load_trained(workdir, mesh=mesh, autoencoder=autoencoder)
    request = sampling.Request(**dict(num_images=COUNT, classes=["all"], batch_size=2) | request)
    sampling.sample_to_folder(model, SETTINGS, request, out=out, save_images=save_images)
    return (out / "samples.npz").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(quick_compilation):
    """Calls with the same settings and devices share their compiled function."""
    real, made = trained_model.make_generator, {}

    def make(config, mesh, settings, *, guide, autoencoder):
        key = (mesh, settings, guide is None, autoencoder.name)
        if key not in made:
            made[key] = real(config, mesh, settings, guide=guide, autoencoder=autoencoder)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_model, "make_generator", make)
        yield


@pytest.fixture(scope="module")
def reference(workdir, tmp_path_factory):
    """samples.npz of COUNT images, drawn by one device, two at a time."""
    return sample(workdir, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_same_bytes_for_any_number_of_devices(workdir, reference, tmp_path, num_devices):
    assert sample(workdir, tmp_path, num_devices) == reference


def test_the_same_bits_where_one_device_could_draw_all(workdir, tmp_path):
    """Latents, since pixels hide differences in rounding."""
    options = dict(batch_size=64, autoencoder="preview")
    one, eight = (sample(workdir, tmp_path / str(n), n, **options) for n in (1, 8))
    assert one == eight


def test_other_batch_sizes_differ_by_rounding(workdir, reference, tmp_path):
    sample(workdir, tmp_path / "other", batch_size=5)
    (tmp_path / "reference.npz").write_bytes(reference)
    first, second = (
        np.load(path)["arr_0"].astype(int)
        for path in (tmp_path / "reference.npz", tmp_path / "other" / "samples.npz")
    )
    assert np.abs(first - second).max() <= 1


def test_a_stopped_run_goes_on_and_draws_only_what_is_missing(
    workdir, reference, tmp_path, monkeypatch
):
    real, written = SampleFolder.write, []

    def full(folder, start, *arrays):
        if len(written) == 3:
            raise sampling.SamplingError("the disk is full")
        written.append(start)
        real(folder, start, *arrays)

    monkeypatch.setattr(SampleFolder, "write", full)
    with pytest.raises(sampling.SamplingError, match="full"):
        sample(workdir, tmp_path)
    assert len(list((tmp_path / "shards").iterdir())) == 3
    monkeypatch.setattr(SampleFolder, "write", lambda *args: (written.append(args[1]), real(*args)))
    assert sample(workdir, tmp_path) == reference
    assert written == list(range(0, COUNT, 2))

    def none(*args, **options):
        raise AssertionError("nothing is left to draw")

    monkeypatch.setattr(SampleFolder, "write", none)
    assert sample(workdir, tmp_path) == reference


def command(workdir, out, *flags):
    base = [sys.executable, "sample.py", f"--workdir={workdir}", f"--out={out}", "--classes=all"]
    options = ["--sampler=euler_sde", "--num_steps=3", "--guidance=2", "--seed=5", "--batch_size=2"]
    return [*base, *options, f"--num_images={COUNT}", *flags]


def test_a_killed_command_goes_on(workdir, reference, tmp_path):
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
    code, output = tiny.run(command(workdir, tmp_path))
    assert code == 0, output
    assert (tmp_path / "samples.npz").read_bytes() == reference


def test_two_processes_draw_the_same(workdir, reference, tmp_path):
    address = f"--coordinator_address=127.0.0.1:{tiny.free_port()}"
    flags = ["--distributed", address, "--num_processes=2"]
    processes = [
        tiny.start(command(workdir, tmp_path, *flags, f"--process_id={i}"), num_devices=2)
        for i in range(2)
    ]
    (code, output), (other_code, other_output) = map(tiny.finish, processes)
    assert (code, other_code) == (0, 0), output + other_output
    assert (tmp_path / "samples.npz").read_bytes() == reference
    assert "grid.png" in output and "grid.png" not in other_output


@pytest.fixture
def in_two_processes(monkeypatch):
    """Calls a function as process 0, then as process 1, which receives what 0 has broadcast.

    Gives what each returned or raised.
    """

    def call(function):
        sent, outcomes = [], []

        def broadcast(array):
            if jax.process_index() == 0:
                sent.append(array)
                return array
            return sent.pop(0)

        with monkeypatch.context() as patch:
            patch.setattr(run.multihost_utils, "broadcast_one_to_all", broadcast)
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


def test_processes_agree_on_what_is_missing_and_stop_together(tmp_path, in_two_processes):
    def open_(record):
        rows = {name: jax.ShapeDtypeStruct((), np.int32) for name in ("arr_0", "arr_1")}
        folder = SampleFolder(tmp_path, 9, rows)
        with contextlib.closing(folder):
            missing = run._open_everywhere(folder, record)
            if jax.process_index() == 0:
                folder.write(2, np.zeros(3, np.int32), np.zeros(3, np.int32))
            return missing

    assert in_two_processes(lambda: open_({"seed": 0})) == [[(0, 9)]] * 2
    assert in_two_processes(lambda: open_({"seed": 0})) == [[(0, 2), (5, 9)]] * 2
    refused, other = in_two_processes(lambda: open_({"seed": 1}))
    assert "holds another run's images (seed: 0 -> 1)" in refused
    assert other == "process 0 had to stop; its own message says why"


@pytest.mark.parametrize("failing", ["write", "join", "save_png"])
def test_a_full_disk_stops_all_processes(workdir, tmp_path, monkeypatch, in_two_processes, failing):
    def full(*args):
        assert jax.process_index() == 0
        raise sampling.SamplingError("the disk is full")

    model = sampling.load_trained(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
    assert model.weights.step == 3 and model.autoencoder.name == "identity"  # read by one process
    monkeypatch.setattr(SampleFolder, failing, full)
    monkeypatch.setattr(sampling, "load_trained", lambda *args, **options: model)
    outcomes = in_two_processes(lambda: sample(workdir, tmp_path))
    assert outcomes == ["the disk is full", "process 0 had to stop; its own message says why"]


def test_generate_gives_the_commands_images(workdir, reference, tmp_path):
    images = flowdcn_jax.generate(
        workdir,
        classes=["all"],
        num_images=COUNT,
        sampler="euler_sde",
        num_steps=3,
        guidance=2.0,
        seed=5,
        batch_size=2,
        progress=False,
    )
    (tmp_path / "reference.npz").write_bytes(reference)
    np.testing.assert_array_equal(images, np.load(tmp_path / "reference.npz")["arr_0"])


def test_a_loaded_model_is_read_and_compiled_once(workdir, monkeypatch, capsys):
    calls = []
    for name in ("load_weights", "make_generator"):
        real = getattr(trained_model, name)

        def counted(*args, name=name, real=real, **options):
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(trained_model, name, counted)
    model = flowdcn_jax.load_trained(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
    assert calls == []
    first = flowdcn_jax.generate(model, progress=False)
    assert first.shape == (4, 8, 8, 1)  # config.sampling.num_images
    again = flowdcn_jax.generate(model, num_steps=2, guidance=2.0, seed=0)  # config.sampling's
    np.testing.assert_array_equal(again, first)
    assert sorted(calls) == ["load_weights", "make_generator"]
    assert "euler, 2 steps: an image takes 2 evaluations of" in capsys.readouterr().out
    with pytest.raises(sampling.SamplingError, match="step is 2; expected none beside a model"):
        flowdcn_jax.generate(model, step=2)


def test_a_guide_is_compared_with_the_model_as_it_was_trained(workdir):
    model = sampling.load_trained(workdir, guide_step=2, autoencoder="preview")
    settings = model.fill_settings(SETTINGS)
    assert model.generator(settings) is model.generator(settings)


def test_what_is_not_given_is_the_runs(workdir):
    model = sampling.load_trained(workdir)
    settings = model.fill_settings(sampling.Settings())
    assert (settings.num_steps, settings.guidance, settings.seed) == (2, 2.0, 0)  # tiny digits
    assert (settings.sampler, settings.image_size) == ("euler", (8, 8))
    given = sampling.Settings(num_steps=3, guidance=0.0, seed=5, image_size="8x12")
    assert model.fill_settings(given) == sampling.Settings(
        num_steps=3,
        guidance=0,
        seed=np.int64(5),
        image_size=[8, 12],
        sampler="euler",
        resolution_adjustment="none",
    )


def test_the_default_folder_is_the_settings_own(workdir, monkeypatch):
    model = sampling.load_trained(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
    labels = model.labels(sampling.Request(classes=["three", 1], num_images=4), seed=0)
    assert labels.tolist() == [3, 1, 3, 1]
    settings = model.fill_settings(SETTINGS)
    record = run.describe(model, settings, labels)
    path = run.default_path(workdir, record)
    assert path.parent == workdir / "samples" and path.name.startswith("step_00000003_")
    earlier = sampling.load_trained(workdir, step=2, mesh=model.mesh)
    guided = sampling.load_trained(workdir, guide_step=2, mesh=model.mesh)
    for other in (
        run.describe(earlier, settings, labels),
        run.describe(guided, settings, labels),
        run.describe(model, settings, labels[:3]),
        run.describe(model, settings, labels[::-1]),
        run.describe(model, sampling.Settings().for_model(model.config), labels),
    ):
        assert run.default_path(workdir, other) != path


def test_the_record_holds_all_that_the_images_depend_on(workdir):
    model = sampling.load_trained(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
    settings = SETTINGS.for_model(model.config)

    def record(*, guide=False, sha256=None, scale=1.0, **overrides):
        """Of a run with the same parameters and another config."""
        config = tiny.config(**overrides)
        other = model.weights._replace(config=config)
        autoencoder = dataclasses.replace(model.autoencoder, weights_sha256=sha256, scale=scale)
        kept = dict(config=model.config, weights=model.weights, guide=other)
        changed = dict(config=config, weights=other, guide=None)
        parts = types.SimpleNamespace(**(kept if guide else changed), autoencoder=autoencoder)
        return run.describe(parts, settings, np.arange(4))

    assert record() == run.describe(model, settings, np.arange(4))
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


def test_pngs_say_what_they_are(workdir, tmp_path):
    sample(workdir, tmp_path, classes=["three", 1], num_images=4, save_images=True)
    metadata = read_metadata(tmp_path / "images" / "00002.png")
    expected = {"index": 2, "class": 3, "class_name": "three"}
    assert {key: metadata[key] for key in expected} == expected
    for path in ("grid.png", "images/00002.png"):
        metadata = read_metadata(tmp_path / path)
        assert metadata["request"] == {"classes": ["three", "1"], "labels": "balanced"}
        assert metadata["flowdcn_jax"] == flowdcn_jax.__version__
        assert metadata["settings"]["seed"] == 5
    assert "request" not in json.loads((tmp_path / "settings.json").read_text())
    sample(workdir, tmp_path, classes=["3", "1"], num_images=4)  # the same, in other words


def test_a_strip_does_not_replace_other_pictures(workdir, tmp_path, monkeypatch):
    def draw(model, settings, labels, **rest):
        return np.full((len(labels), 8, 8, 1), settings.seed, np.uint8)

    monkeypatch.setattr("flowdcn_jax.sampling.compare.draw_images", draw)

    def strip(kind, out, seed=0):
        model, settings = sampling.load_trained(workdir), sampling.Settings(seed=seed)
        request = sampling.Request(num_images=1)
        return sampling.compare_to_png(model, settings, request, kind=kind, out=out)

    path = strip("image_size", tmp_path / "strip")
    first = path.read_bytes()
    for kind, seed, difference in (
        ("image_size", 7, "seed: 0 -> 7"),
        ("steps", 0, "compare: 'image_size' -> 'steps'"),
    ):
        with pytest.raises(sampling.SamplingError, match=rf"another run's images \(.*{difference}"):
            strip(kind, tmp_path / "strip", seed)
    with pytest.raises(sampling.SamplingError, match="compare: 'image_size' -> None"):
        sample(workdir, tmp_path / "strip")
    assert strip("image_size", tmp_path / "strip").read_bytes() == first
    assert read_metadata(path)["request"]["labels"] == "balanced"
    assert sorted(path.name for path in (tmp_path / "strip").iterdir()) == [
        ".lock",
        "compare_image_size.png",
        "settings.json",
    ]

    sample(workdir, tmp_path / "run", num_images=2)
    with pytest.raises(sampling.SamplingError, match="compare: None -> 'steps'"):
        strip("steps", tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "grid.png").write_text("mine")
    for call in (lambda out: strip("steps", out), lambda out: sample(workdir, out)):
        with pytest.raises(sampling.SamplingError, match="mine holds grid.png and no settings"):
            call(tmp_path / "mine")
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
def test_strips_show_each_value_in_a_column(drawn, workdir, tmp_path, kind, columns, options):
    path = sampling.compare_to_png(
        sampling.load_trained(workdir),
        sampling.Settings(**options),
        sampling.Request(num_images=2, classes=["one"]),
        kind=kind,
        out=tmp_path,
    )
    assert path == tmp_path / f"compare_{kind}.png"
    assert len(drawn) == len(set(drawn)) == columns
    width, height = Image.open(path).size
    assert width > columns * 64 and height > 2 * 64
    metadata = read_metadata(path)
    assert metadata["compare"] == kind and len(metadata["settings"]) == columns


@pytest.fixture
def drawn(monkeypatch):
    """The settings of each column that a comparison asks for; all are black."""
    settings_of_columns = []

    def draw(model, settings, labels, **rest):
        assert settings == model.fill_settings(settings)
        settings_of_columns.append(settings)
        return np.zeros((len(labels), *settings.image_size, 1), np.uint8)

    monkeypatch.setattr("flowdcn_jax.sampling.compare.draw_images", draw)
    return settings_of_columns


def test_a_strip_of_samplers_names_evaluations_and_what_it_leaves_out(
    drawn, workdir, tmp_path, monkeypatch, capsys
):
    grids = []
    real = make_grid
    monkeypatch.setattr(
        "flowdcn_jax.sampling.compare.make_grid",
        lambda *args, **options: (grids.append(options), real(*args, **options))[1],
    )
    settings = sampling.Settings(diffusion="zero", num_steps=50, seed=5)
    request = sampling.Request(num_images=1, classes="one")
    sampling.compare_to_png(
        sampling.load_trained(workdir), settings, request, kind="samplers", out=tmp_path
    )
    evaluations = dict.fromkeys([s for s in samplers.SAMPLERS if s not in ("adams1", "neural")], 50)
    evaluations["heun"] = 99
    assert grids[0]["captions"] == [f"{s}\n{n} evals, one" for s, n in evaluations.items()]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "samplers: adams1 is left out: it is euler"
    assert "neural is left out: num_steps is 50; the sampler 'neural' has one of 5" in lines[1]
    assert lines[2:] == [f"samplers: {s}, {n} evals" for s, n in evaluations.items()]
    assert {column.seed for column in drawn} == {5}
    assert [column.diffusion for column in drawn] == [None] * 6 + ["zero"] * 3


@pytest.mark.parametrize(
    "kind, options",
    [
        ("steps", dict(num_steps=5)),
        ("samplers", dict(sampler="euler")),
        ("image_size", dict(image_size=(8, 8))),
        ("resolution_adjustment", dict(resolution_adjustment="none", image_size=(8, 12))),
    ],
)
def test_a_comparison_goes_through_its_option_alone(drawn, workdir, tmp_path, kind, options):
    model, settings = sampling.load_trained(workdir), sampling.Settings(**options)
    with pytest.raises(sampling.SamplingError, match=f"expected none, since compare={kind} goes"):
        sampling.compare_to_png(model, settings, sampling.Request(), kind=kind, out=tmp_path)
    assert not drawn
