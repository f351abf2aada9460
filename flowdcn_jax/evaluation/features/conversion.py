"""From the published files of feature networks to the safetensors that are read here."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flowdcn_jax.evaluation.features.registry import find_network
from flowdcn_jax.evaluation.features.weights import COUNTER, FeaturesError, place_weights
from flowdcn_jax.files import atomic_path
from flowdcn_jax.published_weights.weights_file import open_weights_file


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
