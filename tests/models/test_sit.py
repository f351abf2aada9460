"""SiT against the authors' model, and what its users rely on."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from flowdcn_jax import models
from flowdcn_jax.models import sit
from tests.comparison import relative_error
from tests.official import nhwc

NAMES = {
    "x_embedder.proj": "stem",
    "t_embedder.mlp.0": "time_embedder.hidden",
    "t_embedder.mlp.2": "time_embedder.out",
    "attn.proj": "attention.out",
    "attn.qkv": "attention.qkv",
    "mlp.fc1": "mlp.hidden",
    "mlp.fc2": "mlp.out",
    "adaLN_modulation.1": "modulation",
    "final_layer": "final",
}


@pytest.fixture(scope="module")
def golden(fixture_file):
    return fixture_file("sit.npz")


def model_config(golden, **overrides):
    config = json.loads(str(golden["config"]))
    return ml_collections.ConfigDict(
        dict(
            name="sit",
            width=config["hidden_size"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            patch_size=config["patch_size"],
            in_channels=4,
            num_classes=config["num_classes"],
            learn_sigma=True,
            dtype="float32",
            remat=False,
        )
        | overrides
    )


@pytest.fixture(scope="module")
def params(golden):
    """The official tiny model's parameters, once they are known to fit."""
    tree: dict = {}
    for key, value in golden.items():
        name = key.removeprefix("param/")
        if name == key or name == "pos_embed":
            continue
        if name == "y_embedder.embedding_table.weight":
            name = "class_embedder.embedding"
        elif value.ndim == 4:
            name, value = "stem.kernel", value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        elif value.ndim == 2:
            name, value = name.replace(".weight", ".kernel"), value.T
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        *sections, last = (int(part) if part.isdecimal() else part for part in name.split("."))
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    _, abstract = models.abstract_model(model_config(golden))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, abstract)
    return tree


def run(golden, params, x=None, **overrides):
    graphdef, _ = models.abstract_model(model_config(golden, **overrides))
    x = nhwc(golden["x"]) if x is None else x
    return models.apply_model(graphdef, params, x, golden["t"], golden["y"])


def test_output_matches_official(golden, params):
    assert relative_error(run(golden, params), nhwc(golden["out"])) < 1e-5


def test_positions_match_official(golden):
    ours = sit.position_embedding(8, 8, 48)
    np.testing.assert_allclose(ours.reshape(1, 64, 48), golden["param/pos_embed"], atol=1e-7)


def test_positions_of_other_sizes_are_the_same_coordinates():
    large = sit.position_embedding(16, 12, 48)
    np.testing.assert_array_equal(large[:8, :8], sit.position_embedding(8, 8, 48))
    np.testing.assert_array_equal(large[3, 9, :24], large[11, 9, :24])  # the column
    np.testing.assert_array_equal(large[3, 9, 24:], large[3, 2, 24:])  # the row
