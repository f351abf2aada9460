"""Training: state, step, sharding, checkpoints, metrics and the loop that joins them."""
