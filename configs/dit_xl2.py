"""DiT-XL/2 on 256x256 ImageNet latents: 674.8 M parameters, 118.6 GMACs an image.

    python train.py --config=configs/dit_xl2.py --workdir=DIR

The run of sit_xl2.py under DiT's name: dit_s2.py says why.
"""

from configs import sit_xl2


def get_config():
    return sit_xl2.get_config()
