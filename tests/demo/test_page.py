"""The page's fields and answers, without anything that shows them."""

import re
import shlex
from unittest import mock

import numpy as np
import pytest

import flowdcn_jax
from flowdcn_jax.demo import page as pages
from flowdcn_jax.options import options_of
from flowdcn_jax.sampling import Request, Settings

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def page(model):
    return pages.Page(model, ["--workdir=runs/my digits"])


def values(page, **changed):
    """What the fields hold, as the page is opened, and after some were changed."""
    return {field.option.name: field.value for field in page.fields()} | changed


def test_every_option_of_a_picture_is_a_field_with_the_runs_value(page):
    fields = {field.option.name: field for field in page.fields()}
    declared = set(options_of(Request)) | set(options_of(Settings))
    assert set(fields) == declared - {"batch_size"}
    assert list(fields)[: len(pages.FIRST)] == list(pages.FIRST)
    assert fields["classes"].choices[3] == "three" and fields["classes"].several
    assert fields["image_size"].choices == ["8x8", "8x12", "12x8", "12x12"]
    shown = {name: fields[name].value for name in ("image_size", "num_steps", "guidance", "seed")}
    assert shown == dict(image_size="8x8", num_steps=2, guidance=2.0, seed=0)
    assert fields["diffusion"].choices == ["", "sigma", "constant", "zero"]
    assert fields["sampler"].choices[0] == "euler" and "one of" not in fields["sampler"].help


def test_an_answer_has_the_images_of_the_command_that_it_names(page, model, monkeypatch):
    grids = []
    monkeypatch.setattr(pages, "_grid", lambda images, labels, names: grids.append((images, names)))
    answer = page.answer(values(page, classes=["three", "7"], seed=5, num_images=4))
    assert re.fullmatch(
        r"4 images in [\d.]+ s; each took 2 evaluations of the velocity, 4 passes through a model",
        answer.text,
    )
    command = shlex.split(answer.command)
    assert command[:3] == ["python", "sample.py", "--workdir=runs/my digits"]
    flags = dict(flag.removeprefix("--").split("=") for flag in command[3:])
    assert flags == dict(classes="three,7", num_images="4", seed="5")
    flags |= dict(seed=5, num_images=4)
    ((images, names),) = grids
    assert names == ["three", "seven", "three", "seven"]
    expected = flowdcn_jax.generate(model, progress=False, **flags)
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_the_command_says_all_where_published_settings_depend_on_what_is_given(model):
    page = pages.Page(model, ["--weights=NAME"])
    with mock.patch.dict(model.published, dict(num_steps=4, last_step=0.3)):

        def flags(**given):
            command = page._command(Request(), model.fill_settings(Settings(**given)))
            return dict(flag.removeprefix("--").split("=") for flag in shlex.split(command)[2:])

        assert flags() == flags(num_steps=4, last_step=0.3) == dict(weights="NAME")
        fewer = flags(num_steps=3, last_step=0.3)  # with which it is no longer filled in
        assert fewer["num_steps"] == "3" and fewer["last_step"] == "0.3"
        assert flags(seed=5) == dict(weights="NAME", seed="5")


def test_pictures_and_what_is_left_empty(page):
    emptied = values(page, seed=None, num_images=None, diffusion="", classes=[])
    answer = page.answer(emptied)
    assert answer.text.startswith("4 images")  # the run's grid has no more
    assert answer.grid.dtype == answer.strip.dtype == np.uint8
    assert answer.strip.shape[1] > answer.strip.shape[0] * 3 / 5 and answer.strip.std() > 10
    assert answer.command == "python sample.py '--workdir=runs/my digits' --num_images=4"


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(classes=["three", "twelve"]), "classes names 'twelve'; expected numbers from 0 to 9"),
        (dict(image_size="9x8"), "image_size is 9x8; expected HxW, both multiples of 2"),
        (dict(image_size="large"), "image_size is 'large'; expected HxW"),
        (dict(num_steps=2.5), "num_steps is 2.5; expected a whole number: at least 1"),
        (dict(num_steps=1001), "num_steps is 1001; expected at most 1000 on this page"),
        (dict(num_images=17), "num_images is 17; expected at most 16 on this page"),
        (dict(guidance=-1), "guidance is -1; expected at least 0"),
        (dict(seed=-1), "seed is -1; expected at least 0"),
        (dict(guidance_interval="1"), "guidance_interval is '1'; expected two times"),
        (dict(diffusion="zero"), "diffusion is 'zero' and the sampler 'euler'"),
        (dict(sampler="neural", num_steps=11), "num_steps is 11; the sampler 'neural' has one of"),
    ],
)
def test_bad_values_are_answered_in_one_line(page, changed, message):
    answer = page.answer(values(page, **changed))
    assert answer.text.startswith(f"error: {message}") and "\n" not in answer.text
    assert answer.grid is answer.strip is None and answer.command == ""


def test_what_is_a_bug_is_not_an_answer(page, monkeypatch):
    monkeypatch.setattr(pages, "_strip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.answer(values(page))


def test_a_strip_shows_the_noise_the_image_and_even_steps_between():
    assert pages.kept_steps(1) == (0, 1)
    assert pages.kept_steps(3) == (0, 1, 2, 3)
    steps = pages.kept_steps(250)
    assert len(steps) == 8 and steps[0] == 0 and steps[-1] == 250
