"""FlowDCN-B/2 on 256x256 images in TAEF2's latents (32x32x32): 120.4 M parameters.

    python -m flowdcn_jax.tools.cache_latents --dataset=folder:PATH --autoencoder=taef2 \\
        --autoencoder_weights=DIR --data_dir=DIR
    python train.py --config=configs/b2_taef2.py --workdir=DIR --config.data.data_dir=DIR \\
        --config.autoencoder.weights=DIR

PATH has a subfolder a class; --config.model.num_classes is their number. TAEF2 is a tiny
autoencoder: it encodes and decodes fast, so that pictures can be seen while the model trains.
Of a thousand images, learnt by heart: 20k steps of 256. For VAR training cache them with
--aspect_buckets and add --config.data.aspect_buckets.count=10 --config.data.random_flip=False.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("b2")
    config.model.in_channels = 32
    config.autoencoder.name = "taef2"
    config.train.num_steps = 20_000
    config.checkpoint.every_steps = 2_000
    config.log.sample_every_steps = 2_000
    return config
