"""What commands check of their flags before any work."""

from pathlib import Path

import pytest
from absl import flags

from flowdcn_jax.command import file_to_write, numbers, write_json
from flowdcn_jax.errors import UserError


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
