"""The run that sampling's tests draw with."""

from tests.sampling.conftest import one_device, workdir

__all__ = ["one_device", "workdir"]
