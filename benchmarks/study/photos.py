"""Prepares photos for --table=times: copies of one size, to compare samples with.

    python -m benchmarks.study.photos --source=PHOTOS --image_size=256x256 --out=DATA/photos_256x256
    python -m benchmarks.study.photos --source=PHOTOS --image_size=176x352 --out=DATA/photos_176x352
    C="--dataset=folder:PHOTOS --autoencoder=taef2 --autoencoder_weights=DATA/taef2"
    python -m flowdcn_jax.tools.cache_latents $C --data_dir=DATA/square
    python -m flowdcn_jax.tools.cache_latents $C --data_dir=DATA/aspects --aspect_buckets
    python -m benchmarks.study --table=times --data_dir=DATA ...

PHOTOS has a subfolder for each of a thousand classes, DATA/taef2 holds TAEF2's weights. A photo is
scaled to cover the size and cropped at its centre, as the latents of a bucket are.
"""

from pathlib import Path

from absl import flags
from PIL import Image, ImageOps
from tqdm import tqdm

from flowdcn_jax import command
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import atomic_write

_SOURCE = command.define_path("source", "Folder of photos, at any depth.", required=True)
_IMAGE_SIZE = flags.DEFINE_string("image_size", None, "HxW, pixels.", required=True)
_OUT = command.define_path("out", "Folder to write PNGs to.", required=True)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def main() -> None:
    try:
        height, width = map(int, _IMAGE_SIZE.value.split("x"))
        if min(height, width) < 1:
            raise ValueError
    except ValueError as error:
        raise UserError(f"--image_size is {_IMAGE_SIZE.value!r}; expected HxW") from error
    source = Path(_SOURCE.value)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(f"--source={source} holds no photos; expected {', '.join(_SUFFIXES)}")
    for place, path in enumerate(tqdm(files, unit="photo", dynamic_ncols=True)):
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
        with atomic_write(Path(_OUT.value) / f"{place:05d}.png") as file:
            fitted.save(file, format="PNG")
    print(f"{len(files)} photos of {height}x{width} in {_OUT.value}")


if __name__ == "__main__":
    command.run(main)
