"""What JAX's default device can run."""

import jax

MIN_COMPUTE_CAPABILITY = 8.0  # Ampere: the first with bfloat16, and with the kernels' instructions


def why_no_nvidia_kernels() -> str | None:
    """Why kernels for NVIDIA GPUs can't run on JAX's default device; None if they can."""
    device = _default_device()
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return f"it needs an NVIDIA GPU, and the default device is {device}"
    if float(device.compute_capability) < MIN_COMPUTE_CAPABILITY:
        return (
            f"it needs compute capability {MIN_COMPUTE_CAPABILITY} or higher, and "
            f"{device.device_kind} has {device.compute_capability}"
        )
    return None


def is_hopper() -> bool:
    """Whether JAX's default device is an NVIDIA GPU of compute capability 9, such as an H100."""
    if why_no_nvidia_kernels():
        return False
    return int(float(_default_device().compute_capability)) == 9


def _default_device():
    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device  # a platform
