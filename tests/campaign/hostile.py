"""Inputs that a generator draws from a seed: each is taken, or refused in one line, soon.

Flags and config keys go to the parsers and checks of the commands, files to what reads them.
"""

import io
import json
import os
import random
import signal
import string
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from flowdcn_jax.autoencoders import load_autoencoder
from flowdcn_jax.config import config_names, flatten, load_config, validate
from flowdcn_jax.data.image_files import BadImageError, decode_rgb, open_formats
from flowdcn_jax.data.labelled_images import FolderImages
from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation.image_sets import open_images
from flowdcn_jax.evaluation.reference_files import open_side
from flowdcn_jax.files import local_path
from flowdcn_jax.published_weights.weights_file import open_weights_file
from flowdcn_jax.sampling.settings import ModelChoice, Output, Request, Settings

LIMIT_S = 60
TAKEN, REFUSED = "taken", "refused in a line"
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**70), 0.0, -0.0, 0.5, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "0", "None", "auto", "a" * 5000, "~/x",
    "gs://b/x", "../..", "\x00", "\udce4", "кот", "🐕", (), (1,), (1, "a"), ("cat",), ((1,),),
    [], [1, 2], {}, {"a": 1}, b"x", 1j, float, object(),
)  # fmt: skip
FORMS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000")


def case(number: int) -> tuple[str, str]:
    """(what was drawn, what came of it)."""
    generator = random.Random(number)
    kind = sorted(KINDS)[number % len(KINDS)]
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    try:
        with tempfile.TemporaryDirectory() as folder:
            KINDS[kind](generator, Path(folder))
        return kind, TAKEN
    except UserError as error:
        assert len(str(error).strip().splitlines()) == 1, f"{kind}: {error!s:.500}"
        return kind, REFUSED
    except flags.Error:  # which the commands print in a line
        return kind, REFUSED
    finally:
        signal.alarm(0)


def _too_long(signum, frame) -> None:
    raise AssertionError(f"it took more than {LIMIT_S} s")


def _values(generator: random.Random, options: type, count: int) -> dict:
    names = generator.sample(list(options.__dataclass_fields__), count)
    return {name: generator.choice(VALUES) for name in names}


def _options(generator: random.Random, folder: Path) -> None:
    options = generator.choice((Request, Settings, ModelChoice, Output))
    options(**_values(generator, options, min(2, len(options.__dataclass_fields__))))


def _config_values(generator: random.Random, folder: Path) -> None:
    config = load_config(generator.choice(config_names()))
    keys = generator.sample(sorted(flatten(config)), generator.choice((1, 1, 2, 3)))
    for key in keys:
        section, _, name = key.rpartition(".")
        node = config
        for part in filter(None, section.split(".")):
            node = node[part]
        try:
            setattr(node, name, generator.choice(VALUES))
        except (TypeError, ValueError, KeyError) as error:  # ml_collections', which gets a line
            raise UserError(str(error).splitlines()[0]) from error
    validate(config, generator.choice((1, 8)), 1)


def _paths(generator: random.Random, folder: Path) -> None:
    letters = "~/.:\\ \n\tgs3" + string.ascii_letters + "кот\udce4"
    local_path("".join(generator.choice(letters) for _ in range(generator.randrange(40))))


def _mutated(generator: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice((0, 1, 1, 2, 8, 64))):
        if changed:
            place = generator.randrange(min(len(changed), generator.choice((64, 512, 10**6))))
            changed[place] = generator.randrange(256)
    if generator.random() < 0.3:
        del changed[generator.randrange(len(changed) + 1) :]
    if generator.random() < 0.1:
        changed += generator.randbytes(generator.randrange(2000))
    return bytes(changed)


def _images(generator: random.Random, folder: Path) -> None:
    mode = generator.choice(("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"))
    image = Image.new(mode, (generator.randrange(1, 40), generator.randrange(1, 40)))
    buffer = io.BytesIO()
    try:
        image.save(buffer, generator.choice(FORMS))
    except (OSError, ValueError, KeyError):  # a form that has not this mode
        image.convert("RGB").save(buffer, "PNG")
    decode_rgb(_mutated(generator, buffer.getvalue()))


def _npz(generator: random.Random, folder: Path) -> None:
    buffer = io.BytesIO()
    shape = tuple(generator.randrange(4) for _ in range(generator.randrange(5)))
    dtype = generator.choice((np.uint8, np.float32, np.float64, np.int64, "U3", "O", ">f4"))
    arrays = {generator.choice(("arr_0", "mu", "sigma", "x")): np.zeros(shape, dtype)}
    np.savez(buffer, **arrays, allow_pickle=True) if dtype == "O" else np.savez(buffer, **arrays)
    path = folder / generator.choice(("a.npz", "a.png", "a"))
    path.write_bytes(_mutated(generator, buffer.getvalue()))
    images = generator.choice((open_side, open_images))(str(path))
    if hasattr(images, "read"):
        list(images.read([range(images.count)]))


def _safetensors(generator: random.Random, folder: Path) -> None:
    kinds = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8", "XX", 3)
    header = {}
    for name in generator.sample(("a", "a.b", "module.a", "", "é", "decoder.conv_in.weight"), 2):
        header[name] = {
            "dtype": generator.choice(kinds),
            "shape": generator.choice(([], [1], [2, 2], [-1], [2**62, 4], "x", [1.5])),
            "data_offsets": generator.choice(([0, 4], [0, 0], [4, 0], [0, 2**62], [], None)),
        }
    text = json.dumps(header).encode()
    size = generator.choice((len(text), len(text), len(text), 0, 2**62, len(text) + 9))
    content = size.to_bytes(8, "little") + text + bytes(generator.choice((0, 4, 16)))
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(_mutated(generator, content))
    if generator.random() < 0.5:
        for tensor in open_weights_file(path).tensors.values():
            tensor.read()
    else:
        config = dict(name="sd_vae", weights=str(folder), dtype="float32", downsampling=8)
        load_autoencoder(ConfigDict(config))


def _folders(generator: random.Random, folder: Path) -> None:
    names = [b"a", b"10", b"9", b"lost+found", b".x", b"caf\xe9", "кот".encode(), b" a", b"a\nb"]
    extensions = list(open_formats()) + [".txt", ""]
    root = os.fsencode(folder)
    for _ in range(generator.randrange(8)):
        place = root
        for _ in range(generator.randrange(1, 4)):
            place += b"/" + generator.choice(names)
        try:
            os.makedirs(place, exist_ok=True)
            end = generator.choice(extensions).encode()
            what = generator.random()
            if what < 0.6:
                with open(place + b"/1" + end, "wb") as file:
                    file.write(generator.randbytes(generator.randrange(50)))
            elif what < 0.8:
                os.symlink(generator.choice((b".", b"..", b"/nowhere", place)), place + b"/l" + end)
            else:
                os.mkfifo(place + b"/pipe" + end)
        except OSError:  # a file in the place of a folder, or there already
            continue
    images = FolderImages(folder)
    for index in range(len(images)):
        try:
            images.read(index)
        except BadImageError:
            continue


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "options": _options,
    "config keys": _config_values,
    "paths": _paths,
    "image files": _images,
    "npz files": _npz,
    "safetensors": _safetensors,
    "folders": _folders,
}
