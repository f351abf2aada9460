"""Two processes with four virtual devices each train, checkpoint, stop and restore together."""

import signal
import sys
import time

import numpy as np
import pytest

from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIONS = dict(train__num_steps=4, model__width=64, mesh__data=2, mesh__fsdp=4)


MANY_CHECKSUMS = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from flowdcn_jax.runs.checkpoint import checksum
from flowdcn_jax.runs.sharding import make_mesh

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sharding = NamedSharding(make_mesh(2, 4), PartitionSpec("fsdp"))
rows = np.arange(64.0, dtype=np.float32)
arrays = [jax.make_array_from_callback((64,), sharding, lambda i: rows[i])] * 300
print(len(set(checksum(arrays).values())), "checksum")
"""


def start_two(workdir, **overrides):
    address = f"--coordinator_address=127.0.0.1:{tiny.free_port()}"
    flags = ["--distributed", address, "--num_processes=2"]
    return [
        tiny.start(
            tiny.train_command(workdir, *flags, f"--process_id={i}", **OPTIONS | overrides),
            num_devices=4,
        )
        for i in range(2)
    ]


def finish_all(processes, status=0):
    results = [tiny.finish(process) for process in processes]
    assert [code for code, _ in results] == [status] * 2, "\n".join(output for _, output in results)
    return [output for _, output in results]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    tiny.train(tiny.config(**OPTIONS, checkpoint__every_steps=4), workdir, one_device=False)
    return workdir


def test_two_processes_match_one_and_resume(one_process, tmp_path):
    finish_all(start_two(tmp_path, train__num_steps=2))
    assert tiny.steps(tmp_path) == [2]
    first, second = finish_all(start_two(tmp_path))
    assert "going on from step 2" in first and "going on" not in second
    assert tiny.steps(tmp_path) == [2, 4]
    losses = [[row["loss"] for row in tiny.metrics(w)] for w in (tmp_path, one_process)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    endless = dict(train__num_steps=1_000_000, checkpoint__every_steps=500_000)
    processes = start_two(tmp_path, **endless)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(tiny.metrics(tmp_path)) < 3:
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.05)
    outputs = finish_all(start_two(tmp_path, **endless), status=2)
    assert f"is in use by another run (process {processes[0].pid} on" in outputs[0]
    assert "process 0 had to stop" in outputs[1]

    processes[1].send_signal(signal.SIGINT)  # which becomes SIGTERM, as clusters send
    finish_all(processes, status=75)
    (step,) = tiny.steps(tmp_path)
    assert tiny.metrics(tmp_path)[-1]["step"] == step


def test_checksums_of_more_arrays_than_a_device_takes_at_once():
    """XLA has 32 computations of a CPU device in flight, the collectives of which then hang."""
    address = f"127.0.0.1:{tiny.free_port()}"
    commands = [[sys.executable, "-c", MANY_CHECKSUMS, address, str(i)] for i in range(2)]
    processes = [tiny.start(command, num_devices=4) for command in commands]
    assert all("1 checksum" in output for output in finish_all(processes))
