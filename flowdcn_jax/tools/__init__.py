"""Commands beside training and sampling: `python -m flowdcn_jax.tools.<name> --help`."""
