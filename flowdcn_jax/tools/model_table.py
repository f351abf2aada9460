"""Prints what every model of the paper costs, as Markdown: python -m flowdcn_jax.tools.model_table

Parameters and multiply-adds come from shapes alone, so XL/2 needs no memory. On a GPU the forward
pass is timed too. --json=FILE writes the same numbers with the device, the versions and the date.
"""

import functools
import itertools
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from tqdm import tqdm

from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, numbers, write_json
from flowdcn_jax.config import load_config
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.models import abstract_model, apply_model, parameter_count, random_params
from pallas_kernels.timing import median_ms, none_if_out_of_memory

# A config of configs/ -> the model's name in the paper.
MODELS = {
    "s2": "FlowDCN-S/2",
    "b2": "FlowDCN-B/2",
    "l2": "FlowDCN-L/2",
    "xl2": "FlowDCN-XL/2",
    "sit_s2": "SiT-S/2 and DiT-S/2",
    "sit_b2": "SiT-B/2 and DiT-B/2",
    "sit_l2": "SiT-L/2 and DiT-L/2",
    "sit_xl2": "SiT-XL/2 and DiT-XL/2",
    "sit_s2_plus": "SiT-S/2+",
    "flowcnn_3x3": "FlowCNN-3x3 (S/2)",
    "flowcnn_5x5": "FlowCNN-5x5 (S/2)",
    "s2_layer_norm": "FlowDCN-S/2, LayerNorm",
    "s2_gelu": "FlowDCN-S/2, GELU MLP",
    "s2_layer_norm_gelu": "FlowDCN-S/2, LayerNorm and GELU MLP",
    "s2_fixed_prior": "FlowDCN-S/2, fixed priors",
    "s2_single_scale": "FlowDCN-S/2, single-scale priors",
}
TIMED_PASSES = 20
TIMED_DTYPE = "bfloat16"

_MODELS = flags.DEFINE_list("models", list(MODELS), "Configs, such as s2,sit_s2; by default all.")
_IMAGE_SIZES = flags.DEFINE_list("image_sizes", ["256", "512"], "Sides of the images, in pixels.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "64"], "Images at a time, where timed.")
_TIMING = flags.DEFINE_enum(
    "timing", "auto", ["auto", "always", "never"], "auto: time on GPUs, not on CPUs."
)
_JSON = command.define_path("json", "File to write the numbers to, as JSON.")


def count(config, image_sizes: list[int]) -> dict:
    """{"parameters": n, "forward_gmacs": {image size: 1e9 multiply-adds of an image}}."""
    graphdef, params = abstract_model(config.model)
    network = nnx.merge(graphdef, params)  # of shapes, not of numbers
    sides = {size: size // config.autoencoder.downsampling for size in image_sizes}
    return {
        "parameters": parameter_count(params),
        "forward_gmacs": {
            size: network.forward_macs(side, side) / 1e9 for size, side in sides.items()
        },
    }


def compile_forward(config, image_size: int, batch_size: int):
    """The compiled forward pass over a batch; None if it needs more memory than there is.

    bfloat16 activations and float32 parameters, as in sampling, on one device.
    """
    config.model.dtype = TIMED_DTYPE
    graphdef, shapes = abstract_model(config.model)
    side = image_size // config.autoencoder.downsampling
    x = (batch_size, side, side, config.model.in_channels)
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in ((x, jnp.float32), (x[:1], jnp.float32), (x[:1], jnp.int32))
    ]
    forward = jax.jit(functools.partial(apply_model, graphdef))
    return none_if_out_of_memory(lambda: forward.lower(shapes, *inputs).compile())


def time_forward(compiled) -> dict:
    """{"latency_ms": of one pass over the batch, "images_per_s"}; None if memory ran out.

    Wall time without guidance, the median of TIMED_PASSES after one to warm up.
    """
    latency_ms = None if compiled is None else none_if_out_of_memory(_latency_ms, compiled)
    if latency_ms is None:
        return {"latency_ms": None, "images_per_s": None}
    _, x, _, _ = compiled.args_info[0]
    return {"latency_ms": latency_ms, "images_per_s": 1e3 * x.shape[0] / latency_ms}


def _latency_ms(compiled) -> float:
    shapes, x, t, y = compiled.args_info[0]
    inputs = (
        random_params(shapes),
        jax.random.normal(jax.random.key(0), x.shape),
        jnp.linspace(0.1, 0.9, t.shape[0]),
        jnp.zeros(y.shape, jnp.int32),
    )
    return median_ms(compiled, *inputs, runs=TIMED_PASSES)


def measure(
    names: list[str], *, image_sizes: list[int], batch_sizes: list[int], timed: bool
) -> dict:
    """Everything that the command prints, as it writes it to --json.

    Raises:
        UserError: an unknown model, or a size that the models cannot take.
    """
    check(names, image_sizes, batch_sizes)
    rows = [
        {"config": name, "model": MODELS[name], **count(load_config(name), image_sizes)}
        for name in tqdm(names, desc="counting", unit="model", dynamic_ncols=True)
    ]
    runs = list(itertools.product(names, image_sizes, batch_sizes)) if timed else []

    def compile_run(run):
        return compile_forward(load_config(run[0]), *run[1:])

    bar = functools.partial(tqdm, total=len(runs), disable=not runs, dynamic_ncols=True)
    with ThreadPoolExecutor() as pool:  # compiling takes most of the time, and one core
        compiled = list(bar(pool.map(compile_run, runs), desc="compiling", unit="program"))
    timings = [
        {"config": name, "image_size": size, "batch_size": batch, **time_forward(program)}
        for (name, size, batch), program in bar(
            zip(runs, compiled, strict=True), desc="timing", unit="program"
        )
    ]
    return {"machine": describe_machine(), "models": rows, "timings": timings}


def check(names: list[str], image_sizes: list[int], batch_sizes: list[int]) -> None:
    """Raises a UserError for the first value that cannot be used."""
    if not names:
        raise UserError(f"--models is empty; expected some of {', '.join(MODELS)}")
    for name in names:
        if name not in MODELS:
            raise UserError(f"--models names {name!r}; expected some of {', '.join(MODELS)}")
        if names.count(name) > 1:
            raise UserError(f"--models names {name!r} {names.count(name)} times; expected once")
        config = load_config(name)
        stride = config.autoencoder.downsampling * config.model.patch_size
        for size in image_sizes:
            if size < 1 or size % stride:
                raise UserError(
                    f"--image_sizes names {size}; expected positive multiples of {stride}"
                )
    if min(batch_sizes) < 1:
        raise UserError(f"--batch_sizes names {min(batch_sizes)}; expected positive numbers")


def to_markdown(result: dict, command: str) -> str:
    """The result as a document."""
    sizes = list(result["models"][0]["forward_gmacs"])
    header = ["model", "config", "parameters (M)", *(f"GMACs at {size}²" for size in sizes)]
    rows = [
        [row["model"], f"`{row['config']}`", f"{row['parameters'] / 1e6:.2f}"]
        + [f"{row['forward_gmacs'][size]:.2f}" for size in sizes]
        for row in result["models"]
    ]
    parts = [
        "# What the models cost",
        f"Made by\n\n```bash\n{command}\n```",
        "Parameters are the numbers that training changes. GMACs are 10⁹ multiply-adds of the\n"
        "forward pass over one image: of Linears, convolutions and attention's two products, as\n"
        "published figures count; elementwise work and FlowDCN's bilinear sampling are left out.\n"
        "SiT's and DiT's published parameters hold the position embedding, a constant here.",
        _table(header, rows),
    ]
    if result["timings"]:
        parts += _timings_markdown(result)
    return "\n\n".join(parts) + "\n"


def _timings_markdown(result: dict) -> list[str]:
    titles = {row["config"]: row["model"] for row in result["models"]}
    header = ["model", "image", "batch", "latency (ms)", "images/s"]
    rows = [
        [titles[row["config"]], f"{row['image_size']}²", str(row["batch_size"])]
        + [
            "out of memory" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, digits in (("latency_ms", 2), ("images_per_s", 1))
        ]
        for row in result["timings"]
    ]
    machine = result["machine"]
    return [
        f"One forward pass without guidance, on one {machine['devices'][0]} (driver "
        f"{machine['driver']}, jax {machine['versions']['jax']}, {machine['date']} UTC): "
        f"{TIMED_DTYPE}\n"
        f"activations and float32 parameters, wall time, median of {TIMED_PASSES} passes.",
        _table(header, rows),
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    timed = _TIMING.value == "always" or (
        _TIMING.value == "auto" and jax.default_backend() == "gpu"
    )
    out = file_to_write(_JSON)
    result = measure(
        _MODELS.value,
        image_sizes=numbers(_IMAGE_SIZES),
        batch_sizes=numbers(_BATCH_SIZES),
        timed=timed,
    )
    write_json(out, result)
    arguments = shlex.join(sys.argv[1:])
    print(
        to_markdown(result, f"python -m flowdcn_jax.tools.model_table {arguments}".strip()), end=""
    )


if __name__ == "__main__":
    command.run(main)
