"""SiT-S/2 on 256x256 ImageNet latents: 32.9 M parameters, 6.06 GMACs an image.

    python train.py --config=configs/sit_s2.py --workdir=DIR

400k steps of 256 images: 3.7e18 FLOPs. The transformer that the paper compares FlowDCN with, at
the same sizes and under the same objective.
"""

from flowdcn_jax.config import default_config, model_config


def get_config():
    config = default_config()
    config.model = model_config("sit")
    return config
