"""FlowDCN-B/2 on ImageNet latents of various aspect ratios (VAR): 120.1 M parameters.

    python -m flowdcn_jax.tools.cache_latents --dataset=imagenet2012 --aspect_buckets \\
        --autoencoder=sd_vae --autoencoder_weights=DIR --data_dir=DIR
    python train.py --config=configs/b2_var.py --workdir=DIR --config.data.data_dir=DIR

Ten buckets of aspects 0.5 to 3, each with the area of 256x256. The paper reports FID 23.6 for
VAR-B after 400k steps of 256 images, without guidance. That run also drew its times from the
logit-normal distribution, as here; --config.flow.time_distribution=uniform turns that off.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("b2")
    config.data.aspect_buckets.count = 10
    config.data.random_flip = False
    config.flow.time_distribution = "logit_normal"
    return config
