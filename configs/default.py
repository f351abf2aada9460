"""FlowDCN-S/2 on 256x256 ImageNet latents, as published: every key's default.

flowdcn_jax/config.py declares the keys, with defaults, ranges and units; docs/config.md lists them.
The other files of this folder change a few each, and any can be set on the command line:

    python train.py --config=configs/s2.py --config.train.batch_size=64 --workdir=DIR
"""

import functools

from flowdcn_jax.config import default_config, model_config


def get_config():
    return default_config()


# What configs of one's own say: `config.model = default.sit()`.
flowdcn, flowcnn, sit = (
    functools.partial(model_config, name) for name in ("flowdcn", "flowcnn", "sit")
)
