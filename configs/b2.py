"""FlowDCN-B/2 on 256x256 ImageNet latents: 120.1 M parameters, 19.2 GMACs an image.

    python train.py --config=configs/b2.py --workdir=DIR

400k steps of 256 images: 1.2e19 FLOPs. The paper reports FID 28.5 and sFID 6.09 without guidance.
"""

from flowdcn_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(width=768, depth=12, num_groups=12)
    return config
