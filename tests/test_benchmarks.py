"""The benchmarks run, and say on what."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernel_times import by_kind, kernels_of
from benchmarks.random_autoencoder import random_kl
from benchmarks.steps import training_step
from flowdcn_jax.autoencoders import kl
from flowdcn_jax.runs.sharding import make_mesh
from pallas_kernels.timing import CALLS, compile_calls
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS = 26_608  # of a SiT with a block of 16 channels and 1000 classes


def test_a_timed_program_does_all_of_each_call():
    """What does not depend on the call before, too."""
    ran = []

    def count(x):
        ran.append(x)
        return x

    def function(chained, x):
        return chained + jax.pure_callback(count, x, x)

    ones = jnp.ones(4)
    out, _ = compile_calls(function, ones, ones)(ones, ones)
    np.testing.assert_array_equal(out, np.full(4, 1 + CALLS))
    assert len(ran) == CALLS


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


def wait_for_data(out, *options):
    """(what the benchmark prints, what it writes) of a few small steps."""
    command = [sys.executable, "-m", "benchmarks.data_wait", "--gpus=3", "--batch_size=2"]
    command += ["--config.data.image_size=32", "--steps=5", "--warm_up=1", "--megabytes=1"]
    code, output = tiny.run([*command, "--seconds=0.05", f"--out={out}", *options])
    assert code == 0, output
    return output, json.loads(out.read_text())


def test_the_wait_for_data_is_measured_beside_a_simulated_step(tmp_path):
    output, report = wait_for_data(tmp_path / "out", "--step_ms=100")
    assert "The step is simulated: a sleep of 100 ms stands in for training" in output
    assert report["simulated_step_ms"] == 100 and report["config"] == "configs/xl2.py"
    assert {"cpu", "devices", "versions", "date"} <= report["machine"].keys()
    result = report["result"]
    assert result["steps"] == 5 and result["step_ms"] >= 100
    total_ms = result["step_ms"] + result["wait_ms"]
    assert result["data_wait"] == pytest.approx(result["wait_ms"] / total_ms)
    assert result["demand_examples_per_s"] == pytest.approx(3 * 2 / total_ms * 1e3)
    assert f"| {result['data_wait']:.3%} | {result['demand_examples_per_s']:.0f} |" in output


def test_a_step_that_takes_no_time_waits_for_data(tmp_path):
    _, report = wait_for_data(tmp_path / "out", "--step_ms=0", "--batch_size=256")
    assert report["result"]["data_wait"] > 0.5


def test_the_step_that_waits_for_data_is_that_of_training():
    config = tiny.config(model=tiny.SIT, train__batch_size=2)
    run_step = training_step(config, make_mesh(devices=jax.devices()[:1]))
    batch = {"image": np.full((2, 8, 8, 1), 9, np.uint8), "label": np.zeros(2, np.int32)}
    first, second = run_step(batch), run_step(batch)
    assert first["learning_rate"] == 0 < second["learning_rate"]  # the warm-up goes on
    assert np.isfinite(second["loss"])


def test_training_is_not_timed_without_a_gpu():
    code, output = tiny.run([sys.executable, "-m", "benchmarks.data_wait"])
    assert code == 2 and "needs a GPU, and there is none; with --step_ms=300 a sleep" in output
    assert "Traceback" not in output


def test_the_parts_of_an_evaluation_are_timed(tmp_path):
    parts = ["statistics", "distance", "score", "kid", "precision_recall", "pass"]
    options = [f"--parts={','.join(parts)}", f"--out={tmp_path / 'out'}", "--num_images=20"]
    command = [sys.executable, "-m", "benchmarks.evaluation", *options]
    code, output = tiny.run([*command, "--num_features=8", "--image_size=32"])
    assert code == 0, output
    report = json.loads((tmp_path / "out").read_text())
    assert [row["part"] for row in report["results"]] == parts
    assert all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in report["results"])


def test_the_control_of_figures_says_what_is_out_of_order(tmp_path, repository):
    command = [sys.executable, "-m", "benchmarks.evaluation_control", "--config=configs/digits.py"]
    network = ["--features=dinov2", f"--weights={repository}/tests/fixtures/tiny_dinov2"]
    sizes = ["--num_images=10", "--num_references=20", "--features_batch_size=10"]
    code, output = tiny.run([*command, *network, *sizes, f"--out={tmp_path}/out.json"])
    report = json.loads((tmp_path / "out.json").read_text())
    rows = [(row["kind"], row["distance"]) for row in report["results"]]
    assert [kind for kind, _ in rows] == [
        *("as they are", *["blurred"] * 3, *["noisy"] * 3, *["fewer classes"] * 3)
    ]
    distances = [distance for kind, distance in rows if kind in ("as they are", "noisy")]
    found = any(line.startswith("distance of noisy") for line in report["out_of_order"])
    assert found == (sorted(distances) != distances)
    assert code == (1 if report["out_of_order"] else 0), output
    assert (tmp_path / "out.png").exists()
    code, output = tiny.run([*command, *network, "--num_references=900"])
    assert code == 2 and "is 900 and --num_images 5000; expected at most 898, half" in output


def test_the_random_autoencoder_that_is_timed_tells_images_apart():
    sizes = kl.KLSizes(
        image_channels=3, latent_channels=4, widths=(8, 8), layers_per_block=1, norm_groups=4
    )
    autoencoder = random_kl(sizes, dtype=jnp.float32)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
    mean, std = jax.jit(autoencoder.encode)(autoencoder.params, images)
    assert mean.std(0).min() > 0.01 and mean.std((1, 2)).min() > 0.01  # images, and places in each
    assert np.isfinite(std).all() and std.std() > 0.01


def test_kernels_are_not_timed_without_a_gpu():
    for module in ("benchmarks.operators", "pallas_kernels.deformable_conv.tune"):
        code, output = tiny.run([sys.executable, "-m", module])
        assert code == 2 and "needs an NVIDIA GPU" in output and "Traceback" not in output


def test_the_sampling_benchmark_measures_one_device_and_two(tmp_path):
    command = [sys.executable, "-m", "benchmarks.sampling", "--config=configs/sit_s2.py"]
    command += ["--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2"]
    command += ["--image_sizes=32", "--num_steps=3", "--batch_size=2", "--runs=1"]
    code, output = tiny.run([*command, "--devices=1,2", f"--out={tmp_path / 'out'}"], num_devices=2)
    assert code == 0, output
    report = json.loads((tmp_path / "out").read_text())
    assert len(report["machine"]["devices"]) == 2
    one, two = report["results"]
    assert (one["num_devices"], two["num_devices"]) == (1, 2)
    for row in (one, two):
        assert (row["evaluations"], row["passes_an_image"]) == (3, 6)
        assert row["images_per_s"] == pytest.approx(2e3 * row["num_devices"] / row["batch_ms"])
        assert row["outside_model"] == pytest.approx(1 - 3 * row["model_ms"] / row["batch_ms"])
        assert row["program_bytes"] > 4 * WEIGHTS and row["process_peak_bytes"] is None
        assert row["of_one_device"] == row["images_per_s"] / one["images_per_s"]
        assert f"| {row['images_per_s']:.2f} | {row['of_one_device']:.2f} |" in output


def test_sampling_is_not_measured_on_devices_that_are_not_there():
    code, output = tiny.run([sys.executable, "-m", "benchmarks.sampling", "--devices=1,3"])
    assert code == 2 and "--devices names 3; expected at most 1" in output
    assert "Traceback" not in output


# The benchmark on a FlowDCN and a SiT so small that a step takes no time.
SMALL_TRAINING = """
from benchmarks import training
from flowdcn_jax import command
load_config = training.load_config
def small(name):
    config = load_config(name)
    parts = "num_groups" if name == "s2" else "num_heads"
    config.model.update({"width": 16, "depth": 1, parts: 2})
    return config
training.load_config = small
command.run(training.main)
"""


@pytest.mark.parametrize(
    "passes, meshes",
    [
        ("train,forward", "1x2"),
        pytest.param("train,mean_flow", "1x2", marks=pytest.mark.slow),  # compiles for long
    ],
)
def test_the_training_benchmark_compares_models(tmp_path, passes, meshes):
    command = [sys.executable, "-c", SMALL_TRAINING, "--models=s2,sit_s2", "--sizes=32x4"]
    command += [
        f"--passes={passes}",
        f"--meshes={meshes}",
        "--runs=1",
        "--steps=2",
        f"--out={tmp_path / 'out.json'}",
    ]
    code, output = tiny.run(command, num_devices=2)
    assert code == 0, output
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"devices", "versions", "date"} <= report["machine"].keys()
    rows = report["results"]
    assert [(row["pass"], row["model"], *row["mesh"].values()) for row in rows] == [
        (work, model, 1, fsdp)
        for work in passes.split(",")
        for fsdp in ([1] if work == "forward" else [int(mesh[-1]) for mesh in meshes.split(",")])
        for model in ("s2", "sit_s2")
    ]
    assert (tmp_path / "out.png").exists() and rows[1]["parameters"] == WEIGHTS
    if "mean_flow" in passes:
        assert rows[3]["parameters"] == WEIGHTS + (256 + 1 + 16 + 1) * 16
        assert rows[3]["of_its_train"] == pytest.approx(rows[3]["step_ms"] / rows[1]["step_ms"])
    for flowdcn, row in zip([x for x in rows[::2] for _ in range(2)], rows, strict=True):
        images = 4 * row["mesh"]["fsdp"]
        assert row["batch_size"] == 4
        assert row["images_per_s"] == pytest.approx(1e3 * images / row["step_ms"])
        assert row["of_the_first"] == row["images_per_s"] / flowdcn["images_per_s"]
        assert f"| {row['step_ms']:.2f} | {row['images_per_s']:.1f} |" in output
        # Parameters, their two moments and the EMA are given and taken back in the same place;
        # the gradients come on top.
        copies = (1, 2) if row["pass"] == "forward" else (5, 10)
        least, most = (4 * row["parameters"] * n / row["mesh"]["fsdp"] for n in copies)
        assert least < row["program_bytes"] < (most if images == 4 else 2 * most)


@pytest.mark.slow  # eight starts of train.py
def test_the_scaling_benchmark_runs_each_mesh(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.scaling", "--config=configs/sit_s2.py"]
    command += ["--meshes=1x1,1x1:2,2x1,1x2", "--batch_size=4", "--num_steps=30", "--gb_per_s=1"]
    small = {"model.width": 16, "model.depth": 1, "model.num_heads": 2, "data.image_size": 32}
    command += [f"--config.{key}={value}" for key, value in small.items()]
    code, output = tiny.run([*command, f"--out={out}"], timeout_s=900)
    assert code == 0, output
    report = json.loads(out.read_text())
    one, parts, data, fsdp = report["results"]
    assert one["losses_differ_by"] is None and one["restore_s"] is None
    assert parts["batch_size"] == data["batch_size"] == 8 and fsdp["restore_s"] > 0
    assert 0 <= data["losses_differ_by"] < 1e-5 and fsdp["losses_differ_by"] < 1e-5
    work_s, sent_s = 4 / one["images_per_s"], 4 * report["parameters"] / 1e9  # n - 1 over n, twice
    assert data["floor"] == pytest.approx(8 / (work_s + sent_s))
    assert data["ceiling"] == pytest.approx(8 / max(work_s, sent_s))


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("--sizes=32", "--sizes is '32'; expected pairs of positive numbers such as 256x64"),
        ("--meshes=9x9", "--meshes names 9x9; expected at most 1 devices"),
        ("--passes=back", "--passes is 'back'; expected some of train, mean_flow, "),
    ],
)
def test_the_training_benchmark_names_what_it_cannot_time(option, error):
    code, output = tiny.run([sys.executable, "-m", "benchmarks.training", option])
    assert code == 2 and error in output and "Traceback" not in output


# A SiT so small that it takes no time, of random weights; in a process of its own, for its flags.
SMALL_PRECISION = """
import json
from benchmarks import precision
from flowdcn_jax.config import model_config
from flowdcn_jax.models import abstract_model, random_params
precision.SIZE |= {"width": 16, "depth": 1}
config = model_config("sit") | precision.SIZE | precision.MODELS["sit"]
print(json.dumps(precision.measure("sit", random_params(abstract_model(config)[1]))))
"""


@pytest.mark.slow
def test_the_precision_benchmark_compares_dtypes():
    code, output = tiny.run([sys.executable, "-c", SMALL_PRECISION])
    assert code == 0, output
    row = json.loads(output.splitlines()[-1])
    assert len(row["velocity"]) == len(row["times"]) == 4
    for error in (*row["velocity"], row["gradient"]):
        assert 1e-4 < error < 0.1
    assert row["worst"] >= row["gradient"] / 2
    assert row["embedding"] < 0.01  # float32, also beside bfloat16


def test_a_profile_tells_kernels_by_the_instruction_that_started_them():
    def told(kind, name, **more):
        return {"ph": "M", "name": kind, "args": {"name": name}} | more

    def ran(name, instruction, start_us, duration_us, tid=7):
        event = {"ph": "X", "name": name, "pid": 1, "ts": start_us, "dur": duration_us}
        return event | {"tid": tid, "args": {"hlo_op": instruction}}

    trace = [
        told("process_name", "/device:GPU:0", pid=1),
        told("thread_name", "Stream #13(compute)", pid=1, tid=7),
        told("thread_name", "XLA Ops", pid=1, tid=8),
        ran("loop_add_fusion_2", "loop_add_fusion.2", 60, 500),
        ran("nvjet_tst", "custom-call.1", 10, 2000),
        ran("residual_adaln", "pallas_call.3", 600, 40),
        ran("what is not a kernel", "custom-call.1", 0, 9e9, tid=8),
    ]
    program = """
      %custom-call.1 = f32[2]{0} custom-call(%a), custom_call_target="__cublas$lt$matmul"
      ROOT %loop_add_fusion.2 = f32[2]{0} fusion(%b), metadata={op_name="jit(train_step)/add"}
    """
    kernels = kernels_of({"traceEvents": trace})
    assert [kernel.start_us for kernel in kernels] == [10, 60, 600]
    assert by_kind(kernels, program, steps=2) == [
        {"kind": "products", "ms": 1.0, "kernels": 0.5},
        {"kind": "optimizer and EMA", "ms": 0.25, "kernels": 0.5},
        {"kind": "residual, norm and modulation", "ms": 0.02, "kernels": 0.5},
    ]


@pytest.mark.parametrize(
    "command, message",
    [
        (("step_profile",), "error: a profile needs a GPU; JAX's devices are"),
        (("reader", "--out=/proc/x/y.json"), "error: --out=/proc/x/y.json cannot be written: "),
        (("reader", "--image_sizes=abc"), "error: --image_sizes is 'abc'; expected numbers of"),
        (("operators", "--shape=64,16,16"), "error: --shape is '64,16,16'; expected five pos"),
        (("study", "--table=x"), "error: --table names 'x'; expected some of shipped, models, abl"),
        (("study", "--guidances=a"), "error: guidances is 'a'; expected numbers of at least 0"),
        (("training", "--models=xl3"), "error: --models names 'xl3'; expected some of b2, "),
        (("training", "--models=b2", "--sizes=100x4"), "image_size is 100; expected a multiple"),
    ],
)
def test_bad_flags_of_benchmarks_are_one_line(command, message):
    module, *options = command
    code, output = tiny.run([sys.executable, "-m", f"benchmarks.{module}", *options])
    assert code == 2 and message in output and "Traceback" not in output, output
    assert len(output.splitlines()) == 1, output
