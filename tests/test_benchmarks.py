"""The benchmarks run, and say on what."""

import json
import sys

from tests import tiny


def test_the_reader_benchmark_writes_its_table(tmp_path):
    options = ["--image_sizes=32", "--threads=0,2", "--batch_sizes=4", f"--out={tmp_path / 'out'}"]
    short = ["--repeats=1", "--seconds=0.05", "--megabytes=1"]
    code, output = tiny.run([sys.executable, "-m", "benchmarks.reader", *options, *short])
    assert code == 0, output
    report = json.loads((tmp_path / "out").read_text())
    assert {"cpu", "cores", "versions", "date"} <= report["machine"].keys()
    assert [row["threads"] for row in report["results"]] == [0, 2]
    assert all(row["latents"] == "4x4x4" for row in report["results"])
    for row in report["results"]:
        assert f"| {row['examples_per_s']:.0f} |" in output


def test_kernels_are_not_timed_without_a_gpu():
    for module in ("benchmarks.operators", "pallas_kernels.deformable_conv.tune"):
        code, output = tiny.run([sys.executable, "-m", module])
        assert code == 1 and "needs an NVIDIA GPU" in output and "Traceback" not in output
