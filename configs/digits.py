"""A small FlowDCN on scikit-learn's handwritten digits: 16x16 pixels, patch 4, 10 classes.

    python train.py --config=configs/digits.py --workdir=DIR

Needs no data and no accelerator: 1.2 M parameters, 1500 steps of 64 images, three minutes on two
CPU cores. The loss ends near 0.2, and guidance 2 gives digits that anyone can read.
"""

from flowdcn_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(
        width=128, depth=4, num_groups=4, patch_size=4, in_channels=1, num_classes=10
    )
    config.data.update(name="digits", image_size=16, random_flip=False)
    config.autoencoder.update(name="identity", downsampling=1)
    config.train.update(batch_size=64, num_steps=1_500)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, clip_norm=1.0)
    config.ema.decay = 0.995
    config.checkpoint.every_steps = 250
    config.log.update(every_steps=25, sample_every_steps=500)
    config.sampling.update(num_images=60, num_steps=25, guidance=2.0, classes=())
    return config
