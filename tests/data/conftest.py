"""Fixtures of the data tests: configs, and CIFAR-10 in miniature in each of its forms."""

import io
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax.data import make_source

CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
COUNTS = {"train": 30, "test": 10}


@pytest.fixture
def open_source():
    """make_source with every key at a default."""

    def open_source(name, *, channels=None, **overrides):
        config = {
            "name": name,
            "data_dir": None,
            "split": "train",
            "image_size": 16 if name == "digits" else 32,
            "random_flip": False,
            "aspect_buckets": {"count": 0},
            "num_threads": 2,
            "prefetch_batches": 4,
        }
        return make_source(ml_collections.ConfigDict(config | overrides), channels=channels)

    return open_source


@pytest.fixture(scope="session")
def tiny_cifar10():
    """{split: (uint8 [N, 32, 32, 3], labels [N])}, smooth so that JPEG keeps them nearly."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in COUNTS.items():
        colours = rng.integers(0, 256, (count, 2, 2, 3), np.uint8)
        images = [Image.fromarray(c).resize((32, 32), Image.Resampling.BILINEAR) for c in colours]
        splits[split] = np.stack([np.asarray(i) for i in images]), np.arange(count) % 10
    return splits


@pytest.fixture
def write_cifar10(tiny_cifar10, tmp_path):
    """Writes the miniature in a form, "npz", "folders" or "binary"; returns the folder."""

    def write_cifar10(form):
        folder = tmp_path / form
        folder.mkdir()
        for split, (images, labels) in tiny_cifar10.items():
            _WRITERS[form](folder, split, images, labels)
        return folder

    return write_cifar10


def _write_npz(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    jpegs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        jpegs.append(buffer.getvalue())
    np.savez(
        folder / f"tiny_{split}.npz",
        jpeg_bytes=np.frombuffer(b"".join(jpegs), np.uint8),
        offsets=np.cumsum([0, *map(len, jpegs)]),
        labels=labels.astype(np.uint8),
        class_names=np.array(CLASS_NAMES),
    )


def _write_folders(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / split / CLASS_NAMES[label] / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def _write_binary(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    records = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)
    (folder / "batches.meta.txt").write_text("\n".join(CLASS_NAMES) + "\n\n")
    if split == "test":
        records.tofile(folder / "test_batch.bin")
    else:
        for number, part in enumerate(np.array_split(records, 2), start=1):
            part.tofile(folder / f"data_batch_{number}.bin")


_WRITERS = {"npz": _write_npz, "folders": _write_folders, "binary": _write_binary}
