"""Published weights by name: what there is, fetching, where it lies, removing.

    python -m flowdcn_jax.tools.weights list
    python -m flowdcn_jax.tools.weights fetch flowdcn-xl2-256    # and its decoder; converts it
    python -m flowdcn_jax.tools.weights where sd-vae-ft-ema      # prints the path
    python -m flowdcn_jax.tools.weights remove flowdcn-xl2-256

Files come from those who publish them, under their licences. The cache is FLOWDCN_CACHE, by default
in ~/.cache/flowdcn_jax/weights; a hub's files lie in the hub's own (HF_HUB_CACHE). HF_ENDPOINT
names another hub.
"""

from pathlib import Path

from absl import flags

from flowdcn_jax import command, weights_flags
from flowdcn_jax.errors import UserError
from flowdcn_jax.named_weights.table import DECODER, MODEL, TABLE, cache_folder, find

_ACCEPT = flags.DEFINE_bool(
    "accept_change", False, "With fetch: fetch anew, and keep to what the source has now."
)
_obey_offline = weights_flags.define_offline()


def main(action: str = "list", *names: str) -> None:
    _obey_offline()
    if action not in _ACTIONS:
        raise UserError(f"{action!r} is nothing to do; expected one of {', '.join(_ACTIONS)}")
    if (action == "list") == bool(names):
        raise UserError(f"{action} takes {'no' if names else 'the'} name of weights")
    if _ACCEPT.value and action != "fetch":
        raise UserError("--accept_change is given without fetch; expected it there alone")
    for name in names:
        find(name)
    _ACTIONS[action](*names)


def _list() -> None:
    from flowdcn_jax.named_weights import summary

    rows = [("name", "size", "licence", "here", "source", "what")]
    for name, weights in TABLE.items():
        licence = weights.licence or "see source"
        source = weights.files[0].source
        rows.append((name, weights.size, licence, summary(name), source, weights.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(f"cache: {cache_folder()}")


def _fetch(*names: str) -> None:
    for name in names:
        path = _path_of(name, accept_change=_ACCEPT.value)
        if find(name).kind == MODEL:
            _path_of(find(name).decoder)
        print(path)


def _where(*names: str) -> None:
    from flowdcn_jax.named_weights import summary

    for name in names:
        if summary(name) in ("-", "begun"):
            raise UserError(
                f"{name} is not in the cache; python -m flowdcn_jax.tools.weights fetch {name} "
                "brings it"
            )
        print(_path_of(name))


def _remove(*names: str) -> None:
    from flowdcn_jax.named_weights import folder_of, remove

    for name in names:
        if not remove(name):
            raise UserError(f"{name} is not in the cache, {cache_folder()}")
        at_hub = any(file.repo for file in find(name).files)
        stays = "; what the hub's client keeps stays: hf cache rm deletes it" if at_hub else ""
        print(f"removed {folder_of(name)}{stays}")


def _path_of(name: str, *, accept_change: bool = False) -> Path:
    """What is used of a name: a model's workdir, a decoder's folder, a network's file."""
    weights = find(name)
    if weights.kind == DECODER:
        from flowdcn_jax.named_weights import fetch

        return next(iter(fetch(name, accept_change=accept_change).values())).parent
    import jax

    jax.config.update("jax_platforms", "cpu")  # files in, files out
    if weights.kind == MODEL:
        from flowdcn_jax.published_weights import give_back_freed_arrays
        from flowdcn_jax.sampling import named_workdir

        give_back_freed_arrays()
        return named_workdir(name, accept_change=accept_change)
    from flowdcn_jax.evaluation.features import named_features

    return named_features(name, accept_change=accept_change)


_ACTIONS = {"list": _list, "fetch": _fetch, "where": _where, "remove": _remove}


if __name__ == "__main__":
    command.run(main)
