"""EMAs in a run's folder: saved, restored alone, begun later, and made of others after training."""

import functools
import logging
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flowdcn_jax import ema
from flowdcn_jax.models import abstract_model
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.posthoc import PosthocError, make_posthoc_ema
from flowdcn_jax.runs.sharding import make_mesh, with_sharding
from flowdcn_jax.runs.state import TrainState, abstract_state
from flowdcn_jax.sampling import load_trained
from tests import tiny
from tests.comparison import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("power_0.05", "power_0.1")
CONFIG = tiny.config(ema__others=NAMES)
STEPS = range(15, 121, 15)  # of the checkpoints


def mesh():
    return make_mesh(1, 1, jax.devices()[:1])


def trajectory() -> list[TrainState]:
    """States of 121 steps of parameters that go their ways at random, with the EMAs of each."""
    generator = np.random.default_rng(0)
    averages = ema.averages(CONFIG.ema)
    state = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype),
        abstract_state(CONFIG, mesh()),
    )
    states = [state]
    for step in range(120):
        params = jax.tree.map(
            lambda p: p + generator.normal(scale=0.1, size=p.shape).astype(p.dtype), state.params
        )
        means = {"ema": state.ema, **state.other_emas}
        for name, old in means.items():
            share = np.float32(ema.share(averages[name], step, warmup=0.0))
            means[name] = jax.tree.map(lambda p, e, s=share: s * p + (1 - s) * e, params, old)
        main = means.pop("ema")
        step = np.int32(step + 1)
        state = state._replace(step=step, params=params, ema=main, other_emas=means)
        states.append(state)
    return states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a workdir with a checkpoint every 15 steps, the states of all steps)"""
    workdir, states = tmp_path_factory.mktemp("run"), trajectory()
    save(workdir, *(states[step] for step in STEPS))
    return workdir, states


def save(workdir, *states, config=CONFIG):
    checkpointer = Checkpointer(workdir, keep=len(STEPS), keep_every_steps=None)
    for state in states:
        checkpointer.save(jax.device_put(state), config, None)
    checkpointer.close()


def restore(workdir, config):
    checkpointer = Checkpointer(workdir, keep=3, keep_every_steps=None)
    try:
        return checkpointer.restore_newest(abstract_state(config, mesh()))
    finally:
        checkpointer.close()


def restore_ema(workdir, name, step=None):
    def shapes(config):
        return with_sharding(abstract_model(config.model)[1], mesh())

    return checkpoint.restore_ema(str(workdir), step, shapes, name=name)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def workdir(run, tmp_path):
    """A copy with the last two checkpoints."""
    for step in (105, 120):
        shutil.copytree(run[0] / "checkpoints" / str(step), tmp_path / "checkpoints" / str(step))
    return tmp_path


def test_all_of_them_are_restored(run, workdir):
    assert_same(restore(workdir, CONFIG), run[1][120])


@pytest.mark.parametrize("name", NAMES)
def test_one_is_restored_alone(run, workdir, name):
    for item in ("state", "ema", *(f"ema_{other}" for other in NAMES if other != name)):
        shutil.rmtree(workdir / "checkpoints" / "120" / item)
    weights = restore_ema(workdir, name)
    assert weights.step == 120
    assert_same(weights.params, run[1][120].other_emas[name])


def test_sampling_takes_one_by_its_name(run):
    model = load_trained(run[0], ema="power_0.1", mesh=mesh())
    assert_same(model.weights.params, run[1][120].other_emas["power_0.1"])
    assert_same(load_trained(run[0], mesh=mesh()).weights.params, run[1][120].ema)


def test_a_name_that_is_not_there_is_answered_with_those_that_are(run):
    expected = "step 120 of .* has no EMA 'power_0.2'; there are ema, power_0.05, power_0.1;"
    with pytest.raises(checkpoint.EmaError, match=expected):
        load_trained(run[0], ema="power_0.2")


def test_one_that_is_asked_for_later_begins_as_the_parameters(run, tmp_path, caplog):
    old = tiny.config()
    save(tmp_path, run[1][120]._replace(other_emas={}), config=old)

    def forget(record):  # what a run saved before there were such keys
        for section, key in (("ema", "others"), ("ema", "warmup"), ("optimizer", "name")):
            del record["config"][section][key]

    tiny.rewrite_run(tmp_path, 120, forget)
    assert_same(restore(tmp_path, old), run[1][120]._replace(other_emas={}))
    assert not caplog.records
    state = restore(tmp_path, tiny.config(ema__others=("power_0.05",)))
    assert_same(state.other_emas, {"power_0.05": run[1][120].params})
    assert "no EMA power_0.05 was saved: it begins as the parameters at 120" in caplog.text


def test_one_that_is_damaged_is_passed_over(run, workdir, caplog):
    files = (workdir / "checkpoints" / "120" / "ema_power_0.1").rglob("d/*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)
    assert_same(restore_ema(workdir, "power_0.1").params, run[1][105].other_emas["power_0.1"])
    with caplog.at_level(logging.WARNING):
        assert restore(workdir, CONFIG).step == 105


def by_brute_force(states, width, last):
    """The EMA of a power function out of the parameters after each step, in float64."""
    ends = (np.arange(last + 1) / last) ** (ema.exponent(width) + 1)
    weights = np.diff(ends)
    params = (state.params for state in states[1 : last + 1])
    add = lambda total, p, w: total + w * p.astype(float)  # noqa: E731
    total = jax.tree.map(lambda p: np.zeros(p.shape), states[0].params)
    for weight, tree in zip(weights, params, strict=True):
        total = jax.tree.map(functools.partial(add, w=weight), total, tree)
    return total


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "width, last, tolerance", [(0.07, 120, 7e-4), (0.12, 120, 5e-4), (0.08, 90, 1.2e-3)]
)
def test_another_width_is_made_after_training(run, tmp_path, width, last, tolerance):
    """Of eight checkpoints, or six, in which parameters have moved by a random walk's length."""
    workdir, states = Path(shutil.copytree(run[0], tmp_path / "run")), run[1]
    made = make_posthoc_ema(workdir, width, step=last if last != 120 else None)
    assert made.name == f"power_{width}" and made.step == last
    assert made.num_snapshots == 2 * len([step for step in STEPS if step <= last])
    weights = restore_ema(workdir, made.name)
    assert weights.step == last and weights.config.to_json() == CONFIG.to_json()
    expected = flat(by_brute_force(states, width, last))
    error = relative_error(flat(weights.params), expected)
    assert error < tolerance
    # Those that were tracked are much farther away.
    others = states[last].other_emas
    assert 10 * error < min(relative_error(flat(others[n]), expected) for n in NAMES)


def test_what_cannot_be_made_is_refused_and_nothing_is_written(run, workdir, tmp_path_factory):
    def refused(message, folder=run[0], width=0.08, **options):
        with pytest.raises(PosthocError, match=message):
            make_posthoc_ema(folder, width, **options)

    refused("width is 0.3; expected a number above 0 and up to 0.2887", width=0.3)
    refused("width is 0.0; expected", width=0.0)
    refused("has power_0.05 of step 120: sample.py --ema=power_0.05", width=0.05)
    refused(
        "0.02 cannot be made at step 120 of the 8 checkpoints that hold .*off by 24", width=0.02
    )
    few = "the 2 checkpoints that hold power_0.05, power_0.1: .*keep_every_steps"
    refused(few, folder=workdir, width=0.15)
    refused("the 1 checkpoints", step=15, width=0.15)
    with pytest.raises(checkpoint.CheckpointError, match=r"has no step 7; there are \[15, 30"):
        make_posthoc_ema(run[0], 0.08, step=7)
    single = tmp_path_factory.mktemp("single")
    only = tiny.config(ema__others=NAMES[:1])
    kept = {NAMES[0]: run[1][120].other_emas[NAMES[0]]}
    save(single, run[1][120]._replace(other_emas=kept), config=only)
    refused("holds power_0.05 up to step 120; expected .* of two widths", folder=single)
    assert not any((folder / "posthoc_emas").exists() for folder in (run[0], workdir, single))


def test_the_tool_makes_one_and_says_how_it_is_drawn(run, tmp_path):
    workdir = Path(shutil.copytree(run[0], tmp_path / "run"))
    module = "flowdcn_jax.tools.reconstruct_ema"
    code, output = tiny.run([sys.executable, "-m", module, f"--workdir={workdir}", "--width=0.08"])
    assert code == 0, output
    folder = workdir / "posthoc_emas" / "power_0.08" / "120"
    assert f"{folder}: power_0.08 of step 120, of 16 snapshots; its profile is off by 1." in output
    assert f"python sample.py --workdir={workdir} --ema=power_0.08" in output
    expected = flat(by_brute_force(run[1], 0.08, 120))
    assert relative_error(flat(restore_ema(workdir, "power_0.08").params), expected) < 7e-4
