"""How large the kernels' arrays may be."""

from collections.abc import Iterable

MAX_ELEMENTS = 2**31 - 1  # indices are int32


def check_indexable(name: str, arrays: Iterable) -> None:
    """Raises ValueError if one of the arrays of kernel `name` has more elements than indices."""
    for array in arrays:
        if array.size > MAX_ELEMENTS:
            raise ValueError(
                f"{name}: an array of shape {array.shape} has {array.size} elements; expected at "
                f"most {MAX_ELEMENTS}. Split the batch, or take implementation='xla'"
            )
