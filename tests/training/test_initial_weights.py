"""Runs that begin with another run's weights: --init_from."""

import json
import shutil

import jax
import numpy as np
import pytest

from flowdcn_jax.errors import UserError
from flowdcn_jax.models import abstract_model, init_params
from flowdcn_jax.runs import checkpoint, initial_weights
from flowdcn_jax.runs.initial_weights import InitFrom
from flowdcn_jax.runs.sharding import make_mesh, with_sharding
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = dict(model__width=32, model__patch_size=4)
NAMES = tuple("0123456789")  # of the digits


def config(**overrides):
    """Of a run of 32x32 digits."""
    here = dict(data__image_size=32, train__num_steps=3, optimizer__learning_rate=5e-4)
    return tiny.config(**MODEL | here | overrides)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of 16x16 digits with checkpoints at 100 and 150, and two EMAs."""
    workdir = tmp_path_factory.mktemp("source")
    options = dict(optimizer__learning_rate=5e-3, ema__decay=0.9, ema__others=("power_0.1",))
    every = dict(checkpoint__every_steps=100, log__every_steps=150)
    digits = tiny.config(data__image_size=16, train__num_steps=150, **MODEL, **options, **every)
    tiny.train(digits, workdir)
    return workdir


@pytest.fixture(scope="module")
def begun(source, tmp_path_factory):
    """(a run that began with its weights, what it printed)"""
    workdir, printed = tmp_path_factory.mktemp("begun"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        tiny.train(config(), workdir, init_from=InitFrom(str(source)))
    return workdir, "\n".join(printed)


def find(source, config, *, names=NAMES, **choice):
    choice = InitFrom(str(source), **choice)
    return initial_weights.find(choice, config, names, workdir="elsewhere", saved=None)


def weights(workdir, step, name):
    def shapes(config):
        mesh = make_mesh(1, 1, jax.devices()[:1])
        return with_sharding(abstract_model(config.model)[1], mesh)

    if name == "params":
        return checkpoint.restore_params(str(workdir), step, shapes).params
    return checkpoint.restore_ema(str(workdir), step, shapes, name=name).params


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_at_twice_the_resolution_the_loss_begins_far_below_a_fresh_runs(source, begun, tmp_path):
    workdir, printed = begun
    tiny.train(config(), tmp_path)
    losses, fresh = ([row[1] for row in tiny.numbers(folder)] for folder in (workdir, tmp_path))
    assert len(losses) == len(fresh) == 3
    assert max(losses) < 0.65 * min(fresh)
    text = f"begins with the weights ema of step 150 of {source}: the table of the classes is kept"
    assert f"{text}; differs: config.data.image_size: 16 -> 32" in printed


def test_what_it_began_with_is_in_its_records(source, begun):
    workdir, _ = begun
    expected = find(source, config())
    assert expected["differs"] == ["config.data.image_size: 16 -> 32"]
    assert json.loads((workdir / "config.json").read_text())["origin"] == expected
    for step in tiny.steps(workdir):
        assert checkpoint.read_run(str(workdir), step).origin == expected


@pytest.mark.parametrize("name", ["ema", "power_0.1", "params"])
def test_it_begins_with_the_weights_of_that_name_and_step(source, name):
    mesh = make_mesh(4, 2)
    origin = find(source, config(), step=100, weights=name)
    params = initial_weights.restore(origin, config(), mesh)
    assert_same(params, weights(source, 100, name))
    kernel = params["time_embedder"]["hidden"]["kernel"]
    assert kernel.sharding.mesh == mesh
    others = {
        find(source, config(), step=100, weights=other)["checksum"]
        for other in ("ema", "power_0.1", "params")
    }
    assert len(others | {origin["checksum"], find(source, config(), weights=name)["checksum"]}) == 4


def test_other_classes_get_a_table_of_their_own(source):
    for classes, names in [(12, None), (10, tuple("abcdefghij")), (3, ("a", "b", "c"))]:
        ours = config(model__num_classes=classes)
        origin = find(source, ours, names=names)
        assert origin["class_table"] == "new"
    assert "the table of the classes is made anew" in initial_weights.as_text(origin)
    params = initial_weights.restore(origin, ours, make_mesh(1, 1, jax.devices()[:1]))
    fresh = init_params(ours.model, jax.random.key(ours.seed))
    np.testing.assert_allclose(
        params["class_embedder"]["embedding"], fresh["class_embedder"]["embedding"], rtol=1e-6
    )
    there = weights(source, 150, "ema")
    for tree in (params, there):
        del tree["class_embedder"]
    assert_same(params, there)


def test_classes_without_names_keep_the_table(source):
    assert find(source, config(), names=None)["class_table"] == "kept"


def test_mean_velocities_begin_with_those_of_a_velocity_model(source):
    ours = config(model__second_time=True, flow__objective="mean_flow")
    origin = find(source, ours)
    text = initial_weights.as_text(origin)
    assert "is kept, the embedder of the second time is made anew; differs: " in text
    assert "config.flow.objective: 'velocity' -> 'mean_flow'" in text
    assert "config.model.second_time: False -> True" in text
    params = initial_weights.restore(origin, ours, make_mesh(1, 1, jax.devices()[:1]))
    embedder = params.pop("span_embedder")
    fresh = init_params(ours.model, jax.random.key(ours.seed))["span_embedder"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), embedder, fresh)
    assert_same(params, weights(source, 150, "ema"))


def test_it_goes_on_with_the_flags_and_without(source, begun, tmp_path):
    workdir, longer = shutil.copytree(begun[0], tmp_path / "run"), config()
    for num_steps, choice in [(4, None), (5, InitFrom(str(source), 150))]:
        longer.train.num_steps = num_steps
        tiny.train(longer, workdir, init_from=choice)
    expected = find(source, config())
    assert checkpoint.read_run(str(workdir), 5).origin == expected


def test_a_source_that_is_gone_or_has_gone_on_does_not_matter(source, begun, tmp_path, caplog):
    moved = shutil.copytree(source, tmp_path / "moved")
    (moved / "checkpoints" / "150").rename(moved / "checkpoints" / "151")
    for choice in (InitFrom(str(tmp_path / "gone")), InitFrom(str(moved))):
        tiny.train(config(), begun[0], init_from=choice)  # all steps are done
        assert f"--init_from={choice.workdir} is not compared" in caplog.text


def retrained(source, folder):
    """A run that has other weights at the same step."""
    shutil.copytree(source, folder)

    def change(sums):
        sums["ema"]["stem/bias"] += 1

    path = folder / "checkpoints" / "150" / "checksums" / "metadata"
    sums = json.loads(path.read_text())
    change(sums)
    path.write_text(json.dumps(sums))
    return folder


def test_a_run_that_began_otherwise_is_refused(source, begun, tmp_path):
    other = retrained(source, tmp_path / "other")
    before = tiny.files(begun[0])
    for choice, expected in {
        InitFrom(str(source), 100): "init.step: 150 -> 100",
        InitFrom(str(source), weights="params"): "init.weights: 'ema' -> 'params'",
        InitFrom(str(other)): "init.checksum: ",
    }.items():
        with pytest.raises(UserError, match=f"began with other weights .*{expected}"):
            tiny.train(config(), begun[0], init_from=choice)
    assert tiny.files(begun[0]) == before
    with pytest.raises(UserError, match="a run that began with initial values"):
        tiny.train(config(data__image_size=16), source, init_from=InitFrom(str(begun[0])))


def test_what_does_not_fit_is_refused_before_anything_is_written(source, tmp_path):
    converted = tmp_path / "converted"
    params = weights(source, 150, "ema")
    checkpoint.save_weights(converted, params, config())
    for overrides, choice, expected in [
        (dict(model__width=16), {}, "another model: config.model.width: 32 -> 16. Expected"),
        (dict(model__depth=2), {}, "config.model.depth: 1 -> 2"),
        (dict(model__boundary="truncate"), {}, "config.model.boundary: 'zeros' -> 'truncate'"),
        (dict(model=tiny.SIT), {}, "config.model.name: 'flowdcn' -> 'sit'"),
        ({}, dict(weights="power_0.2"), "no EMA 'power_0.2'; there are ema, power_0.1"),
        ({}, dict(step=7), r"no step 7; there are \[100, 150\]"),
        ({}, dict(workdir=str(tmp_path / "none")), "holds no checkpoints"),
        ({}, dict(workdir=str(converted), weights="params"), "is params; expected ema, since"),
        ({}, dict(workdir=str(tmp_path / "run")), "is the --workdir too"),
    ]:
        choice = InitFrom(**dict(workdir=str(source)) | choice)
        with pytest.raises(UserError, match=expected) as caught:
            tiny.train(config(**overrides), tmp_path / "run", init_from=choice)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="holds converted weights, from which its run starts"):
        tiny.train(config(), converted, init_from=InitFrom(str(source)))
    assert tiny.steps(converted) == [0]


def test_converted_weights_of_other_classes(source, tmp_path):
    """What is refused in their own workdir has its way here."""
    ten = tmp_path / "converted"
    checkpoint.save_weights(ten, weights(source, 150, "ema"), config())
    origin = find(ten, config(model__num_classes=3), names=None)
    assert (origin["step"], origin["class_table"]) == (0, "new")


def test_flags_about_nothing(tmp_path):
    code, output = tiny.run(tiny.train_command(tmp_path / "run", "--init_step=3"))
    assert code == 2 and "error: --init_step given without --init_from" in output
