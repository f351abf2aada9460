"""The version, apart from the package's top, which whoever needs it would have to import."""

__version__ = "0.1.0"
