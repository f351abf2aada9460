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
    with capsys.disabled():
        print(
            f" [from nothing {times[0]:.1f} s, again without a network {times[1]:.1f} s] ", end=""
        )


def test_weights_list_fetch_where_and_remove(newcomer, server, tmp_path):
    status, output = newcomer("weights", "list")
    row = next(line for line in output.splitlines() if line.startswith("tiny "))
    assert status == 0 and "MIT" in row and " -  " in row
    status, output = newcomer("weights", "fetch", "tiny")  # and the decoder
    cache = tmp_path / "user" / "flowdcn_jax" / "weights"
    assert status == 0 and output.splitlines()[-1] == str(cache / "tiny" / "made" / "workdir")
    server.requests.clear()
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
        (["weights", "where", "tiny"], "tiny is not in the cache; python -m flowdcn_jax.tools.wei"),
        (
            ["weights", "frob"],
            "'frob' is nothing to do; expected one of list, fetch, where, remove",
        ),
        (["weights", "fetch"], "fetch takes the name of weights"),
        (["weights", "fetch", "tiny", "--offline"], "and nothing is fetched offline"),
        (["sample", "--weights=tiny", "--workdir=x"], "give either --workdir=DIR, of a run, or --"),
        (["sample", "--weights=tiniest"], "'tiniest' is no name of weights; the nearest are tiny"),
        (
            ["sample", "--weights=no/such"],
            "--weights=no/such is not there; expected a run's folder",
        ),
    ],
)
def test_bad_requests_are_one_line(newcomer, command, message):
    status, output = newcomer(*command)
    assert status == 2 and message in output
    assert output.startswith("error: ") and output.count("\n") == 1


def test_a_run_is_named_by_weights_too(newcomer, tmp_path):
    for name in ("first", "second"):
        (tmp_path / "mine" / name / "checkpoints").mkdir(parents=True)
    status, output = newcomer("sample", f"--weights={tmp_path / 'mine'}")
    assert status == 2 and "it holds first, second: name one of them" in output
    status, output = newcomer("sample", f"--weights={tmp_path / 'mine' / 'first'}")
    assert status == 2 and "holds no finished checkpoint yet" in output
