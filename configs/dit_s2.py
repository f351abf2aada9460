"""DiT-S/2 on 256x256 ImageNet latents: 32.9 M parameters, 6.06 GMACs an image.

    python train.py --config=configs/dit_s2.py --workdir=DIR

DiT and SiT are one network and differ in the objective. Here both are trained with SiT's, the
velocity of the linear path, so this run is that of sit_s2.py. DiT's published figures come from its
own objective, noise prediction on a variance-preserving path. So do its published weights: they
have SiT's tensors, but converted with this config they would draw noise.
"""

from flowdcn_jax.config import load_config


def get_config():
    return load_config("sit_s2")
