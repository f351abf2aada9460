"""The loss plot: what it reads, and what it refuses."""

import json
import sys

import pytest
from PIL import Image

from flowdcn_jax.errors import UserError
from flowdcn_jax.tools.plot_metrics import plot_metric, read_metric
from tests import tiny


def write(folder, steps, tail=""):
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(lines) + tail)


def test_short_stretches_and_half_written_lines_are_left_out(tmp_path):
    write(tmp_path / "run", [10, 20, 27, 30, 40], tail='{"step": 50, "lo')
    steps, losses = read_metric(str(tmp_path / "run"), "loss")
    assert steps == [10, 20, 27, 40]  # 30 speaks for three steps
    assert losses == [1 / 10, 1 / 20, 1 / 27, 1 / 40]


def test_plots_one_run_or_several(tmp_path):
    write(tmp_path / "one", [10, 20, 30])
    write(tmp_path / "two", [10])
    plot_metric([str(tmp_path / "one"), str(tmp_path / "two")], "loss", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (840, 480)


def test_figures_are_of_the_steps_that_have_them(tmp_path):
    write(tmp_path / "run", range(10, 60, 10), tail='{"step": 53, "loss": 1, "FID": 7.5}\n')
    assert read_metric(str(tmp_path / "run"), "FID") == ([53], [7.5])
    assert read_metric(str(tmp_path / "run"), "loss")[0] == [10, 20, 30, 40, 50]
    plot_metric([str(tmp_path / "run")], "FID", tmp_path / "FID.png")
    with pytest.raises(UserError, match="holds no 'sFID'; expected one of loss, FID"):
        read_metric(str(tmp_path / "run"), "sFID")


def test_folders_without_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere/metrics.jsonl does not exist"):
        read_metric(str(tmp_path / "nowhere"), "loss")
    write(tmp_path / "empty", [])
    with pytest.raises(UserError, match="empty/metrics.jsonl holds no metrics yet"):
        read_metric(str(tmp_path / "empty"), "loss")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    write(tmp_path / "run", [10])
    command = [sys.executable, "-m", "flowdcn_jax.tools.plot_metrics", f"--workdir={tmp_path}/run"]
    code, output = tiny.run([*command, "--out=/proc/x.png"])
    assert code == 2 and output.startswith("error: --out=/proc/x.png cannot be written: ")
    assert len(output.splitlines()) == 1
