"""A run's weights under the authors' names and back are the same function, whatever its options."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flowdcn_jax import models
from flowdcn_jax.config import model_config
from flowdcn_jax.published_weights import PublishedWeightsError, convert, export
from flowdcn_jax.runs import checkpoint
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dict(width=16, depth=1, in_channels=1, num_classes=10, dtype="float32")
PARTS = {"flowdcn": dict(num_groups=2), "flowcnn": dict(num_groups=2), "sit": dict(num_heads=2)}
# Of each model: options that are not the defaults', as many at once as go together.
SHARED = dict(
    width=32,
    depth=2,
    patch_size=1,
    in_channels=3,
    num_classes=3,
    learn_sigma=False,
    remat=True,
    dtype="bfloat16",
    gradient_dtype="bfloat16",
)
OPTIONS = [
    ("sit", {}),
    ("sit", SHARED | dict(num_heads=4, attention="xla")),
    ("flowdcn", {}),
    ("flowdcn", SHARED | dict(num_groups=4, max_scale=3.0, boundary="truncate")),
    pytest.param("flowdcn", dict(scale_prior="single_scale"), marks=pytest.mark.slow),
    pytest.param("flowdcn", dict(learn_scale_prior=False), marks=pytest.mark.slow),
]
NOT_PUBLISHED = [
    ("flowdcn", "norm", "layer_norm"),
    ("flowdcn", "mlp", "gelu"),
    ("flowdcn", "second_time", True),
    ("sit", "norm", "rms_norm"),
    ("sit", "mlp", "swiglu"),
    ("sit", "second_time", True),
    ("flowcnn", "kernel_size", 5),
]


def config_of(name, **options):
    return tiny.config(model=model_config(name) | SMALL | PARTS[name] | options)


def save(folder, config):
    """A workdir of random weights; learned priors are not those that they begin with."""
    params = models.random_params(models.abstract_model(config.model)[1])
    checkpoint.save_weights(folder, params, config)
    return folder


def outputs(workdir):
    """Of the model in a workdir as its own config describes it."""

    def shapes(config):
        return models.abstract_model(config.model)[1]

    weights = checkpoint.restore_ema(str(workdir), None, shapes)
    model = weights.config.model
    graphdef, _ = models.abstract_model(model)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, model.in_channels))
    inputs = x, np.array([0.2, 0.9], np.float32), np.array([1, model.num_classes])
    return compiled(graphdef)(weights.params, *inputs)


def compiled(graphdef):
    return jax.jit(lambda params, *inputs: models.apply_model(graphdef, params, *inputs))


def test_every_option_is_here():
    cases = [getattr(case, "values", case) for case in OPTIONS]
    there = {(name, key) for name, options in cases for key in options}
    there |= {(name, key) for name, key, _ in NOT_PUBLISHED}
    of_models = {(name, key) for name in PARTS for key in model_config(name) if key != "name"}
    assert {each for each in of_models if each[0] != "flowcnn"} <= there


@pytest.mark.parametrize("name, options", OPTIONS)
def test_outputs_are_the_same_bits(tmp_path, name, options):
    """The config of the way back says boundary="zeros", as a config's default does."""
    workdir = save(tmp_path / "run", config_of(name, **options))
    export(workdir, tmp_path / "out.safetensors")
    again = config_of(name, **{key: value for key, value in options.items() if key != "boundary"})
    convert(tmp_path / "out.safetensors", again, tmp_path / "again")
    expected = np.asarray(outputs(workdir))
    assert expected.std() > 0
    np.testing.assert_array_equal(outputs(tmp_path / "again"), expected)


@pytest.mark.parametrize("name, option, value", NOT_PUBLISHED)
def test_models_without_the_authors_names_are_refused(tmp_path, name, option, value):
    workdir = save(tmp_path / "run", config_of(name, **{option: value}))
    with pytest.raises(PublishedWeightsError, match="expected"):
        export(workdir, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.fixture(scope="module")
def zeros(tmp_path_factory):
    """A folder: `run`, trained with boundary="zeros"; its export; `bare`, without metadata."""
    folder = tmp_path_factory.mktemp("zeros")
    export(save(folder / "run", tiny.config()), folder / "out.safetensors")
    save_file(load_file(folder / "out.safetensors"), folder / "bare.safetensors")
    return folder


def boundary_of(workdir):
    return checkpoint.read_run(str(workdir), 0).config["model"]["boundary"]


def test_without_metadata_the_boundary_is_a_flag(zeros, tmp_path):
    for boundary, expected in [(None, "truncate"), ("truncate", "truncate"), ("zeros", "zeros")]:
        folder = tmp_path / str(boundary)
        origin = convert(zeros / "bare.safetensors", tiny.config(), folder, boundary=boundary)
        assert origin["boundary"] == boundary_of(folder) == expected


def test_what_contradicts_the_metadata_is_refused(zeros, tmp_path):
    source = zeros / "out.safetensors"
    for keys, boundary, expected in [
        ({}, "truncate", "config.model.boundary: 'zeros' -> 'truncate'"),
        (dict(model__max_scale=3.0), None, "config.model.max_scale: 6.0 -> 3.0"),
        (dict(data__image_size=16), None, "config.data.image_size: 8 -> 16"),
        (dict(model=tiny.SIT), None, "config.model.name: 'flowdcn' -> 'sit'"),
    ]:
        with pytest.raises(PublishedWeightsError, match=expected):
            convert(source, tiny.config(**keys), tmp_path / "run", boundary=boundary)
        assert not (tmp_path / "run").exists()
    with pytest.raises(PublishedWeightsError, match="--boundary is zeros; expected none for"):
        convert(source, tiny.config(model=tiny.SIT), tmp_path / "run", boundary="zeros")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', '{"data": {}}'])
def test_damaged_metadata_is_one_line(zeros, tmp_path, text):
    source = tmp_path / "source.safetensors"
    save_file(load_file(zeros / "out.safetensors"), source, metadata={"flowdcn_jax": text})
    with pytest.raises(PublishedWeightsError, match="metadata 'flowdcn_jax' is damaged"):
        convert(source, tiny.config(), tmp_path / "run")


def test_another_max_scale_than_the_authors_is_warned_of(zeros, tmp_path, caplog):
    convert(zeros / "bare.safetensors", tiny.config(model__max_scale=3.0), tmp_path / "run")
    assert "max_scale is 3.0; published weights were trained with 6.0" in caplog.text


def test_the_metadata_is_readable(zeros):
    with safe_open(zeros / "out.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    told = json.loads(metadata["flowdcn_jax"])
    assert told["model"]["boundary"] == "zeros" and told["data"] == {"image_size": 8}
