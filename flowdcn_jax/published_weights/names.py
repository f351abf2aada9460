"""The tensors of the authors' models: their names, and where each belongs in this project's.

FlowDCN's names are those of its release; SiT's those of its own release, which FlowDCN's follow. A
PyTorch Linear's weight is [out,in] and a convolution's [out,in,p,p]; a Linear's kernel here is
[in,out].
"""

import dataclasses

import numpy as np
from flax import traverse_util

from flowdcn_jax.models import abstract_model, read_options
from flowdcn_jax.models.flowdcn import SCALE_PRIORS, FlowDCNOptions, direction_prior
from flowdcn_jax.models.sit import position_embedding
from flowdcn_jax.models.velocity_network import NetworkOptions
from flowdcn_jax.published_weights.weights_file import PublishedWeightsError

# The models that the authors published, as options of config.model.
PUBLISHED = {
    "flowdcn": dict(norm="rms_norm", mlp="swiglu", second_time=False),
    "sit": dict(norm="layer_norm", mlp="gelu", second_time=False),
}
# Their module -> ours, in the order of the authors' parameters(). A model has some of them.
OUTER_MODULES = {
    "x_embedder.proj": "stem",
    "t_embedder.mlp.0": "time_embedder.hidden",
    "t_embedder.mlp.2": "time_embedder.out",
    "y_embedder.embedding_table": "class_embedder",
    "final_layer.linear": "final.linear",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
BLOCK_MODULES = {
    "norm1": "norm1",
    "attn": "conv",  # the priors
    "attn.v": "conv.values",
    "attn.qk_deformables": "conv.directions",
    "attn.qk_scales": "conv.scales",
    "attn.qk_weights": "conv.weights",
    "attn.out": "conv.out",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "norm2",
    "mlp.w1": "mlp.w1",
    "mlp.w3": "mlp.w3",
    "mlp.w2": "mlp.w2",
    "mlp.fc1": "mlp.hidden",
    "mlp.fc2": "mlp.out",
    "adaLN_modulation.1": "modulation",
}
# Our name within a module -> theirs.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "scale_prior": "deformables_scale",
}
DIRECTION_PRIOR = "deformables_prior"
POSITIONS = "pos_embed"


@dataclasses.dataclass(frozen=True)
class OfficialTensor:
    """A tensor of the authors' model.

    Attributes:
        name: theirs.
        shape: theirs.
        path: keys that lead to our parameter; None for a constant, which is no parameter here.
        our_shape: of our parameter.
        constant: the value of a constant, [*shape] float32.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str | int, ...] | None
    our_shape: tuple[int, ...] | None = None
    constant: np.ndarray | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Their array, laid out as ours."""
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif self.path[-1] == "kernel":
            array = array.T
        return np.ascontiguousarray(array.reshape(self.our_shape))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array, laid out as theirs; the inverse of `to_ours`."""
        if len(self.shape) == 4:
            out, channels, p, _ = self.shape
            array = array.reshape(p, p, channels, out).transpose(3, 2, 0, 1)
        elif self.path[-1] == "kernel":
            array = array.T
        return np.ascontiguousarray(array.reshape(self.shape))


def official_tensors(config, *, tokens_per_side: int) -> dict[str, OfficialTensor]:
    """The tensors of the authors' model of this configuration, by name.

    In the order of the authors' `parameters()`, which a nameless list of EMA weights follows.

    Args:
        config: config.model.
        tokens_per_side: of SiT's table of positions, a constant of the resolution of training.

    Raises:
        PublishedWeightsError: the authors have no such model.
    """
    options = _published_options(config)
    _, params = abstract_model(config)
    flat = traverse_util.flatten_dict(params)
    tensors: list[OfficialTensor] = []
    if config.name == "sit":
        positions = position_embedding(tokens_per_side, tokens_per_side, config.width)
        tensors.append(_constant(POSITIONS, positions.reshape(1, -1, config.width)))
    for module, ours in OUTER_MODULES.items():
        tensors += _module_tensors(module, tuple(ours.split(".")), flat, config)
    for number in range(config.depth):
        for module, ours in BLOCK_MODULES.items():
            name, path = f"blocks.{number}.{module}", ("blocks", number, *ours.split("."))
            if module == "attn" and config.name == "flowdcn":
                tensors += _fixed_priors(name, options)
            tensors += _module_tensors(name, path, flat, config)
    assert not flat, f"parameters without the authors' names: {list(flat)}"
    return {tensor.name: tensor for tensor in tensors}


def _published_options(config) -> NetworkOptions:
    """The options of config.model; raises PublishedWeightsError if nobody published it."""
    if config.name not in PUBLISHED:
        raise PublishedWeightsError(
            f"config.model.name is {config.name!r}; expected one of those with published weights: "
            f"{', '.join(PUBLISHED)}"
        )
    options = read_options(config)
    for key, value in PUBLISHED[config.name].items():
        if getattr(options, key) != value:
            raise PublishedWeightsError(
                f"config.model.{key} is {getattr(options, key)!r}; expected {value!r}, as in the "
                f"weights published for {config.name!r}"
            )
    return options


def _fixed_priors(module: str, options: FlowDCNOptions) -> list[OfficialTensor]:
    """The priors that are constants: of the directions, and of the scales if they are not learned.

    The authors' module holds both as parameters.
    """
    priors = [_constant(f"{module}.{DIRECTION_PRIOR}", direction_prior()[None, None, None, None])]
    if not options.learn_scale_prior:
        scales = SCALE_PRIORS[options.scale_prior](options.num_groups)
        shape = (1, 1, 1, len(scales), 1, 1)
        priors.append(_constant(f"{module}.{LEAVES['scale_prior']}", scales.reshape(shape)))
    return priors


def _constant(name: str, value: np.ndarray) -> OfficialTensor:
    return OfficialTensor(name, value.shape, path=None, constant=value)


def _module_tensors(
    module: str, path: tuple[str | int, ...], flat: dict, config
) -> list[OfficialTensor]:
    """The tensors of one of the authors' modules, whose parameters are taken out of `flat`."""
    tensors = []
    for ours, theirs in LEAVES.items():
        leaf = flat.pop((*path, ours), None)
        if leaf is None:
            continue
        shape = leaf.shape
        if path == ("stem",) and ours == "kernel":
            shape = (config.width, config.in_channels, config.patch_size, config.patch_size)
        elif ours == "kernel":
            shape = shape[::-1]
        elif ours == "scale_prior":
            shape = (1, 1, 1, *shape, 1, 1)
        tensors.append(OfficialTensor(f"{module}.{theirs}", shape, (*path, ours), leaf.shape))
    return tensors
