"""What training frameworks and hubs leave around weights: pointers, cache folders, prefixes.

Imports no JAX.
"""

import re
from collections.abc import Iterable
from pathlib import Path

_LFS = b"version https://git-lfs"
# What torch.nn.DataParallel and torch.compile put before names, and in them.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")


def lfs_pointer(path: Path) -> bool:
    """Whether the file is the pointer that Git LFS leaves where a large file should be."""
    with open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """{name without the prefixes of wrappers: name}.

    Raises:
        ValueError: two names are the same without them.
    """
    plain: dict[str, str] = {}
    for name in names:
        bare = _WRAPPERS.sub("", name)
        if bare in plain:
            raise ValueError(f"it holds {bare} twice, as {plain[bare]} and as {name}")
        plain[bare] = name
    return plain


def in_hub_cache(folder: Path) -> Path:
    """The files of a model in Hugging Face's cache, of its folder there; others as they are.

    That is models--OWNER--NAME, with refs/ and snapshots/COMMIT/.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    commits = sorted(path for path in snapshots.iterdir() if path.is_dir())
    return commits[-1] if commits else folder
