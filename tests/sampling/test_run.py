"""Whole sampling runs: any devices, stopped and gone on with, as a file, an array or a strip."""

import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import flowdcn_jax
from flowdcn_jax import sampling
from flowdcn_jax.images import read_metadata
from flowdcn_jax.sampling import run
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.training.sharding import make_mesh
from tests import tiny

SETTINGS = sampling.Settings(sampler="euler_sde", num_steps=3, guidance=2.0, seed=5)
COUNT = 24


def sample(workdir, out, num_devices=1, batch_size=2, **options):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    options = dict(num_images=COUNT, classes=["all"]) | options
    sampling.sample_to_folder(
        workdir, SETTINGS, out=out, mesh=mesh, batch_size=batch_size, **options
    )
    return (out / "samples.npz").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Calls with the same settings and devices share their compiled function."""
    real, made = run.make_generator, {}

    def make(config, mesh, settings, *, guide, autoencoder):
        key = (mesh, settings.for_model(config), guide is None)
        if key not in made:
            made[key] = real(config, mesh, settings, guide=guide, autoencoder=autoencoder)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_generator", make)
        yield


@pytest.fixture(scope="module")
def reference(workdir, tmp_path_factory):
    """samples.npz of COUNT images, drawn by one device, two at a time."""
    return sample(workdir, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_same_bytes_for_any_number_of_devices(workdir, reference, tmp_path, num_devices):
    assert sample(workdir, tmp_path, num_devices) == reference


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

    def full(folder, start, arrays):
        if len(written) == 3:
            raise sampling.SamplingError("the disk is full")
        written.append(start)
        real(folder, start, arrays)

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


@pytest.mark.parametrize("process", [0, 1])
def test_processes_agree_on_what_is_missing_and_refuse_together(tmp_path, monkeypatch, process):
    def run_both(record):
        """Process 0 first, whose broadcast the other one then receives."""
        sent = []

        def broadcast(array):
            sent.append(array)
            return sent[0]

        monkeypatch.setattr(run.multihost_utils, "broadcast_one_to_all", broadcast)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        for index in range(process + 1):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            folder = SampleFolder(tmp_path, 9)
            if index < process and record != {"seed": 0}:
                with pytest.raises(sampling.SamplingError, match="another run's images"):
                    run._open_everywhere(folder, record)
            else:
                missing = run._open_everywhere(folder, record)
        return missing

    assert run_both({"seed": 0}) == [(0, 9)]
    SampleFolder(tmp_path, 9).write(2, {"arr_0": np.zeros((3, 1)), "arr_1": np.zeros(3)})
    assert run_both({"seed": 0}) == [(0, 2), (5, 9)]
    with pytest.raises(sampling.SamplingError, match=("another run", "process 0 can")[process]):
        run_both({"seed": 1})


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


def test_the_default_folder_is_the_settings_own(workdir, monkeypatch):
    model = sampling.load_trained(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
    labels = model.labels(["three", 1], 4, order="balanced", seed=0)
    assert labels.tolist() == [3, 1, 3, 1]
    settings = SETTINGS.for_model(model.config)
    record = run.describe(model, settings, labels)
    path = run.default_path(workdir, record)
    assert path.parent == workdir / "samples" and path.name.startswith("step_00000003_")
    earlier = sampling.load_trained(workdir, step=2, mesh=model.mesh)
    for other in (
        run.describe(earlier, settings, labels),
        run.describe(model._replace(guide=earlier.weights), settings, labels),
        run.describe(model, settings, labels[:3]),
        run.describe(model, settings, labels[::-1]),
        run.describe(model, sampling.Settings().for_model(model.config), labels),
    ):
        assert run.default_path(workdir, other) != path


@pytest.mark.parametrize(
    "kind, columns, options",
    [
        ("steps", 7, dict(sampler="neural", num_steps=5)),
        ("image_size", 4, {}),
        ("resolution_adjustment", 3, dict(image_size=(8, 12))),
    ],
)
def test_strips_show_each_value_in_a_column(workdir, tmp_path, monkeypatch, kind, columns, options):
    drawn = []

    def draw(model, settings, labels, **rest):
        settings.for_model(model.config)
        drawn.append(settings)
        return np.zeros((len(labels), *settings.image_size, 1), np.uint8)

    monkeypatch.setattr("flowdcn_jax.sampling.compare.draw_images", draw)
    settings = sampling.Settings(**dict(num_steps=2) | options)
    path = sampling.compare_to_png(
        workdir, settings, kind=kind, num_images=2, classes=["one"], out=tmp_path
    )
    assert path == tmp_path / f"compare_{kind}.png"
    assert len(drawn) == len(set(drawn)) == columns
    width, height = Image.open(path).size
    assert width > columns * 64 and height > 2 * 64
    assert read_metadata(path)["compare"] == kind


def test_a_strip_of_samplers_is_drawn_with_one_noise(workdir, tmp_path):
    columns = sampling.compare.COMPARISONS["samplers"](SETTINGS, tiny.config())
    assert [name for name, _ in columns] == [
        "euler",
        "heun",
        "heun_cached",
        "adams2",
        "adams3",
        "adams4",
        "euler_sde",
        "euler_sde_mean",
        "euler_sde_preserve",
    ]
    assert len({settings.seed for _, settings in columns}) == 1
