"""FlowDCN-S/2 with LayerNorm instead of RMSNorm: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_layer_norm.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper; the LayerNorm has no affine
part, as in SiT.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("s2")
    config.model.update(norm="layer_norm")
    return config
