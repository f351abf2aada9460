"""What JAX's default device can run."""

import jax

MIN_COMPUTE_CAPABILITY = 8.0  # Ampere: the first with bfloat16, and with the kernels' instructions


def why_no_nvidia_kernels() -> str | None:
    """Why kernels for NVIDIA GPUs can't run on JAX's default device; None if they can."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):  # a platform
        device = jax.devices(device)[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return f"it needs an NVIDIA GPU, and the default device is {device}"
    if float(device.compute_capability) < MIN_COMPUTE_CAPABILITY:
        return (
            f"it needs compute capability {MIN_COMPUTE_CAPABILITY} or higher, and "
            f"{device.device_kind} has {device.compute_capability}"
        )
    return None
