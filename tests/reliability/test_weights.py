"""Files of weights as hubs, training frameworks and careless hands leave them."""

import json
import re
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from flowdcn_jax.autoencoders import AutoencoderError, load_autoencoder
from flowdcn_jax.autoencoders.kl import _LDM_NAMES, from_ldm
from flowdcn_jax.published_weights.weights_file import PublishedWeightsError, open_weights_file
from flowdcn_jax.weight_names import plain_names
from tests.conftest import FIXTURES

SD_VAE = FIXTURES / "tiny_sd_vae"
FILE = "diffusion_pytorch_model.safetensors"


def load(weights):
    config = dict(name="sd_vae", weights=str(weights), dtype="float32", downsampling=8)
    return load_autoencoder(ConfigDict(config)).params


@pytest.fixture(scope="module")
def whole():
    return load(SD_VAE)


@pytest.fixture
def tensors():
    return load_file(SD_VAE / FILE)


def assert_same(found, expected, tolerance=0.0):
    leaves = [
        np.concatenate([leaf.ravel() for leaf in _leaves(tree)]) for tree in (found, expected)
    ]
    np.testing.assert_allclose(*leaves, rtol=tolerance, atol=tolerance)


def _leaves(tree):
    return [
        leaf
        for _, each in sorted(tree.items(), key=str)
        for leaf in (_leaves(each) if isinstance(each, dict) else [each])
    ]


def write(folder, tensors, name=FILE, config=b""):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    (folder / "config.json").write_bytes(config + (SD_VAE / "config.json").read_bytes())
    return folder


def test_half_precision_hub_caches_and_byte_order_marks_are_read(tmp_path, tensors, whole):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    folder = write(tmp_path / "half", half, "diffusion_pytorch_model.fp16.safetensors")
    assert_same(load(folder), whole, 1e-3)
    cache = tmp_path / "models--stabilityai--sd-vae-ft-ema"
    write(cache / "snapshots" / "31f26fd", tensors, config=b"\xef\xbb\xbf")
    assert_same(load(cache), whole)
    write(cache / "snapshots" / "ffff", half)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("31f26fd\n")
    assert_same(load(cache), whole)


def test_prefixes_of_wrappers_are_dropped_also_inside_names(tmp_path, tensors, whole):
    wrapped = {
        f"module._orig_mod.{name.replace('mid_block.', 'mid_block._orig_mod.')}": tensor
        for name, tensor in tensors.items()
    }
    assert_same(load(write(tmp_path, wrapped)), whole)
    assert open_weights_file(tmp_path / FILE).tensors.keys() == tensors.keys()
    assert plain_names(["a.submodule.b"]) == {"a.submodule.b": "a.submodule.b"}
    with pytest.raises(ValueError, match="holds a twice, as a and as module.a"):
        plain_names(["a", "module.a"])


def test_latent_diffusions_own_file_is_read(tmp_path, tensors, whole):
    ups = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks")})
    ldm = {}
    for name, tensor in tensors.items():
        new = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{ups - 1 - int(m[1])}", name)
        for old, theirs in (
            ("down_blocks", "down"),
            (".resnets.0.", ".block.0."),
            (".resnets.1.", ".block.1."),
            (".resnets.2.", ".block.2."),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("mid_block.block.0", "mid.block_1"),
            ("mid_block.block.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("attn_1.group_norm", "attn_1.norm"),
            ("attn_1.to_out.0", "attn_1.proj_out"),
            ("attn_1.to_", "attn_1."),
            ("attn_1.query", "attn_1.q"),
            ("attn_1.key", "attn_1.k"),
            ("attn_1.value", "attn_1.v"),
            ("attn_1.proj_attn", "attn_1.proj_out"),
        ):
            new = new.replace(old, theirs)
        if ".attn_1." in new and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        ldm[f"first_stage_model.{new}"] = tensor
    ldm["model.diffusion_model.out.2.bias"] = np.zeros(4, np.float32)
    assert_same(load(write(tmp_path, ldm)), whole)
    assert from_ldm(tensors) is tensors and _LDM_NAMES


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, tensors):
    tensors["decoder.conv_out.bias"][1] = np.nan
    with pytest.raises(AutoencoderError, match="^decoder.conv_out.bias of .* not finite"):
        load(write(tmp_path, tensors))


def test_types_that_numpy_has_not_and_pointers_are_one_line(tmp_path):
    header = json.dumps({"w": dict(dtype="F8_E4M3", shape=[4], data_offsets=[0, 4])}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    folder = shutil.copytree(SD_VAE, tmp_path / "vae")
    (folder / FILE).write_bytes(content)
    with pytest.raises(AutoencoderError, match="of a type that is not read .*expected float16"):
        load(folder)
    file = open_weights_file(folder / FILE)
    with pytest.raises(PublishedWeightsError, match="w of the source cannot be read as an array"):
        file.tensors["w"].read()
    (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(AutoencoderError, match="pointer that Git LFS leaves.*git lfs pull"):
        load(folder)
    with pytest.raises(PublishedWeightsError, match="pointer that Git LFS leaves.*git lfs pull"):
        open_weights_file(folder / FILE)
