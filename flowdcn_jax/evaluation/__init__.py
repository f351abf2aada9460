"""Evaluation: how far generated images are from real ones, by published protocols.

`evaluate(samples, references, features)` compares two sides, each images or their statistics, that
`open_side` opens and `drawn_images` draws; `load_features` gives the network. docs/evaluation.md
says what figures are.
"""

import importlib

_MODULES = {  # of each name; loaded when it is asked for, since evaluate.py --help needs no JAX
    "Comparison": "comparison",
    "DrawnRequest": "settings",
    "EvaluationError": "settings",
    "FeatureChoice": "settings",
    "Features": "statistics",
    "Figure": "figures",
    "ImageChoice": "settings",
    "ImageSet": "image_sets",
    "Report": "report",
    "Statistics": "statistics",
    "collect": "statistics",
    "drawn_images": "drawing",
    "evaluate": "report",
    "evaluator": "drawing",
    "frechet_distance": "gaussian",
    "kernel_distance": "kernel",
    "load_features": "features",
    "needs_network": "report",
    "open_images": "image_sets",
    "open_side": "reference_files",
    "precision_recall": "neighbours",
    "read_statistics": "reference_files",
    "write_statistics": "reference_files",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
