"""Kills, faults of the system, damaged files, hostile inputs, bad transfers, long runs:

    python -m tests.campaign --out=FOLDER [--share=0.1] [--parts=kills,damage]

--share takes that part of each count. Stopped at any moment, the same command goes on. Writes
results.jsonl, a line a case, and summary.json and summary.md, which docs/reliability.md explains.
On Linux, with a C compiler for the faults of the system.
"""

import os
import sys
from pathlib import Path

from absl import app, flags

PARTS = ("hostile", "damage", "transfers", "system", "kills", "pairs", "steps")
COUNTS = dict(
    hostile=3000, damage=300, transfers=200, system=300, kills=800, pairs=200, steps=100_000
)

_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_SHARE = flags.DEFINE_float("share", 1.0, "Of the counts.", 0, 1)
_PARTS = flags.DEFINE_list("parts", list(PARTS), "Which of them.")


def main(argv: list[str]) -> None:
    del argv
    from flowdcn_jax import faults
    from tests.campaign import damage, hostile, kills, results, steps, system, transfers

    faults.hush()  # as all commands do
    runners = {
        "hostile": hostile.case,
        "damage": damage.case,
        "transfers": transfers.case,
        "system": system.case,
        "kills": kills.case,
        "pairs": kills.pair_case,
        "steps": steps.run,
    }
    found = results.Results(Path(_OUT.value).absolute())
    os.environ["FLOWDCN_CAMPAIGN"] = str(found.folder)
    if "system" in _PARTS.value:
        system.preload()
    for part in _PARTS.value:
        count = max(1, round(_SHARE.value * COUNTS[part]))
        if part == "steps":
            found.run(part, 1, lambda number, count=count: steps.run(found.folder, count))
        else:
            found.run(part, count, runners[part])
        found.write()
    print((found.folder / "summary.md").read_text())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main, [sys.argv[0], *sys.argv[1:]])
