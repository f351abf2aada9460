"""AutoencoderKL against diffusers' own output."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

from flowdcn_jax.autoencoders import AutoencoderError, kl
from tests.autoencoders.conftest import SD_VAE, decode, encode, nhwc
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def golden(fixture_file):
    return {name: nhwc(array) for name, array in fixture_file("sd_vae.npz").items()}


@pytest.fixture(scope="module")
def vae(load):
    return load("sd_vae", str(SD_VAE))


def test_encode_matches_diffusers(vae, golden):
    mean, std = encode(vae, golden["x"])
    assert relative_error(mean, golden["mean"]) < 3e-6  # 1e-5 as the norms' epsilon: 5e-6
    assert relative_error(std, golden["std"]) < 1e-5
    assert relative_error(2 * np.log(std), golden["logvar"]) < 1e-5


def test_decode_matches_diffusers(vae, golden):
    """The module's output; the interface's is scaled and clipped."""
    tensors = load_file(SD_VAE / FILE)
    config = json.loads((SD_VAE / "config.json").read_text())
    sizes = kl.find_sizes(tensors, config, "here")
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: kl.AutoencoderKL(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    )
    decoded = jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))(
        vae.params, golden["z"]
    )
    assert relative_error(decoded, golden["decoded"]) < 3e-6


@pytest.mark.gpu
def test_matches_diffusers_on_a_gpu(vae, golden):
    """TF32 would be off by 1e-3."""
    mean, std = encode(vae, golden["x"])
    assert relative_error(mean, golden["mean"]) < 1e-5
    assert relative_error(std, golden["std"]) < 1e-5
    images = decode(vae, golden["z"] * vae.scale)
    assert relative_error(images, np.clip(golden["decoded"], -1, 1)) < 1e-5


def test_bfloat16_is_close_and_its_output_is_not_rounded(load, vae, golden):
    half = load("sd_vae", str(SD_VAE), dtype="bfloat16")
    mean, std = encode(half, golden["x"])
    assert mean.dtype == std.dtype == jnp.float32
    assert relative_error(mean, golden["mean"]) < 2e-2
    assert relative_error(std, golden["std"]) < 5e-2
    assert (mean != mean.astype(jnp.bfloat16)).mean() > 0.9
    images = decode(half, golden["z"] * 0.18215)
    assert images.dtype == jnp.float32
    assert relative_error(images, np.clip(golden["decoded"], -1, 1)) < 3e-2


def test_log_variances_are_clamped(vae, golden):
    params = jax.tree.map(np.copy, vae.params)
    params["quant_conv"]["bias"][4:] = [1e4, -1e4, 1e4, -1e4]
    _, std = jax.jit(vae.encode)(params, golden["x"])
    limits = np.exp([10, -15, 10, -15]).astype(np.float32)
    np.testing.assert_allclose(std, np.broadcast_to(limits, std.shape), rtol=1e-5)


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_names(tmp_path, load, vae, as_convolutions):
    """Files such as sd-vae-ft-ema's: query, key, value, proj_attn, as Linears or convolutions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(SD_VAE / FILE).items():
        for new_part, old_part in old.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        if as_convolutions and ".attentions." in name and tensor.ndim == 2:
            tensor = np.ascontiguousarray(tensor[:, :, None, None])
        renamed[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    save_file(renamed, tmp_path / FILE)
    (tmp_path / "config.json").write_text((SD_VAE / "config.json").read_text())
    assert_same_params(load("sd_vae", str(tmp_path)).params, vae.params)


def assert_same_params(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_file_is_as_good_as_its_folder(load, vae):
    other = load("sd_vae", str(SD_VAE / FILE))
    assert_same_params(other.params, vae.params)
    assert other.weights_sha256 == vae.weights_sha256
    assert (vae.downsampling, vae.channels, vae.scale, vae.shift) == (8, 4, 0.18215, 0.0)


def test_sizes_of_the_published_vae():
    """Parameters as the TAESD README counts those of the SD VAE, without the two quant convs."""
    sizes = kl.KLSizes(3, 4, (128, 256, 512, 512), 2, 32)
    model = nnx.eval_shape(lambda: kl.AutoencoderKL(sizes, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    for half, expected in (("encoder", 34_163_592), ("decoder", 49_490_179)):
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(getattr(model, half))))
        assert sum(np.prod(leaf.shape) for leaf in flat.values()) == expected


def write_changed(folder, **changes):
    config = json.loads((SD_VAE / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / FILE).symlink_to(SD_VAE / FILE)


def test_decode_undoes_scale_and_shift_and_clips(tmp_path, load, golden):
    """Here those of another config.json, so that neither can be forgotten."""
    write_changed(tmp_path, scaling_factor=0.13025, shift_factor=0.5)
    vae = load("sd_vae", str(tmp_path))
    assert (vae.scale, vae.shift) == (0.13025, 0.5)
    images = decode(vae, (golden["z"] - 0.5) * 0.13025)
    assert relative_error(images, np.clip(golden["decoded"], -1, 1)) < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(_class_name="VQModel"), "describes a VQModel; .* asks for a AutoencoderKL"),
        (dict(act_fn="gelu"), "act_fn='gelu'; expected 'silu'"),
        (dict(latents_mean=[0.1]), r"latents_mean=\[0.1\]; expected None"),
        (dict(block_out_channels=[8, 16]), r"block_out_channels=\[8, 16\]; expected \[8, 16, 32"),
        (dict(layers_per_block=3), "layers_per_block=3; expected 2"),
        (dict(norm_num_groups=3), r"widths \(8, 16, 32, 32\); expected multiples of the 3 groups"),
    ],
)
def test_other_architectures_are_refused(tmp_path, load, changes, message):
    write_changed(tmp_path, **changes)
    with pytest.raises(AutoencoderError, match=message):
        load("sd_vae", str(tmp_path))


def test_without_config_json_norms_have_32_groups(tmp_path, load):
    (tmp_path / FILE).symlink_to(SD_VAE / FILE)
    with pytest.raises(AutoencoderError, match="multiples of the 32 groups"):
        load("sd_vae", str(tmp_path))
