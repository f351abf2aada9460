"""What tutorials and the README show runs, on a tiny run instead of the digits."""

import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

import flowdcn_jax
from tests import tiny
from tests.conftest import FIXTURES
from tests.docs.blocks import read_blocks

TUTORIALS = sorted((tiny.REPOSITORY / "docs" / "tutorials").glob("*.md"))


@pytest.fixture
def folder(workdir, tmp_path, monkeypatch):
    """The current folder, with what tutorials find in theirs."""
    shutil.copytree(workdir, tmp_path / "runs" / "digits")
    for name in ("train.py", "sample.py", "evaluate.py", "configs"):
        (tmp_path / name).symlink_to(tiny.REPOSITORY / name)
    (tmp_path / "sd-vae-ft-ema").symlink_to(FIXTURES / "tiny_sd_vae")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page, space):
    for block in read_blocks(page):
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), space)
    return space


@pytest.mark.usefixtures("quick_compilation")
def test_the_readme_and_the_sampling_tutorial_in_python(folder, one_device, monkeypatch):
    load = flowdcn_jax.load_trained  # one device compiles faster than eight
    trained = load(folder / "runs" / "digits", mesh=one_device)
    monkeypatch.setattr(flowdcn_jax, "load_trained", lambda _: trained, raising=False)
    readme = run_python(tiny.REPOSITORY / "README.md", {})
    assert readme["images"].shape == (8, 8, 8, 1)
    space = run_python(tiny.REPOSITORY / "docs" / "tutorials" / "sample.md", {})
    assert space["images"].shape == (8, 8, 8, 1) and (space["images"] != readme["images"]).any()
    assert space["velocity"].shape == (2, 8, 8, 1)
    assert space["trajectory"].shape == (3, 2, 8, 8, 1)
    assert jnp.isfinite(space["trajectory"]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_operators_tutorial():
    space = run_python(tiny.REPOSITORY / "docs" / "tutorials" / "operator.md", {})
    assert space["out"].shape == (2, 16, 16, 6, 64) and jnp.isfinite(space["out"]).all()
    assert space["after"] < space["before"]


# What makes the tutorials' commands take seconds: small pictures, networks and numbers.
SMALL = {
    "(280, 260)": "(80, 70)",
    "random.randint(10, 100)": "random.randint(10, 30)",
    "--image_size=256": "--image_size=64",
    "--num_images=200": "--num_images=8 --num_steps=2",
    "--num_images=16": "--num_images=4",
    "--weights=dinov2.safetensors": f"--weights={FIXTURES}/tiny_dinov2 --features_batch_size=4",
    "--config=mine.py": "--config=mine.py --config.data.image_size=64 "
    + " ".join(
        f"--config.{key}={value}"
        for key, value in tiny.OVERRIDES.items()
        if key not in ("data.image_size", "train.batch_size")
    ),
    "--config.train.num_steps=20": "--config.train.num_steps=4 --config.train.batch_size=8 "
    "--config.model.width=16 --config.model.depth=1 --config.log.sample_every_steps=0",
    ":29123": f":{tiny.free_port()}",
    "python -m flowdcn_jax.tools.demo": "true",  # it would wait; tests/demo has it
}


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_block_runs(page, folder):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(tiny.REPOSITORY),
    }
    python = ""
    for block in read_blocks(page):
        text = block.text
        for written, smaller in SMALL.items():
            text = text.replace(written, smaller)
        if block.file:
            (folder / block.file).write_text(text)
            continue
        if block.language == "python":  # a page's blocks are one program
            python += text
            (folder / "block.py").write_text(python if page.stem != "train" else text)
            text = "python block.py"
        done = subprocess.run(
            ["bash", "-euc", text], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    made = {"train": "runs/mine/loss.png", "sample": "steps/compare_steps.png"}
    made |= {"evaluate": "guidance.png", "hosts": "runs/two/checkpoints/4"}
    assert page.stem not in made or (folder / made[page.stem]).exists()
