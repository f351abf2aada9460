"""FlowCNN-5x5 (S/2) on 256x256 ImageNet latents: 36.7 M parameters, 6.43 GMACs an image.

    python train.py --config=configs/flowcnn_5x5.py --workdir=DIR

400k steps of 256 images: 4.0e18 FLOPs. FlowDCN-S/2 with ordinary 5x5 convolutions in groups instead
of deformable ones; flowdcn_jax/models/flowcnn.py says in which form.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("flowcnn_3x3")
    config.model.kernel_size = 5
    return config
