"""FlowDCN-S/2 with a GELU MLP instead of SwiGLU: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_gelu.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper; the MLP is SiT's, of hidden
width 4d with biases.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("s2")
    config.model.update(mlp="gelu")
    return config
