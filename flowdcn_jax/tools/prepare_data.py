"""Prepares a data set for training, once.

    python -m flowdcn_jax.tools.prepare_data --dataset=cifar10 \\
        --source=train.npz --source=test.npz --data_dir=~/tensorflow_datasets

CIFAR-10 comes from one of: .npz files of JPEGs (or the folder that holds them), a folder with
`train/<class>/*.png|jpg` and `test/...`, or the folder of the binary version.  60,000 images take
about half a minute and 200 MB.  A data set that is there already is left alone.
"""

from pathlib import Path

from absl import flags

from flowdcn_jax import command
from flowdcn_jax.data import prepare_cifar10
from flowdcn_jax.files import local_path

_DATASET = flags.DEFINE_enum("dataset", None, ["cifar10"], "Data set to prepare.", required=True)
_SOURCE = flags.DEFINE_multi_string(
    "source", None, "File or folder to read; repeat it or separate by commas.", required=True
)
_DATA_DIR = command.define_path(
    "data_dir", "Folder of prepared data sets.  Default: $TFDS_DATA_DIR, else that of TFDS."
)

_PREPARERS = {"cifar10": prepare_cifar10}


def main() -> None:
    sources = [part for value in _SOURCE.value for part in _split_commas(value)]
    folder, written = _PREPARERS[_DATASET.value](sources, data_dir=_DATA_DIR.value)
    print(f"{_DATASET.value} {'prepared in' if written else 'was already prepared in'} {folder}")


def _split_commas(value: str) -> list[Path]:
    """A path that exists may hold a comma itself."""
    if (whole := local_path(value)).exists():
        return [whole]
    return [local_path(part) for part in value.split(",") if part]


if __name__ == "__main__":
    command.run(main)
