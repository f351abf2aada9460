"""SiT-S/2+ on 256x256 ImageNet latents: 32.9 M parameters, 6.06 GMACs an image.

    python train.py --config=configs/sit_s2_plus.py --workdir=DIR

400k steps of 256 images: 3.7e18 FLOPs. SiT with FlowDCN's RMSNorm and SwiGLU: between it and
FlowDCN-S/2 are left attention against the deformable convolution, the position embedding, and the
initial values.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("sit_s2")
    config.model.update(norm="rms_norm", mlp="swiglu")
    return config
