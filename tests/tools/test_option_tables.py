"""The tables of options in the docs."""

import pytest

from flowdcn_jax.errors import UserError
from flowdcn_jax.tools.option_tables import with_tables
from tests import tiny

PAGE = (tiny.REPOSITORY / "docs" / "sampling.md").read_text()


def test_the_docs_have_todays_tables():
    """If not: python -m flowdcn_jax.tools.option_tables"""
    assert with_tables(PAGE) == PAGE
    assert "| `num_steps`: steps from noise to image | at least 1 | config.sampling.num_s" in PAGE


def test_tables_take_the_place_of_older_ones():
    head, row, tail = PAGE.partition("| `num_steps`: steps from noise to image | at least 1 ")
    assert with_tables(f"{head}| `num_steps`: something else {tail}") == PAGE
    with pytest.raises(UserError, match="the page has no lines <!-- options:"):
        with_tables("# A page\n")
