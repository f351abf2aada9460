"""The table of names: what others published, where it is, and how it is used. Imports no JAX.

None of it is part of this project. Files are fetched from those who publish them, by whoever asks,
under their licences.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowdcn_jax.errors import UserError
from flowdcn_jax.files import local_path, user_cache

MODEL, DECODER, FEATURES = "model", "decoder", "feature network"  # kinds
GIB = 2**30
_NEAREST = 3  # names in a message


class NamedWeightsError(UserError, ValueError):
    """A name, a source or a cache that cannot be used; the message says which, and what to do."""


@dataclasses.dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
        name: of the file, which is that at its source.
        repo: OWNER/NAME on the hub; None: it is at `url`.
        url: where it is, if not on a hub.
        sha256: how its SHA-256 begins, where a source says it; "": what came first is kept to.
        limit_bytes: more is not taken.
    """

    name: str
    repo: str | None = None
    url: str | None = None
    sha256: str = ""
    limit_bytes: int = 8 * GIB

    @property
    def source(self) -> str:
        """Where it is from, for people."""
        return f"https://huggingface.co/{self.repo}" if self.repo else str(self.url)


@dataclasses.dataclass(frozen=True)
class NamedWeights:
    """What a name stands for.

    Attributes:
        kind: MODEL, DECODER or FEATURES.
        what: one line for people.
        files: to fetch.
        size: of them together, for people; rounded.
        licence: as the publisher states it; None: not known here, see the source.
        resolution: of a model's training, pixels a side.
        config: of a model: the config in configs/ that its tensors have.
        decoder: of a model: the name of the weights that decode.
        settings: of a model: those of its published figures, options of sample.py.
        of: of a decoder its name in config.autoencoder, of features their network's.
        converted: of features: whether their file becomes safetensors first.
    """

    kind: str
    what: str
    files: tuple[File, ...]
    size: str
    licence: str | None
    resolution: int | None = None
    config: str | None = None
    decoder: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: str | None = None
    converted: bool = False


def _diffusers(repo: str) -> tuple[File, ...]:
    """An autoencoder as diffusers stores it."""
    limit = dict(limit_bytes=GIB)
    return (
        File("diffusion_pytorch_model.safetensors", repo, **limit),
        File("config.json", repo, limit_bytes=2**20),
    )


TABLE = {
    "flowdcn-xl2-256": NamedWeights(
        kind=MODEL,
        what="FlowDCN-XL/2, 2M steps; FID 2.01 with these settings, by its authors",
        files=(File("FlowDCN-XL-2M-R256.pth", "wangsssssss/FlowDCN"),),
        size="2.5 GB",
        licence=None,
        resolution=256,
        config="xl2",
        decoder="sd-vae-ft-ema",
        settings=dict(sampler="euler", num_steps=250, last_step=0.04, guidance=1.375),
    ),
    "sit-xl2-256": NamedWeights(
        kind=MODEL,
        what="SiT-XL/2, 7M steps; FID 2.06 with guidance 1.5 and an SDE, by its authors",
        files=(File("SiT-XL-2-256.pt", "nyu-visionx/SiT-collections"),),
        size="2.7 GB",
        licence="MIT",
        resolution=256,
        config="sit_xl2",
        decoder="sd-vae-ft-ema",
        settings=dict(
            sampler="euler_sde",
            num_steps=250,
            last_step=0.04,
            guidance=1.5,
            guidance_channels="three",
        ),
    ),
    "sd-vae-ft-ema": NamedWeights(
        kind=DECODER,
        what="Stable Diffusion's autoencoder, the decoder of the models above",
        files=_diffusers("stabilityai/sd-vae-ft-ema"),
        size="335 MB",
        licence="MIT",
        of="sd_vae",
    ),
    "sd-vae-ft-mse": NamedWeights(
        kind=DECODER,
        what="the same with a smoother decoder",
        files=_diffusers("stabilityai/sd-vae-ft-mse"),
        size="335 MB",
        licence="MIT",
        of="sd_vae",
    ),
    "taesd": NamedWeights(
        kind=DECODER,
        what="tiny autoencoder of the SD-VAE's latents",
        files=_diffusers("madebyollin/taesd"),
        size="10 MB",
        licence="MIT",
        of="taesd",
    ),
    "taef1": NamedWeights(
        kind=DECODER,
        what="tiny autoencoder of FLUX.1's latents",
        files=_diffusers("madebyollin/taef1"),
        size="10 MB",
        licence=None,
        of="taef1",
    ),
    "taef2": NamedWeights(
        kind=DECODER,
        what="tiny autoencoder of FLUX.2's latents",
        files=(File("taef2.safetensors", "madebyollin/taef2", limit_bytes=GIB),),
        size="10 MB",
        licence=None,
        of="taef2",
    ),
    "inception": NamedWeights(
        kind=FEATURES,
        what="Inception of 2015, of FID, sFID, Inception score, precision, recall and KID",
        files=(
            File(
                "pt_inception-2015-12-05-6726825d.pth",
                url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth",
                sha256="6726825d",  # as PyTorch puts it into a name
                limit_bytes=GIB // 2,
            ),
        ),
        size="91 MB",
        licence="Apache-2.0",
        of="inception",
        converted=True,
    ),
    "dinov2": NamedWeights(
        kind=FEATURES,
        what="DINOv2 ViT-L/14, of FD-DINOv2",
        files=(
            File("model.safetensors", "facebook/dinov2-large", limit_bytes=4 * GIB),
            File("config.json", "facebook/dinov2-large", limit_bytes=2**20),
        ),
        size="1.2 GB",
        licence="Apache-2.0",
        of="dinov2",
    ),
}
"""The names; docs/weights.md shows them."""


def named(text: Any) -> bool:
    """Whether this is a name of the table; a file or folder of that name comes first."""
    return (
        isinstance(text, str | os.PathLike)
        and os.fspath(text) in TABLE
        and not (os.path.exists(text))
    )


def find(name: str, kind: str | None = None) -> NamedWeights:
    """TABLE[name].

    Raises:
        NamedWeightsError: no such name, or one of another kind; the message has the nearest.
    """
    if name not in TABLE:
        near = difflib.get_close_matches(str(name).lower(), TABLE, n=_NEAREST, cutoff=0.5)
        known = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(TABLE)}"
        raise NamedWeightsError(f"{name!r} is no name of weights; {known}")
    if kind not in (None, TABLE[name].kind):
        fitting = [each for each, weights in TABLE.items() if weights.kind == kind]
        raise NamedWeightsError(
            f"{name} is {TABLE[name].what}; expected a {kind}: one of {', '.join(fitting)}"
        )
    return TABLE[name]


def cache_folder() -> Path:
    """Where the cache is: $FLOWDCN_CACHE, else a folder in the user's cache."""
    return local_path(os.environ.get("FLOWDCN_CACHE") or user_cache() / "weights")
