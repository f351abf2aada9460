"""The ImageNet photos that some tests want, as a folder with a subfolder a class.

    python -m tests.photos imagenet_samples_jpeg.npz FOLDER

The .npz holds `jpeg_bytes` (uint8, all files end to end), `offsets` [N+1] and `names` [N], the
classes in the order of their labels.
"""

import sys
from pathlib import Path

import numpy as np


def write_photos(archive: Path, folder: Path, count: int | None = None) -> None:
    """Writes the first `count` photos (all by default) to folder/<class>/<number>.jpg."""
    with np.load(archive, allow_pickle=False) as file:
        encoded, offsets, names = file["jpeg_bytes"], file["offsets"], file["names"]
    for index, name in enumerate(names[:count]):
        path = folder / str(name) / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[offsets[index] : offsets[index + 1]].tobytes())


if __name__ == "__main__":
    write_photos(Path(sys.argv[1]), Path(sys.argv[2]))
