"""Makes an EMA of another width after training: EDM2's post-hoc EMA (arXiv 2312.02696).

    python -m flowdcn_jax.tools.reconstruct_ema --workdir=DIR --width=0.08
    python sample.py --workdir=DIR --ema=power_0.08

The run must have saved power-function EMAs of two widths (config.ema.others), in several
checkpoints (config.checkpoint.keep_every_steps). The EMA is written to
DIR/posthoc_emas/power_WIDTH/STEP, whole or not at all, with checksums.
"""

from absl import flags

from flowdcn_jax import command

_WORKDIR = command.define_path("workdir", "Folder of the training run.", required=True)
_WIDTH = flags.DEFINE_float(
    "width", None, "Standard deviation of the profile over the steps done.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to end at; the newest by default.")


def main() -> None:
    import jax
    from tqdm import tqdm

    from flowdcn_jax.runs.posthoc import make_posthoc_ema

    jax.config.update("jax_platforms", "cpu")  # files in, files out
    made = make_posthoc_ema(
        _WORKDIR.value,
        _WIDTH.value,
        step=_STEP.value,
        progress=lambda snapshots: tqdm(snapshots, unit="snapshot", dynamic_ncols=True),
    )
    print(
        f"{made.folder}: {made.name} of step {made.step}, of {made.num_snapshots} snapshots; its "
        f"profile is off by {made.error:.2%}\n"
        f"to sample: python sample.py --workdir={_WORKDIR.value} --ema={made.name}"
    )


if __name__ == "__main__":
    command.run(main)
