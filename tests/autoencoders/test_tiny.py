"""The TAESD family: real TAEF2 weights, and the structure of all from random ones."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file

from flowdcn_jax.autoencoders import tiny
from tests.autoencoders.conftest import (
    CHANNELS,
    WIDTH,
    decode,
    encode,
    nhwc,
    random_tensors,
    write_pair,
    write_single,
)
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Layers of taesd.py that hold tensors, by their number.
ENCODER_CONVS, ENCODER_BLOCKS = {0, 2, 6, 10, 14}, {1, 3, 4, 5, 7, 8, 9, 11, 12, 13}
DECODER_CONVS, DECODER_BLOCKS = {1, 7, 12, 17, 19}, {3, 4, 5, 8, 9, 10, 13, 14, 15, 18}
WITHOUT_BIAS = {"encoder": {2, 6, 10}, "decoder": {7, 12, 17}}
WITH_NORM = {"encoder": {11, 12, 13}, "decoder": {3, 4, 5}}


@pytest.fixture(scope="module")
def real_folder():
    folder = os.environ.get("FLOWDCN_TEST_DATA")
    if not folder or not Path(folder, "taef2_encoder.safetensors").is_file():
        pytest.skip("set FLOWDCN_TEST_DATA to the folder of taef2_{encoder,decoder}.safetensors")
    return folder


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_real_taef2(real_folder, load, fixture_file, dtype, tolerance):
    golden = {name: nhwc(array) for name, array in fixture_file("taef2.npz").items()}
    taef2 = load("taef2", real_folder, dtype=dtype)
    latents, std = encode(taef2, golden["x"] * 2 - 1)
    assert relative_error(latents, golden["latent"]) < tolerance
    assert not std.any()
    images = decode(taef2, golden["latent"])
    assert images.dtype == latents.dtype == jnp.float32
    expected = np.clip(golden["decoded"], 0, 1)
    assert relative_error(images * 0.5 + 0.5, expected) < tolerance
    assert (taef2.scale, taef2.shift, taef2.channels, taef2.downsampling) == (1, 0, 32, 8)


@pytest.fixture(scope="module", params=CHANNELS)
def random_pair(request, tmp_path_factory, load):
    """(name, tensors, autoencoder) of random weights."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    tensors = random_tensors(name)
    write_pair(tensors, folder, name)
    return name, tensors, load(name, str(folder))


def convolve(x, weight, bias=None, stride=1):
    """NCHW, in NumPy."""
    side = weight.shape[2]
    pad = (side // 2,) * 2
    x = np.pad(x, [(0, 0), (0, 0), pad, pad])
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(2, 3))
    x = np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], weight, optimize=True)
    return x if bias is None else x + bias[:, None, None]


def reference(tensors, half, x, num_layers):
    """taesd.py's layer by layer interpretation of its numbered tensors, NCHW."""
    for layer in range(num_layers):
        prefix = f"{half}.{layer}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if "pool.0.weight" in own:
            hidden = convolve(x, own["pool.0.weight"])
            groups = hidden.reshape(hidden.shape[0], 4, -1)
            centred = groups - groups.mean(2, keepdims=True)
            groups = centred / np.sqrt(centred.var(2, keepdims=True) + 1e-5)
            hidden = groups.reshape(hidden.shape) * own["pool.1.weight"][:, None, None]
            hidden = hidden + own["pool.1.bias"][:, None, None]
            x = x + convolve(np.maximum(hidden, 0), own["pool.3.weight"])
        if "conv.0.weight" in own:
            hidden = x
            for index in (0, 2, 4):
                hidden = convolve(hidden, own[f"conv.{index}.weight"], own[f"conv.{index}.bias"])
                hidden = np.maximum(hidden, 0) if index < 4 else hidden
            x = np.maximum(hidden + x, 0)
        elif "weight" in own:
            halves = half == "encoder" and "bias" not in own
            x = convolve(x, own["weight"], own.get("bias"), stride=2 if halves else 1)
        elif layer == 0:
            x = np.tanh(x / 3) * 3
        elif layer == 2:
            x = np.maximum(x, 0)
        else:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
    return x


def test_matches_a_plain_interpretation_of_the_tensors(random_pair):
    name, tensors, autoencoder = random_pair
    generator = np.random.default_rng(1)
    images = generator.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    latents, std = encode(autoencoder, images)
    assert latents.shape == (2, 2, 3, CHANNELS[name]) and not std.any()
    expected = reference(tensors, "encoder", images.transpose(0, 3, 1, 2) / 2 + 0.5, 15)
    assert relative_error(latents, nhwc(expected)) < 1e-5

    x = 4 * generator.normal(size=latents.shape).astype(np.float32)
    expected = nhwc(reference(tensors, "decoder", x.transpose(0, 3, 1, 2), 20)) * 2 - 1
    assert (np.abs(expected) < 1).mean() > 0.2  # most of the test is not clipped away
    assert relative_error(decode(autoencoder, x), np.clip(expected, -1, 1)) < 1e-5


def test_names_and_shapes_are_the_publishers(random_pair):
    name, tensors, _ = random_pair
    expected = {}

    def add_conv(prefix, shape, bias=True):
        expected[f"{prefix}.weight"] = shape
        if bias:
            expected[f"{prefix}.bias"] = shape[:1]

    layers = {
        "encoder": (ENCODER_CONVS, ENCODER_BLOCKS),
        "decoder": (DECODER_CONVS, DECODER_BLOCKS),
    }
    for half, (convs, blocks) in layers.items():
        for index in convs:
            ends = {("encoder", 0): (WIDTH, 3), ("encoder", 14): (CHANNELS[name], WIDTH)}
            ends |= {("decoder", 1): (WIDTH, CHANNELS[name]), ("decoder", 19): (3, WIDTH)}
            sides = ends.get((half, index), (WIDTH, WIDTH))
            add_conv(f"{half}.{index}", (*sides, 3, 3), index not in WITHOUT_BIAS[half])
        for index in blocks:
            for conv in (0, 2, 4):
                add_conv(f"{half}.{index}.conv.{conv}", (WIDTH, WIDTH, 3, 3))
            if name == "taef2" and index in WITH_NORM[half]:
                add_conv(f"{half}.{index}.pool.0", (4 * WIDTH, WIDTH, 1, 1), bias=False)
                add_conv(f"{half}.{index}.pool.1", (4 * WIDTH,))
                add_conv(f"{half}.{index}.pool.3", (WIDTH, 4 * WIDTH, 1, 1), bias=False)
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected


@pytest.mark.parametrize("file_name", ["diffusion_pytorch_model.safetensors", "{}.safetensors"])
def test_both_layouts_give_the_same(random_pair, load, tmp_path, file_name):
    name, tensors, autoencoder = random_pair
    path = tmp_path / file_name.format(name)
    write_single(tensors, path)
    assert "decoder.layers.0.weight" in load_file(path)
    for weights in (path, tmp_path):
        other = load(name, str(weights))
        jax.tree.map(np.testing.assert_array_equal, other.params, autoencoder.params)


def test_half_precision_files_and_compute(load, tmp_path):
    """The publisher's float16 tensors become float32 parameters; bfloat16 compute stays close."""
    tensors = {k: v.astype(np.float16) for k, v in random_tensors("taef2").items()}
    write_pair(tensors, tmp_path, "taef2")
    exact, half = (load("taef2", str(tmp_path), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(np.float32)}
    x = np.random.default_rng(2).normal(size=(1, 2, 3, 32)).astype(np.float32)
    images = decode(half, x)
    assert images.dtype == jnp.float32
    assert 1e-4 < relative_error(images, decode(exact, x)) < 5e-2


def test_parameters_as_the_taesd_readme_counts_them():
    sizes = tiny.TinySizes(3, 4, 64, midblock_norm=False)
    model = nnx.eval_shape(lambda: tiny.AutoencoderTiny(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    for half, expected in (("encoder", 1_222_532), ("decoder", 1_222_531)):
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(getattr(model, half))))
        assert sum(np.prod(leaf.shape) for leaf in flat.values()) == expected
