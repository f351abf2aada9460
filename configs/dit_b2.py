"""DiT-B/2 on 256x256 ImageNet latents: 130.3 M parameters, 23.0 GMACs an image.

    python train.py --config=configs/dit_b2.py --workdir=DIR

The run of sit_b2.py under DiT's name: dit_s2.py says why.
"""

from flowdcn_jax.config import load_config


def get_config():
    return load_config("sit_b2")
