"""Every key with its default and unit: FlowDCN-S/2 on 256x256 ImageNet latents, as published.

The other files of this folder override a few keys each. Any key can be set on the command line:

    python train.py --config=configs/s2.py --config.train.batch_size=64 --workdir=DIR
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.seed = 0  # of initial values, data order, noise, times, dropped labels; below 2**32

    config.model = flowdcn()  # below; other models have other keys
    config.data = dict(
        name="latents",  # or cifar10, digits
        data_dir=config_dict.placeholder(str),  # TFDS folder; None: TFDS's default
        split="train",
        image_size=256,  # side of the training images, or root of the buckets' area, pixels
        aspect_buckets=dict(  # VAR training, on latents cached with --aspect_buckets
            count=0,  # aspects, evenly spaced; 0: square images alone
            min_aspect=0.5,  # width / height
            max_aspect=3.0,
            side_multiple=16,  # sides are rounded down to it, pixels
        ),
        random_flip=True,  # mirror half of the visits
        num_threads=4,  # reader threads a process
        prefetch_batches=8,  # batches read ahead a process, in host memory
    )
    config.autoencoder = dict(
        name="preview",  # latents, three channels of which are shown; identity: pixels in [-1,1];
        # or a decoder: sd_vae, taesd, taef1, taef2
        weights=config_dict.placeholder(str),  # its safetensors file, or the folder that holds it
        downsampling=8,  # image pixels a latent pixel, each side
        dtype="float32",  # compute dtype: float32, bfloat16, or auto as in model.dtype
    )
    config.train = dict(
        batch_size=256,  # global, all devices of all hosts together
        num_steps=400_000,
        accumulation_steps=1,  # micro-batches a step; divides batch_size
    )
    config.flow = dict(
        time_distribution="uniform",  # or logit_normal
        label_dropout=0.1,  # probability of "no class"
    )
    config.optimizer = dict(  # AdamW
        learning_rate=1e-4,
        warmup_steps=0,  # linear from 0
        weight_decay=0.0,
        b1=0.9,
        b2=0.999,
        epsilon=1e-8,
        clip_norm=config_dict.placeholder(float),  # global gradient norm; None: no clipping
    )
    config.ema = dict(decay=0.9999)
    config.mesh = dict(  # product: number of devices; -1: what the other leaves
        data=-1,  # copies of the parameters
        fsdp=1,  # devices that share one copy
    )
    config.checkpoint = dict(
        every_steps=10_000,
        keep=3,  # newest checkpoints kept
        keep_every_steps=config_dict.placeholder(int),  # kept for ever; None: no such step
    )
    config.log = dict(
        every_steps=100,
        sample_every_steps=10_000,  # grid of EMA samples; 0: never
    )
    config.sampling = dict(  # of the grids in training; also what sample.py draws unless told
        num_images=64,
        num_steps=50,
        guidance=1.375,
        seed=0,
        classes=(207, 360, 387, 974, 88, 979, 417, 279),  # in turn; (): all classes in turn
    )
    return config.lock()  # a misspelled key is an error, in files as on the command line


def flowdcn() -> dict:
    """config.model of a FlowDCN."""
    return _shared() | dict(
        name="flowdcn",
        num_groups=6,  # groups of the deformable convolution; divides width
        boundary="zeros",  # or "truncate", which released weights were trained with
        max_scale=6.0,  # S_max: largest sampling radius, tokens
        scale_prior="multiscale",  # each group has a radius; or single_scale: all start alike
        learn_scale_prior=True,  # False: the radii before the content's influence are constants
        norm="rms_norm",  # or layer_norm
        mlp="swiglu",  # or gelu
    )


def flowcnn() -> dict:
    """config.model of a FlowCNN: ordinary convolutions instead of deformable ones."""
    return _shared() | dict(
        name="flowcnn",
        num_groups=6,  # groups of the convolution; divides width
        kernel_size=3,  # tokens a side; odd
    )


def sit() -> dict:
    """config.model of a SiT or DiT: attention, and a position embedding."""
    return _shared() | dict(
        name="sit",
        num_heads=6,  # divides width
        norm="layer_norm",  # or rms_norm
        mlp="gelu",  # or swiglu
    )


def _shared() -> dict:
    """What all models have."""
    return dict(
        width=384,  # channels of a token
        depth=12,  # blocks
        patch_size=2,  # latent pixels a side
        in_channels=4,
        num_classes=1000,  # the label num_classes means "no class"
        learn_sigma=True,  # predict 2*in_channels, use the first half (as released)
        dtype="auto",  # compute dtype: float32, bfloat16, or auto: bfloat16 except on CPUs
        remat=False,  # recompute blocks in the backward pass: less memory, a third more time
    )
