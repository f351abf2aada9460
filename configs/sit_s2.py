"""SiT-S/2 on 256x256 ImageNet latents: 32.9 M parameters, 6.06 GMACs an image.

    python train.py --config=configs/sit_s2.py --workdir=DIR

400k steps of 256 images: 3.7e18 FLOPs. The transformer that the paper compares FlowDCN with, at
the same sizes and under the same objective.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model = default.sit()
    return config
