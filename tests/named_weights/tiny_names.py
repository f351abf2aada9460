"""A table of tiny weights in the place of the published ones, and the files that a server has.

    python -m tests.named_weights.tiny_names COMMAND [flags]

runs `flowdcn COMMAND` with that table.
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from flowdcn_jax import command
from flowdcn_jax.named_weights import table
from flowdcn_jax.named_weights.table import DECODER, FEATURES, MODEL, File, NamedWeights
from tests import official

FIXTURES = Path(__file__).parent.parent / "fixtures"
HUB_CLASSES = 1000  # as ImageNet's, so that classes have names
SETTINGS = dict(
    sampler="euler", num_steps=3, last_step=0.2, guidance=1.5, guidance_channels="three"
)
ADDRESS = "FLOWDCN_TEST_ADDRESS"  # the variable with the server's, for a command


def golden() -> dict[str, np.ndarray]:
    """The tiny official model."""
    with np.load(FIXTURES / "model.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def model_file() -> bytes:
    """The tiny official model as safetensors, with a thousand classes."""
    tensors = official.state_dict(golden())
    name = "y_embedder.embedding_table.weight"
    tensors[name] = np.resize(tensors[name], (HUB_CLASSES + 1, tensors[name].shape[1]))
    return save({key: np.ascontiguousarray(value) for key, value in tensors.items()})


def config(name: str):
    """In the place of `load_config`: the tiny official model's."""
    made = official.run_config(golden())
    made.model.num_classes = HUB_CLASSES
    return made


def files() -> dict[str, bytes]:
    """What the server has, by path."""
    vae, dino = FIXTURES / "tiny_sd_vae", FIXTURES / "tiny_dinov2"
    found = {"/owner/tiny/tiny.safetensors": model_file(), "/files/tiny.safetensors": model_file()}
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        found[f"/owner/vae/{name}"] = (vae / name).read_bytes()
    for name in ("model.safetensors", "config.json"):
        found[f"/owner/dino/{name}"] = (dino / name).read_bytes()
    return found


def names(address: str) -> dict[str, NamedWeights]:
    """The table, with a model at the hub and one at a URL."""
    model = dict(
        kind=MODEL,
        what="the tiny official model",
        size="2 MB",
        licence="MIT",
        resolution=official.run_config(golden()).data.image_size,
        config="s2",
        decoder="tiny-vae",
        settings=SETTINGS,
    )
    vae = ("diffusion_pytorch_model.safetensors", "config.json")
    dino = ("model.safetensors", "config.json")
    url = File("tiny.safetensors", url=f"{address}/files/tiny.safetensors")
    digest = hashlib.sha256(model_file()).hexdigest()[:8]
    told = File("tiny.safetensors", url=url.url, sha256=digest)
    small = dict(size="1 MB", licence=None)
    return {
        "tiny": NamedWeights(files=(File("tiny.safetensors", "owner/tiny"),), **model),
        "tiny-url": NamedWeights(files=(url,), **model),
        "tiny-told": NamedWeights(files=(told,), **model),
        "tiny-vae": NamedWeights(
            kind=DECODER,
            what="the tiny SD-VAE",
            files=tuple(File(name, "owner/vae") for name in vae),
            of="sd_vae",
            **small,
        ),
        "tiny-dino": NamedWeights(
            kind=FEATURES,
            what="the tiny DINOv2",
            files=tuple(File(name, "owner/dino") for name in dino),
            of="dinov2",
            **small,
        ),
    }


def install(address: str) -> None:
    """Puts the tiny table in the place of the published one, for the rest of the process."""
    from flowdcn_jax.sampling import named_model

    table.TABLE.clear()
    table.TABLE.update(names(address))
    named_model.load_config = config


if __name__ == "__main__":
    import importlib

    install(os.environ[ADDRESS])
    tool = sys.argv.pop(1)
    command.run(importlib.import_module(f"flowdcn_jax.tools.{tool}").main)
