"""What memory programs take of each device."""

from collections.abc import Iterable

import jax


def program_bytes(program: jax.stages.Compiled) -> int:
    """Arguments, results and temporary buffers of a device, as XLA assigned them.

    Results in the place of donated arguments count once.
    """
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def process_peak_bytes(devices: Iterable[jax.Device]) -> int | None:
    """The most that a device has held since the process started; None where JAX cannot tell."""
    stats = [device.memory_stats() or {} for device in devices]
    return max((each["peak_bytes_in_use"] for each in stats if each), default=None)
