"""Reading weight files: every form gives the same tensors, and what cannot be read is named."""

import argparse
import builtins
import logging
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flowdcn_jax.published_weights import PublishedWeightsError, weights_file
from flowdcn_jax.published_weights.names import official_tensors
from flowdcn_jax.published_weights.selection import select_weights, warn_of_unused
from flowdcn_jax.published_weights.weights_file import open_weights_file
from tests import official
from tests.official import half, lightning, under

FIXTURES = Path(__file__).parent.parent / "fixtures"
BIAS = "blocks.1.attn.out.bias"


@pytest.fixture(scope="module")
def expected(golden):
    return official_tensors(official.model_config(golden), tokens_per_side=8)


def read(path, which, expected):
    """(format, which, arrays by name)."""
    weights = select_weights(open_weights_file(path), which, expected)
    warn_of_unused(weights)
    arrays = {name: tensor.read() for name, tensor in weights.tensors.items()}
    for name, tensor in weights.tensors.items():
        assert arrays[name].shape == tensor.shape and str(arrays[name].dtype) == tensor.dtype
    return weights.format, weights.which, arrays


def assert_same(actual, tensors, constants=None):
    """Bit for bit; the priors, which the fixtures' EMA halves too, are those of the state dict."""
    assert actual.keys() == tensors.keys()
    for name, value in tensors.items():
        kept = constants is not None and name.endswith("deformables_prior")
        np.testing.assert_array_equal(actual[name], constants[name] if kept else value)


def test_a_state_dict_with_or_without_the_checkpoints_prefix(tensors, write, expected):
    for prefix in ("", "denoiser."):
        for which in ("ema", "model"):
            form, found, arrays = read(write(under(prefix, tensors)), which, expected)
            assert (form, found) == ("state dict", "only")
            assert_same(arrays, tensors)


def test_a_lightning_checkpoint(tensors, write, expected, caplog):
    path = write(lightning(tensors, half(tensors)))
    form, found, arrays = read(path, "ema", expected)
    assert (form, found) == ("Lightning checkpoint", "ema")
    assert_same(arrays, half(tensors), constants=tensors)
    assert "blocks.0.attn.deformables_prior; those of the state dict" in caplog.text
    _, found, arrays = read(path, "model", expected)
    assert found == "model"
    assert_same(arrays, tensors)


def test_an_ema_with_the_right_constants_warns_of_nothing(tensors, write, expected, caplog):
    with caplog.at_level(logging.WARNING):
        read(write(lightning(tensors, tensors)), "ema", expected)
    assert not caplog.text


def test_a_checkpoint_of_sits_training(tensors, write, expected):
    path = write(under("model.", tensors) | under("ema.", half(tensors)))
    form, found, arrays = read(path, "ema", expected)
    assert (form, found) == ("SiT checkpoint", "ema")
    assert_same(arrays, half(tensors))
    assert_same(read(path, "model", expected)[2], tensors)
    only = r"one set of weights, model\.\*; --weights=model takes it"
    with pytest.raises(PublishedWeightsError, match=only):
        read(write(under("model.", tensors)), "ema", expected)


@pytest.mark.parametrize("prefix", ["model.", "ema."])
def test_a_state_dict_with_a_name_of_sits_sets_is_a_state_dict(tensors, write, expected, prefix):
    more = {f"{prefix}extra": np.zeros(3, np.float32)}
    form, found, arrays = read(write(tensors | more), "ema", expected)
    assert (form, found) == ("state dict", "only") and arrays.keys() == (tensors | more).keys()


@pytest.mark.parametrize("beyond", ["", "state_dict."])
def test_a_tensor_with_two_names_is_refused(tensors, write, expected, beyond):
    twice = under(f"{beyond}denoiser.", tensors) | {f"{beyond}{BIAS}": tensors[BIAS] + 7}
    with pytest.raises(PublishedWeightsError, match=f"holds {BIAS} twice, with the prefix denoi"):
        read(write(twice), "model", expected)


def test_an_ema_list_that_does_not_go_with_the_state_dict(tensors, write, expected):
    def ema_of(values):
        return lightning(tensors, dict(enumerate(values)))

    values = list(half(tensors).values())
    with pytest.raises(PublishedWeightsError, match="EMA list has 64 tensors .* state dict 65"):
        read(write(ema_of(values[1:])), "ema", expected)
    values[2], values[3] = values[3], values[2]
    with pytest.raises(PublishedWeightsError) as caught:
        read(write(ema_of(values)), "ema", expected)
    assert "tensor 2 of the source's EMA list has shape (64,); expected (64, 256)" in str(
        caught.value
    )
    assert "t_embedder.mlp.0.weight" in str(caught.value)
    one_set = r"one set of weights, state_dict\.\*, and no EMA .*; --weights=model takes it"
    with pytest.raises(PublishedWeightsError, match=one_set):
        read(write(under("state_dict.denoiser.", tensors)), "ema", expected)


def test_an_ema_that_is_no_list_is_refused(tensors, write, expected):
    state = under("state_dict.denoiser.", tensors)
    by_name = state | under("optimizer_states.0.ema.", tensors)
    with pytest.raises(PublishedWeightsError, match="EMA has a tensor 'blocks.0.*; expected a li"):
        read(write(by_name), "ema", expected)
    gap = lightning(tensors, tensors)
    gap["optimizer_states.0.ema.99"] = gap.pop("optimizer_states.0.ema.64")
    with pytest.raises(PublishedWeightsError, match="tensor '99' among its 65; .* are 0 to 64"):
        read(write(gap), "ema", expected)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.999999])
def test_truncated_safetensors(tensors, write, share):
    path = write(tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PublishedWeightsError, match="not a whole safetensors|neither a PyTorch"):
        open_weights_file(path)


def test_files_of_other_kinds_are_named(tmp_path):
    with pytest.raises(PublishedWeightsError, match="no.pth cannot be read: No such file"):
        open_weights_file(tmp_path / "no.pth")
    with pytest.raises(PublishedWeightsError, match="cannot be read: Is a directory"):
        open_weights_file(tmp_path)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(PublishedWeightsError, match="pointer that Git LFS leaves"):
        open_weights_file(tmp_path / "pointer.pth")


def test_without_pytorch_its_files_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PublishedWeightsError, match="not installed. Install its CPU build"):
        open_weights_file(FIXTURES / "official_tiny.pth")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch, which only its own files need")


def test_an_old_pytorch_is_named(monkeypatch):
    """And the file is not called damaged."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.4.1+cpu"))
    with pytest.raises(PublishedWeightsError, match=r"2.4.1\+cpu is installed; expected 2.5 or"):
        open_weights_file(FIXTURES / "official_tiny.pth")


def test_a_pytorch_that_does_not_load_is_named(monkeypatch):
    def import_(name, *args):
        if name == "torch":
            raise OSError("libgomp.so.1: cannot open shared object file")
        return original(name, *args)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", import_)
    with pytest.raises(PublishedWeightsError, match="installed cannot be loaded: libgomp.so.1"):
        open_weights_file(FIXTURES / "official_tiny.pth")


def test_the_authors_files(torch, tensors, expected):
    form, found, arrays = read(FIXTURES / "official_tiny.pth", "ema", expected)
    assert (form, found) == ("state dict", "only")
    assert_same(arrays, tensors)
    form, found, arrays = read(FIXTURES / "official_tiny.ckpt", "ema", expected)
    assert (form, found) == ("Lightning checkpoint", "ema")
    assert_same(arrays, half(tensors), constants=tensors)
    assert_same(read(FIXTURES / "official_tiny.ckpt", "model", expected)[2], tensors)


def test_files_are_mapped_anew_as_they_are_read(torch, tensors, expected, monkeypatch):
    loads = []
    monkeypatch.setattr(weights_file, "REMAP_BYTES", 100_000)  # the file has 1 MB, not 128
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (loads.append(k["mmap"]), load(*a, **k))[1])
    assert_same(read(FIXTURES / "official_tiny.pth", "ema", expected)[2], tensors)
    assert loads == [True] * 8  # a MB of tensors, of which four are of 98 KB


def test_an_ema_list_follows_the_state_dicts_own_order(torch, tensors, tmp_path, expected):
    backwards = dict(reversed(tensors.items()))
    state = {f"denoiser.{name}": torch.from_numpy(v) for name, v in backwards.items()}
    ema = tuple(torch.from_numpy(v) for v in half(backwards).values())
    tree = {"state_dict": state, "optimizer_states": [{"ema": ema}]}
    torch.save(tree, tmp_path / "x.ckpt")
    arrays = read(tmp_path / "x.ckpt", "ema", expected)[2]
    assert_same(arrays, half(tensors), constants=tensors)


def test_pytorchs_old_format_and_the_arguments_in_sits_checkpoints(
    torch, tensors, tmp_path, expected
):
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read(tmp_path / "old.pt", "ema", expected)[2], tensors)
    tree = {"ema": state, "model": state, "args": argparse.Namespace(model="SiT-XL/2")}
    torch.save(tree, tmp_path / "0400000.pt")
    assert read(tmp_path / "0400000.pt", "ema", expected)[0] == "SiT checkpoint"


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated_pytorch_files(torch, tmp_path, share):
    content = (FIXTURES / "official_tiny.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(PublishedWeightsError, match="cut.pth cannot be read: it is truncated"):
        open_weights_file(tmp_path / "cut.pth")


@pytest.mark.parametrize("file", ["official_tiny.pth", "official_tiny.ckpt"])
def test_a_changed_bit_in_a_pytorch_file_is_found(torch, tensors, tmp_path, file):
    """PyTorch itself reads such a file without a word."""
    content = bytearray((FIXTURES / file).read_bytes())
    content[content.find(tensors["blocks.0.mlp.w1.weight"].tobytes()) + 3] ^= 0x40
    (tmp_path / file).write_bytes(content)
    torch.load(tmp_path / file, weights_only=True, mmap=True)
    with pytest.raises(PublishedWeightsError, match=r"truncated or damaged \(Bad CRC-32.*/data/"):
        open_weights_file(tmp_path / file)


def test_pytorch_files_that_were_saved_without_checksums_are_read(torch, tmp_path):
    torch.serialization.set_crc32_options(False)
    torch.save({"weight": torch.ones(3)}, tmp_path / "x.pth")
    torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(open_weights_file(tmp_path / "x.pth").tensors["weight"].read(), 1)


@pytest.mark.parametrize("kind", ["sparse", "without data"])
def test_tensors_that_are_no_arrays_are_named(torch, tmp_path, kind):
    tensor = torch.zeros(64)
    tensor = tensor.to_sparse() if kind == "sparse" else tensor.to("meta")
    torch.save({BIAS: tensor}, tmp_path / "x.pth")
    with pytest.raises(PublishedWeightsError, match=f"{BIAS} of the source cannot be read as an"):
        open_weights_file(tmp_path / "x.pth").tensors[BIAS].read()


def test_names_that_nesting_makes_equal_are_refused(torch, tmp_path):
    torch.save({"a": {"b": torch.zeros(2)}, "a.b": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(PublishedWeightsError, match="x.pth holds two tensors named a.b"):
        open_weights_file(tmp_path / "x.pth")


def test_running_out_of_memory_is_not_called_damage(torch, monkeypatch):
    def exhausted(*args, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    with pytest.raises(MemoryError):
        open_weights_file(FIXTURES / "official_tiny.pth")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(torch, tmp_path):
    bomb = Bomb(tmp_path / "harm")
    torch.save({"weight": torch.zeros(2), "more": bomb}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"more": bomb}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(PublishedWeightsError) as caught:
            open_weights_file(tmp_path / name)
        assert f"{name} is refused" in str(caught.value)
        assert "mkdir" in str(caught.value) and "\n" not in str(caught.value)
        assert "save the weights alone: tree = torch.load(FILE" in str(caught.value)
    assert not (tmp_path / "harm").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # it would have
    assert (tmp_path / "harm").exists()
