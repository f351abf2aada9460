"""FlowDCN-S/2 with scale priors that are not learned: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_fixed_prior.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper: the groups' radii stay
where they start, and only what each token predicts moves them.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("s2")
    config.model.update(learn_scale_prior=False)
    return config
