"""Models, decoders and feature networks by name, from a server to pictures."""

import hashlib
import json

import jax
import numpy as np
import pytest
from flax import nnx

import flowdcn_jax
from flowdcn_jax import sampling, weights_flags
from flowdcn_jax.autoencoders.autoencoder import PUBLISHED
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation.features import (
    NETWORKS,
    FeaturesError,
    WeightsNotFoundError,
    load_features,
)
from flowdcn_jax.named_weights import NamedWeightsError, table, transfer
from flowdcn_jax.published_weights import weights_file
from flowdcn_jax.runs.checkpoint import CheckpointError
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling import SamplingError, Settings, named_model
from tests import official
from tests.named_weights import tiny_names

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_name_is_its_files_with_the_published_settings(cache, server, files, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    trained = flowdcn_jax.load_trained("tiny", mesh=mesh)
    assert server.requests == []  # nothing until it is needed
    expected = tiny_names.golden()
    classes = "param/y_embedder.embedding_table.weight"
    rows = trained.checkpoint.config.model.num_classes + 1
    expected[classes] = np.resize(expected[classes], (rows, expected[classes].shape[1]))
    expected["config"] = json.dumps(json.loads(str(expected["config"])) | {"num_classes": rows - 1})
    same = np.testing.assert_array_equal
    jax.tree.map(same, trained.weights.params, official.to_tree(expected))
    config = trained.weights.config.copy_and_resolve_references()
    config.autoencoder.name = "sd_vae"
    assert trained.checkpoint.config.to_json() == config.to_json()  # it was known before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NamedWeightsError, match="diffusion_pytorch_model.* nothing is fetched"):
        _ = trained.autoencoder
    monkeypatch.delenv("HF_HUB_OFFLINE")
    weights = files["/owner/vae/diffusion_pytorch_model.safetensors"]
    assert trained.autoencoder.weights_sha256 == hashlib.sha256(weights).hexdigest()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.requests.clear()
    model, config = flowdcn_jax.load_model("tiny")
    jax.tree.map(same, nnx.to_pure_dict(nnx.state(model)), trained.weights.params)
    assert config == trained.weights.config and server.requests == []
    assert str(trained.samples) == "samples/tiny"  # not in the cache


def test_what_is_given_comes_before_what_is_published(cache):
    model = flowdcn_jax.load_trained("tiny")
    filled = vars(model.fill_settings(Settings()))
    assert tiny_names.SETTINGS.items() <= filled.items()
    filled = model.fill_settings(Settings(guidance=4.0, guidance_channels="all", last_step=0.5))
    assert (filled.guidance, filled.guidance_channels, filled.num_steps) == (4.0, "all", 3)
    assert filled.last_step == 0.5
    filled = model.fill_settings(Settings(num_steps=7))  # the last step was of the others
    assert (filled.num_steps, filled.last_step, filled.sampler) == (7, None, "euler")
    through = named_model.with_published(Settings(), model.published, through="num_steps")
    assert (through.num_steps, through.last_step, through.guidance) == (None, None, 1.5)


BAD = {
    "classes names 'golden retreiver'.*nearest are golden retriever": dict(
        classes="golden retreiver"
    ),
    "step is 3; expected none: tiny has one checkpoint": dict(step=3),
    "ema is 'power_0.1'; expected none": dict(ema="power_0.1"),
    "guide_step is 1 without guide_workdir; expected both": dict(guide_step=1),
    "image_size is 100x100; expected HxW, both multiples of 16": dict(image_size="100x100"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_refused_before_anything_is_fetched(cache, server, message):
    with pytest.raises(SamplingError, match=message):
        flowdcn_jax.generate("tiny", progress=False, **BAD[message])
    assert server.requests == [] and not cache.exists()


def test_a_missing_pytorch_and_other_kinds_are_told_before_anything_is_fetched(
    cache, server, monkeypatch
):
    with pytest.raises(NamedWeightsError, match="tiny-vae is the tiny SD-VAE; expected a model"):
        flowdcn_jax.load_trained("tiny-vae")
    monkeypatch.setattr(weights_file, "TORCH_SUFFIXES", (".safetensors",))
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="tiny.safetensors is a PyTorch file, and PyTorch"):
        flowdcn_jax.load_trained("tiny")
    assert server.requests == []


def test_a_job_of_several_processes_does_not_fetch(cache, monkeypatch):
    monkeypatch.setattr(named_model.jax, "process_count", lambda: 2)
    with pytest.raises(NamedWeightsError, match="weights fetch tiny first"):
        flowdcn_jax.load_trained("tiny")


def test_a_damaged_workdir_is_converted_anew_and_a_changed_decoder_refused(
    cache, server, files, caplog
):
    workdir = named_model.named_workdir("tiny")
    damaged = next(path for path in sorted(workdir.rglob("*")) if path.stat().st_size > 5000)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    assert named_model.named_workdir("tiny") == workdir and "is made anew" in caplog.text
    assert damaged.is_file() or workdir.is_dir()
    decoder = named_model.decoder_folder("tiny") / "config.json"
    decoder.write_text("{}")
    server.files["/owner/vae/config.json"] = b"{}"
    with pytest.raises(transfer.SourceChangedError, match="config.json of .* --accept_change"):
        named_model.decoder_folder("tiny")


def test_a_folder_of_the_name_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(CheckpointError, match="tiny holds no checkpoints"):
        flowdcn_jax.load_trained("tiny")


def test_weights_is_a_name_or_the_folder_of_one_run(cache, tmp_path):
    assert weights_flags._named_or_folder("tiny") == "tiny"
    mine = tmp_path / "mine"
    for name in ("first", "second"):
        (mine / name / "checkpoints").mkdir(parents=True)
    assert weights_flags._named_or_folder(str(mine / "first")) == str(mine / "first")
    for given, message in (
        (str(mine), "no run's folder, .*; it holds first, second: name one of them"),
        (str(tmp_path / "no"), "no is not there; expected a run's folder, or a name"),
        ("tiniest", "'tiniest' is no name of weights; the nearest are tiny"),
    ):
        with pytest.raises(UserError, match=message):
            weights_flags._named_or_folder(given)


def test_the_published_table_fits_the_rest_of_the_project():
    for name, weights in table.TABLE.items():
        assert all(
            file.limit_bytes > 0 and bool(file.repo) != bool(file.url) for file in weights.files
        )
        if weights.kind == table.FEATURES:
            assert weights.of in NETWORKS
        elif weights.kind == table.DECODER:
            known = PUBLISHED[weights.of]
            assert {weights.files[0].name} <= {
                name for each in known.files for name in each.values()
            }
        else:
            config = named_model.named_config(name)
            assert config.data.image_size == weights.resolution
            settings = named_model.with_published(Settings(), weights.settings)
            filled = vars(sampling.fill_settings(settings, config))
            assert weights.settings.items() <= filled.items()
            assert PUBLISHED[config.autoencoder.name].channels == config.model.in_channels
    assert {known.by_name for known in PUBLISHED.values()} <= table.TABLE.keys()


def test_feature_networks_by_name(cache, server):
    features = load_features("dinov2", weights="tiny-dino")
    assert features.description.network == "dinov2"
    with pytest.raises(FeaturesError, match="are tiny-dino, of dinov2; expected those of i"):
        load_features("inception", weights="tiny-dino")
    with pytest.raises(NamedWeightsError, match="tiny-vae is the tiny SD-VAE; expected a feat"):
        load_features("inception", weights="tiny-vae")


def test_missing_weights_of_networks_name_what_fetches_them():
    with pytest.raises(WeightsNotFoundError, match="Or give the name inception, and it is fetched"):
        load_features("inception", weights=None)
