"""FlowDCN-S/2 with one scale prior for all groups: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_single_scale.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper: every group starts with
a radius of half of max_scale, 3 tokens. With --config.model.learn_scale_prior=False too there is no
prior at all.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("s2")
    config.model.update(scale_prior="single_scale")
    return config
