"""A FlowDCN on CIFAR-10 whose weights are small enough to ship: 7.9 M parameters.

    python train.py --config=configs/cifar10_tiny.py --workdir=DIR

12k steps of 256 images. Seven blocks of 256 channels; of its EMA in 16 bits `make demo-cifar` draws
pictures on a CPU (docs/cifar10_tiny.md). The learning rate falls to 0, so that few steps suffice.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("cifar10_s2")
    config.model.update(width=256, depth=7, num_groups=4)
    config.train.num_steps = 12_000
    config.optimizer.update(learning_rate=1e-3, schedule="cosine")
    config.flow.time_distribution = "logit_normal"
    config.checkpoint.every_steps = 12_000
    config.log.sample_every_steps = 0
    config.sampling.update(num_images=30, num_steps=20, guidance=2.0)
    return config
