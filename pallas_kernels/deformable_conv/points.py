"""Where the sampling points of a query lie, in the two forms that the operator takes.

`Offsets` holds the offsets themselves. `Multiscale` holds what FlowDCN's projections give, from
which offset = (direction + direction prior) * sigmoid(scale + scale prior) * max_scale (paper
section 3.2): computed where it is used, it never exists in memory. Kernels see no difference: they
ask for a point, and hand back the gradients of its offset and weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deformable_conv.interpolation import are_finite, discard_non_finite


class Point(NamedTuple):
    """One sampling point of many queries; arrays are float32, an entry a query."""

    dx: jax.Array  # tokens
    dy: jax.Array
    weight: jax.Array
    # (d dx, d dy, d weight) -> gradients of the per-query fields, of a pair (x, y) as a tuple.
    pull_back: Callable
    # What `entries` of a tangent gives -> (d dx, d dy, d weight).
    push_forward: Callable

    def seen_from(self, query_x, query_y) -> tuple[jax.Array, jax.Array, "Point"]:
        """(x, y, point): its coordinates, for queries that are there, all finite.

        A point whose coordinates are not has neither weight nor gradients, and samples nothing.
        """
        x, y = self.dx + query_x, self.dy + query_y
        finite = are_finite(x, y)

        def keep(number):
            return jnp.where(finite, number, 0.0)

        def pull_back(*gradients):
            return jax.tree.map(keep, self.pull_back(*gradients))

        def push_forward(*entries):
            return jax.tree.map(keep, self.push_forward(*entries))

        point = Point(
            self.dx, self.dy, keep(self.weight), pull_back=pull_back, push_forward=push_forward
        )
        return *discard_non_finite(x, y), point


class Offsets(NamedTuple):
    """Sampling points by their offsets. In a kernel the fields are references."""

    offsets: jax.Array  # [B, h, w, G, K, 2], (dx, dy) in tokens
    weights: jax.Array  # [B, h, w, G, K]

    @property
    def per_query(self) -> tuple:
        """The fields with an entry a query, which have gradients."""
        return tuple(self)

    @property
    def per_group(self) -> tuple:
        """The fields with an entry a group."""
        return ()

    @property
    def constant(self) -> tuple:
        """The fields that all queries of all groups share."""
        return ()

    def point(self, read: Callable, k) -> Point:
        """Point k; read(field, *index) gives the queries' entries of a per-query field."""
        (dx, dy), weight = self.entries(read, k)
        return Point(
            dx,
            dy,
            weight,
            pull_back=lambda dx, dy, weight: ((dx, dy), weight),
            push_forward=lambda offset, weight: (*offset, weight),
        )

    def entries(self, read: Callable, k) -> tuple:
        """((dx, dy), weight) of point k; of tangents, what push_forward takes."""
        offset = read(self.offsets, k, 0), read(self.offsets, k, 1)
        return offset, read(self.weights, k)

    def to_offsets(self) -> "Offsets":
        return self


class MultiscaleTangent(NamedTuple):
    """Along which the fields of `Multiscale` move that are no constants."""

    directions: jax.Array  # [B, h, w, G, K, 2]
    scales: jax.Array  # [B, h, w, G, K]
    weights: jax.Array  # [B, h, w, G, K]
    scale_prior: jax.Array  # [G] float32

    @property
    def per_query(self) -> tuple:
        return tuple(self[:3])

    @property
    def per_group(self) -> tuple:
        return (self.scale_prior,)

    @property
    def constant(self) -> tuple:
        return ()

    def entries(self, read: Callable, k) -> tuple:
        """What push_forward of point k takes."""
        direction = read(self.directions, k, 0), read(self.directions, k, 1)
        return direction, read(self.scales, k) + self.scale_prior[...], read(self.weights, k)


class Multiscale(NamedTuple):
    """Sampling points by direction and scale, as FlowDCN's layers project them."""

    directions: jax.Array  # [B, h, w, G, K, 2], (dx, dy)
    scales: jax.Array  # [B, h, w, G, K]
    weights: jax.Array  # [B, h, w, G, K]
    scale_prior: jax.Array  # [G] float32
    direction_prior: jax.Array  # [K, 2] float32
    max_scale: jax.Array  # [2] float32, of x and y, in tokens

    @property
    def per_query(self) -> tuple:
        return tuple(self[:3])

    @property
    def per_group(self) -> tuple:
        return (self.scale_prior,)

    @property
    def constant(self) -> tuple:
        return self.direction_prior, self.max_scale

    def point(self, read: Callable, k) -> Point:
        max_x, max_y = self.max_scale[0], self.max_scale[1]
        direction_x = read(self.directions, k, 0) + self.direction_prior[k, 0]
        direction_y = read(self.directions, k, 1) + self.direction_prior[k, 1]
        fraction, complement = _sigmoid(read(self.scales, k) + self.scale_prior[...])

        def pull_back(d_dx, d_dy, d_weight):
            d_x, d_y = d_dx * max_x, d_dy * max_y
            d_scale = (d_x * direction_x + d_y * direction_y) * fraction * complement
            return (d_x * fraction, d_y * fraction), d_scale, d_weight

        def push_forward(d_direction, d_scale, d_weight):
            d_fraction = d_scale * (fraction * complement)
            d_dx = max_x * (d_direction[0] * fraction + direction_x * d_fraction)
            d_dy = max_y * (d_direction[1] * fraction + direction_y * d_fraction)
            return d_dx, d_dy, d_weight

        dx, dy = direction_x * (fraction * max_x), direction_y * (fraction * max_y)
        return Point(dx, dy, read(self.weights, k), pull_back, push_forward)

    def to_offsets(self) -> Offsets:
        """The same sampling points by their offsets, in float32.

        One whose offset is not finite has no gradients, or 0 times infinity would be in them.
        """
        scales = self.scales.astype(jnp.float32) + self.scale_prior[:, None]
        directions = self.directions.astype(jnp.float32) + self.direction_prior

        def offsets_of(directions, scales):
            return directions * (jax.nn.sigmoid(scales)[..., None] * self.max_scale)

        offsets = offsets_of(directions, scales)
        finite = are_finite(offsets[..., 0], offsets[..., 1])
        scales = jnp.where(finite, scales, jax.lax.stop_gradient(scales))
        directions = jnp.where(finite[..., None], directions, jax.lax.stop_gradient(directions))
        return Offsets(offsets_of(directions, scales), self.weights)


def _sigmoid(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sigmoid(x), 1 - sigmoid(x)), each to full precision."""
    # Beyond -80, the last product would be 0 times infinity. Triton's maximum would lose a NaN.
    x = jnp.where(x < -80.0, -80.0, x)
    e = jnp.exp2(x * -1.4426950408889634)  # an instruction; exp is ten
    # GPUs have an instruction for rsqrt, but divide in a dozen.
    sigmoid = jnp.square(jax.lax.rsqrt(1 + e))
    return sigmoid, e * sigmoid


Points = Offsets | Multiscale
PointsTangent = Offsets | MultiscaleTangent
TANGENT_OF = {Offsets: Offsets, Multiscale: MultiscaleTangent}


def flatten_tokens(array: jax.Array) -> jax.Array:
    """[B, h, w, ...] -> [B, h * w, ...]."""
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def flatten_points(points: Points | PointsTangent) -> Points | PointsTangent:
    """The same sampling points, the fields with an entry a query [B, h * w, ...]."""
    per_query = map(flatten_tokens, points.per_query)
    return type(points)(*per_query, *points.per_group, *points.constant)
