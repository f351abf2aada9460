"""SiT-L/2 on 256x256 ImageNet latents: 457.8 M parameters, 80.7 GMACs an image.

    python train.py --config=configs/sit_l2.py --workdir=DIR

400k steps of 256 images: 5.0e19 FLOPs.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("sit_s2")
    config.model.update(width=1024, depth=24, num_heads=16)
    return config
