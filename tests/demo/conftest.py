"""The run that sampling's tests draw with."""

from tests.sampling.conftest import model, one_device, workdir

__all__ = ["model", "one_device", "workdir"]
