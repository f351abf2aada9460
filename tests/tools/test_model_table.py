"""The table of what the models cost: counted, and timed on whatever device there is."""

import json
import sys

import jax
import pytest

from flowdcn_jax.config import config_names
from flowdcn_jax.errors import UserError
from flowdcn_jax.tools import model_table
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

COMMAND = [sys.executable, "-m", "flowdcn_jax.tools.model_table"]


@pytest.fixture
def tiny_configs(monkeypatch):
    """A transformer of 16 channels on pixels in the place of the models of configs/."""
    monkeypatch.setattr(model_table, "load_config", lambda name: tiny.config(model=tiny.SIT))


def measure(names=("s2", "xl2"), image_sizes=(8,), batch_sizes=(1,), timed=False):
    return model_table.measure(
        list(names), image_sizes=list(image_sizes), batch_sizes=list(batch_sizes), timed=timed
    )


def rows_of(markdown):
    return [line for line in markdown.splitlines() if line.startswith("| ") and "---" not in line]


def test_every_model_is_in_the_table():
    """But for DiT's names for SiT's networks, other data sets, sizes and aims, and the defaults."""
    others = {name for name in config_names() if name.startswith("dit_")}
    others |= {name for name in config_names() if name.endswith("_mean_flow")}
    others |= {"xl2_512", "b2_var", "b2_taef2", "cifar10_s2", "cifar10_tiny", "digits", "default"}
    assert set(model_table.MODELS) == set(config_names()) - others


@pytest.mark.slow
def test_the_committed_table_is_what_the_command_prints(tmp_path):
    out, docs = tmp_path / "new" / "table.json", tiny.REPOSITORY / "docs"
    code, output = tiny.run([*COMMAND, "--timing=never", f"--json={out}"])
    assert code == 0, output
    rows = rows_of(output)
    assert len(rows) == 1 + len(model_table.MODELS)
    assert rows == rows_of((docs / "model_table.md").read_text())[: len(rows)]
    result = json.loads(out.read_text())
    assert result["models"] == json.loads((docs / "model_table.json").read_text())["models"]
    assert result["models"][0]["parameters"] == 30_300_416
    assert result["models"][0]["forward_gmacs"]["256"] == pytest.approx(4.80, abs=5e-3)
    assert set(result["machine"]["devices"]) == {"cpu"} and result["machine"]["versions"]["jax"]
    assert result["timings"] == []


def test_timing_on_any_device(tiny_configs):
    result = measure(names=["s2"], image_sizes=(16,), batch_sizes=(3,), timed=True)
    (row,) = result["timings"]
    assert row["images_per_s"] == pytest.approx(3 * 1000 / row["latency_ms"])
    assert row["latency_ms"] > 0
    markdown = model_table.to_markdown(result, "command")
    assert f"| FlowDCN-S/2 | 16² | 3 | {row['latency_ms']:.2f} |" in markdown
    assert "one cpu" in markdown


def test_a_pass_that_runs_out_of_memory_is_a_row_that_says_so(tiny_configs, monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")

    monkeypatch.setattr(model_table, "apply_model", exhausted)
    result = measure(names=["s2"], timed=True)
    assert "| 8² | 1 | out of memory | out of memory |" in model_table.to_markdown(result, "")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(names=["s3"]), "--models names 's3'; expected some of s2, b2"),
        (dict(names=[]), "--models is empty; expected some of s2, b2"),
        (dict(names=["s2", "xl2", "s2"]), "--models names 's2' 2 times; expected once"),
        (dict(image_sizes=[8, 9]), "--image_sizes names 9; expected positive multiples of 2"),
        (dict(image_sizes=[0]), "--image_sizes names 0"),
        (dict(batch_sizes=[0]), "--batch_sizes names 0; expected positive"),
    ],
)
def test_bad_requests_are_refused(tiny_configs, options, message):
    with pytest.raises(UserError, match=message):
        measure(**options)


def test_bad_numbers_and_files_end_in_one_line(tmp_path):
    for flag, message in (
        ("--image_sizes=256x512", "error: --image_sizes is '256x512'; expected numbers"),
        (f"--json={tmp_path}", "is a folder; expected a file"),
    ):
        code, output = tiny.run([*COMMAND, flag])
        assert code == 2 and message in output and "Traceback" not in output
