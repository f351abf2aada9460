"""Draws images: see flowdcn_jax/tools/sample.py, which `flowdcn sample` runs from any folder."""

from flowdcn_jax import command
from flowdcn_jax.tools import sample

if __name__ == "__main__":
    command.run(sample.main)
