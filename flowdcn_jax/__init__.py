"""FlowDCN in JAX: images of any resolution from a purely convolutional flow-matching model.

Conventions: arrays are NHWC; t=0 is noise and t=1 is data; offsets are (dx, dy) in tokens.

`generate(workdir, ...)` gives images of a training run, and so does `generate(model, ...)` without
reading and compiling anew, for `model = load_trained(workdir)`. `load_model(workdir)` gives the
network and the config. Each takes the name of published weights, such as "flowdcn-xl2-256", in the
place of a workdir. All are `flowdcn_jax.sampling`'s.
"""

from flowdcn_jax.version import __version__ as __version__

__all__ = ["generate", "load_model", "load_trained"]


def __getattr__(name: str):
    if name in __all__:
        from flowdcn_jax import sampling  # later than `import flowdcn_jax`: it is heavy

        return getattr(sampling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
