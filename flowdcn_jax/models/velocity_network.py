"""What all models share: patches in, adaLN blocks conditioned on time and class, patches out.

The models differ in their blocks, and in whether tokens are told their positions.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flowdcn_jax.errors import ConfigError
from flowdcn_jax.models import layers
from flowdcn_jax.options import at_least, checked, one_of, option
from flowdcn_jax.precision import BESIDE_BFLOAT16, DTYPES, compute_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The keys of config.model that all models have; those of S/2 by default.

    Raises:
        flowdcn_jax.errors.ConfigError: a value out of range, or two that do not go together.
    """

    width: int = option(384, "channels of a token", at_least(1), fixed=True)
    depth: int = option(12, "blocks", at_least(1), fixed=True)
    patch_size: int = option(2, "latent pixels a side", at_least(1), fixed=True)
    in_channels: int = option(
        4, "channels of the input and of the velocity", at_least(1), fixed=True
    )
    num_classes: int = option(
        1000, "classes; the label num_classes means no class", at_least(1), fixed=True
    )
    learn_sigma: bool = option(
        True, "predict 2*in_channels and use the first half, as released", fixed=True
    )
    dtype: str = option("auto", "compute dtype; auto: bfloat16 except on CPUs", one_of(*DTYPES))
    gradient_dtype: str = option(
        "float32",
        "of parameters' gradients while devices add them up, if dtype is bfloat16; bfloat16: half "
        "as much to send of every matrix, rounded before that",
        one_of("float32", "bfloat16"),
    )
    remat: bool = option(
        False, "recompute blocks in the backward pass: less memory, a third more time"
    )

    second_time: bool = option(
        False,
        "take a second time r, up to which the velocity is the mean, as flow.objective=mean_flow "
        "needs it",
        fixed=True,
    )

    def __post_init__(self):
        checked(self, prefix="config.model.", error=ConfigError)

    @property
    def compute_dtype(self):
        """The dtype that `dtype` stands for on these devices."""
        return compute_dtype(self.dtype)

    @property
    def sum_dtype(self):
        """The dtype in which devices add gradients up: `gradient_dtype`, beside bfloat16."""
        narrow = jnp.dtype(self.compute_dtype).itemsize == 2
        return jnp.dtype(self.gradient_dtype if narrow else "float32")

    def _require_multiple(self, name: str, divisor: str) -> None:
        value, of = getattr(self, name), getattr(self, divisor)
        if value % of:
            raise ConfigError(
                f"config.model.{name} is {value}; expected a multiple of "
                f"config.model.{divisor}={of}"
            )


class Pending(NamedTuple):
    """A gated branch that the next block adds, as it reads the tokens anyway."""

    branch: layers.Branch
    gate: Array  # [B,d] float32


class AdaLNBlock(nnx.Module):
    """x += gate1 * mixer(adaLN(norm1(x))); x += gate2 * mlp(adaLN(norm2(x))).

    A block defines norm1, norm2, mlp and modulation (a Linear to 6 * width), and names its mixer;
    mlp and mixer give a `layers.Branch`.
    """

    mixer: str  # the attribute in which, alone, tokens see one another

    def __call__(
        self, x: Array, pending: Pending | None, condition: Array, *mixer_options
    ) -> tuple[Array, Pending]:
        """x [B,h,w,d] in the compute dtype and what is still to be added to it, likewise returned.

        condition [B,d] is float32.
        """
        modulation = self.modulation(nnx.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        if pending is None:
            narrow = (a.astype(x.dtype) for a in (shift1, scale1))
            h = layers.modulate(self.norm1(x), *narrow)
        else:
            x, h = layers.residual_adaln(x, *pending, self.norm1, scale1, shift1)
        mixed = getattr(self, self.mixer)(h, *mixer_options)
        x, h = layers.residual_adaln(x, mixed, gate1, self.norm2, scale2, shift2)
        return x, Pending(self.mlp(h), gate2)


class FinalLayer(nnx.Module):
    """LayerNorm, adaLN and a Linear to p*p*channels, in float32; both Linears start at zero."""

    def __init__(self, width: int, out_features: int, *, rngs: nnx.Rngs, **linear_options):
        zeros = nnx.initializers.zeros_init()
        options = dict(kernel_init=zeros, bias_init=zeros, rngs=rngs, **linear_options)
        self.norm = layers.layer_norm(width, dtype=jnp.float32, rngs=rngs)
        self.modulation = layers.Linear(width, 2 * width, **options)
        self.linear = layers.Linear(width, out_features, **options)

    def __call__(self, x: Array, condition: Array) -> Array:
        shift, scale = jnp.split(self.modulation(nnx.silu(condition)), 2, axis=-1)
        return self.linear(layers.modulate(self.norm(x), shift, scale))


def float32_options(options: NetworkOptions) -> dict:
    """What the Linears share that act on the condition, and the last one: they are float32.

    bfloat16 could not tell neighbours of a 250-step time grid from one another.
    """
    narrow = jnp.dtype(options.compute_dtype).itemsize == 2
    precision = BESIDE_BFLOAT16 if narrow else None
    return dict(dtype=jnp.float32, precision=precision, gradient_dtype=options.sum_dtype)


def linear_options(options: NetworkOptions, rngs: nnx.Rngs) -> dict:
    """What the Linears that act on tokens share."""
    return dict(dtype=options.compute_dtype, gradient_dtype=options.sum_dtype, rngs=rngs)


class VelocityNetwork(nnx.Module):
    """The velocity network around its blocks, which a model makes.

    Args:
        options: config.model.
        rngs: source of the initial values.
        linear: makes the Linears that have no initial values of their own.
    """

    takes_max_scale_factor = False  # whether blocks have a reach that a call can change

    def __init__(self, options: NetworkOptions, *, rngs: nnx.Rngs, linear=layers.Linear):
        self.options = options
        patch_features = options.patch_size**2 * options.in_channels
        out_features = patch_features * (2 if options.learn_sigma else 1)
        width, float32 = options.width, float32_options(options)
        self.stem = layers.xavier_linear(patch_features, width, **linear_options(options, rngs))
        self.time_embedder = layers.TimestepEmbedder(width, linear=linear, rngs=rngs, **float32)
        self.class_embedder = layers.ClassEmbedder(
            options.num_classes,
            width,
            rngs=rngs,
            **{key: value for key, value in float32.items() if key != "dtype"},
        )
        self.blocks = nnx.List(self.make_block(options, rngs=rngs) for _ in range(options.depth))
        self.final = FinalLayer(width, out_features, rngs=rngs, **float32)
        span_embedder = None
        if options.second_time:  # last, so that all else starts as it does without
            span_embedder = layers.TimestepEmbedder(
                width, linear=linear, starts_at_zero=True, rngs=rngs, **float32
            )
        self.span_embedder = span_embedder

    def make_block(self, options: NetworkOptions, *, rngs: nnx.Rngs) -> AdaLNBlock:
        """One of the `depth` blocks."""
        raise NotImplementedError

    def __call__(
        self,
        x: Array,
        t: Array,
        y: Array,
        max_scale_factor: Array | None = None,
        *,
        r: Array | None = None,
    ) -> Array:
        """Velocity [B,H,W,C] (float32) at x [B,H,W,C], time t [B] in [0,1], class y [B] (integers).

        max_scale_factor [depth,2] multiplies max_scale in each block along x and y (see
        `flowdcn_jax.models.resolution`); only of models that take it.

        A model of a second time gives the mean velocity from t to r [B] in [t,1]; without r that at
        t alone (arXiv 2505.13447, section 4.1). It sees t and the span r - t.

        Raises:
            ValueError: a shape that does not fit, a side that the patch size does not divide, or
                an r that the model does not take.
        """
        options = self.options
        self._check(x, t, y, max_scale_factor, r)
        tokens, pending = self.embed(x), None
        condition = self.time_embedder(t) + self.class_embedder(y)
        if self.span_embedder is not None:
            condition += self.span_embedder(jnp.zeros_like(t) if r is None else r - t)
        for number, block in enumerate(self.blocks):
            factor = () if max_scale_factor is None else (max_scale_factor[number],)
            apply = nnx.remat(type(block).__call__) if options.remat else type(block).__call__
            tokens, pending = apply(block, tokens, pending, condition, *factor)
        tokens = layers.add_residual(tokens, *pending)
        out = layers.unpatchify(self.final(tokens, condition), options.patch_size)
        return out[..., : options.in_channels].astype(jnp.float32)

    def embed(self, x: Array) -> Array:
        """x [B,H,W,C] -> tokens [B,H/p,W/p,d]."""
        x = x.astype(self.options.compute_dtype)
        return self.stem(layers.patchify(x, self.options.patch_size))

    def forward_macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass over one input of height x width (latent pixels).

        Of the Linears and convolutions, as published figures count: elementwise work, norms and the
        lookup of the class are left out, and convolutions count their padding.
        """
        tokens = (height // self.options.patch_size) * (width // self.options.patch_size)
        once = {
            "time_embedder",
            "span_embedder",
            "modulation",
        }  # act on the condition, not on the tokens
        total = 0
        for path, module in nnx.iter_modules(self):
            kernel = getattr(module, "kernel", None)
            if kernel is not None:  # of a Linear or a convolution
                total += (1 if once.intersection(path) else tokens) * math.prod(kernel.shape)
        return total

    def _check(
        self, x: Array, t: Array, y: Array, max_scale_factor: Array | None, r: Array | None
    ) -> None:
        channels, patch_size = self.options.in_channels, self.options.patch_size
        if x.ndim != 4 or x.shape[-1] != channels:
            raise ValueError(f"x has shape {x.shape}; expected [B, H, W, {channels}]")
        if x.shape[1] % patch_size or x.shape[2] % patch_size or 0 in x.shape[1:3]:
            raise ValueError(
                f"x is {x.shape[1]}x{x.shape[2]}; both sides must be positive multiples of the "
                f"patch size {patch_size}"
            )
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t {t.shape} and y {y.shape} must both have shape {x.shape[:1]}")
        if r is not None and self.span_embedder is None:
            raise ValueError("r is given; expected none, since the model has no second time")
        if r is not None and r.shape != t.shape:
            raise ValueError(f"r has shape {r.shape}; expected that of t, {t.shape}")
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"y has dtype {y.dtype}; expected integers")
        expected = (self.options.depth, 2) if self.takes_max_scale_factor else None
        if max_scale_factor is not None and max_scale_factor.shape != expected:
            raise ValueError(
                f"max_scale_factor has shape {max_scale_factor.shape}; expected "
                + (f"{expected}, a row a block" if expected else "none for this model")
            )
