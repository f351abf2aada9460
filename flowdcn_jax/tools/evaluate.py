"""Compares images with others: python evaluate.py --samples=X.npz --reference=STATS.npz --weights=W

Either side is an .npz file of images (arr_0: uint8 NHWC), a folder of images or of such files, a
data set, or statistics (ADM's reference batches, or what flowdcn_jax.tools.reference_stats writes).
--samples=WORKDIR draws with a trained model while it measures, with sample.py's options; several
values of --guidance, --num_steps, --ema or --step make a table:

    python evaluate.py --samples=runs/xl2 --guidance=1,1.25,1.5,2 --reference=imagenet256.npz ...

Prints FID, sFID, Inception score, precision, recall and KID; with --features=dinov2 FD-DINOv2,
precision and recall; --out=FILE.json keeps all that decides them, and of a table a plot. Several
hosts: as train.py, with --distributed.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from flowdcn_jax import command, weights_flags
from flowdcn_jax.evaluation.settings import (
    DrawnRequest,
    EvaluationError,
    FeatureChoice,
    ImageChoice,
)
from flowdcn_jax.options import instance_of, options_of
from flowdcn_jax.sampling.settings import ModelChoice, Settings

_SEVERAL = ("step", "ema", "num_steps", "guidance")  # make a table; the first change least often

_SAMPLES = flags.DEFINE_string("samples", None, "Generated images, or a workdir.", required=True)
_REFERENCE = flags.DEFINE_string("reference", None, "Real images, or statistics.", required=True)
_OUT = command.define_path(
    "out",
    "FILE.json to write; both sides' numbers go beside it, as FILE.samples.npz and so on.",
)
_KEEP = flags.DEFINE_bool(
    "keep_samples", False, "Draw to the folder in WORKDIR/samples that sample.py would, first."
)
_DRAWING = (DrawnRequest, Settings, ModelChoice)
_OPTIONS = command.option_flags(FeatureChoice, ImageChoice, *_DRAWING, several=_SEVERAL)
_obey_offline = weights_flags.define_offline()
command.define_device_flags()


def main() -> None:
    _obey_offline()
    command.use_devices()
    out = command.file_to_write(_OUT)
    values = _OPTIONS()
    # Imported here so that --help and usage errors come at once.
    from flowdcn_jax.evaluation import Comparison, evaluate, needs_network, open_side
    from flowdcn_jax.runs.checkpoint import FOLDER
    from flowdcn_jax.runs.processes import in_first_process

    drawn = (Path(_SAMPLES.value).expanduser() / FOLDER).is_dir()
    if drawn:
        rows = _draw(_variants(values), values)
    else:
        _check_nothing_is_drawn(values)
        samples = open_side(_SAMPLES.value)
        rows = [({}, samples)]
    reference = open_side(_REFERENCE.value, **vars(instance_of(ImageChoice, values)))
    needed = drawn or needs_network(samples) or needs_network(reference)
    features = instance_of(FeatureChoice, values).load() if needed else None
    comparison = Comparison(out)
    for varied, samples in rows:
        title = ", ".join(["samples", *(f"{name} {value}" for name, value in varied.items())])
        report = evaluate(samples, reference, features, title=title)
        reference = report.references  # read once
        if varied:
            in_first_process(functools.partial(comparison.add, varied, report))

    def finish() -> None:
        print((comparison if comparison.rows else report).table())
        if out is not None and not comparison.rows:
            report.write(out)

    in_first_process(finish)


def _check_nothing_is_drawn(values: dict[str, Any]) -> None:
    """Raises EvaluationError at the first option of drawing that is given."""
    given = values | {_KEEP.name: _KEEP.value}
    unset = {name: each.default for cls in _DRAWING for name, each in options_of(cls).items()}
    for name, default in (unset | {_KEEP.name: False}).items():
        if given[name] != default:
            raise EvaluationError(
                f"--{name} is given, and --samples={_SAMPLES.value} holds no checkpoints to draw "
                "from; expected a workdir, or no such option"
            )


Variant = tuple[dict[str, Any], ModelChoice, Settings]  # first what makes it differ from others


def _variants(values: dict[str, Any]) -> list[Variant]:
    """A variant for each combination of values, found good before any work.

    Raises:
        flowdcn_jax.errors.UserError: a value that the run cannot serve.
    """
    from flowdcn_jax.sampling import load_trained

    request = instance_of(DrawnRequest, values)
    lists = {name: values[name] or [None] for name in _SEVERAL}
    varied = [name for name, several in lists.items() if len(several) > 1]
    variants = []
    for chosen in itertools.product(*lists.values()):
        given = values | dict(zip(lists, chosen, strict=True))
        choice, settings = instance_of(ModelChoice, given), instance_of(Settings, given)
        model = load_trained(_SAMPLES.value, **vars(choice))  # its config; no weights yet
        model.labels(request, seed=model.fill_settings(settings).seed)
        variants.append(({name: given[name] for name in varied}, choice, settings))
    return variants


def _draw(variants: list[Variant], values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """(what makes it differ, images) of each variant; one model's weights at a time."""
    import jax

    from flowdcn_jax.evaluation import drawn_images, open_images
    from flowdcn_jax.runs.sharding import make_mesh
    from flowdcn_jax.sampling import load_trained, sample_to_folder

    request = instance_of(DrawnRequest, values)
    mesh = None if _KEEP.value else make_mesh(devices=jax.local_devices())
    for choice, group in itertools.groupby(variants, key=lambda variant: variant[1]):
        model = load_trained(_SAMPLES.value, mesh=mesh, **vars(choice))
        for varied, _, settings in group:
            if _KEEP.value:
                grid = sample_to_folder(model, **vars(request), **vars(settings))
                yield varied, open_images(str(grid.parent))
            else:
                yield varied, drawn_images(model, request, settings)


if __name__ == "__main__":
    command.run(main)
