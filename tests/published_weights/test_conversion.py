"""From published weights to a workdir that samples and trains, and back."""

import functools
import hashlib
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import flowdcn_jax
from flowdcn_jax import models, sampling
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.published_weights import PublishedWeightsError, convert, export
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.optimizer import make_optimizer
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state, state_from_weights
from tests import official, tiny
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Random parameters amplify rounding. Those of model.npz do a hundredfold (tests/models holds
# float64 to 1e-5).
FLOAT32_TOLERANCE = {"model.npz": 2e-5, "sit.npz": 1e-5}
FIXTURES = Path(__file__).parent.parent / "fixtures"


@functools.cache
def compiled(graphdef):
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))


def run(golden, model):
    graphdef, state = nnx.split(model)
    return compiled(graphdef)(state, official.nhwc(golden["x"]), golden["t"], golden["y"])


@pytest.mark.parametrize("file", ["model.npz", "sit.npz"])
def test_converted_models_give_the_authors_outputs(converted, file):
    golden, workdir = converted(file)
    model, _ = flowdcn_jax.load_model(workdir)
    expected = official.nhwc(golden["out"])
    assert relative_error(run(golden, model), expected) < FLOAT32_TOLERANCE[file]


@pytest.mark.parametrize("file", ["model.npz", "sit.npz"])
def test_converted_models_are_those_that_tests_of_models_hold_to_the_outputs_and_gradients(
    converted, file
):
    """At other sizes too. The config given says boundary="zeros"."""
    golden, workdir = converted(file)
    assert checkpoint.read_run(str(workdir), 0).config["model"] == (
        official.model_config(golden).to_dict()
    )
    jax.tree.map(np.testing.assert_array_equal, params_of(workdir, 0), official.to_tree(golden))


def test_bfloat16_is_close_to_float32(golden, tensors, tmp_path):
    """With the halves that the fixture's EMA holds: its own parameters amplify rounding to 0.3."""
    lightning = official.lightning(tensors, official.half(tensors))
    source = official.write_safetensors(tmp_path / "source", lightning)
    convert(source, official.run_config(golden), tmp_path / "run")
    single, config = flowdcn_jax.load_model(tmp_path / "run")
    params = nnx.to_pure_dict(nnx.state(single))
    halves = jax.tree.map(lambda leaf: leaf / 2, official.to_tree(golden))
    jax.tree.map(np.testing.assert_array_equal, params, halves)
    config.model.dtype = "bfloat16"
    graphdef, _ = models.abstract_model(config.model)
    out = run(golden, nnx.merge(graphdef, params))
    assert relative_error(out, run(golden, single)) < 2e-2


@pytest.mark.parametrize("file", ["model.npz", "sit.npz"])
def test_there_and_back_is_the_identity(converted, tmp_path, file):
    golden, workdir = converted(file)
    assert export(workdir, tmp_path / "out.safetensors") == 0
    written, expected = load_file(tmp_path / "out.safetensors"), official.state_dict(golden)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name].view(np.uint32), value.view(np.uint32))
    convert(tmp_path / "out.safetensors", official.run_config(golden), tmp_path / "again")
    assert tiny.checksums(tmp_path / "again", 0)["ema"] == tiny.checksums(workdir, 0)["ema"]


def test_the_origin_is_recorded(converted, fixture_file):
    _, workdir = converted("model.npz")
    origin = json.loads((workdir / "origin.json").read_text())
    assert origin == {
        "file": "source",
        "sha256": hashlib.sha256((workdir.parent / "source").read_bytes()).hexdigest(),
        "format": "state dict (safetensors)",
        "weights": "only",
        "image_size": 128,
        "flowdcn_jax": flowdcn_jax.__version__,
        "boundary": "truncate",
    }


@pytest.mark.parametrize("file, weights", [("pth", "ema"), ("ckpt", "ema"), ("ckpt", "model")])
def test_the_authors_files_give_their_outputs(golden, converted, tmp_path, file, weights):
    """Through PyTorch; the fixture's EMA is half of each parameter."""
    pytest.importorskip("torch", reason="PyTorch, which only its own files need")
    source = FIXTURES / f"official_tiny.{file}"
    origin = convert(source, official.run_config(golden), tmp_path / "run", weights=weights)
    assert origin["weights"] == ("only" if file == "pth" else weights)
    model, _ = flowdcn_jax.load_model(tmp_path / "run")
    expected, tolerance = official.nhwc(golden["out"]), FLOAT32_TOLERANCE["model.npz"]
    if (file, weights) == ("ckpt", "ema"):
        graphdef, _ = models.abstract_model(flowdcn_jax.load_model(tmp_path / "run")[1].model)
        halves = jax.tree.map(lambda leaf: leaf / 2, official.to_tree(golden))
        expected = run(golden, nnx.merge(graphdef, halves))
        assert relative_error(expected, official.nhwc(golden["out"])) > 0.1
        tolerance = 1e-6
    assert relative_error(run(golden, model), expected) < tolerance


def wave(shape):
    return 0.1 * np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder: `run`, whose EMA is not its parameters; ema and model.safetensors; `converted`."""
    folder = tmp_path_factory.mktemp("exported")
    config = tiny.config(model__boundary="truncate", model__num_classes=10)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    state = initial_state(config, mesh)
    # A model that has not been trained answers zero; this one does not.
    moved = jax.tree.map(lambda leaf: leaf + wave(leaf.shape), state.params)
    checkpointer = Checkpointer(str(folder / "run"), keep=1, keep_every_steps=None)
    checkpointer.save(state._replace(step=np.int32(7), ema=moved), config, None)
    checkpointer.close()
    assert export(folder / "run", folder / "ema.safetensors") == 7
    export(folder / "run", folder / "model.safetensors", weights="model", step=7)
    convert(folder / "ema.safetensors", tiny.config(), folder / "converted")
    return folder


def params_of(workdir, step, restore=checkpoint.restore_ema):
    weights = restore(str(workdir), step, lambda config: models.abstract_model(config.model)[1])
    return weights.params


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_ema_and_the_trained_weights_are_exported(exported):
    for weights, restore in (("ema", checkpoint.restore_ema), ("model", checkpoint.restore_params)):
        params = params_of(exported / "run", 7, restore)
        tensors = load_file(exported / f"{weights}.safetensors")
        weight = tensors["final_layer.linear.weight"]
        assert weight.any() == (weights == "ema")  # a model's head starts at zero
        np.testing.assert_array_equal(weight.T, params["final"]["linear"]["kernel"])
    assert_same(params_of(exported / "converted", 0), params_of(exported / "run", 7))
    for restore in (checkpoint.restore_ema, checkpoint.restore_params):
        assert_same(
            params_of(exported / "converted", None, restore), params_of(exported / "run", 7)
        )


def test_fine_tuning_starts_from_the_weights_and_they_outlive_its_checkpoints(
    exported, tmp_path, caplog
):
    """With another resolution, batch size and seed than they were converted with.

    The learning rate is so small that the steps hardly change the parameters. sample.py --step=0
    compares with the converted weights; they are no place to go on from, though.
    """
    workdir = shutil.copytree(exported / "converted", tmp_path / "run")
    config = tiny.config(
        model__boundary="truncate",
        data__image_size=10,
        optimizer__learning_rate=1e-30,
        train__num_steps=2,
        train__batch_size=8,
        checkpoint__every_steps=1,
        checkpoint__keep=1,
        seed=5,
    )
    tiny.train(config, workdir)
    assert "starting from the converted weights" in caplog.text
    assert tiny.steps(workdir) == [0, 2]
    weights = params_of(exported / "run", 7)
    assert_same(params_of(workdir, 0), weights)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-20)
    for restore in (checkpoint.restore_ema, checkpoint.restore_params):
        jax.tree.map(close, params_of(workdir, 2, restore), weights)
    (workdir / "checkpoints" / "2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="step 2: .*starts afresh from the conv"):
        tiny.train(config, workdir)
    assert tiny.steps(workdir) == [0, 2]


def test_a_state_of_weights_has_a_fresh_optimizer_and_is_split_over_the_devices(exported):
    config = tiny.config(model__boundary="truncate", train__batch_size=8)
    weights = params_of(exported / "run", 7)
    state = state_from_weights(config, make_mesh(), jax.tree.map(np.asarray, weights))
    assert_same(state.params, weights)
    assert_same(state.ema, weights)
    assert_same(state.opt_state, make_optimizer(config).init(weights))
    assert state.step == 0 and state.step.dtype == np.int32
    expected = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, make_mesh()))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == expected


def test_fine_tuning_keeps_the_model(exported, tmp_path):
    convert(exported / "ema.safetensors", tiny.config(), tmp_path / "run")
    differs = "change: config.model.boundary: 'truncate' -> 'zeros'. Use"
    with pytest.raises(ConfigError, match=differs):
        tiny.train(tiny.config(model__remat=True, train__batch_size=8), tmp_path / "run")
    assert tiny.steps(tmp_path / "run") == [0]


def test_converted_weights_are_sampled(exported, tmp_path):
    model = sampling.load_trained(exported / "converted")
    sampling.sample_to_folder(model, num_steps=1, image_size=(6, 10), num_images=2, out=tmp_path)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 6, 10, 1) and file["arr_0"].std() > 0


def test_an_export_of_16_bits_is_half_as_large_and_loses_the_last_digits(exported, tmp_path):
    file = tmp_path / "half.safetensors"
    export(exported / "run", file, dtype="float16")
    assert file.stat().st_size < 0.6 * (exported / "ema.safetensors").stat().st_size
    tensors = load_file(file)
    constants = {name for name, tensor in tensors.items() if tensor.dtype == np.float32}
    assert constants == {"blocks.0.attn.deformables_prior"}
    origin = convert(file, tiny.config(), tmp_path / "run")
    assert origin["dtype"] == "float16"
    rounded = params_of(tmp_path / "run", 0)
    whole = params_of(exported / "run", 7)
    assert_same(rounded, jax.tree.map(lambda leaf: np.float32(np.float16(leaf)), whole))
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {np.dtype(np.float32)}


def test_an_export_cannot_hold_what_its_dtype_cannot(exported, tmp_path):
    large = jax.tree.map(lambda leaf: 1e6 * leaf, params_of(exported / "run", 7))
    checkpoint.save_weights(tmp_path / "run", large, tiny.config())
    with pytest.raises(PublishedWeightsError, match="holds .*; expected at most 6.55e.04"):
        export(tmp_path / "run", tmp_path / "x.safetensors", dtype="float16")
    with pytest.raises(PublishedWeightsError, match="dtype is 'int8'; expected float32 or fl"):
        export(tmp_path / "run", tmp_path / "x.safetensors", dtype="int8")
    assert not (tmp_path / "x.safetensors").exists()


def test_exports_that_cannot_be_right_are_named(exported, tmp_path, caplog):
    config = tiny.config(model__max_scale=3.0)
    checkpoint.save_weights(tmp_path / "run", params_of(exported / "run", 7), config)
    with caplog.at_level(logging.WARNING):
        export(tmp_path / "run", tmp_path / "out.safetensors")
    assert "boundary='zeros'; the authors' code has 'truncate'" in caplog.text
    assert "max_scale=3.0; the authors' code has 6.0" in caplog.text
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoints"):
        export(tmp_path / "nowhere", tmp_path / "x.safetensors")
