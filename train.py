"""Trains a model: see flowdcn_jax/tools/train.py, which `flowdcn train` runs from any folder."""

from flowdcn_jax import command
from flowdcn_jax.tools import train

if __name__ == "__main__":
    command.run(train.main)
