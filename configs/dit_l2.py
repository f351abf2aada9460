"""DiT-L/2 on 256x256 ImageNet latents: 457.8 M parameters, 80.7 GMACs an image.

    python train.py --config=configs/dit_l2.py --workdir=DIR

The run of sit_l2.py under DiT's name: dit_s2.py says why.
"""

from configs import sit_l2


def get_config():
    return sit_l2.get_config()
