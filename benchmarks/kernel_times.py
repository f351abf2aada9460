"""Kernels in a trace of a training step, by kind of work."""

import collections
import re
from typing import Any, NamedTuple

# (kind, pattern of the kernel's name, of its instruction); the first that both fit counts.
_KINDS = (
    ("between devices", "nccl", ""),
    ("deformable aggregation", "deformable_", ""),
    ("residual, norm and modulation", "residual_adaln", ""),
    ("SwiGLU", "swiglu", ""),
    ("attention", "", r"__cudnn\$fmha"),
    ("products", "", r"__cublas|kind=kCustom.*gemm"),
    ("optimizer and EMA", "", r'op_name="jit\(train_step\)/(add|mul|sub|sqrt)"'),
    ("norm of the gradient", "", r'op_name="jit\(train_step\)/reduce_sum"'),
    ("other sums", "reduce", ""),
    ("other elementwise work", "", ""),
)


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    instruction: str  # of the compiled program: its name there
    start_us: float
    duration_us: float


def by_kind(kernels: list[Kernel], program_text: str, *, steps: int) -> list[dict[str, Any]]:
    """Milliseconds and kernels a step of each kind of work, the longest first.

    Args:
        kernels: those of `steps` steps.
        program_text: of the compiled program, in which the instructions stand.
    """
    lines = (re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", x) for x in program_text.splitlines())
    instructions = {match[1]: match[2] for match in lines if match}
    time_us, count = collections.Counter(), collections.Counter()
    for kernel in kernels:
        text = instructions.get(kernel.instruction, "")
        kind = next(
            kind
            for kind, name, instruction in _KINDS
            if re.search(name, kernel.name) and re.search(instruction, text)
        )
        time_us[kind] += kernel.duration_us
        count[kind] += 1
    return [
        {"kind": kind, "ms": us / steps / 1e3, "kernels": count[kind] / steps}
        for kind, us in time_us.most_common()
    ]


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The kernels of GPUs in a trace as `jax.profiler` writes it, in the order of their start."""
    events = trace["traceEvents"]

    def names(of: str) -> dict[tuple, str]:
        told = (event for event in events if event.get("ph") == "M" and event["name"] == of)
        keys = ("pid",) if of == "process_name" else ("pid", "tid")
        return {tuple(event[key] for key in keys): event["args"]["name"] for event in told}

    processes, threads, kernels = names("process_name"), names("thread_name"), []
    for event in events:
        process = processes.get((event.get("pid"),), "")
        thread = threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and process.startswith("/device:GPU") and "Stream" in thread:
            instruction = event.get("args", {}).get("hlo_op", "")
            kernels.append(Kernel(event["name"], instruction, event["ts"], event["dur"]))
    return sorted(kernels, key=lambda kernel: kernel.start_us)
