"""FlowDCN-L/2 on 256x256 ImageNet latents: 421.5 M parameters, 68.2 GMACs an image.

    python train.py --config=configs/l2.py --workdir=DIR

400k steps of 256 images: 4.2e19 FLOPs. The paper reports FID 13.8 and sFID 4.69 without guidance.
"""

from flowdcn_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(width=1024, depth=24, num_groups=16)
    return config
