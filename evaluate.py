"""Measures images: see flowdcn_jax/tools/evaluate.py, which `flowdcn evaluate` runs anywhere."""

from flowdcn_jax import command
from flowdcn_jax.tools import evaluate

if __name__ == "__main__":
    command.run(evaluate.main)
