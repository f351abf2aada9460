"""FlowDCN-S/2 that draws CIFAR-10 in one step: cifar10_s2.py, trained by MeanFlow.

    python -m flowdcn_jax.tools.prepare_data --dataset=cifar10 --source=FOLDER
    python train.py --config=configs/cifar10_s2_mean_flow.py --workdir=DIR
    python sample.py --workdir=DIR --num_steps=1

30.2 M parameters. Three of four rows are flow matching, as published for ImageNet, and the target
is guided with the published scale of 2 (omega 1, kappa 0.5): samples need no guidance.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("cifar10_s2")
    config.model.second_time = True
    config.flow.objective = "mean_flow"
    config.flow.mean_flow.guidance_kappa = 0.5
    config.sampling.update(num_steps=1, guidance=1.0)
    return config
