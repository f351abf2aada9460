"""What bfloat16 costs in accuracy: velocities, gradients and the time embedding beside float32's.

    python -m benchmarks.precision --folder=DIR --out=docs/precision.json

Trains a small model of each kind on handwritten digits (float32, 300 steps), once: its EMA weights
lie in DIR/<model>.npz. Random weights would not do: FlowDCN amplifies rounding with them. Each
model then computes in both dtypes with the same weights, on the same digits.

"velocity" is |bfloat16 - float32| / |float32| over 64 images at a time t; "gradient" the same over
all parameters of the loss of 64 images at random times; "worst" that of the parameter that is the
worst. "embedding" is the length of the time embedding's error over that of the difference between
neighbours, on a grid of 250 times. --float32_points has FlowDCN's projections to directions, scales
and weights give float32 beside bfloat16, which its kernels take.

Another version of the project is measured with the same weights from its own folder:

    git worktree add ../before 397d046
    cd ../before && PYTHONPATH=. python ../flowdcn_jax/benchmarks/precision.py --folder=DIR
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx, traverse_util

from flowdcn_jax import command
from flowdcn_jax.config import load_config, model_config
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.flow.loss import draw, velocity_loss
from flowdcn_jax.models import abstract_model, apply_model

TIMES = (0.1, 0.4, 0.7, 0.95)
IMAGES = 64
SIZE = dict(width=128, depth=4, patch_size=4, in_channels=1, num_classes=10)
MODELS = {
    "flowdcn": dict(num_groups=4),
    "sit": dict(num_heads=4),
    "flowcnn": dict(num_groups=4),
}

_FOLDER = flags.DEFINE_string("folder", None, "Where the weights lie, or will.", required=True)
_MODELS = flags.DEFINE_list("models", list(MODELS), "Of flowdcn, sit and flowcnn.")
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of the training, where it is needed.", 1)
_FLOAT32_POINTS = flags.DEFINE_bool("float32_points", False, "FlowDCN's points are float32.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> None:
    out = command.file_to_write(_OUT)
    folder = Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe_machine(), "results": {}}
    print("| model |" + "".join(f" velocity, t={t} |" for t in TIMES), end="")
    print(" gradient | worst | embedding |\n" + "| --- " * (len(TIMES) + 4) + "|")
    for name in _MODELS.value:
        path = folder / f"{name}.npz"
        if not path.exists():
            np.savez(path, **_train(name))
        points = _FLOAT32_POINTS.value and name == "flowdcn"
        row = report["results"][name] = measure(name, _read(path), float32_points=points)
        numbers = [*row["velocity"], row["gradient"], row["worst"]]
        print(f"| {name} |" + "".join(f" {100 * x:.2f} % |" for x in numbers), end="")
        print(f" {row['embedding']:.3g} |", flush=True)
    command.write_json(out, report)


def _train(name: str) -> dict[str, np.ndarray]:
    """EMA weights of a run on digits, by their paths."""
    # Imported here, since other versions have them elsewhere.
    from flowdcn_jax import load_model
    from flowdcn_jax.evaluation import evaluator
    from flowdcn_jax.sampling import grid_drawer
    from flowdcn_jax.training.loop import train

    config = load_config("digits").unlock()
    config.model = model_config(name) | SIZE | MODELS[name] | {"dtype": "float32"}
    config.train.update(num_steps=_STEPS.value, batch_size=32)
    config.optimizer.warmup_steps = 0
    config.checkpoint.every_steps = _STEPS.value
    config.log.sample_every_steps = 0
    config.ema.decay = 0.98
    with tempfile.TemporaryDirectory() as workdir:
        train(config.lock(), workdir, grid_drawer, evaluator, devices=jax.devices()[:1])
        model, _ = load_model(workdir)
        params = nnx.to_pure_dict(nnx.state(model))
    flat = traverse_util.flatten_dict(jax.device_get(params))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def _read(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as file:
        flat = {tuple(_key(part) for part in name.split("/")): file[name] for name in file.files}
    return traverse_util.unflatten_dict(flat)


def _key(part: str) -> str | int:
    return int(part) if part.isdecimal() else part  # the blocks have numbers


def measure(name: str, params: dict, *, float32_points: bool = False) -> dict[str, Any]:
    """A row of the table; parts of one, not percent."""
    found = {
        dtype: _outputs(name, params, dtype, float32_points) for dtype in ("float32", "bfloat16")
    }
    right, narrow = found["float32"], found["bfloat16"]
    grads = [jax.tree.leaves(each["gradient"]) for each in (narrow, right)]
    errors = [_relative(*pair) for pair in zip(*grads, strict=True)]
    flat = [np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in grads]
    error = narrow["embedding"] - right["embedding"]
    return {
        "times": TIMES,
        "velocity": [
            _relative(*pair) for pair in zip(narrow["velocity"], right["velocity"], strict=True)
        ],
        "gradient": _relative(*flat),
        "worst": max(errors),
        "embedding": _length(error[1:]) / _length(np.diff(right["embedding"], axis=0)),
    }


def _outputs(name: str, params: dict, dtype: str, float32_points: bool) -> dict[str, Any]:
    config = model_config(name) | SIZE | MODELS[name] | {"dtype": dtype}
    graphdef, _ = abstract_model(config)
    if float32_points:
        model = nnx.merge(graphdef, params)
        for block in model.blocks:
            for linear in (block.conv.directions, block.conv.scales, block.conv.weights):
                linear.out_dtype = jnp.float32
        graphdef, _ = nnx.split(model)
    apply = jax.jit(functools.partial(apply_model, graphdef))
    images, labels = _digits()
    noise = np.random.default_rng(1).standard_normal(images.shape, np.float32)
    velocities = [
        apply(params, t * images + (1 - t) * noise, np.full(IMAGES, t, np.float32), labels)
        for t in TIMES
    ]
    draws = draw(jax.random.key(2), images.shape, time_distribution="uniform", label_dropout=0.1)
    loss = functools.partial(
        velocity_loss, velocity_fn=functools.partial(apply_model, graphdef), null_class=10
    )
    gradient = jax.jit(jax.grad(loss))(params, images, labels, draws)
    embed = jax.jit(lambda params, t: nnx.merge(graphdef, params).time_embedder(t))
    embedding = embed(params, jnp.arange(250, dtype=jnp.float32) / 250)
    outputs = dict(velocity=velocities, gradient=gradient, embedding=embedding)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), outputs)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """[IMAGES,16,16,1] in [-1,1], and their labels."""
    from flowdcn_jax.data import make_source

    source = make_source(load_config("digits").data)
    rows = source.read(np.arange(IMAGES), np.arange(IMAGES), 0)
    return rows["image"].astype(np.float32) / 127.5 - 1, rows["label"]


def _relative(found: np.ndarray, right: np.ndarray) -> float:
    return _length(found - right) / _length(right)


def _length(x: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


if __name__ == "__main__":
    command.run(main)
