"""FlowDCN-XL/2 for few steps on 256x256 ImageNet latents: xl2.py, trained by MeanFlow.

    python train.py --config=configs/xl2_mean_flow.py --workdir=DIR
    python train.py --config=configs/xl2_mean_flow.py --workdir=DIR --init_from=runs/xl2

620.6 M parameters. The objective's options are those that the MeanFlow paper published for its own
XL/2, a transformer: guidance of omega 0.2 and kappa 0.92 at t >= 0.25, AdamW with b2 = 0.95, 240
epochs of 256 images. The second command begins with the weights of a run of xl2.py. Neither was run
at length here.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("xl2")
    config.model.second_time = True
    config.flow.objective = "mean_flow"
    config.flow.mean_flow.update(guidance_omega=0.2, guidance_kappa=0.92, guidance_begin=0.25)
    config.train.num_steps = 1_200_000
    config.optimizer.b2 = 0.95
    config.sampling.update(num_steps=1, guidance=1.0)
    return config
