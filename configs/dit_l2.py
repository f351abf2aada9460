"""DiT-L/2 on 256x256 ImageNet latents: 457.8 M parameters, 80.7 GMACs an image.

    python train.py --config=configs/dit_l2.py --workdir=DIR

The run of sit_l2.py under DiT's name: dit_s2.py says why.
"""

from flowdcn_jax.config import load_config


def get_config():
    return load_config("sit_l2")
