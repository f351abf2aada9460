"""FlowDCN-S/2 with neither RMSNorm nor SwiGLU: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_layer_norm_gelu.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper: SiT-S/2's blocks with the
deformable convolution in the place of attention, under FlowDCN's initial values.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("s2")
    config.model.update(norm="layer_norm", mlp="gelu")
    return config
