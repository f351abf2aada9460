"""Sources, configs and targets that cannot be right: each with its message, nothing written."""

import logging
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import SafetensorError

from configs import s2, xl2
from flowdcn_jax.errors import ConfigError
from flowdcn_jax.published_weights import (
    PublishedWeightsError,
    conversion,
    convert,
    export,
    warn_of_dit,
)
from flowdcn_jax.published_weights.names import official_tensors
from flowdcn_jax.published_weights.selection import check_tensors
from flowdcn_jax.published_weights.weights_file import StoredTensor
from flowdcn_jax.runs import checkpoint
from tests import official, tiny


def changed(tensors, name, value):
    return tensors | {name: value}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BIAS = "blocks.1.attn.out.bias"
PRIOR = "blocks.2.attn.deformables_prior"
FAULTS = {
    "extra": (
        lambda t: t | {"blocks.1.attn.out.gamma": t[BIAS]},
        r"blocks.1.attn.out.gamma of the source, of shape \(64,\), is not of the model$",
    ),
    "missing": (lambda t: without(t, BIAS), rf"{BIAS} is missing .*; expected shape \(64,\)$"),
    "misshapen": (
        lambda t: changed(t, BIAS, t[BIAS][:-1]),
        rf"{BIAS} has shape \(63,\) in the source; expected \(64,\)$",
    ),
    "transposed": (
        lambda t: changed(t, "final_layer.linear.weight", t["final_layer.linear.weight"].T.copy()),
        r"linear.weight has shape \(64, 32\) in the source; expected \(32, 64\)$",
    ),
    "float16": (
        lambda t: {name: value.astype(np.float16) for name, value in t.items()},
        "not float32: .*float16.* and 62 more. Published weights are float32",
    ),
    "one float64": (
        lambda t: changed(t, BIAS, t[BIAS].astype(np.float64)),
        f"not float32: {BIAS} is float64",
    ),
    "not finite": (
        lambda t: changed(t, BIAS, t[BIAS] * np.float32(np.inf)),
        f"{BIAS} of the source holds values that are not finite",
    ),
    "another prior": (
        lambda t: changed(t, PRIOR, t[PRIOR][..., ::-1].copy()),
        f"{PRIOR} of the source differs by up to 2 from the constant",
    ),
    "16-bit EMA of a float32 checkpoint": (
        lambda t: official.lightning(t, {k: v.astype(np.float16) for k, v in t.items()}),
        "not float32: .*float16.* and 59 more. Published",
    ),
    "no number of a block": (
        lambda t: {"blocks.norm.weight": t[BIAS]},
        r"x_embedder.proj.weight is missing .*; and 63 more$",
    ),
    "another prefix": (
        lambda t: official.under("net.", t),
        r"all names of the source begin with net.; expected them without it; x_embedder.* missing",
    ),
    "half of the blocks": (
        lambda t: {name: value for name, value in t.items() if not name.startswith("blocks.2")},
        r"looks like a model with depth=2 \(config.model.depth is 3\); blocks.2.norm1.weight is",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_corrupted_sources_are_refused_before_anything_is_written(golden, tensors, write, fault):
    corrupt, message = FAULTS[fault]
    source = write(corrupt(tensors))
    workdir = source.parent / "new" / "run"
    with pytest.raises(PublishedWeightsError, match=message):
        convert(source, official.run_config(golden), workdir)
    assert list(source.parent.iterdir()) == [source]


def test_another_table_of_positions_is_refused(fixture_file, write):
    golden = fixture_file("sit.npz")
    tensors = official.state_dict(golden)
    source = write(changed(tensors, "pos_embed", tensors["pos_embed"] * np.float32(1.01)))
    with pytest.raises(PublishedWeightsError, match="pos_embed .* differs by up to 0.01"):
        convert(source, official.run_config(golden), source.parent / "run")


def of_depth(config, depth):
    """Its first blocks alone: fewer to trace."""
    config.model.depth = depth
    return config


def test_a_wrong_size_is_named_in_one_message():
    """S weights for XL: a hundred tensors that do not fit."""
    small = official_tensors(of_depth(s2.get_config(), 2).model, tokens_per_side=16)
    stored = {name: StoredTensor(tensor.shape, "float32", None) for name, tensor in small.items()}
    config = of_depth(xl2.get_config(), 4).model
    with pytest.raises(PublishedWeightsError) as caught:
        check_tensors(stored, official_tensors(config, tokens_per_side=16), config)
    assert str(caught.value).startswith(
        "the source does not fit the config: it looks like a model with width=384 "
        "(config.model.width is 1152), depth=2 (config.model.depth is 4), num_groups=6 "
        "(config.model.num_groups is 16); blocks.2.norm1.weight is missing from the source"
    )
    assert len(str(caught.value)) < 700


def test_a_wrong_size_is_refused_before_anything_is_written(tensors, write):
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match=r"width=64 \(config.model.width is 1152\)"):
        convert(source, of_depth(xl2.get_config(), 4), source.parent / "run")
    assert list(source.parent.iterdir()) == [source]


def test_a_wrong_model_is_named_in_one_message(fixture_file, write, tensors):
    config = official.run_config(fixture_file("sit.npz"))
    with pytest.raises(
        PublishedWeightsError, match=r"name='flowdcn' \(config.model.name is 'sit'\)"
    ):
        convert(write(tensors), config, "unused")


def test_folders_that_are_taken_are_refused(golden, tensors, write, converted):
    source, config = write(tensors), official.run_config(golden)
    _, workdir = converted("model.npz")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(PublishedWeightsError, match="run is not empty; expected a new or empty"):
        convert(source, config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    with pytest.raises(PublishedWeightsError, match="source.safetensors is a file"):
        convert(source, config, source / "run")
    (source.parent / "empty").mkdir()
    convert(source, config, source.parent / "empty")
    assert tiny.steps(source.parent / "empty") == [0]


def test_a_failure_while_writing_leaves_nothing(golden, tensors, write, monkeypatch):
    def fail(workdir, params, config):  # no disk fills up when asked to
        (workdir / "checkpoints").mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match="run cannot be written: No space left"):
        convert(source, official.run_config(golden), source.parent / "run")
    assert list(source.parent.iterdir()) == [source]


def test_a_full_disk_is_found_before_the_work(golden, tensors, write, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match="run has 0 MB free; expected 2 MB, as"):
        convert(source, official.run_config(golden), source.parent / "new" / "run")
    assert list(source.parent.iterdir()) == [source]


def test_exports_are_checked_before_the_work(converted, tmp_path, monkeypatch):
    _, workdir = converted("model.npz")
    (tmp_path / "file").touch()
    target = tmp_path / "new" / "x.safetensors"
    nowhere = tmp_path / "nowhere"  # a bad target is found before there is no run
    with pytest.raises(PublishedWeightsError, match="--export=.* is a folder; expected a"):
        export(nowhere, tmp_path)
    with pytest.raises(PublishedWeightsError, match="cannot be made a folder: .* a file"):
        export(nowhere, tmp_path / "file" / "x.safetensors")
    with monkeypatch.context() as patch:  # no disk fills up when asked to, here and below
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(PublishedWeightsError, match="safetensors has 0 MB free; expected 1 MB"):
            export(workdir, target)
    assert not target.parent.exists()

    def fail(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(conversion, "save_file", fail)
    with pytest.raises(PublishedWeightsError, match="x.safetensors cannot be written: No sp"):
        export(workdir, target)
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_fills_while_orbax_writes_is_one_line(
    golden, tensors, write, monkeypatch, caplog
):
    """Orbax raises a ValueError, and logs a page in each of its threads."""

    def fail(workdir, params, config):
        logging.getLogger("absl").error("a page")
        raise ValueError("RESOURCE_EXHAUSTED: ... [No space left on device] ... ")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    source = write(tensors)
    with pytest.raises(PublishedWeightsError, match="run cannot be written: No space left on dev"):
        convert(source, official.run_config(golden), source.parent / "run")
    assert list(source.parent.iterdir()) == [source] and "page" not in caplog.text


def test_bad_configs_are_refused(golden, tensors, write):
    config = official.run_config(golden)
    config.data.image_size = 100
    with pytest.raises(ConfigError, match="image_size is 100; expected a multiple of 16"):
        convert(write(tensors), config, "unused")
    with pytest.raises(PublishedWeightsError, match="weights is 'best'; expected ema or model"):
        convert("unused", config, "unused", weights="best")


def test_another_resolution_than_the_trainings_is_refused(fixture_file, tmp_path):
    """By SiT's positions; FlowDCN's tensors do not tell it."""
    golden = fixture_file("sit.npz")
    source = official.write_safetensors(tmp_path / "source", official.state_dict(golden))
    config = official.run_config(golden)
    config.data.image_size *= 2
    with pytest.raises(PublishedWeightsError) as caught:
        convert(source, config, tmp_path / "run")
    assert str(caught.value) == (
        "the source was trained on images of 128 pixels a side (pos_embed has 8x8 tokens), and "
        "config.data.image_size is 256; convert with the config of the training's resolution, and "
        "draw other sizes with sample.py --image_size=HxW"
    )


def test_what_a_files_name_tells_against_the_config_is_pointed_out(golden, tmp_path, caplog):
    """Before the file is read: none is there."""
    config = official.run_config(golden)  # 128 pixels a side
    names = {
        "FlowDCN-XL-2M-R256.pth": "trained on images of 256 pixels a side, and .* is 128; if so",
        "DiT-XL-2-256x256.pt": "published DiT weights have SiT's tensors, but predict noise",
        "FlowDCN-R128.pth": None,
        "edited_traditional.pth": None,
    }
    for name, message in names.items():
        caplog.clear()
        with pytest.raises(PublishedWeightsError, match="cannot be read"):
            convert(tmp_path / name, config, tmp_path / "run")
        assert re.search(message, caplog.text) if message else not caplog.text
    warn_of_dit("configs/dit_xl2.py")
    assert "dit_xl2.py: published DiT weights" in caplog.text
