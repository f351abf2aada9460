"""SiT-XL/2 on 256x256 ImageNet latents: 674.8 M parameters, 118.6 GMACs an image.

    python train.py --config=configs/sit_xl2.py --workdir=DIR

7M steps of 256 images, as its authors took: 1.3e21 FLOPs. They report FID 2.06 with guidance.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("sit_s2")
    config.model.update(width=1152, depth=28, num_heads=16)
    config.train.num_steps = 7_000_000
    return config
