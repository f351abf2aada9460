"""The flags that evaluate.py and reference_stats share."""

from typing import Any

from absl import flags

from flowdcn_jax import command

flags.disclaim_key_flags()  # flags defined here are those of the command that asks for them

NETWORKS = ("inception", "dinov2", "efficientnet_lite0")


def define_flags() -> None:
    """Defines the flags of `load_network` and `image_options`."""
    flags.DEFINE_enum(
        "features",
        "inception",
        NETWORKS,
        "Network: inception (FID and its like), dinov2 (FD-DINOv2), efficientnet_lite0.",
    )
    command.define_path("weights", "The network's safetensors file, or the folder that holds it.")
    flags.DEFINE_enum("protocol", "adm", ("adm", "torch_fidelity"), "Whose evaluator is followed.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time on each device.", lower_bound=1)
    flags.DEFINE_integer(
        "image_size",
        None,
        "Side in pixels of the central square that is cut, as ADM does, out of each image of a "
        "folder or TFDS data set for reference; size of digits.  By default images are whole.",
        lower_bound=1,
    )
    flags.DEFINE_string("split", "train", "Split of a data set, or a slice of it.")
    command.define_path(
        "data_dir", "Folder of prepared data sets.  Default: $TFDS_DATA_DIR, else that of TFDS."
    )


def load_network() -> Any:
    """The feature network that the flags ask for, with its weights."""
    from flowdcn_jax.evaluation import load_features

    values = flags.FLAGS
    return load_features(
        values.features,
        weights=values.weights,
        protocol=values.protocol,
        batch_size=values.batch_size,
    )


def image_options() -> dict[str, Any]:
    """`open_images`'s options."""
    return {name: flags.FLAGS[name].value for name in ("image_size", "split", "data_dir")}
