"""Damaged files: what reads them notices, or nothing comes of it.

A case copies a folder, changes one of its files (a bit flipped, the end cut off, a stretch of
zeros, or another file's content), and uses it as a command would.
"""

import contextlib
import functools
import io
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from flowdcn_jax.autoencoders import load_autoencoder
from flowdcn_jax.data import make_source, write_latents
from flowdcn_jax.data.image_files import BadImageError, decode_rgb
from flowdcn_jax.errors import UserError
from flowdcn_jax.runs import checkpoint
from flowdcn_jax.runs.checkpointer import Checkpointer
from flowdcn_jax.runs.sharding import make_mesh
from flowdcn_jax.runs.state import abstract_state, initial_state
from flowdcn_jax.sampling.folder import SampleFolder
from flowdcn_jax.training.metrics import METRICS_FILE, drop_later_lines
from tests import tiny
from tests.conftest import FIXTURES

NOTICED, HARMLESS, UNTOLD = "noticed", "harmless", "cannot be told: the format has no checksum"
CONFIG = tiny.config()


def case(number: int) -> tuple[str, str]:
    """(what was damaged and how, what came of it)."""
    generator = random.Random(number)
    kind = sorted(KINDS)[number % len(KINDS)]
    make, use = KINDS[kind]
    source = _made(kind, make)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(source, Path(folder) / "copy"))
        how = _damage(copy, generator)
        logging.disable(logging.ERROR)
        try:
            outcome = use(copy)
        except (UserError, BadImageError) as error:
            assert "\n" not in str(error).strip(), f"{kind}, {how}: {error}"
            outcome = NOTICED
        except AssertionError as error:
            raise AssertionError(f"{kind}, {how}: {error}") from error
        finally:
            logging.disable(logging.NOTSET)
    return f"{kind}, {how.split()[0]}", outcome


@functools.cache
def _made(kind: str, make: Callable[[Path], None]) -> Path:
    folder = Path(os.environ["FLOWDCN_CAMPAIGN"]) / "damage" / kind.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    return folder


def _damage(folder: Path, generator: random.Random) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    path = generator.choice(files)
    content = bytearray(path.read_bytes())
    how = generator.choice(["flip", "cut", "zero", "swap"])
    place = generator.randrange(len(content))
    if how == "flip":
        content[place] ^= 1 << generator.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "zero":
        length = min(len(content) - place, generator.choice([1, 16, 512]))
        content[place : place + length] = bytes(length)
    else:
        other = generator.choice(files)
        other_content = other.read_bytes()
        other.write_bytes(content)
        content = other_content
    path.write_bytes(content)
    return f"{how} {path.relative_to(folder)} at {place}"


@functools.cache
def _state(step: int):
    state = initial_state(CONFIG, _mesh())
    moved = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(step), state)
    return jax.block_until_ready(moved)


def _mesh():
    return make_mesh(1, 1, jax.devices()[:1])


def _checkpointer(folder: Path) -> Checkpointer:
    return Checkpointer(str(folder), keep=3, keep_every_steps=None)


def _make_checkpoints(folder: Path) -> None:
    with contextlib.closing(_checkpointer(folder)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(_state(step), CONFIG, None)


def _use_checkpoints(folder: Path) -> str:
    saved = checkpoint.saved_run(folder)
    with contextlib.closing(_checkpointer(folder)) as checkpointer:
        state = checkpointer.restore_newest(abstract_state(CONFIG, _mesh()))
    assert saved is not None and state is not None, "no checkpoint was found"
    step = int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, _state(step))
    return HARMLESS if step == 2 else NOTICED


def _make_metrics(folder: Path) -> None:
    lines = [f'{{"step": {step}, "loss": {1 / step!r}}}\n' for step in range(1, 200)]
    (folder / METRICS_FILE).write_text("".join(lines))


def _use_metrics(folder: Path) -> str:
    """A line has no checksum: whole lines with other numbers cannot be told."""
    before = (folder / METRICS_FILE).read_bytes()
    drop_later_lines(folder / METRICS_FILE, 150)
    kept = (folder / METRICS_FILE).read_bytes()
    _make_metrics(folder)
    whole = (folder / METRICS_FILE).read_bytes()
    if before == whole:
        return HARMLESS
    same = set(kept.splitlines()) <= set(whole.splitlines())
    return NOTICED if same else UNTOLD


MOMENTS = np.random.default_rng(0).normal(size=(60, 4, 4, 4)).astype(np.float16)


def _make_latents(folder: Path) -> None:
    examples = [
        dict(mean=m, std=abs(m), mean_flipped=m[:, ::-1], std_flipped=abs(m), label=i % 3)
        for i, m in enumerate(MOMENTS)
    ]
    write_latents(
        examples,
        data_dir=folder,
        latent_shape=(4, 4, 4),
        num_classes=3,
        metadata=tiny.manifest(),
        shard_bytes=10_000,
    )


def _read_latents(folder: Path) -> list:
    keys = dict(name="latents", data_dir=str(folder), split="train", image_size=32)
    buckets = dict(count=0, min_aspect=0.5, max_aspect=2.0, side_multiple=8)
    source = make_source(ConfigDict(keys | dict(random_flip=True, aspect_buckets=buckets)))
    everything = np.arange(len(source))
    batch = source.read(everything, everything, 0)
    return [batch["image"], batch["label"], source.encoder, source.num_classes]


@functools.cache
def _whole_latents() -> list:
    return _read_latents(_made("latents", _make_latents))


def _use_latents(folder: Path) -> str:
    found, expected = _read_latents(folder), _whole_latents()
    same = all(np.array_equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    if same and found[2:] == expected[2:]:
        return HARMLESS
    # The descriptions, JSON of TFDS's and ours, carry no checksum; whole shards may have swapped.
    return UNTOLD


ROWS = {
    "arr_0": jax.ShapeDtypeStruct((4, 4, 3), np.uint8),
    "arr_1": jax.ShapeDtypeStruct((), np.int32),
}
PIXELS = np.random.default_rng(1).integers(0, 256, (20, 4, 4, 3), np.uint8)
LABELS = np.arange(20, dtype=np.int32)
RECORD = {"seed": 0, "model": {"step": 1}}


def _make_samples(folder: Path) -> None:
    samples = SampleFolder(folder, 20, ROWS)
    with contextlib.closing(samples):
        samples.open(RECORD)
        for start in range(0, 20, 4):
            samples.write(start, PIXELS[start : start + 4], LABELS[start : start + 4])


def _use_samples(folder: Path) -> str:
    samples = SampleFolder(folder, 20, ROWS)
    with contextlib.closing(samples):
        samples.open(RECORD)
        missing = samples.missing()
        for start, stop in missing:
            samples.write(start, PIXELS[start:stop], LABELS[start:stop])
        samples.join()
        found = list(samples.images())
    assert all((image == PIXELS[i]).all() and label == i for i, (image, label) in enumerate(found))
    assert len(found) == 20, "images are missing"
    return NOTICED if missing else HARMLESS


def _make_weights(folder: Path) -> None:
    shutil.copytree(FIXTURES / "tiny_sd_vae", folder, dirs_exist_ok=True)


def _load_weights(folder: Path):
    config = dict(name="sd_vae", weights=str(folder), dtype="float32", downsampling=8)
    return load_autoencoder(ConfigDict(config))


def _use_weights(folder: Path) -> str:
    """safetensors has no checksum: a run and its samples keep the SHA-256, and say it differs."""
    found, expected = _load_weights(folder), _load_weights(_made("weights", _make_weights))
    if found.weights_sha256 != expected.weights_sha256:
        return NOTICED  # where the data set or the run names the weights
    assert found.scale == expected.scale
    return HARMLESS


def _make_images(folder: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (24, 24, 3), np.uint8)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        Image.fromarray(pixels).save(folder / f"1.{form.lower()}", form)


def _use_images(folder: Path) -> str:
    outcome = HARMLESS
    for path in sorted(folder.iterdir()):
        whole = (_made("images", _make_images) / path.name).read_bytes()
        if path.read_bytes() == whole:
            continue
        found = np.asarray(decode_rgb(path.read_bytes()))
        expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
        if path.read_bytes()[1:4] == b"PNG" and path.suffix == ".png":  # which has checksums
            assert np.array_equal(found, expected), f"other pixels of {path.name}"
        elif not np.array_equal(found, expected):
            outcome = UNTOLD
    return outcome


KINDS = {
    "checkpoints": (_make_checkpoints, _use_checkpoints),
    "metrics": (_make_metrics, _use_metrics),
    "latents": (_make_latents, _use_latents),
    "samples": (_make_samples, _use_samples),
    "weights": (_make_weights, _use_weights),
    "images": (_make_images, _use_images),
}
