"""How long a function takes on a GPU."""

import math
import statistics
import time
from collections.abc import Callable

import jax

CALLS = 10  # of a function in a program
TIMED_MS = 20  # at least, so that the programs' start and end, up to 0.3 ms, do not count
WARM_UP_S = 0.2  # until when a GPU has raised its clocks


def compile_calls(function: Callable, chained: jax.Array, *args) -> Callable:
    """A program of `CALLS` calls, to be called with the same arguments.

    function(chained, *args) returns an array, or a tuple of them, of which the first takes the
    place of `chained` in the next call: none can be left out or run beside another.
    """
    once = jax.jit(function)  # so that it is traced and lowered once

    def many(chained, args_of_calls):
        others = []
        for args in args_of_calls:
            out = once(chained, *args)
            chained, *rest = out if isinstance(out, tuple) else (out,)
            others.append(rest)
        return chained, others

    # Arguments of their own for each call, or XLA does once for all what depends on these alone.
    program = jax.jit(many).lower(chained, (args,) * CALLS).compile()
    return lambda chained, *args: program(chained, (args,) * CALLS)


def milliseconds(calls: Callable, *args, runs: int = 9) -> float:
    """Median time of one of the calls of `compile_calls`, in milliseconds."""
    return milliseconds_in_a_row(calls, *args, runs=runs) / CALLS


def milliseconds_in_a_row(program: Callable, *args, runs: int = 9) -> float:
    """Median time of a program in milliseconds, without its start and end.

    The device gets one after the other, without waiting for the host.
    """
    count = math.ceil(TIMED_MS / median_ms(program, *args, runs=1))

    def many(*args):
        for _ in range(count):
            out = program(*args)
        return out

    return median_ms(many, *args, runs=runs) / count


def median_ms(function: Callable, *args, runs: int = 9) -> float:
    """Median time of function(*args), its start and end included, in milliseconds.

    Calls to warm up come first, and do not count.
    """
    end_s = time.perf_counter() + WARM_UP_S
    jax.block_until_ready(function(*args))
    while time.perf_counter() < end_s:
        jax.block_until_ready(function(*args))
    times = []
    for _ in range(runs):
        start_s = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) * 1e3


def none_if_out_of_memory(function: Callable, *args):
    """function(*args), or None if the device's memory runs out."""
    try:
        return function(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
