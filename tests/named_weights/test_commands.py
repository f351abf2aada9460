"""The commands: from nothing to a labelled grid, then without a network; and tools.weights."""

import os
import time

import pytest

from flowdcn_jax.images import read_metadata
from tests import forked
from tests.named_weights import tiny_names

TINY = ["-m", "tests.named_weights.tiny_names"]


@pytest.fixture
def newcomer(server, tmp_path, monkeypatch):
    """newcomer(COMMAND, flags ...) -> (status, output), on a machine without any cache."""
    for name in [each for each in os.environ if each.startswith(("HF_", "FLOWDCN_CACHE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv(tiny_names.ADDRESS, server.url)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    return lambda *command: forked.run([*TINY, *command])


@pytest.mark.slow
def test_one_command_from_nothing_to_a_labelled_grid_then_without_a_network(
    newcomer, server, tmp_path, capsys
):
    drawn = ["sample", "--weights=tiny", "--classes=golden retriever,great_white_shark"]
    times = []
    for number, flags in enumerate(([], ["--offline"])):
        server.requests.clear()
        out, start_s = tmp_path / str(number), time.perf_counter()
        status, output = newcomer(*drawn, f"--out={out}", "--num_images=2", *flags)
        times.append(time.perf_counter() - start_s)
        assert status == 0, output
        assert output.splitlines()[-1] == str(out / "grid.png") and (out / "grid.png").is_file()
        assert "euler, 3 steps" in output  # published
        assert bool(server.requests) == (number == 0)
    read = read_metadata(tmp_path / "0" / "grid.png")
    assert read["settings"]["guidance"] == tiny_names.SETTINGS["guidance"]
    assert read["request"]["classes"] == ["golden retriever", "great_white_shark"]
    for name in ("samples.npz", "grid.png"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    _look_at_the_cache(newcomer, server, tmp_path / "user" / "flowdcn_jax" / "weights")
    with capsys.disabled():
        print(f" [from nothing {times[0]:.1f} s, then offline {times[1]:.1f} s] ", end="")


def _look_at_the_cache(newcomer, server, cache):
    """The other things that tools.weights does, with what is there."""
    status, output = newcomer("weights", "list")
    rows = {line.split()[0]: line for line in output.splitlines()}
    assert status == 0 and " converted " in rows["tiny"] and " fetched " in rows["tiny-vae"]
    assert " -  " in rows["tiny-url"]
    status, output = newcomer("weights", "where", "tiny-vae", "tiny", "--offline")
    decoder, workdir = output.splitlines()
    assert status == 0 and workdir == str(cache / "tiny" / "made" / "workdir")
    assert sorted(os.listdir(decoder)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert server.requests == []
    status, output = newcomer("weights", "remove", "tiny")
    assert status == 0 and "what the hub's client keeps stays: hf cache rm" in output
    assert os.listdir(cache / "tiny") == [".lock"]


@pytest.mark.parametrize(
    "command, message",
    [
        (["weights", "fetch", "tinny"], "'tinny' is no name of weights; the nearest are tiny"),
        (["weights", "fetch", "tiny", "--offline"], "and nothing is fetched offline"),
        (["sample", "--weights=tiny", "--workdir=x"], "give either --workdir=DIR, of a run, or --"),
    ],
)
def test_bad_requests_are_one_line(newcomer, command, message):
    status, output = newcomer(*command)
    assert status == 2 and message in output
    assert output.startswith("error: ") and output.count("\n") == 1
