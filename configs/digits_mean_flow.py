"""A small FlowDCN that draws handwritten digits in one step: digits.py, trained by MeanFlow.

    python train.py --config=configs/digits_mean_flow.py --workdir=DIR
    python sample.py --workdir=DIR --num_steps=1

1.3 M parameters, 1500 steps of 64 images, each of which takes 1.4 times the CPU time of one of
digits.py. Digits drawn in one step can be read: docs/few_steps.md shows some. The loss says little;
the velocity loss ends near 0.22.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("digits")
    config.model.second_time = True
    config.flow.objective = "mean_flow"
    config.flow.mean_flow.guidance_kappa = 0.5
    config.sampling.update(num_steps=1, guidance=1.0)
    return config
