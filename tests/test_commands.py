"""Bad input: one line that names the value and what was expected, and nothing written."""

import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from flowdcn_jax import sampling
from flowdcn_jax.autoencoders import WeightsNotFoundError
from flowdcn_jax.environment import keep_compiled_programs
from flowdcn_jax.errors import ConfigError, UserError
from flowdcn_jax.images import read_metadata
from flowdcn_jax.runs.checkpoint import CheckpointError
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a finished tiny run."""
    workdir = tmp_path_factory.mktemp("trained")
    tiny.train(tiny.config(), workdir)
    return workdir


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(train__batch_size=12), "train.batch_size is 12; expected a multiple of 8.*8 devices"),
        (dict(train__accumulation_steps=4), "train.batch_size is 16.*multiple of 32"),
        (dict(train__num_steps=0), "train.num_steps is 0; expected at least 1"),
        (dict(data__image_size=9), "data.image_size is 9; expected a multiple of 2"),
        (
            dict(model__width=17),
            "model.width is 17; expected a multiple of config.model.num_groups=2",
        ),
        (
            dict(model__boundary="floor"),
            "model.boundary is 'floor'; expected one of zeros, truncate",
        ),
        (dict(model__name="dit"), "model.name is 'dit'; expected one of flowcnn, flowdcn, sit"),
        (
            dict(model=tiny.SIT | dict(boundary="zeros")),
            r"model.boundary is 'zeros'; expected no such key, for the model 'sit' has .*num_heads",
        ),
        (
            dict(model=tiny.SIT | dict(num_heads=3)),
            "width is 16; expected a multiple of .*num_heads=3",
        ),
        (dict(model=tiny.SIT | dict(width=6)), "model.width is 6; expected a multiple of 4"),
        (
            dict(model=tiny.SIT | dict(norm="batch")),
            "norm is 'batch'; expected one of rms_norm, layer_norm",
        ),
        (
            dict(model=tiny.FLOWCNN | dict(kernel_size=4)),
            "kernel_size is 4; expected an odd number",
        ),
        (
            dict(model={key: value for key, value in tiny.SIT.items() if key != "num_heads"}),
            "model.num_heads is missing; expected every key that .* the model 'sit' have",
        ),
        (
            dict(data__name="mnist"),
            "data.name is 'mnist'; expected one of cifar10, digits, latents",
        ),
        (dict(data__random_flip=True), "digits are never flipped"),
        (
            dict(model__num_classes=11),
            "num_classes is 11; expected 10, as in the data set 'digits'",
        ),
        (dict(model__in_channels=3), r"shape \(8, 8, 1\); the model expects \(8, 8, 3\)"),
        (
            dict(flow__label_dropout=1.5),
            r"flow.label_dropout is 1.5; expected a number in \[0, 1\)",
        ),
        (dict(optimizer__learning_rate=-1.0), "learning_rate is -1.0; expected a positive number"),
        (
            dict(optimizer__warmup_steps=7),
            "optimizer.warmup_steps is 7; .* at most train.num_steps=6",
        ),
        (
            dict(optimizer__warmup_steps=7, optimizer__schedule="cosine"),
            "optimizer.warmup_steps is 7; .* at most train.num_steps=6",
        ),
        (dict(optimizer__schedule="poly"), "schedule is 'poly'; expected one of constant, cosine"),
        (dict(optimizer__name="sgd"), "optimizer.name is 'sgd'; expected one of adamw, muon"),
        (dict(ema__others=("power_0.3",)), "ema.others is .*power_0.3.*; expected names such as"),
        (dict(ema__warmup=1.0), r"ema.warmup is 1.0; expected a number in \[0, 1\)"),
        (dict(optimizer__clip_norm=0.0), "clip_norm is 0.0; expected a positive number or None"),
        (
            dict(sampling__classes=(3, 10)),
            "classes is .*3, 10.*; expected class numbers from 0",
        ),
        (dict(mesh__data=3), "data=3, fsdp=1; its product must be the number of devices, 8"),
        (dict(seed=-1), "seed is -1; expected at least 0"),
        (dict(sampling__seed=2**32), "sampling.seed is 4294967296; expected .* below 2"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(tmp_path, overrides, message):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        tiny.train(tiny.config(**overrides), workdir, one_device=False)
    assert not workdir.exists()


@pytest.mark.parametrize("name", ["cifar10", "latents"])
def test_a_missing_data_set_names_what_prepares_it(tmp_path, name):
    config = tiny.config(data__name=name, data__data_dir=str(tmp_path / "none"))
    config.data.image_size = 32
    with pytest.raises(FileNotFoundError, match="prepare_data --dataset=cifar10|cache_latents"):
        tiny.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_run_is_refused_and_left_alone(trained):
    before = tiny.files(trained)
    config = tiny.config(model__width=32, train__batch_size=8, seed=3, flow__label_dropout=0.2)
    config.optimizer.name = "muon"
    with pytest.raises(ConfigError) as caught:
        tiny.train(config, trained)
    for part in (
        "config.model.width: 16 -> 32",
        "train.batch_size: 16 -> 8",
        "config.seed: 0 -> 3",
        "config.optimizer.name: 'adamw' -> 'muon'",
    ):
        assert part in str(caught.value)
    assert "label_dropout" not in str(caught.value)
    assert tiny.files(trained) == before


def test_what_may_change_may_change(trained):
    config = tiny.config(model__remat=True, data__num_threads=1, optimizer__learning_rate=1e-3)
    config.optimizer.schedule = "cosine"
    config.ema.others = ("power_0.05",)
    tiny.train(config, trained)


TRAIN = ("train.py", "--workdir=x", "--config=configs/digits.py")
NO_FILE = ("train.py", "--workdir=x", "--config=configs/no.py")


@pytest.mark.parametrize(
    "command, message",
    [
        (("train.py", "--config=configs/digits.py"), "workdir must have a value"),
        ((*TRAIN, "--config.train.batchsize=3"), 'Did you mean "batch_size"'),
        ((*TRAIN, "--config.train.batch_size=many"), "batch_size=many: invalid literal for int"),
        ((*TRAIN, "--config.train.batch_size=0"), "error: config.train.batch_size is 0; expected"),
        (
            (*TRAIN, "--config.model={}"),
            "error: config.model.name is missing; expected the name",
        ),
        (NO_FILE, "error: --config=configs/no.py cannot be loaded; expected a file such as"),
        ((*NO_FILE, "--config.seed=3"), "No such file or directory: 'configs/no.py'"),
        ((*TRAIN, "stray"), "unexpected arguments: ['stray']"),
        (
            (*TRAIN, "--process_id=0", "--num_processes=1"),
            "--process_id given without --distri",
        ),
        ((*TRAIN, "--distributed"), "error: --distributed finds no cluster (SLURM, Kubernetes, cl"),
        (
            (*TRAIN, "--distributed", "--coordinator_address=a"),
            "is 'a'; expected HOST:PORT",
        ),
        (("sample.py", "--workdir=x", "--coordinator_address=a:1"), "given without --distributed"),
        (("sample.py", "--workdir=no/such/folder"), "no/such/folder holds no checkpoints"),
        (("sample.py", "--workdir=x", "--num_images=many"), "invalid literal for int"),
        (("sample.py", "--workdir=x", "--guidance_interval=1"), "'1'; expected two times"),
        (("sample.py", "--workdir=x", "--clases=3"), "Did you mean: classes"),
    ],
)
def test_the_commands_print_one_error_and_no_traceback(command, message):
    code, output = tiny.run([sys.executable, *command])
    assert code == 2
    assert output.startswith("error: ") and output.count("\n") == 1
    assert message in output
    assert not (tiny.REPOSITORY / "x").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.train.batchsize = 3", ':4: Key "batchsize" does not exist'),
        ("config.trian.batch_size = 3", ":4: 'trian' Did you mean \"train\""),
        ("config.train.batch_size = 'many'", ":4: Could not override field 'batch_size'"),
        ("config.train.batch_size = (3", ":4: '(' was never closed"),
        ("del config.flow", ":4: This ConfigDict is locked"),
        ("from configs import defualt", ":4: cannot import name 'defualt'"),
        ("config.train = dict(config.train, steps=3)", "config.train.steps is unknown; expected"),
        (
            "config = 3",
            "cannot be loaded; expected a file such as configs/s2.py, with a get",
        ),
    ],
)
def test_an_error_in_a_config_file_is_one_line_that_says_where(tmp_path, line, message):
    file = tmp_path / "mine.py"
    head = "from configs import digits\ndef get_config():\n    config = digits.get_config()\n"
    file.write_text(f"{head}    {line}\n    return config\n")
    code, output = tiny.run([sys.executable, "train.py", f"--config={file}", "--workdir=x"])
    assert code == 2
    where = f"{file}{message}" if message[0] == ":" else message
    assert output.startswith("error: ") and output.count("\n") == 1 and where in output


def test_help_says_where_the_keys_are():
    _, output = tiny.run([sys.executable, "train.py", "--help"])
    assert "docs/config.md lists every key" in " ".join(output.split())


DECODER = dict(autoencoder="taesd", autoencoder_weights="no/such/folder")


@pytest.fixture(scope="module")
def without_weights(trained, tmp_path_factory):
    """A run whose checkpoints hold their configs alone."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("without") / "weights")
    for item in ("state", "ema"):
        for folder in workdir.glob(f"checkpoints/*/{item}"):
            shutil.rmtree(folder)
    return workdir


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(classes=[3, 10]), "'10'; expected numbers from 0 to 9, or names"),
        (dict(classes=["cat"]), r"'cat'; expected .*\(0, 1, 2"),
        (dict(labels="sorted"), "labels is 'sorted'; expected one of balanced, random"),
        (dict(image_size=(9, 8)), "9x8; expected HxW, both multiples of 2"),
        (dict(image_size=(0, 8)), r"image_size is \(0, 8\); expected HxW"),
        (dict(compare="seeds"), "compare is 'seeds'; expected one of image_size, resolution_adj"),
        (dict(compare="steps", save_images=True), "save_images is True; expected False, for a st"),
        (dict(compare="resolution_adjustment"), "image_size is that of training, 8x8; expected"),
        (dict(num_images=0), "num_images is 0; expected at least 1"),
        (dict(num_steps=0), "num_steps is 0; expected at least 1"),
        (dict(seed=2**32), "seed is 4294967296; expected at least 0 and below"),
        (dict(step=-1), "step is -1; expected at least 0"),
        (dict(guidance=-1.0), "guidance is -1.0; expected at least 0"),
        (dict(guidance=float("nan")), "guidance is nan; expected"),
        (dict(sampler="ddim"), "sampler is 'ddim'; expected one of euler, heun, .*neural"),
        (dict(sampler="neural", num_steps=11), "num_steps is 11; .* 5, 6, 7, 8, 9, 10, 15"),
        (dict(diffusion="zero"), "diffusion is 'zero' and the sampler 'euler'"),
        (dict(diffusion="none"), "diffusion is 'none'; expected one of sigma, constant, zero"),
        (dict(time_shift=0.0), "time_shift is 0.0; expected a positive number"),
        (dict(guidance_interval=(0.8, 0.2)), r"interval is \(0.8, 0.2\); expected two times"),
        (dict(guidance_channels="3"), "channels is '3'; expected one of all, three"),
        (dict(guidance_schedule="cos"), "schedule is 'cos'; expected one of constant, cosine, li"),
        (dict(resolution_adjustment="full"), "adjustment is 'full'; expected one of none, paper"),
        (dict(guide_step=2, guidance=1.0), "guidance is 1; expected another .* guide is given"),
        (dict(classes=[]), r"classes is \[\]; expected names and numbers of classes"),
        (dict(num_images=2.5), "num_images is 2.5; expected a whole number"),
        (dict(batch_size=2.5), "batch_size is 2.5; expected a whole number"),
        (dict(num_steps=2.5), "num_steps is 2.5; expected a whole number"),
        (dict(num_steps="10"), "num_steps is '10'; expected a whole number"),
        (dict(sampler="neural"), "num_steps is 2; .* 5, 6, 7, 8, 9, 10, 15"),  # the config's
        (dict(last_step=1.0), "last_step is 1.0 .* each of the 2 steps more"),
        (dict(last_step=0.0), r"last_step is 0.0; expected a length in \(0, 1\]"),
        (dict(last_step="1"), "last_step is '1'; expected a length"),
        (dict(seed=1.5), "seed is 1.5; expected a whole number"),
        (dict(guidance="2"), "guidance is '2'; expected at least 0"),
        (dict(guidance_interval=(0.2,)), r"interval is \(0.2,\); expected two times"),
        (dict(guidance_interval=0.5), "interval is 0.5; expected two times"),
        (dict(image_size=8), "image_size is 8; expected HxW or two positive whole numbers"),
        (dict(image_size=(8.0, 8.0)), r"image_size is \(8.0, 8.0\); expected HxW"),
        (dict(image_size="8x"), "image_size is '8x'; expected HxW"),
        (dict(image_size="9x8"), "9x8; expected HxW, both multiples of 2"),
    ],
)
def test_bad_sampling_requests_are_refused_before_weights_are_read(
    without_weights, tmp_path, options, message
):
    with pytest.raises(sampling.SamplingError, match=message):
        sampling.sample_to_folder(without_weights, out=tmp_path / "out", **DECODER | options)
    assert not (tmp_path / "out").exists()


def test_reading_weights_would_be_noticed(without_weights, tmp_path):
    """As the test above needs it."""
    with pytest.raises(CheckpointError):
        sampling.sample_to_folder(without_weights, out=tmp_path / "out")
    with pytest.raises(WeightsNotFoundError):
        sampling.sample_to_folder(without_weights, out=tmp_path / "out", **DECODER)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file cannot be made a folder"):
        tiny.train(tiny.config(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_sampling_to_a_file_or_from_a_missing_step_is_refused(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(sampling.SamplingError, match="file cannot be made a folder"):
        sampling.sample_to_folder(trained, out=tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no step 5; there are \[2, 4, 6\]"):
        sampling.load_trained(trained, step=5)


def test_sample_command_writes_grid_npz_and_pngs(trained, tmp_path):
    command = [
        sys.executable,
        "sample.py",
        f"--workdir={trained}",
        "--classes=3,7",
        "--save_images",
    ]
    command += ["--num_images=6", "--image_size=8x12", f"--out={tmp_path}"]
    code, output = tiny.run(command, num_devices=2)
    assert code == 0, output
    assert output.splitlines()[-1] == str(tmp_path / "grid.png")
    assert "2 evaluations of the velocity, 4 passes" in output
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (6, 8, 12, 1) and images.dtype == np.uint8
    assert labels.tolist() == [3, 7, 3, 7, 3, 7]
    single = np.asarray(Image.open(tmp_path / "images" / "00004.png"))
    np.testing.assert_array_equal(single, images[4, ..., 0])
    assert Image.open(tmp_path / "grid.png").mode == "RGB"
    metadata = read_metadata(tmp_path / "images" / "00004.png")
    assert metadata["settings"]["image_size"] == [8, 12] and metadata["settings"]["seed"] == 0
    assert (metadata["index"], metadata["class"], metadata["class_name"]) == (4, 3, "3")
    assert metadata["model"]["step"] == 6

    code, output = tiny.run([*command, "--guidance=3"])
    assert code != 0 and "Traceback" not in output
    assert "another run's images (settings.guidance: " in output and "another --out" in output


def test_compiled_programs_are_kept_where_asked(tmp_path):
    cache = tmp_path / "compiled"
    options = ("--dry_run", f"--compilation_cache={cache}")
    code, output = tiny.run(tiny.train_command(tmp_path / "run", *options))
    assert code == 0, output
    assert any("train_step" in path.name for path in cache.iterdir())


def test_compiled_programs_are_not_kept_for_cpus_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs(None)
        assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        keep_compiled_programs(None)
        assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/flowdcn_jax/compiled"
        with pytest.raises(UserError, match=f"--compilation_cache={__file__} cannot be made"):
            keep_compiled_programs(__file__)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
