"""What stands between the model's space and pictures, chosen by `config.autoencoder.name`.

"identity": the model works on pixels in [-1,1].
"none": the model works on latents and there is no decoder. Grids then show the first three latent
channels as red, green and blue, which is a preview and not a picture.
"""

import jax
import jax.numpy as jnp

LATENT_PREVIEW_RANGE = 3.0  # scaled latents have a standard deviation near 1


def decode_pixels(x: jax.Array) -> jax.Array:
    """[-1,1] float [B,H,W,C] -> uint8 [B,H,W,C]."""
    return jnp.round(jnp.clip(x * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def preview_latents(x: jax.Array) -> jax.Array:
    """Latents [B,h,w,C] -> uint8 [B,h,w,3]: three channels, +-3 filling the range."""
    channels = jnp.minimum(jnp.arange(3), x.shape[-1] - 1)
    return decode_pixels(x[..., channels] / LATENT_PREVIEW_RANGE)


AUTOENCODERS = {"identity": decode_pixels, "none": preview_latents}
