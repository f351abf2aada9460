"""Inputs of the deformable aggregation, in both of its forms."""

import numpy as np

from pallas_kernels.deformable_conv.points import Multiscale

# B, h, w, G, C, K: the shapes that the project measures and promises speed for.
NAMED_SHAPES = {
    "XL at 256": (64, 16, 16, 16, 72, 9),
    "XL at 512": (32, 32, 32, 16, 72, 9),
    "XL at 1024": (16, 64, 64, 16, 72, 9),
    "B at 256": (64, 16, 16, 12, 64, 9),
}


def multiscale_inputs(shape, seed=0, spread=0.3):
    """values, points and a cotangent of the output, float32: offsets like a trained model's."""
    b, h, w, g, c, k = shape
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    side = np.linspace(-1, 1, max(int(k**0.5), 1)) if k > 1 else np.zeros(1)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    fraction = (np.arange(g) + 1) / g - 1e-4
    points = Multiscale(
        directions=spread * normal(b, h, w, g, k, 2),
        scales=spread * normal(b, h, w, g, k),
        weights=normal(b, h, w, g, k),
        scale_prior=np.log(fraction / (1 - fraction)).astype(np.float32),
        direction_prior=np.resize(grid, (k, 2)).astype(np.float32),
        max_scale=np.array([6.0, 6.0], np.float32),
    )
    return normal(b, h, w, g, c), points, normal(b, h, w, g, c)
