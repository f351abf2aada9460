"""Where kernels for NVIDIA GPUs can run: one rule, for this project's and for cuDNN's."""

from types import SimpleNamespace

import jax
import pytest

from pallas_kernels.deformable_conv.api import why_not_pallas
from pallas_kernels.devices import why_no_nvidia_kernels


def fake_device(*, platform="gpu", version="cuda 13000", capability="9.0"):
    return SimpleNamespace(
        platform=platform,
        client=SimpleNamespace(platform_version=version),
        compute_capability=capability,
        device_kind="a GPU",
    )


@pytest.mark.parametrize(
    "device, reason",
    [
        (fake_device(), None),
        (fake_device(version="PJRT CUDA 13", capability="8.0"), None),
        (fake_device(capability="7.5"), "8.0 or higher, and a GPU has 7.5"),
        (fake_device(version="rocm 70000"), "needs an NVIDIA GPU"),
        (fake_device(platform="cpu", version="cpu"), "needs an NVIDIA GPU"),
    ],
)
def test_the_default_device_decides(monkeypatch, device, reason):
    monkeypatch.setattr(jax, "devices", lambda *platform: [device])
    for why_not in (why_no_nvidia_kernels, why_not_pallas):
        assert why_not() is None if reason is None else reason in why_not()


def test_a_cpu_that_is_made_the_default_has_none(monkeypatch):
    """Beside a GPU, too: the first device is not asked."""
    cpu = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *platform: [cpu if platform else fake_device()])
    assert why_no_nvidia_kernels() is None
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert "the default device is" in why_no_nvidia_kernels()
