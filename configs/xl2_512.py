"""FlowDCN-XL/2 on 512x512 ImageNet latents (64x64x4): 618.9 M parameters, 399.8 GMACs an image.

    python -m flowdcn_jax.tools.cache_latents --image_size=512 \\
        --dataset=folder:ILSVRC/Data/CLS-LOC/train \\
        --autoencoder=sd_vae --autoencoder_weights=DIR --data_dir=DIR
    python train.py --config=configs/xl2_512.py --workdir=DIR --config.data.data_dir=DIR \\
        --init_from=XL2_WORKDIR

The paper's recipe: 100k steps of 256 images, 6.1e19 FLOPs, from the weights that configs/xl2.py
trained (2M steps at 256x256). XL2_WORKDIR is that run's, or the published weights' (README), which
need --config.model.boundary=truncate too. The paper reports FID 2.44 with 250 SDE steps. Blocks are
recomputed in the backward pass to fit larger batches.
"""

from flowdcn_jax.config import load_config


def get_config():
    config = load_config("xl2")
    config.model.remat = True
    config.data.image_size = 512
    config.train.num_steps = 100_000
    return config
