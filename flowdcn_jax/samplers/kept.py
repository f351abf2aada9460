"""The one scan of the solvers, which may keep some of the states on the way."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def scan_states(
    step: Callable[[Any, Any], tuple[Any, Array]],
    carry: Any,
    rows: tuple[Array, ...],
    x_init: Array,
    keep: Sequence[int] | None,
) -> tuple[Any, Array | None]:
    """(carry at the end, states kept or None).

    Args:
        step: (carry, row) -> (next carry, next x).
        carry: the first one.
        rows: arrays with a row a step.
        x_init: state 0, [B,...].
        keep: ascending numbers of states, i being x after i rows; None: none. Only these take
            memory, however many rows there are: the second result is [len(keep),B,...].
    """
    if keep is None:
        carry, _ = jax.lax.scan(lambda carry, row: (step(carry, row)[0], None), carry, rows)
        return carry, None
    places = np.full(len(rows[0]) + 1, len(keep))  # len(keep) is out of bounds, and dropped
    places[list(keep)] = np.arange(len(keep))
    kept = jnp.zeros((len(keep), *x_init.shape), x_init.dtype)

    def step_and_keep(state, row):
        (carry, kept), (place, *row) = state, row
        carry, x = step(carry, row)
        return (carry, kept.at[place].set(x, mode="drop")), None

    state = (carry, kept.at[places[0]].set(x_init, mode="drop"))
    state, _ = jax.lax.scan(step_and_keep, state, (jnp.asarray(places[1:]), *rows))
    return state
