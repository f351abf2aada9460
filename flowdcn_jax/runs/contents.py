"""What a folder is for, as its content tells: nothing is written into one that is for other things.

a training run      checkpoints/, metrics.jsonl
images              samples.npz, shards/, settings.json, compare_KIND.png
prepared data       a folder a data set
"""

from pathlib import Path

from flowdcn_jax.errors import UserError
from flowdcn_jax.faults import shown

RUN = "a training run"
IMAGES = "images that were drawn"
DATA = "prepared data"

_SIGNS = {
    RUN: ("checkpoints", "metrics.jsonl"),
    IMAGES: ("samples.npz", "shards", "settings.json", "compare_*.png"),
    DATA: ("imagenet_latents", "cifar10*", "dataset_info.json", "incomplete.latents.*"),
}


def check_is_for(path: Path, kind: str, *, flag: str, error: type[UserError]) -> None:
    """Refuses a folder that holds something else, and nothing of its kind.

    Args:
        path: need not be there.
        kind: what is to be written to it: RUN, IMAGES or DATA.
        flag: the option that names it, as messages say it.
        error: what is raised.

    Raises:
        error: it names what was found.
    """
    found = {
        each: sorted(file.name for sign in signs for file in path.glob(sign))
        for each, signs in _SIGNS.items()
    }
    if found[kind]:
        return
    for each, names in found.items():
        if names:
            raise error(
                f"{flag}={shown(path)} holds {each} ({shown(names[0])}); expected a new folder, or "
                f"one that holds {kind}"
            )
