"""The deformable aggregation beside attention over the same tokens, on an NVIDIA GPU.

    python -m benchmarks.operators --out=docs/operators.json --plot=docs/operators.png

Forward and backward (all gradients) in milliseconds, bytes a second, and ratios to the memory floor
(every input read once, every output written once, at the rate of a large copy) and to cuDNN's
attention. "x3" has offsets three times wider than training starts with. --official=DIR, a clone of
the authors' repository, times their Triton kernels as well; it needs PyTorch.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from flowdcn_jax import command
from flowdcn_jax.command import file_to_write, write_json
from flowdcn_jax.environment import describe_machine
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write
from pallas_kernels.deformable_conv import multiscale_deformable_aggregate
from pallas_kernels.deformable_conv.api import why_not_pallas
from pallas_kernels.deformable_conv.named_shapes import NAMED_SHAPES, model_inputs
from pallas_kernels.timing import compile_calls, milliseconds, milliseconds_in_a_row

_SHAPES = flags.DEFINE_multi_string(
    "shape",
    [",".join(map(str, shape[:5])) for shape in NAMED_SHAPES.values()],
    "B,h,w,G,C",
)
_XLA_TOKENS = flags.DEFINE_integer(
    "xla_tokens", 256, "Most tokens an image for which plain JAX is timed too; its time grows fast."
)
_OFFICIAL = flags.DEFINE_string("official", None, "Clone of the authors' repository.")
_OUT = command.define_path("out", "JSON file to write.")
_PLOT = command.define_path("plot", "PNG to write: time against tokens.")

_K = 9
_COPY_BYTES = 2**31
_PLOTTED = (16, 32, 64, 128)  # sides of the token grids of --plot, at the tokens of 64 x 16 x 16


def main() -> None:
    out, plot = file_to_write(_OUT), file_to_write(_PLOT)
    shapes = [_parse_shape(text) for text in _SHAPES.value]
    if reason := why_not_pallas():
        raise UserError(f"the kernels can't be timed here: {reason}")
    subjects = [subject for shape in shapes for subject in _subjects(shape)]
    if plot:
        sides = [(64 * 256 // side**2, side, side, 16, 72) for side in _PLOTTED]
        plotted = (_attention, functools.partial(_ours, "pallas", "bfloat16", 1.0))
        subjects += [make(shape) for shape in sides if shape not in shapes for make in plotted]
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(_compile, subjects)
        programs = list(tqdm(compiled, "compiling", total=len(subjects), unit="row"))
    report = {"machine": describe_machine(), "copy_bytes_per_s": _copy_rate(), "results": []}
    print(f"copy: {report['copy_bytes_per_s'] / 1e12:.2f} TB/s", flush=True)
    print(
        "| B,h,w,G,C | what | fwd ms | bwd ms | fwd TB/s | bwd TB/s | over floor | of attention |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for subject, calls in zip(subjects, programs, strict=True):
        _add(report, subject.shape, subject.what, *_times(subject, calls))
    if _OFFICIAL.value:
        for shape in shapes:
            for dtype in ("bfloat16", "float32"):
                times = _time_official(Path(_OFFICIAL.value), shape, dtype)
                _add(report, shape, f"official {dtype}", *times)
    if plot:
        _plot(report["results"], plot)
    write_json(out, report)


def _parse_shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--shape is {text!r}; expected five positive numbers B,h,w,G,C")
    return tuple(map(int, sizes))


def _name(shape) -> str:
    return "x".join(map(str, shape))


def _copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    array = jnp.zeros((_COPY_BYTES // 4,), jnp.int32)
    ms = milliseconds_in_a_row(jax.jit(lambda x: x + 1), array)
    return 2 * _COPY_BYTES / ms * 1e3


class Subject(NamedTuple):
    """Something to time: a row of the table."""

    shape: tuple[int, ...]
    what: str
    forward: Callable
    backward: Callable  # (d_out, *inputs of forward)
    make_inputs: Callable  # () -> (d_out, inputs of forward)
    backward_runs_forward: bool = False


def _subjects(shape) -> list[Subject]:
    subjects = [_attention(shape)]
    for dtype in ("bfloat16", "float32"):
        subjects += [_ours("pallas", dtype, widening, shape) for widening in (1.0, 3.0)]
    if shape[1] * shape[2] <= _XLA_TOKENS.value:
        subjects.append(_ours("xla", "bfloat16", 1.0, shape))
    return subjects


def _ours(implementation: str, dtype: str, widening: float, shape) -> Subject:
    """The form that the model uses."""

    def forward(values, *points):
        directions, scales, weights, scale_prior, direction_prior, max_scale = points
        return multiscale_deformable_aggregate(
            values,
            directions,
            scales,
            weights,
            scale_prior,
            direction_prior=direction_prior,
            max_scale=max_scale,
            implementation=implementation,
        )

    def backward(d_out, *inputs):
        def of_learned(*learned):
            return forward(*learned, *inputs[5:])

        return jax.vjp(of_learned, *inputs[:5])[1](d_out)  # the output is not computed

    def make_inputs():
        values, points, d_out = model_inputs((*shape, _K), dtype, widening=widening)
        return d_out, (values, *points)

    what = f"{implementation} {dtype}" + (" x3" if widening > 1 else "")
    return Subject(shape, what, forward, backward, make_inputs)


def _attention(shape) -> Subject:
    """cuDNN's, over the same tokens and heads."""
    b, h, w, g, c = shape
    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")

    def backward(d_out, *inputs):
        return jax.vjp(attention, *inputs)[1](d_out)  # runs the forward too: it needs its sums

    def make_inputs():
        queries = jax.random.normal(jax.random.key(0), (b, h * w, g, c), jnp.bfloat16)
        return queries, (queries,) * 3

    return Subject(shape, "attention bfloat16", attention, backward, make_inputs, True)


def _compile(subject: Subject) -> tuple[Callable, Callable]:
    d_out, inputs = jax.eval_shape(subject.make_inputs)
    return compile_calls(subject.forward, *inputs), compile_calls(subject.backward, d_out, *inputs)


def _times(subject: Subject, programs: tuple[Callable, Callable]) -> tuple[float, float]:
    """(forward, backward) in milliseconds."""
    d_out, inputs = subject.make_inputs()
    forward_ms = milliseconds(programs[0], *inputs)
    backward_ms = milliseconds(programs[1], d_out, *inputs)
    return forward_ms, backward_ms - (forward_ms if subject.backward_runs_forward else 0)


def _time_official(folder: Path, shape, dtype: str) -> tuple[float, float]:
    """(forward, backward) in milliseconds of the authors' Triton kernels, with their launches."""
    import torch
    import triton

    def kernel(file: str, name: str):
        path = folder / "src" / "ops" / "triton_kernels_udcn" / file
        if not path.is_file():
            sys.exit(f"error: {path} does not exist; --official expects a clone of FlowDCN")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    forward = kernel("forward.py", "_forward_kernel")
    backward = kernel("backward.py", "_backward_kernel")
    b, h, w, g, c = shape
    values, points, d_out = model_inputs((*shape, _K), "float32")
    offsets, weights = points.to_offsets()
    ys, xs = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    coordinates = offsets + jnp.stack([xs, ys], axis=-1)[:, :, None, None]
    v, x, a, d = (
        torch.utils.dlpack.from_dlpack(array).to(getattr(torch, dtype)).clone()
        for array in (values, coordinates, weights, d_out)
    )
    sizes = (b, h, w, h * w, g, c, _K)
    grid = (b * h * w * g,)

    def run_forward():
        forward[grid](*sizes, v, x, a, torch.zeros_like(v))

    def run_backward():
        d_values = torch.zeros_like(v, dtype=torch.float16)
        backward[grid](*sizes, v, x, a, d, d_values, torch.zeros_like(x), torch.zeros_like(a))
        d_values.to(v.dtype)

    return tuple(
        triton.testing.do_bench(run, return_mode="median") for run in (run_forward, run_backward)
    )


def _add(report: dict[str, Any], shape, what: str, forward_ms: float, backward_ms: float) -> None:
    """Adds a row to the report and prints it."""
    b, h, w, g, c = shape
    size = 4 if "float32" in what else 2
    values, points = b * h * w * g * c * size, b * h * w * g * _K * 4 * size
    least = (2 * values + points, 3 * values + 2 * points)  # bytes, forward and backward
    floors = [1e3 * n / report["copy_bytes_per_s"] for n in least]
    row = dict(shape=_name(shape), what=what, forward_ms=forward_ms, backward_ms=backward_ms)
    rates, over = ["", ""], ""
    if what.startswith("pallas"):
        row |= dict(forward_floor_ms=floors[0], backward_floor_ms=floors[1])
        rates = [f"{least[0] / forward_ms / 1e9:.2f}", f"{least[1] / backward_ms / 1e9:.2f}"]
        over = f"{forward_ms / floors[0]:.1f}, {backward_ms / floors[1]:.1f}"
    attention = [r for r in report["results"] if r["shape"] == row["shape"]][:1] or [row]
    share = [row[key] / attention[0][key] for key in ("forward_ms", "backward_ms")]
    report["results"].append(row)
    print(
        f"| {row['shape']} | {what} | {forward_ms:.3f} | {backward_ms:.3f} | {rates[0]} | "
        f"{rates[1]} | {over} | {share[0]:.2f}, {share[1]:.2f} |",
        flush=True,
    )


def _plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Time of 16,384 tokens in images of more and more of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    for axes, key in zip(panels, ("forward_ms", "backward_ms"), strict=True):
        for what in ("pallas bfloat16", "attention bfloat16"):
            curve = {}
            for row in rows:
                b, h, w, g, c = (int(n) for n in row["shape"].split("x"))
                if row["what"] == what and h == w and (g, c) == (16, 72):
                    curve[h * w] = row[key] * 16384 / (b * h * w)
            tokens = sorted(curve)
            axes.loglog(tokens, [curve[n] for n in tokens], "o-", label=what)
        axes.set(
            xlabel="tokens an image", ylabel="ms for 16,384 tokens, G=16, C=72", title=key[:-3]
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
    panels[0].legend()
    with atomic_write(out) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    command.run(main)
