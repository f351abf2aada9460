"""The tables of options in docs/."""

import pytest

from tests import doc_tables


@pytest.mark.parametrize("name", doc_tables.PAGES)
def test_the_docs_have_todays_tables(name):
    """If not: python -m tests.doc_tables"""
    page = (doc_tables.ROOT / name).read_text()
    assert doc_tables.with_tables(page, doc_tables.PAGES[name]) == page


def test_tables_take_the_place_of_older_ones():
    name = "docs/sampling.md"
    page = (doc_tables.ROOT / name).read_text()
    head, row, tail = page.partition("| `num_steps`: steps from noise to image | at least 1 ")
    assert row
    older = f"{head}| `num_steps`: something else {tail}"
    assert doc_tables.with_tables(older, doc_tables.PAGES[name]) == page
