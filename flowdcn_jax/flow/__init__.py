"""Flow matching on the linear path: t=0 is noise, t=1 is data. Imports jax alone."""
