"""FlowDCN-S/2 on 256x256 ImageNet latents: 30.3 M parameters, 4.8 GMACs an image.

    python train.py --config=configs/s2.py --workdir=DIR

400k steps of 256 images. The paper reports FID 54.6 and sFID 8.8 without guidance.
"""

from configs import default


def get_config():
    return default.get_config()
