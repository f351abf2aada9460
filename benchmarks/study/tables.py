"""The tables of the study: literal lists of runs, and what the paper says of them.

A row is a config of configs/ and the keys that it changes; `rows.run_of` adds how long it is
trained and how it is measured. Nothing here imports JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


class InData(str):
    """A file or folder below --data_dir."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Another size at which the rows are measured.

    Attributes:
        name: what tables call it.
        image_size: height x width, pixels.
        adjustment: of S_max: none, paper or released.
        data: what its samples are compared with: images of that size.
    """

    name: str
    image_size: str
    adjustment: str
    data: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train.

    Attributes:
        name: what tables and plots call it.
        config: name of a config in configs/.
        changes: keys of the config and their values, set on the command line.
        seeds: of the runs.
        emas: names of the EMAs to choose from; one that the run does not track is made after it.
    """

    name: str
    config: str
    changes: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)
    emas: tuple[str, ...] = ("ema",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """That one row's Fréchet distance is below another's; `text` says it, and whose claim it is."""

    text: str
    better: str
    worse: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A question, the rows that answer it, and what is expected.

    Attributes:
        title: of its section.
        text: what differs between the rows, in Markdown.
        rows: the ways to train; the first ones are run first.
        claims: what is held to the figures.
        in_half: likewise, where the better row has half the steps of the other.
        num_steps: of training, unless the command says otherwise.
        curves: whether figures are taken in training too, of the EMA named ema.
        solver_steps: numbers of Euler steps at which each row is measured besides.
        shapes: at which each row is measured besides.
        data: the reference: a data set's training images, or a folder of images.
    """

    title: str
    text: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    in_half: tuple[Claim, ...] = ()
    num_steps: int = 20_000
    curves: bool = True
    solver_steps: tuple[int, ...] = ()
    shapes: tuple[Shape, ...] = ()
    data: str = "cifar10"


# What makes a config of ImageNet latents one of CIFAR-10's pixels.
CIFAR10 = {
    "model.in_channels": 3,
    "model.num_classes": 10,
    "data.name": "cifar10",
    "data.image_size": 32,
    "autoencoder.name": "identity",
    "autoencoder.downsampling": 1,
    "sampling.classes": (),
}
# With these it is trained as configs/cifar10_s2.py is: for short runs.
SHORT = CIFAR10 | {
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_steps": 500,
    "optimizer.clip_norm": 1.0,
    "ema.decay": 0.999,
}
# As published: AdamW 1e-4, no warm-up, EMA 0.9999, uniform t. An EMA of 0.9999 is mostly initial
# values after a short run, so two that forget them are tracked beside it, in every row.
PUBLISHED = CIFAR10 | {"ema.others": ("power_0.05", "power_0.1")}
_EMAS = ("ema", "power_0.05", "power_0.1")
_THREE = (0, 1, 2)

_FLOWDCN = Row(name="FlowDCN-S/2", config="s2", changes=SHORT, seeds=_THREE)
_SIT = Row(name="SiT-S/2", config="sit_s2", changes=SHORT, seeds=_THREE)

MODELS = Table(
    title="Models",
    text="The networks of the paper's comparison, S/2, all trained alike.",
    rows=(
        _FLOWDCN,
        _SIT,
        Row(name="SiT-S/2+", config="sit_s2_plus", changes=SHORT, seeds=_THREE),
        Row(name="FlowCNN-3x3", config="flowcnn_3x3", changes=SHORT),
        Row(name="FlowCNN-5x5", config="flowcnn_5x5", changes=SHORT),
    ),
    claims=(
        Claim(text="FlowDCN-S/2 is better than SiT-S/2", better="FlowDCN-S/2", worse="SiT-S/2"),
        Claim(text="RMSNorm and SwiGLU make SiT better", better="SiT-S/2+", worse="SiT-S/2"),
        Claim(text="FlowDCN-S/2 is better than SiT-S/2+", better="FlowDCN-S/2", worse="SiT-S/2+"),
        Claim(
            text="Deformable convolutions are better than ordinary ones of 3x3 tokens",
            better="FlowDCN-S/2",
            worse="FlowCNN-3x3",
        ),
        Claim(
            text="Deformable convolutions are better than ordinary ones of 5x5 tokens",
            better="FlowDCN-S/2",
            worse="FlowCNN-5x5",
        ),
    ),
)

ABLATIONS = Table(
    title="Parts of FlowDCN",
    text="FlowDCN-S/2 with one part changed, all trained alike.",
    rows=(
        _FLOWDCN,
        Row(name="single-scale prior", config="s2_single_scale", changes=SHORT),
        Row(name="fixed prior", config="s2_fixed_prior", changes=SHORT),
        Row(
            name="fixed single-scale prior",
            config="s2_single_scale",
            changes=SHORT | {"model.learn_scale_prior": False},
        ),
        Row(name="LayerNorm and GELU", config="s2_layer_norm_gelu", changes=SHORT),
        Row(name="LayerNorm", config="s2_layer_norm", changes=SHORT),
        Row(name="GELU", config="s2_gelu", changes=SHORT),
        Row(
            name="borders as released", config="s2", changes=SHORT | {"model.boundary": "truncate"}
        ),
    ),
    claims=(
        Claim(
            text="Multiscale priors are better than a single scale",
            better="FlowDCN-S/2",
            worse="single-scale prior",
        ),
        Claim(
            text="Learned priors are better than fixed ones",
            better="FlowDCN-S/2",
            worse="fixed prior",
        ),
        Claim(
            text="RMSNorm and SwiGLU are better than LayerNorm and GELU",
            better="FlowDCN-S/2",
            worse="LayerNorm and GELU",
        ),
    ),
)

RECIPE = Table(
    title="Recipe",
    text="FlowDCN-S/2 as published (AdamW 1e-4, no warm-up, EMA 0.9999, uniform t) and one change "
    "at a time, then together. Each is drawn with the EMA that suits it best.",
    rows=tuple(
        Row(name=name, config="s2", changes=PUBLISHED | changes, emas=_EMAS, seeds=seeds)
        for name, changes, seeds in (
            ("as published", {}, _THREE),
            (
                "together",
                {
                    "flow.time_distribution": "logit_normal",
                    "optimizer.learning_rate": 1e-3,
                    "optimizer.warmup_steps": 500,
                    "optimizer.schedule": "cosine",
                    "optimizer.clip_norm": 1.0,
                },
                _THREE,
            ),
            ("rate 5e-4", {"optimizer.learning_rate": 5e-4}, (0,)),
            ("rate 1e-3", {"optimizer.learning_rate": 1e-3}, (0,)),
            ("Muon", {"optimizer.name": "muon"}, (0,)),
            (
                "Muon, rate 1e-3",
                {"optimizer.name": "muon", "optimizer.learning_rate": 1e-3},
                (0,),
            ),
            ("logit-normal t", {"flow.time_distribution": "logit_normal"}, (0,)),
            ("cosine to 0", {"optimizer.schedule": "cosine"}, (0,)),
            ("warm-up of 500 steps", {"optimizer.warmup_steps": 500}, (0,)),
            ("gradients clipped at 1", {"optimizer.clip_norm": 1.0}, (0,)),
            ("weight decay 0.1", {"optimizer.weight_decay": 0.1}, (0,)),
            ("labels dropped 0.05", {"flow.label_dropout": 0.05}, (0,)),
            ("labels dropped 0.2", {"flow.label_dropout": 0.2}, (0,)),
        )
    )
    + (
        Row(
            name="EMA widths after training",
            config="s2",
            changes=PUBLISHED,
            emas=("power_0.05", "power_0.06", "power_0.08", "power_0.1", "power_0.12"),
        ),
    ),
    claims=tuple(
        Claim(text=f"{name} is better than the published recipe", better=name, worse="as published")
        for name in ("together", "logit-normal t", "Muon")
    ),
    in_half=(
        Claim(
            text="The changes together are better than the published recipe",
            better="together",
            worse="as published",
        ),
    ),
    curves=False,
)

FEW_STEPS = Table(
    title="Few steps",
    text="The runs of the models' table, drawn with few Euler steps; an image of a column and a "
    "class has the same noise in each row.",
    rows=(_FLOWDCN, _SIT),
    claims=(
        Claim(
            text="FlowDCN-S/2 is better than SiT-S/2 in few steps",
            better="FlowDCN-S/2",
            worse="SiT-S/2",
        ),
    ),
    solver_steps=(2, 3, 4, 5, 8, 10),
)

# Photos in TAEF2's latents, learnt by heart.
_PHOTOS = {
    "model.in_channels": 32,
    "model.num_classes": 1000,
    "data.random_flip": False,
    "data.data_dir": InData("square"),
    "autoencoder.name": "taef2",
    "autoencoder.weights": InData("taef2"),
    "train.batch_size": 128,
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup_steps": 200,
    "optimizer.clip_norm": 1.0,
    "ema.decay": 0.995,
}
_ASPECTS = {"data.data_dir": InData("aspects"), "data.aspect_buckets.count": 10}
_LOGIT_NORMAL = {"flow.time_distribution": "logit_normal"}
_WIDE = InData("photos_176x352")

TIMES = Table(
    title="Times and aspect ratios",
    text="A thousand photos as squares or in ten aspect buckets (VAR), with times of one or the "
    "other distribution; the released configuration changes both at once. Their square copies are "
    "the reference at equal steps, copies of 176x352 at 1:2 (`benchmarks.study.photos` says how "
    "they are made). They are fewer than the network's features, so that distances are for this "
    "table alone.",
    rows=tuple(
        Row(name=name, config="s2", changes=_PHOTOS | changes, seeds=_THREE)
        for name, changes in (
            ("square, uniform t", {}),
            ("square, logit-normal t", _LOGIT_NORMAL),
            ("VAR, uniform t", _ASPECTS),
            ("VAR, logit-normal t", _ASPECTS | _LOGIT_NORMAL),
        )
    ),
    claims=(
        Claim(
            text="VAR training is better than squares",
            better="VAR, uniform t",
            worse="square, uniform t",
        ),
        Claim(
            text="Logit-normal times are better than uniform ones",
            better="square, logit-normal t",
            worse="square, uniform t",
        ),
        Claim(text="So they are with VAR", better="VAR, logit-normal t", worse="VAR, uniform t"),
    ),
    num_steps=5_000,
    curves=False,
    shapes=(
        Shape(name="1:2", image_size="176x352", adjustment="none", data=_WIDE),
        Shape(name="1:2, S_max adjusted", image_size="176x352", adjustment="paper", data=_WIDE),
    ),
    data=InData("photos_256x256"),
)

SHIPPED = Table(
    title="The model that is shipped",
    text="`configs/cifar10_tiny.py`, whose weights `make demo-cifar` draws with.",
    rows=(Row(name="FlowDCN, 7.9 M parameters", config="cifar10_tiny", changes={}),),
    num_steps=12_000,
    curves=False,
)

TABLES = {
    "shipped": SHIPPED,
    "models": MODELS,
    "ablations": ABLATIONS,
    "recipe": RECIPE,
    "times": TIMES,
    "few_steps": FEW_STEPS,
}
