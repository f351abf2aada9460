"""FlowDCN in JAX: images of any resolution from a purely convolutional flow-matching model.

Conventions: arrays are NHWC; t=0 is noise and t=1 is data; offsets are (dx, dy) in tokens.
"""

__version__ = "0.1.0"


def load_model(workdir, step=None):
    """(model, config) of a training run, with its EMA weights; see `flowdcn_jax.sampling`."""
    from flowdcn_jax import sampling  # later than `import flowdcn_jax`: it is heavy

    return sampling.load_model(workdir, step)
