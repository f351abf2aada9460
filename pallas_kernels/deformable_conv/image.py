"""A call of the Mosaic GPU kernels: its sizes, and the arithmetic of one lane's sampling point."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.deformable_conv.interpolation import corners
from pallas_kernels.deformable_conv.points import Points


class Image(NamedTuple):
    """The sizes of a call, all static."""

    groups: int
    h: int
    w: int
    channels: int
    num_points: int
    dtype: np.dtype
    boundary: str

    @property
    def tokens(self) -> int:
        return self.h * self.w


def image_of(values, points: Points, h: int, w: int, boundary: str) -> Image:
    """The sizes of values [B, tokens, G, C] and their points."""
    groups, channels = values.shape[2:]
    num_points = points.weights.shape[-1]
    return Image(groups, h, w, channels, num_points, np.dtype(values.dtype), boundary)


def read_lane(field, k, *index):
    """What a point's fields are read by that hold one lane's numbers."""
    del k
    return field[index[0]] if index else field


def located(points: Points, query_x, query_y, image: Image):
    """(the lane's point, its corners along x, along y)."""
    point = points.point(read_lane, 0)
    x, y, point = point.seen_from(query_x, query_y)
    return point, corners(x, image.w, image.boundary), corners(y, image.h, image.boundary)


def gradients_of_point(points: Points, query_x, query_y, products, *, image: Image):
    """The gradients of the point's fields from d out . v of its four corners."""
    point, columns, rows = located(points, query_x, query_y, image)
    d_dx = d_dy = d_weight = 0.0
    for n, product in enumerate(products):
        j, i = divmod(n, 2)
        d_weight += rows.weight[j] * columns.weight[i] * product
        d_dx += rows.weight[j] * columns.slope[i] * product
        d_dy += rows.slope[j] * columns.weight[i] * product
    return point.pull_back(point.weight * d_dx, point.weight * d_dy, d_weight)
