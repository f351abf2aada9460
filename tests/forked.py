"""Runs commands without waiting for imports: each forks off a process that has made them."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import types

from tests.conftest import REPOSITORY

# What others have written. Each command imports what is ours itself.
LIBRARIES = (
    "absl.app",
    "flax.nnx",
    "grain",
    "jax",
    "matplotlib.pyplot",
    "ml_collections.config_flags",
    "optax",
    "orbax.checkpoint",
    "PIL.Image",
    "safetensors.numpy",
    "sklearn.datasets",
    "tensorboardX",
    "tensorflow_datasets",
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(LIBRARIES))


def run(command: list[str], *, num_devices: int = 1, timeout_s: float = 240) -> tuple[int, str]:
    """(exit status, everything printed) of `python COMMAND` in the project's folder.

    On virtual CPU devices, with the environment of now. COMMAND is a file or -m and a module, with
    its flags, or -c and a program.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        process = start(command, output.name, num_devices=num_devices)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode, output.read()


def start(command: list[str], output: str, *, num_devices: int = 1):
    """As `run`, without waiting: a multiprocessing.Process, which prints to the file `output`."""
    arguments = (command, output, dict(os.environ), num_devices)
    process = _CONTEXT.Process(target=_become, args=arguments)
    process.start()
    return process


def _become(command: list[str], output: str, environment: dict, num_devices: int) -> None:
    """SystemExit ends the process with its status, and other exceptions with a traceback and 1."""
    import jax

    os.environ.clear()
    os.environ.update(environment)

    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.chdir(REPOSITORY)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    quick = environment.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"  # read when JAX is imported
    jax.config.update("jax_disable_most_optimizations", quick)
    cache = environment.get("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(command[1], main.__dict__)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
