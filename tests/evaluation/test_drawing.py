"""Samples that are measured while they are drawn: from a workdir, in training, as a table."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax.autoencoders import load_autoencoder
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation import (
    Comparison,
    DrawnRequest,
    EvaluationError,
    drawn_images,
    evaluate,
    evaluator,
    open_images,
    open_side,
)
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state
from flowdcn_jax.sampling import Settings, generate, load_trained
from tests import tiny
from tests.conftest import FIXTURES
from tests.evaluation import fakes

pytestmark = pytest.mark.usefixtures("quick_compilation")

REQUEST = DrawnRequest(num_images=21, batch_size=8)  # as EVALUATED
SETTINGS = Settings(num_steps=3, guidance=1.5)


@pytest.fixture(scope="module")
def model(evaluated_run):
    return load_trained(evaluated_run, mesh=make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", crop=8)


def network():
    return fakes.FakeFeatures(network="efficientnet_lite0")


def test_samples_are_those_of_sample_py_whatever_the_ranges(model):
    expected = generate(
        model, classes="all", num_images=21, num_steps=3, guidance=1.5, batch_size=8, progress=False
    )
    images = drawn_images(model, REQUEST, SETTINGS)
    assert (images.count, images.size, images.grey) == (21, (8, 8), True)
    for edges in ((0, 21), (0, 5, 10, 21)):
        ranges = [range(*edge) for edge in zip(edges, edges[1:], strict=False)]
        parts = list(images.read(ranges))
        assert [len(part) for part in parts] == [len(each) for each in ranges]
        found = np.concatenate(parts)
        assert found.shape == (21, 8, 8, 3) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.repeat(expected, 3, axis=3))
    apart = np.concatenate(list(images.read([range(2, 4), range(9, 13)])))
    np.testing.assert_array_equal(apart[..., :1], expected[[2, 3, 9, 10, 11, 12]])
    record = images.settings
    assert record["settings"]["guidance"] == 1.5 and record["model"]["step"] == 6


def test_training_logs_the_figures_of_its_ema(evaluated_run, model, digits):
    rows = tiny.metrics(evaluated_run)
    assert [row["step"] for row in rows if "FD-efficientnet_lite0" in row] == [4, 6]
    report = evaluate(drawn_images(model, REQUEST, SETTINGS), digits, network())
    distance = rows[-1]["FD-efficientnet_lite0"]
    assert distance == pytest.approx(report.figures[0].value, rel=1e-6)
    assert distance != rows[3]["FD-efficientnet_lite0"] and "loss" in rows[3]
    assert not (evaluated_run / "samples").exists()


def test_evaluation_changes_nothing_of_a_run(evaluated_run, tmp_path):
    tiny.train(tiny.config(**fakes.EVALUATED | dict(evaluate__every_steps=0)), tmp_path)
    assert tiny.numbers(tmp_path) == tiny.numbers(evaluated_run)
    first, second = (tiny.checksums(folder, 6) for folder in (tmp_path, evaluated_run))
    assert (first["state"], first["ema"]) == (second["state"], second["ema"])


def test_eight_devices_and_another_file_of_the_reference_give_the_same_figures(
    evaluated_run, fake_network, digits, tmp_path
):
    (images,) = digits.read([range(digits.count)])
    file = fakes.save(tmp_path / "digits.npz", images[..., :1])
    config = tiny.config(**fakes.EVALUATED, mesh__data=2, mesh__fsdp=4, evaluate__reference=file)
    found = figures_of(evaluated_run, config, make_mesh(2, 4))
    assert found == pytest.approx(expected_figures(evaluated_run), rel=1e-6)


def expected_figures(workdir):
    row = tiny.metrics(workdir)[-1]
    return {name: row[name] for name in ("FD-efficientnet_lite0", "KID_efficientnet_lite0")}


def figures_of(workdir, config, mesh):
    """What training would log of the newest checkpoint."""
    checkpointer = Checkpointer(str(workdir), keep=9, keep_every_steps=None)
    state = checkpointer.restore_newest(abstract_state(config, mesh))
    checkpointer.close()
    measure = evaluator(config, mesh, load_autoencoder(config.autoencoder))
    first, second = measure(state.ema), measure(state.ema)
    assert first == second
    return first


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(), "weights of inception: not given. Fetch pt_inception"),
        (dict(evaluate__reference="none.npz"), "no file or folder none.npz"),
        (
            dict(
                evaluate__features="dinov2",
                evaluate__weights=str(FIXTURES / "tiny_dinov2"),
                evaluate__reference=str(FIXTURES / "tiny_dinov2" / "rgb.npz"),
            ),
            "the samples are grey, the reference RGB",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, overrides, message
):
    from flowdcn_jax.evaluation import drawing, load_features

    monkeypatch.setattr(drawing, "load_features", load_features)
    if "reference" in message:
        overrides["evaluate__reference"] = fakes.save(tmp_path / "rgb.npz", fakes.random_images(3))
    with pytest.raises(UserError, match=message):
        tiny.train(tiny.config(evaluate__every_steps=2, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_need_a_reference_and_a_decoder(fake_network, model):
    config = tiny.config(evaluate__every_steps=2, data__name="latents")
    mesh, autoencoder = make_mesh(devices=jax.devices()[:1]), load_autoencoder(config.autoencoder)
    with pytest.raises(EvaluationError, match="reference is None, and the data set 'latents'"):
        evaluator(config, mesh, autoencoder)
    config = tiny.config(evaluate__every_steps=2, autoencoder__name="preview")
    with pytest.raises(EvaluationError, match="'preview', which decodes nothing"):
        evaluator(config, mesh, load_autoencoder(config.autoencoder))
    latents = load_trained(model.checkpoint.workdir, mesh=mesh, autoencoder="none")
    with pytest.raises(EvaluationError, match="makes latents, and has no decoder"):
        drawn_images(latents, REQUEST, SETTINGS)


def test_a_comparison_is_written_row_by_row(tmp_path, model, digits):
    comparison, reference = Comparison(tmp_path / "x.json"), digits
    for steps, guidance in ((2, 1.0), (2, 4.0), (3, 1.0)):
        settings = Settings(num_steps=steps, guidance=guidance)
        report = evaluate(drawn_images(model, REQUEST, settings), reference, network())
        comparison.add({"num_steps": steps, "guidance": guidance}, report)
        reference = report.references
        rows = json.loads((tmp_path / "x.json").read_text())["rows"]
        assert rows[-1]["options"] == {"num_steps": steps, "guidance": guidance}
        assert rows[-1]["figures"][0]["value"] == report.figures[0].value
        assert rows[-1]["samples"]["images"]["settings"]["settings"]["guidance"] == guidance
        names = (rows[-1]["samples"]["file"], rows[-1]["reference"]["file"])
        again = evaluate(*(open_side(str(tmp_path / name)) for name in names), None)
        assert again.figures[0].value == report.figures[0].value
    assert len({row["figures"][0]["value"] for row in rows}) == 3
    first, *lines = comparison.table().splitlines()
    assert first.split() == [
        *("num_steps", "guidance", "FD-efficientnet_lite0", "KID", "(efficientnet_lite0)"),
        *("samples", "reference"),
    ]
    assert lines[1].split()[:2] == ["2", "4.0"] and lines[1].split()[-2:] == ["21", "1797"]
    assert any("only 21 images: the covariance" in line for line in lines)
    assert Image.open(tmp_path / "x.png").size == (720, 480)
    assert len(list(tmp_path.iterdir())) == 6


def run(*flags):
    return tiny.run([sys.executable, "evaluate.py", *flags])


NETWORK = ("--features=dinov2", f"--weights={FIXTURES}/tiny_dinov2", "--features_batch_size=6")


def test_the_command_draws_a_table_and_writes_no_samples(evaluated_run, tmp_path):
    workdir = shutil.copytree(evaluated_run, tmp_path / "run")
    images = fakes.save(tmp_path / "grey.npz", fakes.random_images(6, channels=1))
    reference = tmp_path / "reference.npz"
    command = ["-m", "flowdcn_jax.tools.reference_stats", f"--images={images}", *NETWORK]
    code, output = tiny.run([sys.executable, *command, f"--out={reference}"])
    assert code == 0 and output.splitlines()[-1] == f"6 images in {reference}", output
    flags = [f"--samples={workdir}", f"--reference={reference}", *NETWORK, "--num_images=5"]
    settings = ["--guidance=3", "--num_steps=2", "--seed=1"]
    before = tiny.files(workdir)
    code, output = run(*flags, *settings, "--ema=ema,constant_0.9")
    assert code == 0, output
    lines = [line.split() for line in output.splitlines()]
    start = next(index for index, line in enumerate(lines) if line[:1] == ["ema"])
    (first, value, *_), (second, other, *_) = lines[start + 1 : start + 3]
    assert (first, second) == ("ema", "constant_0.9") and value != other
    assert tiny.files(workdir) == before

    options = [*settings, "--ema=constant_0.9", "--keep_samples", f"--out={tmp_path}/kept.json"]
    code, output = run(*flags, *options)
    assert code == 0, output
    (kept,) = workdir.glob("samples/*/samples.npz")
    assert np.load(kept)["arr_0"].shape == (5, 8, 8, 1)
    (line,) = [line.split() for line in output.splitlines() if line.startswith("FD-dinov2")]
    assert line[1] == other  # as they were drawn without a file
    saved = json.loads((tmp_path / "kept.json").read_text())
    assert saved["samples"]["images"]["settings"]["settings"]["seed"] == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--guidance=1,-2",), "guidance is -2.0; expected at least 0"),
        (("--guidance=1,1",), "flag --guidance=1,1: expected each value once"),
        (("--step=3,5",), "has no step 5; there are [3, 6]"),
        (("--ema=ema,power_0.1",), "power_0.1"),
        (("--classes=11",), "'11'; expected numbers from 0 to 9"),
        (("--samples=grey.npz", "--seed=3"), "--seed is given, and --samples=grey.npz holds no ch"),
        (("--samples=grey.npz", "--keep_samples"), "--keep_samples is given, and --samples=grey"),
    ],
)
def test_the_command_refuses_bad_options_in_one_line(evaluated_run, tmp_path, flags, message):
    fakes.save(tmp_path / "grey.npz", fakes.random_images(6, channels=1))
    flags = [flag.replace("=grey", f"={tmp_path}/grey") for flag in flags]
    code, output = run(
        f"--samples={evaluated_run}",
        f"--reference={tmp_path}/grey.npz",
        *NETWORK,
        *flags,
        f"--out={tmp_path}/x.json",
    )
    assert code == 2 and output.startswith("error: ") and output.count("\n") == 1, output
    assert message in output.replace(f"{tmp_path}/", "")
    assert [path.name for path in tmp_path.iterdir()] == ["grey.npz"]
