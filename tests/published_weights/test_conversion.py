"""From published weights to a workdir that samples and trains, and back."""

import functools
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

import flowdcn_jax
from configs import s2, xl2
from flowdcn_jax import models, sampling
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.published_weights import PublishedWeightsError, conversion, convert, export
from flowdcn_jax.published_weights.checks import check_tensors
from flowdcn_jax.published_weights.names import official_tensors
from flowdcn_jax.published_weights.source import StoredTensor
from flowdcn_jax.training import checkpoint, loop
from flowdcn_jax.training.sharding import make_mesh
from flowdcn_jax.training.state import abstract_state, initial_state, make_optimizer
from tests import official, tiny
from tests.comparison import relative_error

# Random parameters amplify rounding. Those of model.npz do a hundredfold (tests/models holds
# float64 to 1e-5); those of smax.npz, with 12 blocks, about 1e6-fold: moving them by 1e-7 of
# themselves moves the float64 output by 0.1, as far as it is from the recorded one (by 1e-12:
# 2.6e-6). Unlike weights: above 1.
FLOAT32_TOLERANCE = {"model.npz": 2e-5, "smax.npz": 0.2, "sit.npz": 1e-5}


@pytest.fixture(scope="module")
def converted(tmp_path_factory, fixture_file):
    """converted("model.npz") -> (fixture, workdir of its weights), once a module."""

    @functools.cache
    def convert_once(file):
        golden, folder = fixture_file(file), tmp_path_factory.mktemp("converted")
        source = official.write_safetensors(folder / "source", official.state_dict(golden))
        convert(source, official.run_config(golden), folder / "run")
        return golden, folder / "run"

    return convert_once


@functools.cache
def compiled(graphdef):
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))


def run(golden, model, suffix=""):
    graphdef, state = nnx.split(model)
    x = official.nhwc(golden["x" + suffix])
    return compiled(graphdef)(state, x, golden["t"], golden["y"])


@pytest.mark.parametrize(
    "file, suffix",
    [("model.npz", ""), ("model.npz", "_nonsquare"), ("smax.npz", "")]
    + [("smax.npz", "_nonsquare"), ("sit.npz", "")],
)
def test_converted_models_give_the_authors_outputs(converted, file, suffix):
    golden, workdir = converted(file)
    model, config = flowdcn_jax.load_model(workdir)
    if file != "sit.npz":
        assert config.model.boundary == "truncate"  # the config given says zeros
    expected = official.nhwc(golden["out" + suffix])
    assert relative_error(run(golden, model, suffix), expected) < FLOAT32_TOLERANCE[file]


def test_converted_parameters_are_those_that_other_tests_hold_to_the_outputs_and_gradients(
    converted,
):
    golden, workdir = converted("model.npz")
    model, _ = flowdcn_jax.load_model(workdir)
    params = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, params, official.to_tree(golden))


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
    out = run(golden, nnx.merge(graphdef, params), "_nonsquare")
    assert relative_error(out, run(golden, single, "_nonsquare")) < 2e-2


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


def test_another_resolution_than_the_trainings_is_refused(fixture_file, tmp_path):
    """By SiT's positions; FlowDCN's tensors do not tell it."""
    golden = fixture_file("sit.npz")
    source = official.write_safetensors(tmp_path / "source", official.state_dict(golden))
    config = official.run_config(golden)
    config.data.image_size *= 2
    with pytest.raises(PublishedWeightsError) as caught:
        convert(source, config, tmp_path / "run")
    assert str(caught.value) == (
        "the source was trained on images of 128 pixels a side (pos_embed has 8x8 tokens), and "
        "config.data.image_size is 256; convert with the config of the training's resolution, and "
        "draw other sizes with sample.py --image_size=HxW"
    )


def test_what_a_files_name_tells_against_the_config_is_pointed_out(
    golden, tensors, tmp_path, caplog
):
    config = official.run_config(golden)  # 128 pixels a side
    names = {
        "FlowDCN-XL-2M-R256.pth": "trained on images of 256 pixels a side, and .* is 128; if so",
        "DiT-XL-2-256x256.pt": "published DiT weights have SiT's tensors, but predict noise",
        "FlowDCN-R128.pth": None,
        "edited_traditional.pth": None,
    }
    for number, (name, message) in enumerate(names.items()):
        caplog.clear()
        source = official.write_safetensors(tmp_path / name, tensors)
        origin = convert(source, config, tmp_path / f"run{number}")
        assert origin["image_size"] == 128
        assert re.search(message, caplog.text) if message else not caplog.text
    conversion.warn_of_dit("configs/dit_xl2.py")
    assert "dit_xl2.py: published DiT weights" in caplog.text


def changed(tensors, name, value):
    return tensors | {name: value}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BIAS = "blocks.1.attn.out.bias"
FIXTURES = Path(__file__).parent.parent / "fixtures"
PRIOR = "blocks.2.attn.deformables_prior"
FAULTS = {
    "extra": (
        lambda t: t | {"blocks.1.attn.out.gamma": t[BIAS]},
        r"blocks.1.attn.out.gamma of the source, of shape \(64,\), is not of the model$",
    ),
    "missing": (lambda t: without(t, BIAS), rf"{BIAS} is missing .*; expected shape \(64,\)$"),
    "misshapen": (
        lambda t: changed(t, BIAS, t[BIAS][:-1]),
        rf"{BIAS} has shape \(63,\) in the source; expected \(64,\)$",
    ),
    "transposed": (
        lambda t: changed(t, "final_layer.linear.weight", t["final_layer.linear.weight"].T.copy()),
        r"linear.weight has shape \(64, 32\) in the source; expected \(32, 64\)$",
    ),
    "float16": (
        lambda t: {name: value.astype(np.float16) for name, value in t.items()},
        "not float32: .*float16.* and 62 more. Published weights are float32",
    ),
    "one float64": (
        lambda t: changed(t, BIAS, t[BIAS].astype(np.float64)),
        f"not float32: {BIAS} is float64",
    ),
    "not finite": (
        lambda t: changed(t, BIAS, t[BIAS] * np.float32(np.inf)),
        f"{BIAS} of the source holds values that are not finite",
    ),
    "another prior": (
        lambda t: changed(t, PRIOR, t[PRIOR][..., ::-1].copy()),
        f"{PRIOR} of the source differs by up to 2 from the constant",
    ),
    "16-bit EMA of a float32 checkpoint": (
        lambda t: official.lightning(t, {k: v.astype(np.float16) for k, v in t.items()}),
        "not float32: .*float16.* and 59 more. Published",
    ),
    "no number of a block": (
        lambda t: {"blocks.norm.weight": t[BIAS]},
        r"x_embedder.proj.weight is missing .*; and 63 more$",
    ),
    "another prefix": (
        lambda t: official.under("net.", t),
        r"all names of the source begin with net.; expected them without it; x_embedder.* missing",
    ),
    "half of the blocks": (
        lambda t: {name: value for name, value in t.items() if not name.startswith("blocks.2")},
        r"looks like a model with depth=2 \(config.model.depth is 3\); blocks.2.norm1.weight is",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_corrupted_sources_are_refused_before_anything_is_written(golden, tensors, write, fault):
    corrupt, message = FAULTS[fault]
    source = write(corrupt(tensors))
    workdir = source.parent / "new" / "run"
    with pytest.raises(PublishedWeightsError, match=message):
        convert(source, official.run_config(golden), workdir)
    assert list(source.parent.iterdir()) == [source]


def test_another_table_of_positions_is_refused(fixture_file, write):
    golden = fixture_file("sit.npz")
    tensors = official.state_dict(golden)
    source = write(changed(tensors, "pos_embed", tensors["pos_embed"] * np.float32(1.01)))
    with pytest.raises(PublishedWeightsError, match="pos_embed .* differs by up to 0.01"):
        convert(source, official.run_config(golden), source.parent / "run")


def test_a_wrong_size_is_named_in_one_message():
    """S weights for XL: 500 tensors that do not fit."""
    small = official_tensors(s2.get_config().model, tokens_per_side=16)
    stored = {name: StoredTensor(tensor.shape, "float32", None) for name, tensor in small.items()}
    config = xl2.get_config().model
    with pytest.raises(PublishedWeightsError) as caught:
        check_tensors(stored, official_tensors(config, tokens_per_side=16), config)
    assert str(caught.value).startswith(
        "the source does not fit the config: it looks like a model with width=384 "
        "(config.model.width is 1152), depth=12 (config.model.depth is 28), num_groups=6 "
        "(config.model.num_groups is 16); blocks.12.norm1.weight is missing from the source"
    )
    assert len(str(caught.value)) < 700


def test_a_wrong_model_is_named_in_one_message(fixture_file, write, tensors):
    config = official.run_config(fixture_file("sit.npz"))
    with pytest.raises(
        PublishedWeightsError, match=r"name='flowdcn' \(config.model.name is 'sit'\)"
    ):
        convert(write(tensors), config, "unused")


def test_folders_that_are_taken_are_refused(golden, tensors, write, converted):
    source, config = write(tensors), official.run_config(golden)
    _, workdir = converted("model.npz")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(PublishedWeightsError, match="run is not empty; expected a new or empty"):
        convert(source, config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    with pytest.raises(PublishedWeightsError, match="source.safetensors is a file"):
        convert(source, config, source / "run")
    (source.parent / "empty").mkdir()
    convert(source, config, source.parent / "empty")
    assert tiny.steps(source.parent / "empty") == [0]


def test_a_failure_while_writing_leaves_nothing(golden, tensors, write, monkeypatch):
    def fail(workdir, params, config):
        (workdir / "checkpoints").mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match="run cannot be written: No space left"):
        convert(source, official.run_config(golden), source.parent / "run")
    assert list(source.parent.iterdir()) == [source]


def test_a_full_disk_is_found_before_the_work(golden, tensors, write, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match="run has 0 MB free; expected 2 MB, as"):
        convert(source, official.run_config(golden), source.parent / "new" / "run")
    assert list(source.parent.iterdir()) == [source]


def test_exports_are_checked_before_the_work(converted, tmp_path, monkeypatch):
    _, workdir = converted("model.npz")
    (tmp_path / "file").touch()
    target = tmp_path / "new" / "x.safetensors"
    with monkeypatch.context() as patch:  # nothing is restored for a bad target
        patch.setattr(checkpoint, "restore_ema", None)
        with pytest.raises(PublishedWeightsError, match="--export=.* is a folder; expected a"):
            export(workdir, tmp_path)
        with pytest.raises(PublishedWeightsError, match="cannot be made a folder: .* a file"):
            export(workdir, tmp_path / "file" / "x.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(PublishedWeightsError, match="safetensors has 0 MB free; expected 1 MB"):
            export(workdir, target)
    assert not target.parent.exists()

    def fail(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(conversion, "save_file", fail)
    with pytest.raises(PublishedWeightsError, match="x.safetensors cannot be written: No sp"):
        export(workdir, target)
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_fills_while_orbax_writes_is_one_line(
    golden, tensors, write, monkeypatch, caplog
):
    """Orbax raises a ValueError, and logs a page in each of its threads."""

    def fail(workdir, params, config):
        logging.getLogger("absl").error("a page")
        raise ValueError("RESOURCE_EXHAUSTED: ... [No space left on device] ... ")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match="run cannot be written: No space left on dev"):
        convert(source, official.run_config(golden), source.parent / "run")
    assert list(source.parent.iterdir()) == [source] and "page" not in caplog.text


def test_bad_configs_are_refused(golden, tensors, write):
    config = official.run_config(golden)
    config.data.image_size = 100
    with pytest.raises(ConfigError, match="image_size is 100; expected a multiple of 16"):
        convert(write(tensors), config, "unused")
    config = official.run_config(golden)
    config.model.max_scale = 3.0
    with pytest.raises(PublishedWeightsError, match="max_scale is 3.0; expected 6.0, with which"):
        convert("unused", config, "unused")
    with pytest.raises(PublishedWeightsError, match="weights is 'best'; expected ema or model"):
        convert("unused", config, "unused", weights="best")


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
    checkpointer = checkpoint.Checkpointer(str(folder / "run"), keep=1, keep_every_steps=None)
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


def test_fine_tuning_starts_from_the_weights_with_a_fresh_optimizer(exported, monkeypatch, caplog):
    """With another batch size, seed and data than those that they were converted with."""
    started = []
    monkeypatch.setattr(loop._Run, "train", lambda run, state: started.append(state))
    config = tiny.config(
        model__boundary="truncate", train__batch_size=8, data__num_threads=2, seed=5
    )
    loop.train(config, str(exported / "converted"))
    assert "starting from the converted weights" in caplog.text
    (state,) = started
    weights = params_of(exported / "run", 7)
    assert_same(state.params, weights)
    assert_same(state.ema, weights)
    assert_same(state.opt_state, make_optimizer(config.optimizer).init(weights))
    assert state.step == 0 and state.step.dtype == np.int32
    expected = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, make_mesh()))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == expected


def test_fine_tuning_keeps_the_model(exported, tmp_path):
    convert(exported / "ema.safetensors", tiny.config(), tmp_path / "run")
    with pytest.raises(ConfigError, match="config.model.boundary: truncate -> zeros"):
        loop.train(tiny.config(train__batch_size=8), str(tmp_path / "run"))
    assert tiny.steps(tmp_path / "run") == [0]


def test_the_converted_weights_outlive_the_checkpoints_of_fine_tuning(exported, tmp_path):
    """sample.py --step=0 compares with them; they are no place to go on from, though."""
    workdir = shutil.copytree(exported / "converted", tmp_path / "run")
    config = tiny.config(model__boundary="truncate")
    state = initial_state(config, make_mesh(1, 1, jax.devices()[:1]))
    checkpointer = checkpoint.Checkpointer(str(workdir), keep=1, keep_every_steps=None)
    for step in (2, 4, 6):
        checkpointer.save(state._replace(step=np.int32(step)), config, None)
    checkpointer.close()
    assert tiny.steps(workdir) == [0, 6]
    assert_same(params_of(workdir, 0), params_of(exported / "run", 7))
    (workdir / "checkpoints" / "6" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="step 6: .*starts afresh from the conv"):
        loop.train(config, str(workdir))
    assert tiny.steps(workdir) == [0, 6]


def test_converted_weights_are_sampled(exported, tmp_path):
    settings = sampling.Settings(num_steps=1, image_size=(6, 10))
    sampling.sample_to_folder(exported / "converted", settings, num_images=2, out=tmp_path)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 6, 10, 1) and file["arr_0"].std() > 0


def test_exports_that_cannot_be_right_are_named(exported, tmp_path, caplog):
    config = tiny.config(model__max_scale=3.0)
    checkpoint.save_weights(tmp_path / "run", params_of(exported / "run", 7), config)
    with caplog.at_level(logging.WARNING):
        export(tmp_path / "run", tmp_path / "out.safetensors")
    assert "boundary='zeros'; the authors' code has 'truncate'" in caplog.text
    assert "max_scale=3.0; the authors' code has 6.0" in caplog.text
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoints"):
        export(tmp_path / "nowhere", tmp_path / "x.safetensors")
