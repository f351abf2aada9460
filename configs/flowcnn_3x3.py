"""FlowCNN-3x3 (S/2) on 256x256 ImageNet latents: 32.0 M parameters, 5.23 GMACs an image.

    python train.py --config=configs/flowcnn_3x3.py --workdir=DIR

400k steps of 256 images: 3.2e18 FLOPs. FlowDCN-S/2 with ordinary 3x3 convolutions in groups instead
of deformable ones; flowdcn_jax/models/flowcnn.py says in which form.
"""

from flowdcn_jax.config import default_config, model_config


def get_config():
    config = default_config()
    config.model = model_config("flowcnn")
    return config
