"""Compares images with others: python evaluate.py --samples=X.npz --reference=STATS.npz --weights=W

Either side is an .npz file of images (arr_0: uint8 NHWC), a folder of images or of such files, a
data set, or statistics (ADM's reference batches, or what flowdcn_jax.tools.reference_stats writes).
Prints FID, sFID, Inception score, precision, recall and KID; with --features=dinov2 FD-DINOv2,
precision and recall; --out=FILE.json keeps all that decides them.  Several hosts: as train.py, with
--distributed.
"""

from absl import flags

from flowdcn_jax import command, evaluation_flags

_SAMPLES = flags.DEFINE_string("samples", None, "Generated images.", required=True)
_REFERENCE = flags.DEFINE_string("reference", None, "Real images, or statistics.", required=True)
_OUT = command.define_path(
    "out",
    "FILE.json to write; both sides' numbers go beside it, as FILE.samples.npz and so on.",
)
evaluation_flags.define_flags()
command.define_distributed_flags()


def main() -> None:
    command.join_processes()
    out = command.file_to_write(_OUT)
    # Imported here so that --help and usage errors come at once.
    import jax

    from flowdcn_jax.evaluation import evaluate, needs_network, open_side

    samples = open_side(_SAMPLES.value)
    reference = open_side(_REFERENCE.value, **evaluation_flags.image_options())
    needed = needs_network(samples) or needs_network(reference)
    report = evaluate(samples, reference, evaluation_flags.load_network() if needed else None)
    if jax.process_index() == 0:
        print(report.table())
        if out is not None:
            report.write(out)


if __name__ == "__main__":
    command.run(main)
