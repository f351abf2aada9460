"""Two processes give the same as one: statistics, shares, and figures of samples they draw."""

import json
import sys

import pytest

from flowdcn_jax.evaluation import collect, open_images, precision_recall, read_statistics
from tests import tiny
from tests.evaluation import fakes
from tests.evaluation.test_drawing import expected_figures
from tests.evaluation.test_statistics import check_same

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROGRAM = """
import json
import sys
from pathlib import Path
import jax
import numpy as np
from flowdcn_jax.evaluation import EvaluationError, ImageSet, collect, drawing, drawn_images
from flowdcn_jax.evaluation import evaluate, open_images, precision_recall, write_statistics
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.sampling import load_trained
from tests import tiny
from tests.evaluation import fakes
from tests.evaluation.test_drawing import REQUEST, SETTINGS, figures_of

address, number, source, workdir, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))
images = open_images(source)
for batch_size in (7, 300):
    statistics = collect(images, fakes.FakeFeatures(batch_size))
    if number == "1":  # both hold the same: the other process writes the first half of them
        write_statistics(Path(out) / f"{batch_size}.npz", statistics)
rows = statistics.features
print("shares", *precision_recall(rows[:60], rows[40:]))

def broken(ranges):
    for positions in ranges:
        if number == "1":
            raise EvaluationError(f"no image {positions.start}")
        yield np.zeros((len(positions), 8, 9, 3), np.uint8)

try:
    collect(ImageSet("some", 101, (8, 9), broken), fakes.FakeFeatures(50))
except EvaluationError as error:
    print("error:", error)

drawing.load_features = fakes.load_features
config = tiny.config(**fakes.EVALUATED, mesh__data=2, mesh__fsdp=2)
print("trained", json.dumps(figures_of(workdir, config, make_mesh(2, 2))))
model = load_trained(workdir, mesh=make_mesh(devices=jax.local_devices()))
samples, reference = drawn_images(model, REQUEST, SETTINGS), open_images("digits", crop=8)
features = fakes.FakeFeatures(4, network="efficientnet_lite0")
print("drawn", evaluate(samples, reference, features, title=None).figures[0].value)
"""


def test_two_processes_give_the_same_and_fail_together(tmp_path, evaluated_run):
    images = fakes.save(tmp_path / "images.npz", fakes.random_images(101))
    statistics = collect(open_images(images), fakes.FakeFeatures(101))
    address = f"127.0.0.1:{tiny.free_port()}"
    arguments = [images, str(evaluated_run), str(tmp_path)]
    commands = [
        [sys.executable, "-c", PROGRAM, address, str(number), *arguments] for number in range(2)
    ]
    results = [tiny.finish(each) for each in [tiny.start(c, num_devices=2) for c in commands]]
    assert [code for code, _ in results] == [0, 0], results
    for batch_size in (7, 300):
        check_same(read_statistics(tmp_path / f"{batch_size}.npz"), statistics)
    rows, expected = statistics.features, expected_figures(evaluated_run)
    shares = "shares {} {}".format(*precision_recall(rows[:60], rows[40:]))
    for _, output in results:
        assert shares in output and "error: no image 50" in output
        found = dict(line.split(" ", 1) for line in output.splitlines() if line[:1] in ("t", "d"))
        assert json.loads(found["trained"]) == pytest.approx(expected, rel=1e-6)
        assert float(found["drawn"]) == pytest.approx(expected["FD-efficientnet_lite0"], rel=1e-6)
