"""FlowDCN-S/2 with a GELU MLP instead of SwiGLU: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_gelu.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper; the MLP is SiT's, of hidden
width 4d with biases.
"""

from configs import s2


def get_config():
    config = s2.get_config()
    config.model.update(mlp="gelu")
    return config
