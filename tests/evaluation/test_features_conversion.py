"""convert_features: every tensor accounted for, the source's hash kept, one line for errors."""

import hashlib
import json
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flowdcn_jax.evaluation.features import FeaturesError
from flowdcn_jax.evaluation.features.registry import convert
from flowdcn_jax.published_weights import PublishedWeightsError
from tests import tiny
from tests.evaluation.conftest import TINY_DINOV2

COMMAND = [sys.executable, "-m", "flowdcn_jax.tools.convert_features"]


def test_inceptions_counters_are_left_out_and_the_rest_stays(inception_file, tmp_path):
    origin = convert("inception", inception_file, tmp_path / "out.safetensors")
    before, after = load_file(inception_file), load_file(tmp_path / "out.safetensors")
    counters = {name for name in before if name.endswith("bn.num_batches_tracked")}
    assert len(counters) == 94 and before.keys() - after.keys() == counters
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name])
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    expected = {"network": "inception", "file": inception_file.name, "sha256": digest}
    with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["origin"]) == origin == expected


def test_the_command_gives_the_same_bytes_every_time(write_dinov2, dinov2_tensors, tmp_path):
    source = write_dinov2(dinov2_tensors, "source.safetensors")
    convert("dinov2", source, tmp_path / "first.safetensors")
    out = tmp_path / "new" / "second.safetensors"
    command = [*COMMAND, "--network=dinov2", f"--source={source}", f"--out={out}"]
    code, output = tiny.run(command)
    assert code == 0, output
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert output.splitlines()[-1] == f"{out}: dinov2 from source.safetensors, SHA-256 {digest}"
    assert out.read_bytes() == (tmp_path / "first.safetensors").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--network=dino"],
            "error: the network is 'dino'; expected one of inception, dinov2, eff",
        ),
        (["--source=no.pth"], "error: --source=no.pth cannot be read: No such file"),
        (["--out=/proc/x"], "error: --out=/proc/x cannot be written"),
    ],
)
def test_bad_requests_end_in_one_line(flags, message, tmp_path):
    command = [*COMMAND, "--network=dinov2", f"--source={TINY_DINOV2 / 'model.safetensors'}"]
    code, output = tiny.run([*command, f"--out={tmp_path / 'out'}", *flags])
    assert code == 2 and message in output and output.count("\n") == 1, output
    assert not list(tmp_path.iterdir())


def test_a_file_that_has_not_the_hash_in_its_name_is_refused(dinov2_tensors, tmp_path):
    save_file(dinov2_tensors, tmp_path / "source")
    digest = hashlib.sha256((tmp_path / "source").read_bytes()).hexdigest()
    wrong = (tmp_path / "source").rename(tmp_path / "dinov2-01234567.pth")
    with pytest.raises(FeaturesError, match=f"has SHA-256 {digest}; expected 01234567..., as it"):
        convert("dinov2", wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    right = wrong.rename(tmp_path / f"dinov2-{digest[:8]}.pth")
    (tmp_path / "config.json").write_text((TINY_DINOV2 / "config.json").read_text())
    assert convert("dinov2", right, tmp_path / "out")["sha256"] == digest


def test_a_pytorch_file_is_read_for_weights_alone(dinov2_tensors, tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text((TINY_DINOV2 / "config.json").read_text())
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in dinov2_tensors.items()}
    torch.save(state, tmp_path / "dinov2.pth")
    convert("dinov2", tmp_path / "dinov2.pth", tmp_path / "out.safetensors")
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        np.testing.assert_array_equal(tensor, dinov2_tensors[name])
    torch.save(state | {"code": print}, tmp_path / "code.pth")
    with pytest.raises(PublishedWeightsError, match="besides weights it holds code"):
        convert("dinov2", tmp_path / "code.pth", tmp_path / "none.safetensors")
