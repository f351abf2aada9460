"""Every key of the config: changing it changes what it should, and nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdcn_jax import data
from flowdcn_jax.config import default_config, flatten, model_config
from flowdcn_jax.config_flow import MeanFlow
from flowdcn_jax.models import MODELS, abstract_model, apply_model, init_params, random_params
from flowdcn_jax.options import options_of
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state
from flowdcn_jax.sampling import Settings, fill_settings
from flowdcn_jax.training import inputs
from flowdcn_jax.training.step import make_train_step
from tests import tiny, toy

pytestmark = pytest.mark.usefixtures("quick_compilation", "toys")

AFTER = {"later losses", "parameters", "ema"}  # what a step decides

# Key -> (a value other than the base's, keys that it needs beside it, what of `observe` changes).
STEP_KEYS = {
    "seed": (1, {}, {"initial values", "batches", "first loss"} | AFTER),
    "flow.time_distribution": ("logit_normal", {}, {"first loss"} | AFTER),
    "flow.label_dropout": (0.5, {}, {"first loss"} | AFTER),
    "optimizer.name": ("muon", {}, AFTER),
    "optimizer.learning_rate": (1e-3, {}, {"learning rates"} | AFTER),
    "optimizer.warmup_steps": (2, {}, {"learning rates"} | AFTER),
    "optimizer.schedule": ("cosine", {}, {"learning rates"} | AFTER),
    "optimizer.final_learning_rate": (
        1e-3,
        {"optimizer.schedule": "linear"},
        {"learning rates"} | AFTER,
    ),
    "optimizer.weight_decay": (1.0, {}, AFTER),
    "optimizer.b1": (0.5, {}, AFTER),
    "optimizer.b2": (0.9, {}, AFTER),
    "optimizer.epsilon": (1e-2, {}, AFTER),
    "optimizer.clip_norm": (0.1, {"optimizer.epsilon": 1e-2}, AFTER),
    "ema.decay": (0.9, {}, {"ema"}),
    "ema.warmup": (0.1, {}, {"ema"}),
    "ema.others": (("power_0.1", "constant_0.5"), {}, {"other EMAs"}),
    "mesh.data": (4, {"mesh.data": 8, "mesh.fsdp": -1}, {"mesh"}),
    "mesh.fsdp": (4, {}, {"mesh"}),
}

# As above, of `observe_run`.
RUN_KEYS = {
    "train.num_steps": (4, {}, {"steps", "checkpoints"}),
    "checkpoint.every_steps": (3, {}, {"checkpoints"}),
    "checkpoint.every_minutes": (1e-9, {"checkpoint.every_steps": 6}, {"checkpoints"}),
    "checkpoint.keep": (1, {}, {"checkpoints"}),
    "checkpoint.keep_every_steps": (4, {"checkpoint.keep": 1}, {"checkpoints"}),
    "log.every_steps": (3, {}, {"lines"}),
    "log.sample_every_steps": (3, {}, {"grids"}),
}

# As above, of `observe_batches`.
DATA_KEYS = {
    "train.batch_size": (24, {}, {"shape", "numbers"}),
    "data.data_dir": ("OTHER", {}, {"numbers"}),
    "data.split": ("train[:20]", {}, {"numbers"}),
    "data.random_flip": (False, {}, {"numbers"}),
    "data.image_size": (64, {}, {"shape", "numbers"}),
    "data.num_threads": (1, {}, set()),
    "data.prefetch_batches": (1, {}, set()),
}

# As above, of the settings that sampling takes from a run's config.
SAMPLING_KEYS = {
    "sampling.num_steps": (7, {}, {"num_steps"}),
    "sampling.guidance": (3.0, {}, {"guidance"}),
    "sampling.seed": (5, {}, {"seed"}),
}

# Model and key -> (a value other than the base's, what it changes).
MODEL_KEYS = {
    ("flowdcn", "width"): (32, "parameters"),
    ("flowdcn", "depth"): (2, "parameters"),
    ("flowdcn", "patch_size"): (1, "parameters"),
    ("flowdcn", "in_channels"): (3, "parameters"),
    ("flowdcn", "num_classes"): (9, "parameters"),
    ("flowdcn", "learn_sigma"): (False, "parameters"),
    ("flowdcn", "dtype"): ("bfloat16", "function"),
    ("sit", "gradient_dtype"): ("bfloat16", "gradients"),
    ("flowdcn", "remat"): (True, "function"),
    ("flowdcn", "second_time"): (True, "parameters"),
    ("flowdcn", "num_groups"): (4, "parameters"),
    ("flowdcn", "boundary"): ("truncate", "function"),
    ("flowdcn", "max_scale"): (3.0, "function"),
    ("flowdcn", "scale_prior"): ("single_scale", "initial values"),
    ("flowdcn", "learn_scale_prior"): (False, "parameters"),
    ("flowdcn", "norm"): ("layer_norm", "parameters"),
    ("flowdcn", "mlp"): ("gelu", "parameters"),
    ("flowcnn", "num_groups"): (4, "parameters"),
    ("flowcnn", "kernel_size"): (5, "parameters"),
    ("sit", "num_heads"): (4, "function"),
    ("sit", "norm"): ("rms_norm", "parameters"),
    ("sit", "mlp"): ("swiglu", "parameters"),
    ("sit", "attention"): ("xla", "nothing on a CPU"),  # on a GPU: tests/models/test_second_time.py
}

# Keys that need files, or what draws: the tests that change them.
ELSEWHERE = {
    "data.name": "tests/data",
    "data.aspect_buckets.count": "tests/training/test_var.py",
    "data.aspect_buckets.min_aspect": "tests/data/test_buckets.py",
    "data.aspect_buckets.max_aspect": "tests/data/test_buckets.py",
    "data.aspect_buckets.side_multiple": "tests/data/test_buckets.py",
    "autoencoder.name": "tests/autoencoders/test_runs.py",
    "autoencoder.weights": "tests/autoencoders/test_runs.py",
    "autoencoder.downsampling": "tests/autoencoders/test_runs.py",
    "autoencoder.dtype": "tests/autoencoders/test_loading.py",
    "flow.objective": "tests/training/test_mean_flow.py",
    **{
        f"flow.mean_flow.{name}": "tests/flow/test_mean_flow.py"
        for name in options_of(MeanFlow)
        if name != "derivative_dtype"
    },
    "flow.mean_flow.derivative_dtype": "tests/models/test_second_time.py",
    "log.wandb_project": "tests/training/test_run.py",
    "evaluate.every_steps": "tests/evaluation/test_drawing.py",
    "evaluate.num_images": "tests/evaluation/test_drawing.py",
    "evaluate.num_steps": "tests/evaluation/test_drawing.py",
    "evaluate.guidance": "tests/evaluation/test_drawing.py",
    "evaluate.features": "tests/evaluation/test_drawing.py",
    "evaluate.weights": "tests/evaluation/test_drawing.py",
    "evaluate.reference": "tests/evaluation/test_drawing.py",
    "sampling.num_images": "tests/sampling/test_generator.py",
    "sampling.classes": "tests/sampling/test_generator.py",
}


@pytest.fixture(scope="module")
def toys():
    with toy.registered():
        yield


def test_every_key_is_here():
    assert all((tiny.REPOSITORY / path).exists() for path in ELSEWHERE.values())
    keys = [
        *STEP_KEYS,
        *RUN_KEYS,
        *DATA_KEYS,
        *SAMPLING_KEYS,
        *ELSEWHERE,
        "train.accumulation_steps",
    ]
    assert sorted(keys) == sorted(k for k in flatten(default_config()) if k[:6] != "model.")
    of_models = {key for name in MODELS if name != "toy" for key in model_config(name)}
    assert {key for _, key in MODEL_KEYS} == of_models - {"name"}


def changed(before: dict, after: dict) -> set[str]:
    """The names under which two observations differ by more than rounding."""

    def same(a, b) -> bool:
        if jax.tree.structure(a) != jax.tree.structure(b):
            return False
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return all(
            x == y if isinstance(x, str) else np.shape(x) == np.shape(y) and np.allclose(x, y, 1e-4)
            for x, y in pairs
        )

    assert before.keys() == after.keys()
    return {name for name in before if not same(before[name], after[name])}


def dotted(overrides) -> dict:
    return {key.replace(".", "__"): value for key, value in overrides}


@functools.cache
def observe(*overrides) -> dict:
    """Three steps of training, operation by operation: nothing is compiled for a config."""
    base = {
        "optimizer.learning_rate": 2e-2,
        "optimizer.warmup_steps": 0,
        "optimizer.clip_norm": None,
        "ema.decay": 0.5,
    }
    config = toy.config(**dotted((base | dict(overrides)).items()))
    mesh = make_mesh(1, 1, jax.devices()[:1])
    stream = inputs.batches(config, data.make_source(config.data), mesh, start_step=0)
    batches, metrics = [next(stream) for _ in range(3)], []
    with jax.disable_jit():
        state = initial_state(config, mesh)
        seen = {"initial values": jax.device_get(state.params), "batches": batches}
        step = make_train_step(config, mesh)
        for batch in batches:
            state, row = step(state, batch)
            metrics.append(jax.device_get(row))
    losses = [(float(row["loss"]), float(row["grad_norm"])) for row in metrics]
    return seen | {
        "mesh": dict(make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:8]).shape),
        "learning rates": [float(row["learning_rate"]) for row in metrics],
        "first loss": losses[0],
        "later losses": losses[1:],
        "parameters": jax.device_get(state.params),
        "ema": jax.device_get(state.ema),
        "other EMAs": jax.device_get(state.other_emas),
    }


@pytest.mark.parametrize("key", STEP_KEYS)
def test_a_key_of_the_step_changes_what_it_should(key):
    value, beside, expected = STEP_KEYS[key]
    after = observe(*(beside | {key: value}).items())
    assert changed(observe(*beside.items()), after) == expected
    if key == "ema.others":
        assert after["other EMAs"].keys() == set(value)


def test_accumulation_is_a_loop_more():
    """Of the same numbers: see tests/training/test_step.py."""
    mesh = make_mesh(1, 1, jax.devices()[:1])

    def loops(parts: int) -> int:
        config = toy.config(train__accumulation_steps=parts)
        (batch,) = inputs.batch_shapes(config, data.make_source(config.data), mesh)
        step = make_train_step(config, mesh).lower(abstract_state(config, mesh), batch)
        return step.as_text().count("stablehlo.while")

    assert loops(4) == loops(1) + 1


@pytest.fixture(scope="module")
def observe_run(tmp_path_factory):
    """overrides -> what a run of six steps leaves; losses and states by step."""

    @functools.cache
    def observe_run(*overrides) -> dict:
        base = {"checkpoint.every_steps": 2, "checkpoint.keep": 3, "log.every_steps": 1}
        config = toy.config(**dotted((base | dict(overrides)).items()))
        workdir, drawn = tmp_path_factory.mktemp("run"), []

        def drawer(config, mesh, autoencoder):
            return lambda ema: drawn.append(ema) or np.zeros((8, 8, 3), np.uint8)

        tiny.train(config, workdir, make_grid_drawer=drawer)
        lines = [row["step"] for row in tiny.metrics(workdir)]
        return {
            "steps": max(lines),
            "lines": np.diff([0, *lines]).max(),
            "checkpoints": {str(step): "" for step in tiny.steps(workdir)},
            "grids": len(drawn),
            "state": {step: tiny.checksums(workdir, step)["state"] for step in tiny.steps(workdir)},
        }

    return observe_run


@pytest.mark.parametrize("key", RUN_KEYS)
def test_a_key_of_the_run_changes_what_it_should(observe_run, key):
    value, beside, expected = RUN_KEYS[key]
    before = dict(observe_run(*beside.items()))
    after = dict(observe_run(*(beside | {key: value}).items()))
    states = before.pop("state"), after.pop("state")
    assert changed(before, after) == expected
    for step in states[0].keys() & states[1].keys():
        assert states[0][step] == states[1][step]


@pytest.fixture(scope="module")
def observe_batches(tmp_path_factory):
    """overrides -> the first two batches; data_dir OTHER is another folder."""
    folders = [tmp_path_factory.mktemp(name) for name in ("latents", "other")]
    for number, folder in enumerate(folders):
        generator = np.random.default_rng(number)
        for side in (4, 8):
            latents = [
                {"mean": m, "mean_flipped": m[:, ::-1], "label": i % 10}
                for i, m in enumerate(generator.normal(size=(40, side, side, 1)))
            ]
            data.write_latents(
                latents,
                data_dir=folder,
                latent_shape=(side, side, 1),
                num_classes=10,
                stochastic=False,
                mirrored=True,
                metadata=tiny.manifest(),
            )

    @functools.cache
    def observe_batches(*overrides) -> dict:
        folder = folders["OTHER" in dict(overrides).values()]
        base = {"data.name": "latents", "data.image_size": 32, "data.random_flip": True}
        given = base | dict(overrides) | {"data.data_dir": str(folder)}
        config = tiny.config(**dotted(given.items()))
        source = data.make_source(config.data, channels=1)
        stream = inputs.batches(config, source, make_mesh(), start_step=0)
        numbers = jax.device_get([next(stream) for _ in range(2)])
        return {"numbers": numbers, "shape": numbers[0]["image"].shape}

    return observe_batches


@pytest.mark.parametrize("key", DATA_KEYS)
def test_a_key_of_the_data_changes_what_it_should(observe_batches, key):
    value, beside, expected = DATA_KEYS[key]
    after = observe_batches(*(beside | {key: value}).items())
    assert changed(observe_batches(*beside.items()), after) == expected


@pytest.mark.parametrize("key", SAMPLING_KEYS)
def test_a_key_of_sampling_changes_what_it_should(key):
    value, _, expected = SAMPLING_KEYS[key]
    configs = tiny.config(), tiny.config(**dotted([(key, value)]))
    before, after = (vars(fill_settings(Settings(), config)) for config in configs)
    assert {name for name in before if before[name] != after[name]} == expected


@functools.cache
def model_of(name: str, *overrides):
    """(config.model, its graphdef, shapes of its parameters)"""
    small = dict(width=16, depth=1, in_channels=1, num_classes=10, dtype="float32")
    parts = "num_heads" if name == "sit" else "num_groups"
    config = model_config(name) | small | {parts: 2} | dict(overrides)
    return config, *abstract_model(config)


def parameters(model) -> dict:
    paths = jax.tree_util.tree_leaves_with_path(model[2])
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}


def function(model) -> str:
    """The network's operations, in words."""
    config, graphdef, params = model
    x, t, y = np.zeros((1, 4, 4, config["in_channels"])), np.zeros(1), np.zeros(1, int)
    jaxpr = jax.make_jaxpr(lambda params: apply_model(graphdef, params, x, t, y))(params)
    return re.sub("0x[0-9a-f]+", "", str(jaxpr))  # where functions lie in memory


def velocity_and_gradient(model):
    """Of random parameters; the gradient is that of the velocity's squares."""
    config, graphdef, params = model
    x = np.ones((1, 4, 4, config["in_channels"]), np.float32)

    def run(params):
        velocity = apply_model(graphdef, params, x, np.full(1, 0.5), np.ones(1, int))
        return jnp.sum(velocity**2), velocity

    (_, velocity), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(random_params(params))
    return velocity, gradient


@pytest.mark.parametrize("name, key", MODEL_KEYS)
def test_a_key_of_the_model_changes_what_it_should(name, key):
    value, expected = MODEL_KEYS[name, key]
    beside = [("dtype", "bfloat16")] if expected == "gradients" else []
    models = model_of(name, *beside), model_of(name, *beside, (key, value))
    if expected == "parameters":  # with others nothing else can be compared
        assert parameters(models[0]) != parameters(models[1])
        return
    assert parameters(models[0]) == parameters(models[1])
    if expected == "gradients":
        (before, first), (after, second) = map(velocity_and_gradient, models)
        np.testing.assert_array_equal(before, after)
        assert changed(first, second) == set(first)
        return
    assert (function(models[0]) != function(models[1])) == (expected == "function")
    if expected == "initial values":
        before, after = (init_params(model[0], jax.random.key(0)) for model in models)
        priors = [values["blocks"][0]["conv"].pop("scale_prior") for values in (before, after)]
        assert not np.allclose(*priors)
        jax.tree.map(np.testing.assert_array_equal, before, after)
