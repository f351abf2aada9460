"""FlowDCN-XL/2 on 256x256 ImageNet latents: 618.9 M parameters, 100.1 GMACs an image.

    python train.py --config=configs/xl2.py --workdir=DIR

2M steps of 256 images: 3.1e20 FLOPs. The paper reports FID 2.00 with 250 SDE steps and guidance
1.375.
"""

from flowdcn_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(width=1152, depth=28, num_groups=16)
    config.train.num_steps = 2_000_000
    return config
