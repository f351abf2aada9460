"""SiT-B/2 on 256x256 ImageNet latents: 130.3 M parameters, 23.0 GMACs an image.

    python train.py --config=configs/sit_b2.py --workdir=DIR

400k steps of 256 images: 1.4e19 FLOPs.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("sit_s2")
    config.model.update(width=768, depth=12, num_heads=12)
    return config
