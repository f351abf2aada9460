"""The four tokens around a sampling point, all inside the image: for kernels that read their rows.

What JAX computes for one lane's sampling point, see `image.py`.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.deformable_conv.group import Group, Queries
from pallas_kernels.deformable_conv.image import Image, located, read_lane
from pallas_kernels.deformable_conv.interpolation import parts_of_tangent
from pallas_kernels.deformable_conv.point_rows import PointRows
from pallas_kernels.deformable_conv.points import Points, PointsTangent


class Corners(NamedTuple):
    """Two neighbours in two neighbouring rows of the image. Some may have no weight."""

    x: object  # of the first token
    y: object
    rows: tuple  # weights of the two rows, times the point's
    columns: tuple

    @property
    def weights(self) -> list:
        """Of the two upper tokens, of the two lower ones."""
        return [row * column for row in self.rows for column in self.columns]


def three_weights(corners: Corners):
    """(weights of the two rows, that of the right column), of which `weights_of_three` makes four.

    The columns' weights sum to 1, unless one is outside; then the other one is moved to the rows.
    """
    left, right = corners.columns
    total = jnp.where(left == 0, right, jnp.where(right == 0, left, 1.0))
    return *(row * total for row in corners.rows), jnp.where(left == 0, 1.0, right)


def weights_of_three(upper, lower, right) -> list:
    """`Corners.weights`."""
    return [row * column for row in (upper, lower) for column in (1.0 - right, right)]


def corners_of_points(group: Group, words: list, queries: Queries) -> list[Corners]:
    """Those of the lane's query, from its points' words."""
    function = functools.partial(_corners, image=group.image)
    return [
        group.warp.apply(function, group.points.fields(x, k), queries.x, queries.y)
        for k, x in enumerate(words)
    ]


def moving_corners_of_points(
    group: Group, words: list, along: PointRows, d_words: list, queries: Queries
) -> list[tuple[Corners, list]]:
    """`corners_of_points`, and the tangents of their weights, where the points move.

    `along` and `d_words` are of the points' tangent what group.points and `words` are of them.
    """
    function = functools.partial(_moving_corners, image=group.image)
    return [
        group.warp.apply(
            function, group.points.fields(x, k), along.fields(d, k), queries.x, queries.y
        )
        for k, (x, d) in enumerate(zip(words, d_words, strict=True))
    ]


def gradients_of_points(group: Group, words: list, queries: Queries, products: list) -> list:
    """The gradients of each point's fields from d out . v of its four tokens."""
    function = functools.partial(_gradients_of_point, image=group.image)
    return [
        group.warp.apply(function, group.points.fields(x, k), queries.x, queries.y, four)
        for k, (x, four) in enumerate(zip(words, products, strict=True))
    ]


def _inside(corners, size: int):
    """(first token of two inside that hold the corners inside, what their corners' numbers are).

    The latter is a function of a number for each corner; that of one outside has to be 0.
    """
    first = corners.token[0]
    token = jnp.clip(first, 0, size - 2)
    before, after = first < token, token < first

    def of_tokens(low, high):
        return (
            jnp.where(before, high, jnp.where(after, 0.0, low)),
            jnp.where(after, low, jnp.where(before, 0.0, high)),
        )

    return token, of_tokens


def _corners(points: Points, query_x, query_y, *, image: Image) -> Corners:
    point, columns, rows = located(points, query_x, query_y, image)
    x, of_columns = _inside(columns, image.w)
    column_weights = of_columns(*columns.weight)
    y, of_rows = _inside(rows, image.h)
    row_weights = of_rows(*rows.weight)
    return Corners(x, y, tuple(weight * point.weight for weight in row_weights), column_weights)


def _moving_corners(
    points: Points, tangent: PointsTangent, query_x, query_y, *, image: Image
) -> tuple[Corners, list]:
    point, columns, rows = located(points, query_x, query_y, image)
    x, of_columns = _inside(columns, image.w)
    y, of_rows = _inside(rows, image.h)
    weights, slopes = of_columns(*columns.weight), of_columns(*columns.slope)
    moved = point.push_forward(*tangent.entries(read_lane, 0))
    d_weights, shares = [], []
    for row_weight, row_slope in zip(of_rows(*rows.weight), of_rows(*rows.slope), strict=True):
        shares.append(row_weight * point.weight)
        at_weight, at_slope = parts_of_tangent(point.weight, moved, row_weight, row_slope)
        d_weights += [
            at_weight * weight + at_slope * slope
            for weight, slope in zip(weights, slopes, strict=True)
        ]
    return Corners(x, y, tuple(shares), weights), d_weights


def _gradients_of_point(points: Points, query_x, query_y, products, *, image: Image):
    point, columns, rows = located(points, query_x, query_y, image)

    def where_they_lie(corners, size, low, high):
        """Of the two tokens inside, in the places of the corners; those outside count nothing."""
        first = corners.token[0]
        token = jnp.clip(first, 0, size - 2)
        return jnp.where(token < first, high, low), jnp.where(first < token, low, high)

    halves = [where_they_lie(columns, image.w, *products[i : i + 2]) for i in (0, 2)]
    lefts, rights = (where_they_lie(rows, image.h, *x) for x in zip(*halves, strict=True))
    d_dx = d_dy = d_weight = 0.0
    for j, row in enumerate(zip(lefts, rights, strict=True)):
        for i, product in enumerate(row):
            d_weight += rows.weight[j] * columns.weight[i] * product
            d_dx += rows.weight[j] * columns.slope[i] * product
            d_dy += rows.slope[j] * columns.weight[i] * product
    return point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)
