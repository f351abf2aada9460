"""Proof of dependability that takes longer than a test may: see `tests.campaign.__main__`."""
