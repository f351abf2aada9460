"""Accelerator operators, a plain JAX definition beside each; imports jax, and knows no model."""
