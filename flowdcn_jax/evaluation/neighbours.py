"""Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated

NEIGHBOURS = 3
BLOCK_ROWS = 4096  # a device compares so many rows with so many others at a time: 64 MiB of float32

# Squared distances up to this share of |u|^2 + |v|^2 are float32's rounding, and count as 0.
ROUNDING = 1e-6


def precision_recall(
    samples: np.ndarray, references: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """The shares of samples in the references' balls, and of references in the samples'.

    A ball reaches from its centre to the centre's neighbour of this number in the same set, and
    includes that distance.  Distances are float32, from products in full precision; all devices of
    all processes take part, and hold one of the sets and BLOCK_ROWS^2 distances each.

    Args:
        samples: float32 [N,D], the same in all processes, like the references.
        references: float32 [M,D].
        neighbours: k; N and M are larger.

    Returns:
        (precision, recall).
    """
    centre = references.mean(axis=0, dtype=np.float64).astype(np.float32)
    samples, references = samples - centre, references - centre  # small numbers round less
    # A row is its own first neighbour.
    nearest = functools.partial(_nearest, count=neighbours + 1)
    sample_radii, reference_radii = (
        _in_blocks(nearest, rows, rows, np.zeros(len(rows)))[:, -1]
        for rows in (samples, references)
    )
    precision = _in_blocks(_inside, samples, references, reference_radii).mean()
    recall = _in_blocks(_inside, references, samples, sample_radii).mean()
    return float(precision), float(recall)


def _nearest(rows: Array, columns: Array, limits: Array, *, count: int) -> Array:
    """The smallest squared distances of each row to the columns, [n,count], rising."""

    def add(best: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        columns, limits = block
        distances = jnp.where(limits < 0, jnp.inf, _squared_distances(rows, columns))
        negative, _ = jax.lax.top_k(-jnp.concatenate([best, distances], axis=1), count)
        return -negative, None

    return jax.lax.scan(add, jnp.full((len(rows), count), jnp.inf), (columns, limits))[0]


def _inside(rows: Array, columns: Array, limits: Array) -> Array:
    """Whether each row is within the squared distance `limits` of some column, bool [n]."""

    def add(inside: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        columns, limits = block
        return inside | (_squared_distances(rows, columns) <= limits).any(axis=1), None

    return jax.lax.scan(add, jnp.zeros(len(rows), bool), (columns, limits))[0]


def _squared_distances(rows: Array, columns: Array) -> Array:
    """[n,m] of float32 [n,D] and [m,D]."""
    products = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(rows**2, axis=1)[:, None] + jnp.sum(columns**2, axis=1)
    distances = squares - 2 * products
    return jnp.where(distances > ROUNDING * squares, distances, 0)


def _in_blocks(
    function: Callable[[Array, Array, Array], Array],
    rows: np.ndarray,
    columns: np.ndarray,
    limits: np.ndarray,
) -> np.ndarray:
    """`function` of blocks of rows [n,D], with all columns [blocks,m,D] and limits [blocks,m].

    A block's rows are split over all devices.  Limits of what fills up the last block are -1.
    """
    mesh = make_mesh()
    split, whole = batch_sharding(mesh), replicated(mesh)
    blocks = [_blocks(columns, BLOCK_ROWS), _blocks(limits, BLOCK_ROWS, filling=-1)]
    # From a callback: where several processes hold the same array, device_put would compare them.
    others = [jax.make_array_from_callback(x.shape, whole, x.__getitem__) for x in blocks]
    jitted = jax.jit(function, out_shardings=whole)
    found = []
    for block in _blocks(rows, BLOCK_ROWS * mesh.size, multiple=mesh.size):
        placed = jax.make_array_from_callback(block.shape, split, block.__getitem__)
        found.append(np.asarray(jitted(placed, *others)))
    return np.concatenate(found)[: len(rows)]


def _blocks(rows: np.ndarray, most: int, *, multiple: int = 1, filling: float = 0) -> np.ndarray:
    """float32 [blocks,size,...] of rows [n,...]: a size up to `most` that leaves little to fill."""
    num_blocks = -(-len(rows) // most)
    size = -(-len(rows) // (num_blocks * multiple)) * multiple
    filled = np.full((num_blocks * size, *rows.shape[1:]), filling, np.float32)
    filled[: len(rows)] = rows
    return filled.reshape(num_blocks, size, *rows.shape[1:])
