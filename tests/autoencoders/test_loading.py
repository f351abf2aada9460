"""load_autoencoder: what it offers, and what it refuses."""

import hashlib
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from configs import default
from flowdcn_jax.autoencoders import (
    AutoencoderError,
    WeightsNotFoundError,
    check_fits,
    load_autoencoder,
)
from flowdcn_jax.data.prepared import Encoder
from flowdcn_jax.errors import ConfigError
from tests.autoencoders.conftest import SD_VAE, decode, encode, random_tensors, write_pair

FILE = "diffusion_pytorch_model.safetensors"


def test_identity_passes_pixels(load):
    identity = load("identity", downsampling=1)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 5, 1)).astype(np.float32)
    mean, std = encode(identity, images)
    np.testing.assert_array_equal(mean, images)
    assert std.shape == images.shape and not std.any()
    np.testing.assert_array_equal(decode(identity, 2 * images), np.clip(2 * images, -1, 1))
    assert (identity.params, identity.weights_sha256) == ({}, None)
    assert (identity.scale, identity.shift, identity.downsampling) == (1, 0, 1)


def test_preview_shows_three_channels_of_latents_and_encodes_nothing(load):
    preview = load("preview", downsampling=16)
    assert preview.downsampling == 16
    images = decode(preview, np.full((1, 2, 3, 4), -1.5, np.float32))
    np.testing.assert_array_equal(images, np.full((1, 2, 3, 3), -0.5))
    with pytest.raises(AutoencoderError, match="'preview', which cannot encode"):
        preview.encode({}, np.zeros((1, 8, 8, 3)))


def test_identity_and_preview_need_no_other_keys():
    for name, downsampling in (("identity", 1), ("preview", 8)):
        load_autoencoder(ConfigDict(dict(name=name, downsampling=downsampling)))


def test_hash_is_of_the_files_in_order(load, taesd_folder):
    halves = [taesd_folder / f"taesd_{half}.safetensors" for half in ("encoder", "decoder")]
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in halves)).hexdigest()
    assert load("taesd", str(taesd_folder)).weights_sha256 == expected


@pytest.mark.parametrize(
    "name, sources",
    [
        ("sd_vae", [f"{FILE} and config.json from", "huggingface.co/stabilityai/sd-vae-ft-ema"]),
        ("taesd", [f"{FILE} from https://huggingface.co/madebyollin/taesd"]),
        ("taef1", [f"{FILE} from https://huggingface.co/madebyollin/taef1"]),
        ("taef2", ["taef2.safetensors from https://huggingface.co/madebyollin/taef2"]),
    ],
)
def test_missing_weights_say_what_to_fetch_and_which_key_to_set(load, tmp_path, name, sources):
    missing = str(tmp_path / "no")
    for weights, problem in (
        (None, "config.autoencoder.weights is None"),
        (missing, f"config.autoencoder.weights is {missing!r}, which is not there"),
        (
            str(tmp_path),
            f"config.autoencoder.weights is {str(tmp_path)!r}, a folder without {FILE}",
        ),
    ):
        with pytest.raises(WeightsNotFoundError) as caught:
            load(name, weights)
        for part in (
            problem,
            *sources,
            "set config.autoencoder.weights",
            "cache_latents: --autoencoder_weights",
        ):
            assert part in str(caught.value)


def rewrite(folder, name, change):
    """The SD-VAE fixture (or a random tiny autoencoder) with its tensors changed by `change`."""
    if name == "sd_vae":
        tensors = load_file(SD_VAE / FILE)
        (folder / "config.json").write_text((SD_VAE / "config.json").read_text())
    else:
        tensors = random_tensors(name)
    change(tensors)
    if name == "sd_vae":
        save_file(tensors, folder / FILE)
    else:
        write_pair(tensors, folder, name)


CHANGES = [
    ("sd_vae", lambda t: t.pop("quant_conv.bias"), "lacks quant_conv.bias"),
    (
        "sd_vae",
        lambda t: t.pop("encoder.conv_in.weight"),
        "no AutoencoderKL: it has no convolution 'encoder.conv_in.weight'",
    ),
    (
        "sd_vae",
        lambda t: t.update({"decoder.more.weight": np.ones(2, np.float32)}),
        "holds decoder.more.weight, which has no place",
    ),
    (
        "sd_vae",
        lambda t: t.update({"decoder.conv_out.weight": np.ones((3, 8, 3, 1), np.float32)}),
        r"decoder.conv_out.weight of .* has shape \(3, 8, 3, 1\); expected \(3, 8, 3, 3\)",
    ),
    (
        "sd_vae",
        lambda t: t.update({"encoder.conv_norm_out.bias": np.ones(31, np.float32)}),
        r"encoder.conv_norm_out.bias of .* has shape \(31,\); expected \(32,\)",
    ),
    (
        "sd_vae",
        lambda t: t.update({"quant_conv.bias": np.ones(8, np.int32)}),
        "quant_conv.bias of .* has dtype int32; expected floating point",
    ),
    (
        "taesd",
        lambda t: [t.pop(f"decoder.{i}.conv.0.weight") for i in (3, 4, 5, 8)],
        r"lacks decoder.3.conv.0.weight, decoder.4.conv.0.weight, \S+ and 1 more",
    ),
    ("taef2", lambda t: t.pop("encoder.11.pool.0.weight"), "lacks encoder.11.pool.0.weight"),
    ("taef2", lambda t: t.pop("encoder.14.weight"), "TAESD family.* 'encoder.14.weight'"),
    (
        "taesd",
        lambda t: t.update({"encoder.15.bias": np.ones(2, np.float32)}),
        "holds encoder.15.bias, which has no place",
    ),
]


@pytest.mark.parametrize("name, change, message", CHANGES)
def test_every_tensor_is_accounted_for(load, tmp_path, name, change, message):
    rewrite(tmp_path, name, change)
    with pytest.raises(AutoencoderError, match=message) as caught:
        load(name, str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_no_safetensors(load, tmp_path):
    (tmp_path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(AutoencoderError, match=f"{FILE} is not a whole safetensors file"):
        load("sd_vae", str(tmp_path))
    whole = (SD_VAE / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AutoencoderError, match="not a whole safetensors file"):
        load("sd_vae", str(tmp_path))
    (tmp_path / FILE).write_bytes(whole)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(AutoencoderError, match="config.json is not the config.json of diffusers"):
        load("sd_vae", str(tmp_path))


def test_weights_of_another_name_are_refused(load, taesd_folder, tmp_path):
    write_pair(random_tensors("taef1"), tmp_path, "taesd")
    with pytest.raises(AutoencoderError, match="to 16 latent channels; .*'taesd' goes from 3 to 4"):
        load("taesd", str(tmp_path))
    with pytest.raises(AutoencoderError, match="no AutoencoderKL"):
        load("sd_vae", str(taesd_folder / "taesd_encoder.safetensors"))


def test_name_and_downsampling_are_checked(load, taesd_folder):
    with pytest.raises(
        ConfigError, match="name is 'sdvae'; expected one of identity, preview, sd_vae"
    ):
        load("sdvae")
    for name, weights, expected in (("taesd", str(taesd_folder), 8), ("identity", None, 1)):
        with pytest.raises(ConfigError, match=f"downsampling is 4; expected {expected}"):
            load(name, weights, downsampling=4)


@pytest.mark.parametrize("size", [(12, 16), (16, 4), (0, 8)])
def test_image_sides_must_be_divisible(load, taesd_folder, size):
    autoencoder = load("taesd", str(taesd_folder))
    with pytest.raises(AutoencoderError, match=f"images are {size[0]}x{size[1]}; .*multiples of 8"):
        autoencoder.encode(autoencoder.params, np.zeros((1, *size, 3), np.float32))


def test_the_model_must_have_the_channels_of_the_latents(load):
    config, sd_vae = default.get_config(), load("sd_vae", str(SD_VAE))
    check_fits(sd_vae, config)
    config.model.in_channels = 32
    with pytest.raises(ConfigError, match="in_channels is 32; expected 4, the latent channels of"):
        check_fits(sd_vae, config)
    check_fits(load("preview"), config)


@pytest.fixture(scope="module")
def rescaled(load, tmp_path_factory):
    """The SD-VAE fixture with the scale of SDXL's autoencoder, and a shift."""
    folder = tmp_path_factory.mktemp("rescaled")
    (folder / FILE).write_bytes((SD_VAE / FILE).read_bytes())
    sizes = json.loads((SD_VAE / "config.json").read_text())
    sizes |= dict(scaling_factor=0.13025, shift_factor=0.06)
    (folder / "config.json").write_text(json.dumps(sizes))
    return load("sd_vae", str(folder))


def test_an_autoencoder_decodes_its_own_latents_and_those_of_its_space(
    load, taesd_folder, rescaled
):
    config = default.get_config()
    taesd, sd_vae = load("taesd", str(taesd_folder)), load("sd_vae", str(SD_VAE))
    for one in (taesd, sd_vae):
        for other in (taesd, sd_vae):
            check_fits(one, config, origin=other)
    check_fits(rescaled, config, origin=rescaled)
    check_fits(load("preview"), config, origin=rescaled)
    for one, other in ((rescaled, sd_vae), (sd_vae, rescaled)):
        with pytest.raises(
            ConfigError,
            match=f"weights are sd_vae with scale {one.scale} and shift {one.shift:g}; expected "
            f".*sd_vae with scale {other.scale} and shift {other.shift:g}",
        ):
            check_fits(one, config, origin=other)
    for one, other in ((rescaled, taesd), (taesd, rescaled)):
        with pytest.raises(ConfigError, match=f"{one.name!r}; .* which {other.name} with scale"):
            check_fits(one, config, origin=other)


def test_latents_of_an_unknown_autoencoder_are_not_decoded(load, taesd_folder):
    origin = Encoder("mine", None, 1.0, 0.0)
    with pytest.raises(ConfigError, match="which mine with scale 1 and shift 0 encoded.*'preview'"):
        check_fits(load("taesd", str(taesd_folder)), default.get_config(), origin=origin)


def test_other_weights_of_one_name_are_warned_of(load, taesd_folder, caplog):
    """The decoder of sd-vae-ft-mse is right for the latents of sd-vae-ft-ema."""
    taesd = load("taesd", str(taesd_folder))
    for digest in (taesd.weights_sha256, None):
        origin = Encoder("taesd", digest, 1.0, 0.0)
        check_fits(taesd, default.get_config(), origin=origin)
        assert not caplog.text
    check_fits(taesd, default.get_config(), origin=origin._replace(weights_sha256="12ab"))
    assert "SHA-256 12ab; config.autoencoder.weights have " + taesd.weights_sha256 in caplog.text
