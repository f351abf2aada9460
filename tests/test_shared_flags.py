"""What commands check of their flags before any work, and flags of options."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from flowdcn_jax.command import file_to_write, numbers, option_flags, write_json
from flowdcn_jax.errors import UserError
from flowdcn_jax.options import at_least, option
from flowdcn_jax.sampling import sample_to_folder
from tests import tiny


def flag(define, default):
    """A flag named `these` with this value."""
    values = flags.FlagValues()
    holder = define("these", default, "For a test.", flag_values=values)
    values.mark_as_parsed()
    return holder


def test_numbers_of_a_list():
    assert numbers(flag(flags.DEFINE_list, ["256", " 512"])) == [256, 512]
    assert numbers(flag(flags.DEFINE_list, ["0", "2"]), at_least=0) == [0, 2]
    for bad, shown in (("abc", "'abc'"), ("1,0", "'1,0'"), ("-3", "'-3'"), ("", "''")):
        with pytest.raises(UserError, match=f"--these is {shown}; expected numbers of at least 1"):
            numbers(flag(flags.DEFINE_list, bad))


def test_a_file_to_write_is_found_writable_before_the_work(tmp_path):
    assert file_to_write(flag(flags.DEFINE_string, None)) is None
    path = tmp_path / "new" / "report.json"
    assert file_to_write(flag(flags.DEFINE_string, str(path))) == path
    assert list(path.parent.iterdir()) == []  # the folder, and nothing in it
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'
    file_to_write(flag(flags.DEFINE_string, str(path)))  # it is replaced
    for bad, message in (
        (tmp_path, "is a folder; expected a file"),
        (path / "x", "cannot be written"),
        (Path("/proc/x.json"), "cannot be written"),
        (Path("/proc/x/y.json"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=f"--these={bad} {message}"):
            file_to_write(flag(flags.DEFINE_string, str(bad)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    """Options of each type."""

    layers: int = option(2, "coats, one on the other", at_least(1))
    opacity: float | None = option(None, "of a coat", unset="what the colour has")
    dry: bool = option(False, "whether to wait for each coat")
    brush: Path | None = option(None, "its file")
    edges: tuple | None = option(None, "left and right", parse=lambda text: text.split(","))


def parse(*arguments):
    """(the flags, the keywords that they give)"""
    values = flags.FlagValues()
    given = option_flags(Paint, flag_values=values)
    values(["paint", *arguments])
    return values, given()


def test_flags_of_options_give_what_makes_an_instance():
    _, given = parse("--layers=3", "--opacity=0.5", "--dry", "--brush=a/b", "--edges=1,2")
    assert given == dict(layers=3, opacity=0.5, dry=True, brush="a/b", edges="1,2")
    assert parse("--nodry")[1] == parse()[1]
    assert Paint(**parse()[1]) == Paint()


def test_several_values_of_an_option_come_as_a_list():
    values = flags.FlagValues()
    given = option_flags(Paint, several=("opacity", "brush"), flag_values=values)
    values(["paint", "--opacity=0.5, 1"])
    assert (given()["opacity"], given()["brush"]) == ([0.5, 1.0], None)
    text = " ".join(values.get_help().split())
    assert "--brush: its file; several, with commas between them, make a table." in text
    for bad in ("0.5,0.50", "0.5,much", ""):
        with pytest.raises(flags.Error):
            values(["paint", f"--opacity={bad}"])


@pytest.mark.parametrize("bad", ["--layers=2.5", "--opacity=much", "--dry=perhaps", "--layer=1"])
def test_flags_of_options_are_of_their_type(bad):
    with pytest.raises(flags.Error):
        parse(bad)


def test_the_help_of_flags_is_the_options():
    text = parse()[0].get_help()
    assert "--layers: coats, one on the other; at least 1.\n" in text and "(default: '2')" in text
    assert "--opacity: of a coat; by default what the colour has.\n" in text
    assert "--[no]dry: whether to wait for each coat.\n" in text


def test_sample_pys_flags_are_the_keywords_of_its_function():
    """And are defined without JAX, so that a misspelled one is refused at once."""
    code = (
        "import json, sys; from absl import flags; from flowdcn_jax.tools import sample\n"
        "assert 'jax' not in sys.modules\n"
        "of_sample = flags.FLAGS.flags_by_module_dict()[sample.__name__]\n"
        "print(json.dumps({flag.name: flag.default for flag in of_sample}))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tiny.REPOSITORY)
    found = json.loads(output)
    keywords = inspect.signature(sample_to_folder).parameters.values()
    expected = {k.name: k.default for k in keywords if k.kind is k.KEYWORD_ONLY}
    several_processes = ("distributed", "coordinator_address", "num_processes", "process_id")
    for name in ("workdir", "weights", "offline", "compilation_cache", *several_processes):
        del found[name]
    assert found == expected
