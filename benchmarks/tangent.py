"""The deformable aggregation's derivative along a direction, on an NVIDIA GPU.

    python -m benchmarks.tangent --out=tangent.json

Milliseconds of the forward, the backward (all gradients), the tangent by each kernel that can take
the shape, and jax.jvp, which gives output and tangent; ratios are to the forward. "x3" has offsets
three times wider than training starts with. The kernel in use is marked.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from benchmarks.tangent_kernels import candidates
from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from pallas_kernels.deformable_conv.api import why_not_pallas
from pallas_kernels.deformable_conv.blocks import choose_tangent
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.deformable_conv.pallas import deformable_aggregate_pallas, kernel_of
from pallas_kernels.deformable_conv.points import MultiscaleTangent, flatten_points, flatten_tokens
from pallas_kernels.devices import is_hopper
from pallas_kernels.timing import compile_calls, milliseconds

_SHAPES = flags.DEFINE_multi_string(
    "shape", [",".join(map(str, shape)) for shape in NAMED_SHAPES.values()], "B,h,w,G,C,K"
)
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Of values and points.")
_OUT = command.define_path("out", "JSON file to write.")

_WIDENINGS = (1.0, 3.0)


class Subject(NamedTuple):
    """A row of the table."""

    shape: tuple[int, ...]
    dtype: str
    what: str
    function: Callable  # of _inputs: the first result can take the first argument's place


def main() -> None:
    out = file_to_write(_OUT)
    shapes = [_parse_shape(text) for text in _SHAPES.value]
    if reason := why_not_pallas():
        raise UserError(f"the kernels can't be timed here: {reason}")
    subjects = [x for shape in shapes for dtype in _DTYPES.value for x in _subjects(shape, dtype)]
    with ThreadPoolExecutor() as pool:
        programs = list(tqdm(pool.map(_compile, subjects), "compiling", total=len(subjects)))
    report = {"machine": describe_machine(), "results": []}
    print("| B,h,w,G,C,K | | ms | forwards | x3 ms | forwards |")
    print("| --- | --- | --- | --- | --- | --- |")
    forward = {}
    for subject, program in zip(subjects, programs, strict=True):
        row = dict(subject._asdict(), function=None) | _times(subject, program)
        del row["function"]
        if subject.what == "forward":
            forward[subject[:2]] = row["ms"]
        report["results"].append(row)
        print(_line(row, forward[subject[:2]]), flush=True)
    write_json(out, report)


def _parse_shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 6 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--shape is {text!r}; expected six positive numbers B,h,w,G,C,K")
    return tuple(map(int, sizes))


def _subjects(shape, dtype: str) -> list[Subject]:
    make = functools.partial(Subject, shape, dtype)
    subjects = [make("forward", _forward), make("backward", _backward), make("jvp", _jvp)]
    sizes = (*shape[1:3], *shape[4:])
    chosen = choose_tangent(*sizes, dtype, hopper=is_hopper())
    for tiling in candidates(*sizes, dtype, hopper=is_hopper()):
        mark = " (in use)" if tiling == chosen else ""
        subjects.append(make(f"{tiling}{mark}", functools.partial(_tangent, tiling)))
    return subjects


def _inputs(shape, dtype: str, widening: float = 1.0):
    """(values, points, their tangents, d out)."""
    values, points, d_out = model_inputs(shape, dtype, widening=widening)
    d_values, d_points, _ = model_inputs(shape, dtype, seed=1)
    return values, points, d_values, MultiscaleTangent(*d_points[:4]), d_out


def _operator(values, points):
    return deformable_aggregate_pallas(values, points, "zeros")


def _forward(values, points, d_values, d_points, d_out):
    return _operator(values, points)


def _backward(d_out, values, points, d_values, d_points):
    d_values, d_points = jax.vjp(_operator, values, points)[1](d_out)
    return d_values, d_points[:4]


def _jvp(values, points, d_values, d_points, d_out):
    still = (jnp.zeros_like(x) for x in points.constant)
    along = type(points)(*d_points, *still)
    return jax.jvp(_operator, (values, points), (d_values, along))


def _tangent(tiling, d_values, points, values, d_points, d_out):
    kernel = kernel_of("tangent", tiling, *values.shape[1:3])
    moved = flatten_tokens(d_values), flatten_points(d_points)
    still = flatten_tokens(values), flatten_points(points)
    return kernel(*still, *moved, boundary="zeros", interpret=False).reshape(values.shape)


def _arguments(subject: Subject, widening: float = 1.0) -> tuple:
    values, points, d_values, d_points, d_out = _inputs(subject.shape, subject.dtype, widening)
    if subject.what == "backward":
        return d_out, values, points, d_values, d_points
    if subject.what in ("forward", "jvp"):
        return values, points, d_values, d_points, d_out
    return d_values, points, values, d_points, d_out


def _compile(subject: Subject) -> Callable:
    return compile_calls(subject.function, *jax.eval_shape(lambda: _arguments(subject)))


def _times(subject: Subject, program: Callable) -> dict[str, float]:
    times = [milliseconds(program, *_arguments(subject, x)) for x in _WIDENINGS]
    return dict(zip(("ms", "ms_wide"), times, strict=True))


def _line(row: dict, forward_ms: float) -> str:
    shape = "x".join(map(str, row["shape"]))
    ratios = [row[key] / forward_ms for key in ("ms", "ms_wide")]
    numbers = f"{row['ms']:.3f} | {ratios[0]:.2f} | {row['ms_wide']:.3f} | {ratios[1]:.2f}"
    return f"| {shape} | {row['dtype']} {row['what']} | {numbers} |"


if __name__ == "__main__":
    command.run(main)
