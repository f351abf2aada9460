"""What the rows of all tables have in common, declared once; the flags of the study follow from it.

Imports no JAX, so that --help and usage errors come at once.
"""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.study.tables import InData
from flowdcn_jax.errors import UserError
from flowdcn_jax.files import local_path_text
from flowdcn_jax.options import Range, at_least, checked, name_in, option


def _numbers(given: Any) -> tuple[float, ...]:
    """Of a text with commas between them, or of a sequence."""
    return tuple(map(float, given.split(",") if isinstance(given, str) else given))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long rows are trained, and on what they are measured"""

    num_steps: int | None = option(
        None, "training steps of each row", at_least(1), unset="as the table says"
    )
    num_images: int = option(10_000, "samples of a row's figure", at_least(2))
    search_images: int = option(2_000, "samples of each guidance that is tried", at_least(2))
    guidances: tuple[float, ...] = option(
        "1,1.5,2,3",  # as a flag has it; `checked` makes it numbers
        "weights that are tried on each row; the best one draws its samples",
        Range(lambda each: each and min(each) >= 0, lambda: "numbers of at least 0, with commas"),
        parse=_numbers,
    )
    sampling_steps: int = option(50, "Euler steps", at_least(1))
    curve_points: int = option(5, "evaluations in training, evenly spaced; 0: none", at_least(0))
    curve_images: int = option(2_000, "samples of each of them", at_least(2))
    curve_guidance: float = option(2.0, "their guidance", at_least(0))
    features: str = option(
        "efficientnet_lite0",
        "the network that sees the images; inception gives FID",
        name_in("flowdcn_jax.evaluation.features:NETWORKS"),
    )
    weights: Path | None = option(None, "its safetensors file, or the folder that holds it")
    data_dir: str | None = option(
        None,
        "folder of prepared data sets",
        parse=local_path_text,
        unset="$TFDS_DATA_DIR, else that of TFDS",
    )
    draw_batch_size: int = option(500, "images that a device draws at a time", at_least(1))

    def __post_init__(self):
        checked(self)
        for name in ("weights", "data_dir"):  # commands run in the project's folder
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, type(path)(Path(path).absolute()))

    def located(self, value: Any) -> Any:
        """The path of what lies below data_dir; other values as they are.

        Raises:
            UserError: there is no data_dir.
        """
        if not isinstance(value, InData):
            return value
        if self.data_dir is None:
            raise UserError(f"--data_dir is missing; expected the folder that holds {value}")
        return str(Path(self.data_dir) / value)

    def decides(self) -> dict[str, Any]:
        """What figures depend on beside the run's own settings, as JSON takes it."""
        paths = ("num_steps", "weights", "data_dir", "draw_batch_size")
        values = {name: each for name, each in vars(self).items() if name not in paths}
        return values | {"guidances": list(self.guidances)}
