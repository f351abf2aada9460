"""Writes the statistics of a data set once, for evaluate.py --reference=STATS.npz.

    python -m flowdcn_jax.tools.reference_stats --images=ILSVRC/Data/CLS-LOC/train \\
        --crop=256 --weights=inception.safetensors --out=imagenet256.npz

--images is a folder of images at any depth, an .npz file of images or a folder of them, or a data
set: cifar10, digits, or one that TFDS has prepared.  The file holds mean and covariance of all
images (under the names of ADM's reference files), the features of --num_features of them
that lie evenly among all, and the network, its weights' SHA-256 and the protocol.
"""

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.evaluation.settings import FeatureChoice, ImageChoice
from flowdcn_jax.options import instance_of

_IMAGES = flags.DEFINE_string("images", None, "Folder, .npz file or data set.", required=True)
_OUT = command.define_path("out", "STATS.npz to write.", required=True)
_NUM_FEATURES = flags.DEFINE_integer(
    "num_features",
    10_000,
    "Images whose features are kept, for precision, recall and KID; as many as ADM's batches have.",
    lower_bound=2,
)
_OPTIONS = command.option_flags(FeatureChoice, ImageChoice)
command.define_device_flags()


def main() -> None:
    command.use_devices()
    out = command.file_to_write(_OUT)
    # Imported here so that --help and usage errors come at once.
    import jax

    from flowdcn_jax.evaluation import collect, open_images, write_statistics

    values = _OPTIONS()
    images = open_images(_IMAGES.value, **vars(instance_of(ImageChoice, values)))
    features = instance_of(FeatureChoice, values).load()
    statistics = collect(images, features, num_features=_NUM_FEATURES.value)
    if jax.process_index() == 0:
        write_statistics(out, statistics)
        print(f"{statistics.count} images in {out}")


if __name__ == "__main__":
    command.run(main)
