"""Each feature network gives what its reference gave, from the pixels on."""

import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from flowdcn_jax.evaluation.features import NETWORKS, dinov2
from flowdcn_jax.evaluation.features.preprocessing import tf1_matrix
from tests.comparison import relative_error
from tests.evaluation.conftest import TINY_DINOV2

DINOV2_SIZES = ["32x32", "256x256", "300x200"]
LITE_SIZES = ["32x32", "96x128", "256x256"]


def preprocess(name, images, protocol="adm"):
    return jax.jit(NETWORKS[name].preprocessing[protocol].apply)(images)


@pytest.fixture(scope="module")
def inception(inception_file, load):
    return load("inception", inception_file)


@pytest.mark.parametrize("size", ["64", "256", "rect", "299"])
def test_inception_matches_torch_fidelity(inception, fixture_file, size):
    golden = fixture_file("inception.npz")
    outputs = inception(golden[f"{size}/images"])
    spatial = golden[f"{size}/spatial"].reshape(2, 7, 17, 17).transpose(0, 2, 3, 1).reshape(2, -1)
    assert relative_error(outputs["pool"], golden[f"{size}/pool"]) < 1e-5
    assert relative_error(outputs["spatial"], spatial) < 1e-5
    assert relative_error(outputs["logits"], golden[f"{size}/logits_unbiased"]) < 1e-5
    np.testing.assert_array_equal(outputs["features"], outputs["pool"])
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float32)}
    assert outputs.keys() == inception.description.outputs.keys()
    assert inception.num_features == 2048


@pytest.mark.parametrize("size, new_size", [(1, 4), (5, 13), (13, 5), (7, 7), (12, 4)])
def test_tensorflows_bilinear_resize(size, new_size):
    """Between the pixels at floor(i * size / new_size) and after it, without half a pixel."""
    pixels, resized = np.random.default_rng(0).uniform(0, 255, size), []
    for i in range(new_size):
        below, share = divmod(i * size / new_size, 1)
        after = pixels[min(int(below) + 1, size - 1)]
        resized.append((1 - share) * pixels[int(below)] + share * after)
    assert relative_error(tf1_matrix(size, new_size) @ pixels, resized) < 1e-6


@pytest.fixture(scope="module")
def tiny_dinov2(load):
    return load("dinov2", TINY_DINOV2)


@pytest.mark.parametrize("size", DINOV2_SIZES)
def test_dinov2_matches_edm2(tiny_dinov2, fixture_file, size):
    golden = fixture_file("dinov2.npz")
    images = golden[f"{size}/images"]
    features = tiny_dinov2(images)["features"]
    assert relative_error(features, golden[f"{size}/cls"]) < 1e-5
    assert relative_error(features, golden[f"{size}/cls_transformers"]) > 0.05
    pixels = preprocess("dinov2", images)[0].transpose(2, 0, 1)
    assert relative_error(pixels, golden[f"{size}/pixel_values_0"]) < 2e-6


def test_positions_are_fitted_as_the_authors_do(dinov2_tensors, fixture_file):
    table = dinov2_tensors["embeddings.position_embeddings"]
    fitted = dinov2.fit_positions(table, source="it")
    expected = fixture_file("dinov2.npz")["position_embedding"]
    assert relative_error(fitted[0], expected) < 5e-6
    np.testing.assert_array_equal(dinov2.fit_positions(fitted, source="it"), fitted)


def hub_tensors(tensors):
    """The tensors by the names in the authors' file."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, hub in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer", "blocks"),
            ("attention.output.dense", "attn.proj"),
            ("attention.attention", "attn"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("layernorm", "norm"),
        ):
            name = name.replace(theirs, hub)
        renamed[name] = tensor
    for query in [name for name in renamed if "attn.query" in name]:
        parts = [renamed.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        renamed[query.replace("query", "qkv")] = np.concatenate(parts)
    return renamed


def test_the_authors_file_gives_the_same(tiny_dinov2, dinov2_tensors, load, write_dinov2):
    tensors = hub_tensors(dinov2_tensors)
    assert {"blocks.0.attn.qkv.weight", "blocks.2.ls1.gamma", "mask_token"} <= tensors.keys()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    path = write_dinov2(tensors)
    features = load("dinov2", path)(images)["features"]
    np.testing.assert_array_equal(features, tiny_dinov2(images)["features"])
    path.with_name("config.json").unlink()
    build, _ = dinov2.read(tensors, path)
    assert build.args == (dinov2.Sizes(width=64, depth=3, num_heads=1),)  # 64 channels a head


def test_the_published_dinov2_is_a_vit_l():
    """304.4 M parameters with the 37 x 37 positions of the file and its mask token."""
    network = nnx.eval_shape(
        lambda: dinov2.DINOv2(dinov2.VIT_L, dtype=np.float32, rngs=nnx.Rngs(0))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(network))))
    assert count + (37**2 - 16**2) * 1024 + 1024 == 304_368_640


def test_torch_fidelity_resizes_otherwise_for_dinov2(tiny_dinov2, load):
    theirs = load("dinov2", TINY_DINOV2, protocol="torch_fidelity")
    assert "TensorFlow 1" in theirs.description.preprocessing
    assert "bicubic" in tiny_dinov2.description.preprocessing
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    same, other = tiny_dinov2(images)["features"], theirs(images)["features"]
    assert relative_error(other, same) < 1e-6  # there is nothing to resize
    images = images[:, :200]
    assert relative_error(theirs(images)["features"], tiny_dinov2(images)["features"]) > 1e-3


@pytest.mark.parametrize("size", LITE_SIZES)
def test_efficientnets_resize(fixture_file, size):
    golden = fixture_file("efficientnet_lite0.npz")
    pixels = preprocess("efficientnet_lite0", golden[f"{size}/images"]) * 128 + 127
    assert relative_error(pixels[:, ::7, ::7], golden[f"{size}/resized_s7"]) < 1e-6


@pytest.fixture(scope="module")
def lite_architecture(fixture_file):
    return json.loads(str(fixture_file("efficientnet_lite0.npz")["architecture"]))


def lite_reference(layers, tensors, x):
    """(features, logits) of the layers that the fixture lists, NCHW with its explicit padding."""

    def conv(x, name, norm, *, padding=(0, 0, 0, 0), stride=1, relu=True):
        weight = tensors[f"{name}.weight"]
        groups = 1 if weight.shape[1] == x.shape[1] else x.shape[1]
        pads = (padding[:2], padding[2:])
        x = jax.lax.conv_general_dilated(
            x, weight, (stride, stride), pads, feature_group_count=groups
        )
        mean, variance, gain, bias = (
            tensors[f"{norm}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / np.sqrt(variance + 1e-3) * gain + bias
        return jax.numpy.clip(x, 0, 6) if relu else x

    stem, *blocks, _, _, _ = layers
    x = conv(x, "_conv_stem", "_bn0", padding=stem["pad_top_bottom_left_right"], stride=2)
    for block in blocks:
        name, options = block["name"], dict(stride=block["stride"])
        hidden = x
        if block["expand"] > 1:
            hidden = conv(x, f"{name}._expand_conv", f"{name}._bn0")
        options["padding"] = block["pad_top_bottom_left_right"]
        hidden = conv(hidden, f"{name}._depthwise_conv", f"{name}._bn1", **options)
        hidden = conv(hidden, f"{name}._project_conv", f"{name}._bn2", relu=False)
        x = x + hidden if block["skip"] else hidden
    features = conv(x, "_conv_head", "_bn1").mean((2, 3))
    return features, features @ tensors["_fc.weight"].T + tensors["_fc.bias"]


def lite_shapes(layers):
    """{name of a tensor: shape} of the layers that the fixture lists."""
    shapes = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}

    def add(name, norm, *shape):
        shapes[f"{name}.weight"] = shape
        for part in ("running_mean", "running_var", "weight", "bias"):
            shapes[f"{norm}.{part}"] = shape[:1]

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    add("_conv_head", "_bn1", 1280, 320, 1, 1)
    for block in layers[1:-3]:
        name, size, width = block["name"], block["kernel"], block["in_channels"] * block["expand"]
        if block["expand"] > 1:
            add(f"{name}._expand_conv", f"{name}._bn0", width, block["in_channels"], 1, 1)
        add(f"{name}._depthwise_conv", f"{name}._bn1", width, 1, size, size)
        add(f"{name}._project_conv", f"{name}._bn2", block["out_channels"], width, 1, 1)
    return shapes


def test_efficientnet_is_what_the_fixture_lists(lite_architecture, load, tmp_path):
    """With random weights; those of the next tests are not in the repository."""
    layers, generator, tensors = lite_architecture["layers"], np.random.default_rng(0), {}
    for name, shape in lite_shapes(layers).items():
        deviation = 0.1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:]))
        drawn = deviation * generator.standard_normal(shape)
        offset = name.endswith("var") or ("_bn" in name and name.endswith("weight"))
        tensors[name] = np.float32(1 + np.abs(drawn) if offset else drawn)
    assert len(tensors) == lite_architecture["tensors"]
    save_file(tensors, tmp_path / "efficientnet_lite0.safetensors")
    images = generator.integers(0, 256, (1, 64, 48, 3), np.uint8)
    outputs = load("efficientnet_lite0", tmp_path, batch_size=1)(images)
    x = preprocess("efficientnet_lite0", images).transpose(0, 3, 1, 2)
    features, logits = jax.jit(lambda x: lite_reference(layers, tensors, x))(x)
    assert relative_error(outputs["features"], features) < 1e-5
    assert relative_error(outputs["logits"], logits) < 1e-5


@pytest.fixture(scope="module")
def lite(test_data, load):
    """With the real weights."""
    return load("efficientnet_lite0", test_data)


@pytest.mark.parametrize("size", LITE_SIZES)
def test_efficientnet_matches_its_pytorch_port(lite, fixture_file, lite_architecture, size):
    golden = fixture_file("efficientnet_lite0.npz")
    outputs = lite(golden[f"{size}/images"])
    assert relative_error(outputs["features"], golden[f"{size}/features"]) < 1e-5
    assert relative_error(outputs["logits"], golden[f"{size}/logits"]) < 1e-5
    assert lite.description.weights_sha256 == lite_architecture["sha256"]


@pytest.mark.slow
def test_efficientnet_knows_the_photos(load, test_data):
    """86.8 % of a photo a class, cropped in the middle; TensorFlow's padding is worth 6 %."""
    with np.load(test_data / "imagenet_samples_jpeg.npz") as file:
        data, offsets, labels = file["jpeg_bytes"], file["offsets"], file["labels"]
    crops = []
    for first, last in zip(offsets[:-1], offsets[1:], strict=True):
        photo = np.asarray(Image.open(io.BytesIO(data[first:last].tobytes())).convert("RGB"))
        top, left = ((side - 224) // 2 for side in photo.shape[:2])
        crops.append(photo[top : top + 224, left : left + 224])
    lite = load("efficientnet_lite0", test_data, batch_size=40)
    found = lite(np.stack(crops))["logits"].argmax(axis=1)
    assert (found == labels).mean() == pytest.approx(0.868, abs=0.002)
