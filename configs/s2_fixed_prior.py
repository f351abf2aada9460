"""FlowDCN-S/2 with scale priors that are not learned: 30.3 M parameters, 4.80 GMACs an image.

    python train.py --config=configs/s2_fixed_prior.py --workdir=DIR

400k steps of 256 images: 2.9e18 FLOPs. An ablation of the paper: the groups' radii stay
where they start, and only what each token predicts moves them.
"""

from configs import s2


def get_config():
    config = s2.get_config()
    config.model.update(learn_scale_prior=False)
    return config
