"""Converts a published feature network to the safetensors that evaluation reads.

    python -m flowdcn_jax.tools.convert_features --network=inception \\
        --source=pt_inception-2015-12-05-6726825d.pth --out=inception.safetensors

PyTorch files need PyTorch, and are read for weights alone: code in them is never run.
"""

from pathlib import Path

from absl import flags

from flowdcn_jax import command

_NETWORK = flags.DEFINE_string("network", None, "inception, dinov2 or efficientnet_lite0.")
_SOURCE = command.define_path("source", "Published weights: .pth or .safetensors.")
_OUT = command.define_path("out", "safetensors file to write.")
flags.mark_flags_as_required(["network", "source", "out"])


def main() -> None:
    command.check_writable(Path(_OUT.value), flag="out")
    import jax

    from flowdcn_jax.evaluation.features.registry import convert

    jax.config.update("jax_platforms", "cpu")  # a file in, a file out
    origin = convert(_NETWORK.value, _SOURCE.value, _OUT.value)
    print(f"{_OUT.value}: {origin['network']} from {origin['file']}, SHA-256 {origin['sha256']}")


if __name__ == "__main__":
    command.run(main)
