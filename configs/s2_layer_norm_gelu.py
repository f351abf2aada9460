"""FlowDCN-S/2 with neither RMSNorm nor SwiGLU: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_layer_norm_gelu.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper: SiT-S/2's blocks with the
deformable convolution in the place of attention, under FlowDCN's initial values.
"""

from configs import s2


def get_config():
    config = s2.get_config()
    config.model.update(norm="layer_norm", mlp="gelu")
    return config
