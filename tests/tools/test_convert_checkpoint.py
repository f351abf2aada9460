"""The command: both directions, one line for what is wrong, and its memory."""

import json
import shlex
import sys

import pytest
from safetensors.numpy import load_file

import flowdcn_jax
from tests import official, tiny

COMMAND = [sys.executable, "-m", "flowdcn_jax.tools.convert_checkpoint"]
TINY = [f"--config.model.{key}" for key in ("width=64", "depth=3", "num_groups=4")]
TINY += ["--config.model.num_classes=10", "--config.data.image_size=128"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, fixture_file):
    tensors = official.state_dict(fixture_file("model.npz"))
    lightning = official.lightning(tensors, official.half(tensors))
    return official.write_safetensors(tmp_path_factory.mktemp("source") / "tiny", lightning)


def test_there_and_back(source, tmp_path):
    config = ["--config=configs/s2.py", *TINY]
    run = f"--workdir={tmp_path / 'run'}"
    code, output = tiny.run([*COMMAND, f"--source={source}", *config, run, "--weights=model"])
    assert code == 0, output
    assert "tiny, a Lightning checkpoint (safetensors), its model weights" in output
    to_sample, to_train = output.splitlines()[-2:]
    decoder = "--autoencoder=sd_vae --autoencoder_weights=sd-vae-ft-ema"
    assert to_sample == f"to sample:    python sample.py {decoder} {run}"
    flags = [*TINY, "--config.model.boundary=truncate", "--config.sampling.classes=()"]
    assert to_train.startswith("to fine-tune: python train.py --config=configs/s2.py --config.")
    assert set(shlex.split(to_train)[5:]) == {*flags, run}
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["weights"] == "model"
    assert flowdcn_jax.load_model(tmp_path / "run")[1].data.image_size == 128
    out = tmp_path / "out.safetensors"
    code, output = tiny.run([*COMMAND, run, f"--export={out}"])
    assert code == 0, output
    assert output.splitlines()[-1] == f"{out}: the ema weights of step 0"
    names = {name for name in load_file(source) if name.startswith("state_dict.")}
    assert {f"state_dict.denoiser.{name}" for name in load_file(out)} == names


CONVERT = ["--source=no.pth", "--config=configs/s2.py", "--workdir=unused"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give either --source, to convert, or --export"),
        ([*CONVERT, "--export=x"], "give either --source"),
        (CONVERT[:2], "--workdir is missing"),
        ([CONVERT[0], CONVERT[2]], "--config is missing"),
        ([*CONVERT, "stray"], "unexpected arguments: ['stray']"),
        ([*CONVERT, "--config.model.widht=3"], "unknown key in --config"),
        ([CONVERT[0], "--config=configs/no.py"], "--config=configs/no.py cannot be loaded"),
        (CONVERT, "--source=no.pth cannot be read: No such file"),
        (["--workdir=unused", "--export=x"], "unused holds no checkpoints"),
    ],
)
def test_bad_requests_end_in_one_line(flags, message):
    code, output = tiny.run([*COMMAND, *flags])
    assert code == 2
    assert output.startswith("error: ") and message in output
    assert output.count("\n") == 1
    assert not (tiny.REPOSITORY / "unused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["b2", "xl2"])
def test_memory_and_time(config):
    """What grows with the tensors' sizes is the weights and the tensor on its way to the disk.

    XL/2 takes 5 GB of disk and two minutes:
    `python -m pytest -m slow tests/tools/test_convert_checkpoint.py`.
    """
    code, output = tiny.run([sys.executable, "-m", "tests.published_weights.measure", config])
    assert code == 0, output
    measured = json.loads(output.splitlines()[-1])
    assert measured["weights_mb"] > 450
    assert measured["beyond_weights_mb"] < measured["largest_tensor_mb"], measured
    assert measured["narrow_peak_mb"] < 450, measured
    assert measured["cpu_seconds"] < 60, measured
