"""From a training run to pictures: what sample.py, the grids in training and Python users share."""

import importlib

_MODULES = {  # of each name; loaded when it is asked for, since sample.py --help needs no JAX
    "ModelChoice": "settings",
    "Output": "settings",
    "Request": "settings",
    "SamplingError": "settings",
    "Settings": "settings",
    "TrainedModel": "trained_model",
    "count_evaluations": "generator",
    "fill_settings": "generator",
    "generate": "drawing",
    "generate_images": "generator",
    "grid_drawer": "generator",
    "labels_in_turn": "classes",
    "load_model": "trained_model",
    "load_trained": "trained_model",
    "make_generator": "generator",
    "named_workdir": "named_model",
    "decoder_folder": "named_model",
    "sample_to_folder": "drawing",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
