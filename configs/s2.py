"""FlowDCN-S/2 on 256x256 ImageNet latents: 30.3 M parameters, 4.8 GMACs an image.

    python train.py --config=configs/s2.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs, 4.1 hours of steps at the 6936 images/s that one H100 made
of cifar10_s2.py, which has as many tokens (docs/cifar10_s2.md). The paper reports FID 54.6 and sFID
8.8 without guidance.
"""

from flowdcn_jax.config import default_config


def get_config():
    return default_config()
