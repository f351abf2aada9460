"""Configurations: default.py holds every key; the others are short overrides of it."""
