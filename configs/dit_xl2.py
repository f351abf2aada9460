"""DiT-XL/2 on 256x256 ImageNet latents: 674.8 M parameters, 118.6 GMACs an image.

    python train.py --config=configs/dit_xl2.py --workdir=DIR

The run of sit_xl2.py under DiT's name: dit_s2.py says why.
"""

from flowdcn_jax.config import load_config


def get_config():
    return load_config("sit_xl2")
