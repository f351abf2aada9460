"""From uint8 images of any size to what a feature network was trained on, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

EXACT = jax.lax.Precision.HIGHEST  # TF32 would round pixels and weights


class Preprocessing(NamedTuple):
    """A resize of the whole image to a square, aspect not kept, then (x - mean) / deviation.

    Nothing is rounded or clipped in between: the published figures are of such inputs.
    """

    side: int  # pixels
    resize: str  # of RESIZES
    mean: tuple[float, ...]  # red, green, blue, of 0..255
    deviation: tuple[float, ...]

    def apply(self, images: Array) -> Array:
        """uint8 [N,H,W,3] -> float32 [N,side,side,3]."""
        resize, _ = RESIZES[self.resize]
        x = resize(images.astype(jnp.float32), self.side)
        return (x - np.float32(self.mean)) / np.float32(self.deviation)

    def in_words(self) -> str:
        mean, deviation = (
            "/".join(f"{value:.6g}" for value in dict.fromkeys(values))
            for values in (self.mean, self.deviation)
        )
        return (
            f"{RESIZES[self.resize][1]} to {self.side}x{self.side}, aspect not kept, neither "
            f"rounded nor clipped, float32; then (x - {mean}) / {deviation}"
        )


def bilinear_tf1(images: Array, side: int) -> Array:
    """TensorFlow 1's ResizeBilinear, align_corners=False, which Inception's graph begins with."""
    rows, columns = (jnp.asarray(tf1_matrix(size, side)) for size in images.shape[1:3])
    images = jnp.einsum("yh,nhwc->nywc", rows, images, precision=EXACT)
    return jnp.einsum("xw,nywc->nyxc", columns, images, precision=EXACT)


def tf1_matrix(size: int, new_size: int) -> np.ndarray:
    """What `bilinear_tf1` does along one axis: weights [new_size,size], float32.

    Pixel i is taken at i * size / new_size, rounded to float32 as TensorFlow does: no half pixel is
    added, and nothing is smoothed before images are made smaller. The last pixel is repeated.
    """
    place = np.arange(new_size, dtype=np.float32) * np.float32(size / new_size)
    below = place.astype(int)
    share = (place - below.astype(np.float32))[:, None]
    pixels = np.eye(size, dtype=np.float32)
    return pixels[below] * (1 - share) + pixels[np.minimum(below + 1, size - 1)] * share


def bicubic(images: Array, side: int) -> Array:
    """PyTorch's interpolate(mode="bicubic", antialias=True)."""
    shape = (images.shape[0], side, side, images.shape[3])
    return jax.image.resize(images, shape, "cubic", antialias=True, precision=EXACT)


# (float32 [N,H,W,C], side) -> [N,side,side,C]; in words.
RESIZES = {
    "bilinear_tf1": (bilinear_tf1, "TensorFlow 1's bilinear resize (no half pixel, no antialias)"),
    "bicubic": (bicubic, "bicubic resize (a = -0.5, half-pixel centres, antialias)"),
}
