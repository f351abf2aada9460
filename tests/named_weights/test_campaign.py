"""Some of the campaign's transfers; python -m tests.campaign --parts=transfers has all."""

import hashlib

import pytest

from tests.campaign import transfers

# Two of each kind that starts no process of its own.
NUMBERS = (1, 2, 3, 5, 6, 7, 10, 11, 12, 14, 15, 16, 19, 20, 21, 23, 28, 29)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_cache_is_never_wrong(number):
    _, outcome = transfers.case(number)
    assert outcome.startswith(("right", "one line"))


def test_a_cache_that_compares_nothing_would_be_found(monkeypatch):
    """Of the kind `flip`, at the URL whose hash the table has."""
    always = hashlib.sha256(transfers.CONTENT)
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: always)
    with pytest.raises(AssertionError, match="other bytes"):
        transfers.case(16)
