"""FlowDCN-S/2 with LayerNorm instead of RMSNorm: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_layer_norm.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper; the LayerNorm has no affine
part, as in SiT.
"""

from configs import s2


def get_config():
    config = s2.get_config()
    config.model.update(norm="layer_norm")
    return config
