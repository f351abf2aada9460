"""A feature network ready to run: uint8 images in, float32 features out."""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from flowdcn_jax.evaluation.features.preprocessing import Preprocessing
from flowdcn_jax.evaluation.features.weights import FeaturesError
from flowdcn_jax.runs.sharding import batch_sharding, make_mesh, replicated

BATCH_SIZE = 64  # images a device
IN_FLIGHT = 2  # batches: one is computed while another is copied

# Compute dtype and "fast" -> the precision of products, as JAX calls it and in words.
PRECISIONS = {
    ("float32", False): ("highest", "float32, without TF32"),
    ("float32", True): ("tensorfloat32", "float32, with products in TF32 where the device has it"),
    ("bfloat16", False): ("default", "bfloat16, with sums and statistics in float32"),
}


class Description(NamedTuple):
    """What is computed, for people and reports in JSON."""

    network: str
    protocol: str  # whose input the network gets
    preprocessing: str  # of images
    outputs: Mapping[str, str]  # by name
    precision: str
    weights_sha256: str | None  # of the file; None without one
    source_sha256: str | None = None  # of the published file that it was made from, if it says so


class FeatureExtractor:
    """Features of images: extractor(images). `load_features` makes one from a file.

    Attributes:
        description: what is computed.
        num_features: F.
        batch_size: images computed at a time, on all devices together.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        description: Description,
        preprocessing: Preprocessing,
        *,
        products: str,
        batch_size: int = BATCH_SIZE,
        mesh: Mesh | None = None,
    ):
        """Copies the weights to the devices.

        Args:
            graphdef: of the network.
            params: its parameters, as nested dicts of arrays.
            products: their precision, as jax.default_matmul_precision takes it.
            batch_size: images a device.
            mesh: of this process's devices; None: all of them.
        """
        mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh

        def run(params: Any, x: Array) -> dict[str, Array]:
            with jax.default_matmul_precision(products):
                return nnx.merge(graphdef, params)(x)

        self.description = description
        self.batch_size = batch_size * mesh.size
        self._by_row = batch_sharding(mesh)
        self._params = jax.device_put(params, replicated(mesh))
        # Two programs, so that the network is compiled once, whatever the sizes of images.
        self._preprocess = jax.jit(preprocessing.apply, out_shardings=self._by_row)
        self._run = jax.jit(run, out_shardings=self._by_row)
        x = jax.ShapeDtypeStruct((1, preprocessing.side, preprocessing.side, 3), np.float32)
        self.num_features = jax.eval_shape(run, params, x)["features"].shape[1]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The features of any number of images of one size.

        Args:
            images: uint8 [N,H,W,3], red, green, blue.

        Returns:
            float32 arrays [N,...] by the names of `description.outputs`; `features` is [N,F].

        Raises:
            FeaturesError: other images, or features that are not finite.
        """
        _check_images(images)
        running, done = collections.deque(), []
        for first in range(0, len(images), self.batch_size):
            running.append(self._start(images[first : first + self.batch_size]))
            if len(running) == IN_FLIGHT:
                done.append(running.popleft()())
        done += [finish() for finish in running]
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    def compute(self, batch: Array) -> dict[str, Array]:
        """What a call gives for `batch_size` images, all on the devices; does not wait or check."""
        return self._run(self._params, self._preprocess(batch))

    def _start(self, images: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
        """Begins with a batch, and does not wait; what is returned waits, and gives the features.

        A short batch is filled up, so that nothing compiles twice: images do not change each
        other's features.
        """
        missing = self.batch_size - len(images)
        batch = np.pad(images, [(0, missing)] + [(0, 0)] * 3) if missing else images
        outputs = self.compute(jax.device_put(batch, self._by_row))
        return lambda: {
            name: self._checked(name, np.asarray(array)[: len(images)])
            for name, array in outputs.items()
        }

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if bad.size:
            network, precision = self.description.network, self.description.precision
            raise FeaturesError(
                f"{name} of image {bad[0]} of a batch are not finite; expected numbers from "
                f"{network} in {precision}"
            )
        return array


def _check_images(images: np.ndarray) -> None:
    """Raises a FeaturesError unless they are what every network here takes."""
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        hint = "; repeat grey ones three times" if shape[3:] == (1,) else ""
        raise FeaturesError(
            f"images are {dtype} of shape {shape}; expected uint8 [N,H,W,3] in 0..255{hint}"
        )
